"""The embedded benchmark at a size that trains in seconds, as a config file."""

from configs import table

SIZES = {
    "pretrain": 16, "cold_start": 16, "clean": 8, "flipped": 8, "always_plus": 4, "trivial": 4, "shifted": 0,
    "meta_questions": 4, "test_questions": 6,
}  # fmt: skip


def get_config():
    return small(table.get_config())


def small(cfg):
    cfg.noisy_steps.update({name: size for name, size in SIZES.items() if name in cfg.noisy_steps})
    cfg.pretrain.num_steps, cfg.cold_start.num_steps, cfg.num_steps, cfg.checkpoint_every = 1, 2, 7, 2
    cfg.batch_size = cfg.meta_batch_size = cfg.cold_start.batch_size = cfg.pretrain.batch_size = 4
    cfg.log_meta_grad, cfg.inner.clip_norm = True, 5.0  # a clip that the cold start does not have
    return cfg
