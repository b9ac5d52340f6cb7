"""The files beside the weights that transformers reads: tokenizer, chat template, image preprocessing, generation.

They are made of what a model has, its tokenizer.json and its config, so that an export is the same whatever lay beside
the weights it came from.
"""

from __future__ import annotations

import json
from typing import Any

from dreamprm_jax.data.conversation import IMAGE_CONTEXT, IMAGE_END, IMAGE_START, TURN_END, TURN_START
from dreamprm_jax.data.tokens import PRMTokenizer
from dreamprm_jax.models.presets import IMAGENET_MEAN, IMAGENET_STD, InternVLConfig

_VIDEO_TOKEN = "<|video_pad|>"  # a token of the vocabulary that no text has: a new one would have no embedding

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '"
    + TURN_START
    + "' + message['role'] + '\\n' }}{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '"
    + IMAGE_CONTEXT
    + "' }}{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '"
    + TURN_END
    + "\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '"
    + TURN_START
    + "assistant\\n' }}{% endif %}"
)
"""`conversation.render` in Jinja, but for `<img>` and `</img>`, which a processor writes around an image's tokens."""


def companion_files(config: InternVLConfig, tokenizer: PRMTokenizer, layout: str, max_tiles: int) -> dict[str, str]:
    """Text of each file, by name; config.json is written with the weights.

    Args:
      config: of the model.
      tokenizer: of the model.
      layout: "original" or "hf"; transformers has a processor for the second alone.
      max_tiles: of an image, without the thumbnail.
    """
    end_id = tokenizer.tokenizer.token_to_id(TURN_END)
    files = {
        "tokenizer_config.json": _tokenizer_config(config, tokenizer, layout),
        "preprocessor_config.json": _preprocessor_config(config, layout, max_tiles),
        "generation_config.json": {"do_sample": False, "eos_token_id": end_id, "pad_token_id": tokenizer.pad_id},
    }
    if layout == "hf":
        files["processor_config.json"] = {
            "processor_class": "InternVLProcessor",
            "image_seq_length": config.image_tokens_per_tile,
        }
    texts = {name: json.dumps(fields, indent=2) + "\n" for name, fields in files.items()}
    return {"tokenizer.json": tokenizer.tokenizer.to_str(), "chat_template.jinja": CHAT_TEMPLATE, **texts}


def _tokenizer_config(config: InternVLConfig, tokenizer: PRMTokenizer, layout: str) -> dict[str, Any]:
    """Names the class that takes tokenizer.json as it stands: Qwen2Tokenizer splits text by rules of its own."""
    images = {"start_image_token": IMAGE_START, "end_image_token": IMAGE_END, "context_image_token": IMAGE_CONTEXT}
    if tokenizer.tokenizer.token_to_id(_VIDEO_TOKEN) is not None:
        images["video_token"] = _VIDEO_TOKEN
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.language.max_positions,
        "clean_up_tokenization_spaces": False,
        "eos_token": TURN_END,
        "pad_token": tokenizer.tokenizer.id_to_token(tokenizer.pad_id),
        "extra_special_tokens": images,
        **_processor(layout),
    }


def _preprocessor_config(config: InternVLConfig, layout: str, max_tiles: int) -> dict[str, Any]:
    """`data/images.py` as transformers spells it: the tiles are those of `images.tile_image`."""
    side = config.vision.image_size
    return {
        "image_processor_type": "GotOcr2ImageProcessor",
        "crop_to_patches": True,
        "min_patches": 1,
        "max_patches": max_tiles,
        "size": {"height": side, "width": side},
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
        **_processor(layout),
    }


def _processor(layout: str) -> dict[str, str]:
    return {"processor_class": "InternVLProcessor"} if layout == "hf" else {}
