"""Cold start: one epoch of plain supervised fine-tuning, so that the model answers "+" or "-".

    python run.py --config=configs/cold_start.py                  embedded
    python run.py --config=configs/cold_start.py:internvl3_1b --config.train.path=... --config.train.images=...

Paper: 20k rows, one epoch, learning rate 5e-5. Arguments: internvl3_1b (scale), published | paper | corrected
(recipe). Its workdir is what `model.checkpoint` of a later run takes.
"""

from configs import base


def get_config(arguments: str = ""):
    """The record of the experiment; see the module's docstring."""
    cfg, embedded = base.training_config(arguments)
    if not embedded:
        cfg.cold_start.num_steps = 20_000 // cfg.batch_size
        cfg.cold_start.batch_size = cfg.batch_size
    cfg.num_steps = 0
    return cfg.lock()
