"""No selection: the same data, the same budget, every instance at weight 1.

    python run.py --config=configs/uniform.py                     embedded: 2 CPU cores, minutes
    python run.py --config=configs/uniform.py:internvl3_1b --config.train.path=... --config.train.images=...

Paper: arXiv 2509.05542, Table 1, "No Selection": MMMU 79.1 (GPT-5-mini alone: 80.0).
Arguments: internvl3_1b (scale), published | paper | corrected (recipe).
"""

from configs import base


def get_config(arguments: str = ""):
    """The record of the experiment; see the module's docstring."""
    cfg, _ = base.training_config(arguments)
    cfg.weighting.name = "uniform"
    return cfg.lock()
