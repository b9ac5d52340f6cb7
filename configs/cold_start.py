"""Cold start: one epoch of plain supervised fine-tuning, so that the model answers "+" or "-".

    python run.py --config=configs/cold_start.py                  embedded
    python run.py --config=configs/cold_start.py:internvl3_1b --config.train.path=... --config.train.images=...

Paper: 20k rows, one epoch, learning rate 5e-5. Its workdir is what `model.checkpoint` of a later run takes.
"""

from configs import base


def get_config(arguments: str = ""):
    """The record of the experiment; see the module's docstring."""
    chosen = base.split_arguments(arguments, base.TRAINING_ARGUMENTS)
    cfg = base.get_config()
    if "scale" in chosen:
        base.paper_scale(cfg, chosen.get("recipe", "paper"))
        cfg.cold_start.num_steps = 20_000
    else:
        base.embedded_scale(cfg, chosen.get("recipe", "corrected"))
    cfg.num_steps = 0
    return cfg.lock()
