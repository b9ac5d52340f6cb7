"""InternVL: the model as pure functions. The only room that knows flax."""

from dreamprm_jax.models.internvl import apply, encode_images, head, init, step_hidden_states
from dreamprm_jax.models.presets import PRESETS, InternVLConfig, LanguageConfig, VisionConfig

__all__ = [
    "PRESETS",
    "InternVLConfig",
    "LanguageConfig",
    "VisionConfig",
    "apply",
    "encode_images",
    "head",
    "init",
    "step_hidden_states",
]
