"""DreamPRM-1.5, Instance Net: a small MLP predicts each training instance's weight.

    python run.py --config=configs/net.py                         embedded: 2 CPU cores, minutes
    python run.py --config=configs/net.py:internvl3_1b \\
        --config.train.path=... --config.train.images=... --config.meta.path=... --config.meta.images=...

Paper: arXiv 2509.05542, 100k instances, 100k iterations, 72 h on one A100 80 GB with the published code;
MMMU 83.6 (GPT-5-mini alone: 80.0). Arguments: internvl3_1b (scale), published | paper | corrected (recipe).
"""

from configs import base


def get_config(arguments: str = ""):
    """The record of the experiment; see the module's docstring."""
    cfg, embedded = base.training_config(arguments)
    cfg.weighting.name = "net"
    cfg.weighting.activation = "sigmoid"
    if cfg.recipe == "published":  # the released code, not the text: 1e-4, decay 0.05, 5 tiles, features not detached
        cfg.weighting.features = ("label_probs",)
        cfg.weighting.detached = cfg.weighting.zero_output = False
        cfg.outer.lr = 1e-4
        cfg.inner.weight_decay = 0.05
        cfg.images.max_tiles = 1 if embedded else 5
    elif cfg.recipe == "paper":
        cfg.weighting.features = ("hidden",)
        cfg.outer.lr = 5e-4
    else:
        # What a row's loss is beside those of its label: how sure the model is of either label says nothing of the row.
        cfg.weighting.features = ("relative_loss", "relative_prob", "label")
        cfg.weighting.steps = "up_to_first_minus"
        cfg.outer.optimizer = "adamw"
        cfg.outer.lr = 0.01 if embedded else 5e-4
        cfg.outer.schedule = "cosine"  # a net's few parameters swing at a constant rate
        cfg.outer.clip_norm = 1.0  # its size varies by orders of magnitude over a run
    return cfg.lock()
