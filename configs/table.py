"""DreamPRM-1.5, Instance Table: one learned weight per training instance.

    python run.py --config=configs/table.py                       embedded: 2 CPU cores, minutes
    python run.py --config=configs/table.py:internvl3_1b \\
        --config.train.path=... --config.train.images=... --config.meta.path=... --config.meta.images=...

Paper: arXiv 2509.05542, 12k instances, 100k iterations, 72 h on one A100 80 GB with the published code;
MMMU 84.6 (GPT-5-mini alone: 80.0). Arguments: internvl3_1b (scale), paper | corrected (recipe).
"""

from configs import base


def get_config(arguments: str = ""):
    """The record of the experiment; see the module's docstring."""
    chosen = base.split_arguments(arguments, base.TRAINING_ARGUMENTS)
    cfg = base.get_config()
    cfg.weighting.name = "table"
    if "scale" in chosen:
        base.paper_scale(cfg, chosen.get("recipe", "paper"))
    else:
        base.embedded_scale(cfg, chosen.get("recipe", "corrected"))
    return cfg.lock()
