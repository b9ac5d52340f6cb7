"""A trained process reward model -> a directory that others load: safetensors, tokenizer, model card, weights.

    python run.py --config=configs/export.py --config.model.checkpoint=runs/table --workdir=exports/table
    python run.py --config=configs/export.py --config.model.checkpoint=runs/table --workdir=exports/table-original \\
        --config.export.layout=original --config.export.dtype=float32
    python run.py --config=configs/export.py --config.model.checkpoint=runs/table-internvl3_1b --workdir=exports/1b \\
        --config.export.license=apache-2.0 --config.export.repo=ORG/NAME

The directory is written beside its place and renamed, so that it is whole or not there; one that an earlier export
wrote is replaced, any other is refused. 12 tiles at most in preprocessor_config.json, as at test time in the published
code (--config.images.max_tiles). On CPU cores alone; docs/export.md has the files.
"""

from configs import base


def get_config(arguments: str = ""):
    """The record of the task; takes no arguments."""
    base.split_arguments(arguments, {})
    cfg = base.get_config()
    cfg.task = "export"
    cfg.images.max_tiles = 12
    return cfg.lock()
