"""Step scores of chains, one JSON line per chain.

    python run.py --config=configs/score.py --config.model.checkpoint=DIR \\
        --config.input.path=chains.json --config.input.images=DIR --config.output=scores.jsonl

12 tiles at most, as at test time in the published code.
"""

from configs import base


def get_config(arguments: str = ""):
    """The record of the task; takes no arguments."""
    base.split_arguments(arguments, {})
    cfg = base.get_config()
    cfg.task = "score"
    cfg.images.max_tiles = 12
    cfg.batch_size = 8
    return cfg.lock()
