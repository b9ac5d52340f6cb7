"""A checkpoint's config.json, read and written in both layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dreamprm_jax.documents import read_json
from dreamprm_jax.errors import InputError
from dreamprm_jax.models.presets import InternVLConfig, LanguageConfig, VisionConfig

LAYOUTS = ("original", "hf")

_MAX_LAYERS, _MAX_NUMBER, _MIN_NUMBER = 1000, 2**31 - 1, 1e-12
"""Beyond any model: names are made for every layer before a tensor is looked at, and no float may overflow."""
_SHOWN = 80  # characters of a value in a message

# Fields with one supported value: (field, the value that is implemented, what an absent field means).
_ORIGINAL_REQUIRES = (
    ("ps_version", "v2", "v1"),
    ("select_layer", -1, -1),
    ("pad2square", False, False),
    ("use_backbone_lora", 0, 0),
    ("use_llm_lora", 0, 0),
    ("vision_config.qk_normalization", False, True),
    ("vision_config.norm_type", "layer_norm", "rms_norm"),
    ("vision_config.hidden_act", "gelu", "gelu"),
    ("vision_config.qkv_bias", True, False),
    ("vision_config.num_channels", 3, 3),
    ("vision_config.use_moe", False, False),
)
_HF_REQUIRES = (
    ("vision_feature_layer", -1, -1),
    ("vision_feature_select_strategy", "default", "default"),
    ("projector_hidden_act", "gelu", "gelu"),
    ("vision_config.use_qk_norm", False, False),
    ("vision_config.norm_type", "layer_norm", "layer_norm"),
    ("vision_config.hidden_act", "gelu", "gelu"),
    ("vision_config.attention_bias", True, False),
    ("vision_config.num_channels", 3, 3),
    ("vision_config.use_mask_token", False, False),
    ("vision_config.use_absolute_position_embeddings", True, True),
    ("vision_config.use_mean_pooling", True, True),
)
_TEXT_REQUIRES = (
    ("model_type", "qwen2", "qwen2"),
    ("hidden_act", "silu", "silu"),
    ("use_sliding_window", False, False),
)


class _Reader:
    """The fields of one config.json, by dotted name; every complaint carries file, field and value."""

    def __init__(self, path: Path, root: dict[str, Any]):
        self.path, self.root = path, root

    def find(self, field: str, default: Any = None) -> Any:
        value: Any = self.root
        for part in field.split("."):
            if not isinstance(value, dict) or part not in value:
                return default
            value = value[part]
        return value

    def refuse(self, field: str, value: object, why: str) -> InputError:
        text = json.dumps(value)
        text = text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
        return InputError(f'{self.path}: "{field}" is {text}: {why}')

    def require(self, rules: tuple[tuple[str, Any, Any], ...], prefix: str = "") -> None:
        for name, supported, absent in rules:
            value = self.find(prefix + name, absent)
            if value != supported:
                raise self.refuse(prefix + name, value, f"only {json.dumps(supported)} is implemented")

    def number(self, field: str, kind: type = int) -> Any:
        value = self.find(field)
        if value is None:
            raise InputError(f'{self.path}: "{field}" is missing; it must be a positive number')
        return self.check_number(field, value, kind)

    def check_number(self, field: str, value: object, kind: type = int) -> Any:
        if isinstance(value, bool) or not isinstance(value, (int, kind)) or not value > 0:
            raise self.refuse(field, value, f"must be a positive {'whole ' if kind is int else ''}number")
        most = _MAX_LAYERS if field.endswith("num_hidden_layers") else _MAX_NUMBER
        if not _MIN_NUMBER <= value <= most:
            raise self.refuse(field, value, f"must be from {_MIN_NUMBER:g} to {most}")
        return kind(value)

    def object(self, field: str) -> dict[str, Any]:
        value = self.find(field)
        if value is not None and not isinstance(value, dict):
            raise self.refuse(field, value, "must be an object, or null")
        return value or {}

    def side(self, field: str) -> int:
        """A length in pixels, given as a number or as [height, width] of a square."""
        value = self.find(field)
        if not isinstance(value, list):
            return self.number(field)
        if len(value) != 2 or value[0] != value[1]:
            raise self.refuse(field, value, "only squares are implemented")
        return self.check_number(field, value[0])


def read_config_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file. Raises InputError when it is missing or not a JSON object."""
    root = read_json(Path(path), "give a directory with all files of the checkpoint")
    if not isinstance(root, dict):
        raise InputError(f"{path}: holds {type(root).__name__}, not a JSON object")
    return root


