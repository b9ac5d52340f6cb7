"""Raw files of a public data set -> a TFDS data set of ArrayRecord shards, in OUTPUT/BUILDER/VERSION.

    python run.py --config=configs/prepare.py:visualprm400k --config.prepare.source=VisualPRM400K/annotations \\
        --config.prepare.images=VisualPRM400K --config.prepare.output=DATA \\
        --config.prepare.sample=12000 --config.prepare.balance=source_outcome --config.prepare.exclude=DATA/mmmu/1.0.0
    python run.py --config=configs/prepare.py:mmmu_pro --config.prepare.source='MMMU_Pro/standard (4 options)' \\
        --config.prepare.responses=responses.jsonl --config.prepare.output=DATA --config.prepare.exclude=DATA/mmmu/1.0.0
    python run.py --config=configs/prepare.py:mmmu --config.prepare.source='MMMU/*/validation-*.parquet' \\
        --config.prepare.output=DATA
    python run.py --config=configs/prepare.py:visualprocessbench --config.prepare.source=test.jsonl ...

Arguments: the builder, and `published` for the published code's step splitter. Rows that cannot be used are skipped and
listed. On CPU cores alone; a killed command goes on where it was, and the set is the same to the byte.
"""

from configs import base


def get_config(arguments: str = ""):
    """The record of the task; its arguments are the builder and the recipe."""
    chosen = base.split_arguments(arguments, {"builder": base.BUILDERS, "recipe": ("published",)})
    if "builder" not in chosen:
        raise ValueError(
            f"configs/prepare.py needs a builder: configs/prepare.py:{base.BUILDERS[0]}, or another of "
            f"{', '.join(base.BUILDERS[1:])}"
        )
    cfg = base.get_config()
    cfg.task = "prepare"
    cfg.prepare.builder = chosen["builder"]
    cfg.data.on_error = "skip"  # of hundreds of thousands of rows a few are always bad; dropped.jsonl has each
    if "recipe" in chosen:
        cfg.recipe = cfg.prepare.splitter = chosen["recipe"]
    return cfg.lock()
