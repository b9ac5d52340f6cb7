"""DreamPRM (arXiv 2505.20241): one weight per source of the training data, learned through 5 inner steps.

    python run.py --config=configs/domain.py                      embedded: 2 CPU cores, minutes
    python run.py --config=configs/domain.py:internvl3_1b \\
        --config.train.path=... --config.train.images=... --config.meta.path=... --config.meta.images=...

Every training row names its source in "dataset". Paper: +4 points on five benchmarks, weights from 0.55 to 1.49.
The meta loss is DreamPRM's own: squared error of the sigmoid of the mean log-odds against the answer's correctness.
Arguments: internvl3_1b (scale), published | paper | corrected (recipe).
"""

from configs import base


def get_config(arguments: str = ""):
    """The record of the experiment; see the module's docstring."""
    cfg, embedded = base.training_config(arguments)
    cfg.weighting.name = "domain"
    cfg.aggregate, cfg.meta_target, cfg.meta_loss = "mean_log_odds", "plus", "mse"
    cfg.num_inner_steps = 5
    if cfg.recipe == "corrected":
        cfg.outer.optimizer = "adamw"
        cfg.outer.lr = 0.05 if embedded else 5e-3
    cfg.num_steps //= cfg.num_inner_steps  # the same number of inner steps
    return cfg.lock()
