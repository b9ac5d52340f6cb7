"""Model sizes, and how a model is computed.

The InternVL3 family has two kinds of vision tower and two kinds of language model. Implemented here:
InternViT-300M with Qwen2.5, which is 1B, 2B, 8B and 14B. Not implemented: 38B and 78B (InternViT-6B: queries
and keys normalised, RMSNorm) and 9B (InternLM3); reading such a config.json is an `InputError` that names the
field and its value.
"""

from __future__ import annotations

import dataclasses

from jax.sharding import Mesh

from dreamprm_jax.errors import InputError

# Mean and standard deviation of the red, green and blue channel in [0, 1]: what InternViT was trained with.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

REMAT_POLICIES = ("none", "full", "dots")
COMPUTE_DTYPES = ("float32", "bfloat16")
ATTENTIONS = ("xla", "cudnn")
LAYOUTS = ("original", "hf")


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """InternViT. Sizes are of one tower; defaults are InternViT-300M-448px."""

    width: int = 1024  # D
    num_layers: int = 24  # L
    num_heads: int = 16  # N
    mlp_width: int = 4096  # F
    patch_size: int = 14  # pixels
    image_size: int = 448  # pixels: height and width of a tile
    layer_norm_eps: float = 1e-6
    layer_scale_init: float = 0.1  # initial factor of every residual branch (a checkpoint brings its own)

    @property
    def grid(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size


@dataclasses.dataclass(frozen=True)
class LanguageConfig:
    """Qwen2. Defaults are Qwen2.5-0.5B with InternVL3's vocabulary."""

    vocab_size: int = 151_674  # V
    width: int = 896  # D
    num_layers: int = 24  # L
    num_heads: int = 14  # N, of the queries
    num_kv_heads: int = 2  # K, of the keys and values: each serves N / K query heads
    mlp_width: int = 4864  # F
    rope_theta: float = 1e6  # base of the rotary wavelengths
    rms_norm_eps: float = 1e-6
    max_positions: int = 32_768  # tokens: the model's context; longer rows must be refused
    tie_embeddings: bool = False  # the head is the embedding: there is no lm_head parameter


@dataclasses.dataclass(frozen=True)
class InternVLConfig:
    """The whole model, and how it is computed. Hashable, so that it can be a static argument of `jax.jit`."""

    vision: VisionConfig = VisionConfig()
    language: LanguageConfig = LanguageConfig()
    downsample_ratio: float = 0.5  # pixel shuffle: the side of the patch grid times this
    compute_dtype: str = "float32"  # float32 | bfloat16: of activations and products; parameters stay float32
    # What the backward pass recomputes: none | full (a whole layer) | dots (all but projections and fused attention)
    remat: str = "none"
    attention: str = "xla"  # xla | cudnn: cudnn is fused (GPU, bfloat16) but has no forward mode (jax.jvp)
    scan_unroll: int = 1  # layers per turn of the loop over layers: more compiles longer and may run faster
    mesh: Mesh | None = None  # of the devices that share the computation (sharding.py); None: one device

    def __post_init__(self) -> None:
        _check_choice("compute_dtype", self.compute_dtype, COMPUTE_DTYPES)
        _check_choice("remat", self.remat, REMAT_POLICIES)
        _check_choice("attention", self.attention, ATTENTIONS)
        _check_sizes(self)

    @property
    def shuffle_factor(self) -> int:
        """Side of the square of patches that becomes one image token."""
        return round(1 / self.downsample_ratio)

    @property
    def image_tokens_per_tile(self) -> int:
        """I: 256 for a tile of 448 pixels."""
        return (self.vision.grid // self.shuffle_factor) ** 2


def _check_choice(field: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise InputError(f"model config: {field} is {value!r}; choose one of {', '.join(map(str, choices))}")


def _check_sizes(config: InternVLConfig) -> None:
    """Every division that the model takes for granted."""
    vision, language = config.vision, config.language
    if abs(config.shuffle_factor * config.downsample_ratio - 1) > 1e-6:
        raise InputError(
            f"model config: downsample_ratio is {config.downsample_ratio}; it must be 1 / (a whole number)"
        )
    for what, whole, part in (
        ("vision.width by vision.num_heads", vision.width, vision.num_heads),
        ("vision.image_size by vision.patch_size", vision.image_size, vision.patch_size),
        ("the side of the patch grid by 1 / downsample_ratio", vision.grid, config.shuffle_factor),
        ("language.width by language.num_heads", language.width, language.num_heads),
        ("language.num_heads by language.num_kv_heads", language.num_heads, language.num_kv_heads),
        ("the head width of the language model by 2 (rotary pairs)", language.width // language.num_heads, 2),
    ):
        if whole % part:
            raise InputError(f"model config: cannot divide {what}: {whole} is not a multiple of {part}")


def tiny(vocab_size: int) -> InternVLConfig:
    """A model that trains from scratch on a CPU in minutes; the vocabulary is its tokenizer's.

    28-pixel tiles in 2 x 2 patches, shuffled to I = 1 image token. With one token there is nothing to find among image
    tokens, only something to read off: with four, learning where to look took most of a training run.
    """
    return InternVLConfig(
        vision=VisionConfig(
            width=32, num_layers=1, num_heads=2, mlp_width=64, patch_size=14, image_size=28, layer_scale_init=1.0
        ),
        language=LanguageConfig(
            vocab_size=vocab_size,
            width=64,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            mlp_width=128,
            rope_theta=1e4,
            max_positions=1024,
        ),
        scan_unroll=2,
    )


PRESETS: dict[str, InternVLConfig] = {
    "tiny": tiny(vocab_size=256),
    "internvl3_1b": InternVLConfig(),
    "internvl3_2b": InternVLConfig(
        language=LanguageConfig(width=1536, num_layers=28, num_heads=12, num_kv_heads=2, mlp_width=8960)
    ),
    "internvl3_8b": InternVLConfig(
        language=LanguageConfig(width=3584, num_layers=28, num_heads=28, num_kv_heads=4, mlp_width=18_944)
    ),
    "internvl3_14b": InternVLConfig(
        language=LanguageConfig(
            width=5120, num_layers=48, num_heads=40, num_kv_heads=8, mlp_width=13_824, rms_norm_eps=1e-5
        )
    ),
}
"""Sizes of the family, without weights. A checkpoint's own config.json overrides all of this."""
