"""DreamPRM-1.5, Instance Table: one learned weight per training instance.

    python run.py --config=configs/table.py                       embedded: 2 CPU cores, minutes
    python run.py --config=configs/table.py:internvl3_1b \\
        --config.train.path=... --config.train.images=... --config.meta.path=... --config.meta.images=...

Paper: arXiv 2509.05542, 12k instances, 100k iterations, 72 h on one A100 80 GB with the published code;
MMMU 84.6 (GPT-5-mini alone: 80.0). Arguments: internvl3_1b (scale), published | paper | corrected (recipe).
"""

from configs import base


def get_config(arguments: str = ""):
    """The record of the experiment; see the module's docstring."""
    cfg, _ = base.training_config(arguments)
    cfg.weighting.name = "table"
    return cfg.lock()