def config_from_json(path: str | Path) -> InternVLConfig:
    """Read a checkpoint's config.json, in the original (InternVLChatModel) or the -hf layout.

    How to compute (remat, compute_dtype, ...) is not the checkpoint's business and keeps its defaults.
    Raises InputError naming file, field and value for anything that is missing or not implemented.
    """
    path = Path(path)
    reader = _Reader(path, read_config_json(path))
    for part in ("", "llm_config", "text_config"):
        flag = (reader.object(part) if part else reader.root).get("tie_word_embeddings")
        if flag is not None and not isinstance(flag, bool):
            raise reader.refuse(f"{part}.tie_word_embeddings".lstrip("."), flag, "must be true or false")
    model_type = reader.find("model_type")
    if model_type == "internvl_chat":
        reader.require(_ORIGINAL_REQUIRES)
        image_size, text = reader.side("force_image_size"), "llm_config."
    elif model_type == "internvl":
        reader.require(_HF_REQUIRES)
        image_size, text = reader.side("vision_config.image_size"), "text_config."
    else:
        raise reader.refuse("model_type", model_type, 'only "internvl_chat" and "internvl" are implemented')
    try:
        return InternVLConfig(
            vision=_read_vision(reader, image_size),
            language=_read_language(reader, text),
            downsample_ratio=reader.number("downsample_ratio", float),
        )
    except InputError as error:
        raise InputError(str(error).replace("model config:", f"{path}:")) from error


def _read_vision(reader: _Reader, image_size: int) -> VisionConfig:
    stored_size = reader.side("vision_config.image_size")
    if stored_size != image_size:
        why = f"must equal force_image_size {image_size}; position embeddings are never resized"
        raise reader.refuse("vision_config.image_size", stored_size, why)
    return VisionConfig(
        width=reader.number("vision_config.hidden_size"),
        num_layers=reader.number("vision_config.num_hidden_layers"),
        num_heads=reader.number("vision_config.num_attention_heads"),
        mlp_width=reader.number("vision_config.intermediate_size"),
        patch_size=reader.side("vision_config.patch_size"),
        image_size=image_size,
        layer_norm_eps=reader.number("vision_config.layer_norm_eps", float),
    )


def _read_language(reader: _Reader, prefix: str) -> LanguageConfig:
    reader.require(_TEXT_REQUIRES, prefix)
    layer_types = reader.find(prefix + "layer_types") or []
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        raise reader.refuse(prefix + "layer_types", layer_types, 'only "full_attention" is implemented')
    width, num_heads = reader.number(prefix + "hidden_size"), reader.number(prefix + "num_attention_heads")
    head_dim = reader.find(prefix + "head_dim") or width // num_heads
    if head_dim != width // num_heads:
        why = f"only hidden_size / num_attention_heads = {width // num_heads} is implemented"
        raise reader.refuse(prefix + "head_dim", head_dim, why)
    return LanguageConfig(
        vocab_size=reader.number(prefix + "vocab_size"),
        width=width,
        num_layers=reader.number(prefix + "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=reader.number(prefix + "num_key_value_heads"),
        mlp_width=reader.number(prefix + "intermediate_size"),
        rope_theta=_read_rope_theta(reader, prefix),
        rms_norm_eps=reader.number(prefix + "rms_norm_eps", float),
        max_positions=reader.number(prefix + "max_position_embeddings"),
        tie_embeddings=tie_flag(reader.root) is True,
    )


def _read_rope_theta(reader: _Reader, prefix: str) -> float:
    """The rotary base. "dynamic" scaling acts only beyond the model's context, where rows are refused."""
    for field in (prefix + "rope_scaling", prefix + "rope_parameters"):
        scaling = reader.object(field)
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind not in ("default", "dynamic"):
            raise reader.refuse(field, scaling, 'only null, "default" and "dynamic" are implemented')
    if reader.find(prefix + "rope_theta") is None and reader.find(prefix + "rope_parameters") is not None:
        return reader.number(prefix + "rope_parameters.rope_theta", float)
    return reader.number(prefix + "rope_theta", float)


def tie_flag(root: dict[str, Any]) -> bool | None:
    """What a config.json says about a tied head; None where it is silent or contradicts itself.

    Then the tensors decide. Newer transformers write a default of their own at the top, so that the two places
    can differ in one file.
    """
    text = root.get("llm_config") or root.get("text_config") or {}
    said = {place["tie_word_embeddings"] for place in (root, text) if "tie_word_embeddings" in place}
    return bool(said.pop()) if len(said) == 1 else None


def config_to_json(config: InternVLConfig, layout: str, dtype: str = "float32", image_token_id: int = 151_667) -> str:
    """The text of a config.json, in the "original" or the "hf" layout; `config_from_json` reads it back.

    Args:
      dtype: the type of the stored tensors.
      image_token_id: id of `<IMG_CONTEXT>` in the model's tokenizer (the -hf layout stores it).
    """
    root = _original_json(config) if layout == "original" else _hf_json(config, image_token_id)
    return json.dumps(root | {"torch_dtype": dtype}, indent=2) + "\n"


def _vision_json(vision: VisionConfig) -> dict[str, Any]:
    return {
        "hidden_size": vision.width,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_heads,
        "intermediate_size": vision.mlp_width,
        "layer_norm_eps": vision.layer_norm_eps,
        "norm_type": "layer_norm",
        "hidden_act": "gelu",
        "num_channels": 3,
    }


def _text_json(language: LanguageConfig) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": language.vocab_size,
        "hidden_size": language.width,
        "num_hidden_layers": language.num_layers,
        "num_attention_heads": language.num_heads,
        "num_key_value_heads": language.num_kv_heads,
        "intermediate_size": language.mlp_width,
        "rope_theta": language.rope_theta,
        "rms_norm_eps": language.rms_norm_eps,
        "max_position_embeddings": language.max_positions,
        "tie_word_embeddings": language.tie_embeddings,
        "hidden_act": "silu",
        "use_sliding_window": False,
    }


def _original_json(config: InternVLConfig) -> dict[str, Any]:
    vision = config.vision
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "downsample_ratio": config.downsample_ratio,
        "force_image_size": vision.image_size,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internvl2_5",
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 12,
        "tie_word_embeddings": config.language.tie_embeddings,
        "vision_config": _vision_json(vision)
        | {
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "qkv_bias": True,
            "qk_normalization": False,
        },
        "llm_config": _text_json(config.language),
    }


def _hf_json(config: InternVLConfig, image_token_id: int) -> dict[str, Any]:
    vision = config.vision
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "downsample_ratio": config.downsample_ratio,
        "image_seq_length": config.image_tokens_per_tile,
        "image_token_id": image_token_id,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": config.language.tie_embeddings,
        "vision_config": _vision_json(vision)
        | {
            "model_type": "internvl_vision",
            "image_size": [vision.image_size] * 2,
            "patch_size": [vision.patch_size] * 2,
            "attention_bias": True,
            "use_qk_norm": False,
            "use_mean_pooling": True,
            "use_absolute_position_embeddings": True,
        },
        "text_config": _text_json(config.language),
    }
