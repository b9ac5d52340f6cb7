"""InternVL as pure functions of a parameter tree: `init`, `apply`, and the stages in between.

The tree is a plain nested dict of float32 arrays with the keys "vision", "projector" and "language"; the
parameters of all layers of a tower are stacked on a leading L axis under "layers".
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from dreamprm_jax.errors import InputError
from dreamprm_jax.models.presets import IMAGENET_MEAN, IMAGENET_STD, InternVLConfig
from dreamprm_jax.models.qwen2 import Qwen2
from dreamprm_jax.models.vit import InternViT, Projector, pixel_shuffle
from dreamprm_jax.types import Batch, PyTree


def init(config: InternVLConfig, key: jax.Array) -> PyTree:
    """Random parameters, float32, to train from scratch. Free of memory under `jax.eval_shape`."""
    config = dataclasses.replace(config, attention="xla")  # the pass that finds the shapes is in float32
    vision_key, projector_key, language_key = jax.random.split(key, 3)
    side = config.vision.image_size
    shuffled_width = config.shuffle_factor**2 * config.vision.width
    modules = {
        "vision": (InternViT(config), vision_key, jnp.zeros((1, side, side, 3))),
        "projector": (Projector(config), projector_key, jnp.zeros((1, 1, shuffled_width))),
        "language": (Qwen2(config), language_key, jnp.zeros((1, 1), jnp.int32)),
    }
    # Under jit the forward pass that Linen takes to find the shapes is dropped as dead code.
    return {name: jax.jit(module.init)(key, x)["params"] for name, (module, key, x) in modules.items()}


def normalise(tiles: jax.Array) -> jax.Array:
    """Bytes 0..255 [..., 3] -> normalised float32; bfloat16 would not keep all 256 values apart."""
    mean, std = jnp.asarray(IMAGENET_MEAN, jnp.float32), jnp.asarray(IMAGENET_STD, jnp.float32)
    shape = (1,) * (tiles.ndim - 1) + (3,)
    return (tiles.astype(jnp.float32) / 255.0 - mean.reshape(shape)) / std.reshape(shape)


def vision_states(config: InternVLConfig, params: PyTree, pixels: jax.Array) -> jax.Array:
    """Normalised pixels [P, height, width, 3] -> last states [P, 1 + patches, D], class token first."""
    side = config.vision.image_size
    if pixels.shape[1:] != (side, side, 3):
        raise InputError(f"tiles have shape {pixels.shape[1:]}; this model takes ({side}, {side}, 3)")
    pixels = pixels.astype(config.compute_dtype)
    return InternViT(config).apply({"params": params["vision"]}, pixels)


def encode_pixels(config: InternVLConfig, params: PyTree, pixels: jax.Array) -> jax.Array:
    """Normalised pixels [P, height, width, 3] -> image features [P, I, D] of the language model's width."""
    patches = vision_states(config, params, pixels)[:, 1:]  # the class token is dropped
    shuffled = pixel_shuffle(patches, config.shuffle_factor)
    return Projector(config).apply({"params": params["projector"]}, shuffled)


def encode_images(config: InternVLConfig, params: PyTree, tiles: jax.Array) -> jax.Array:
    """Tiles [P, height, width, 3] uint8 -> image features [P, I, D]."""
    return encode_pixels(config, params, normalise(tiles))


def merge_image_features(embeddings: jax.Array, image_mask: jax.Array, features: jax.Array) -> jax.Array:
    """Put image features where the image tokens are.

    Args:
      embeddings: [B, T, D] of the text tokens.
      image_mask: [B, T]; the n-th true position of a row takes the row's n-th feature.
      features: [B, P * I, D], those of padding tiles last.

    Returns:
      [B, T, D]; NaN at an image token that has no feature: a wrong value would train a wrong model in silence.
    """
    if features.shape[1] == 0:
        return jnp.where(image_mask[:, :, None], jnp.nan, embeddings)
    nth = jnp.cumsum(image_mask, axis=1) - 1  # [B, T]
    nth = jnp.maximum(nth, 0)  # before the first image token; not used there
    at_tokens = jnp.take_along_axis(features, nth[:, :, None], axis=1, mode="fill", fill_value=jnp.nan)
    return jnp.where(image_mask[:, :, None], at_tokens, embeddings)


def embed_tokens(config: InternVLConfig, params: PyTree, tokens: jax.Array) -> jax.Array:
    """Token ids [B, T] -> embeddings [B, T, D]; NaN for an id outside the vocabulary."""
    return _language(config, params, tokens, method="embed")


def embed_batch(config: InternVLConfig, params: PyTree, batch: Batch) -> jax.Array:
    """Text and images of a batch as the language model's input [B, T, D]."""
    num_rows, num_tiles = batch.tiles.shape[:2]
    embeddings = embed_tokens(config, params, batch.tokens)
    if num_tiles == 0:
        features = jnp.zeros((num_rows, 0, config.language.width), embeddings.dtype)
    else:
        features = encode_images(config, params, batch.tiles.reshape(-1, *batch.tiles.shape[2:]))
        features = features.reshape(num_rows, num_tiles * config.image_tokens_per_tile, -1)
    return merge_image_features(embeddings, batch.image_mask, features)


def language_states(config: InternVLConfig, params: PyTree, x: jax.Array, positions: jax.Array) -> jax.Array:
    """Embeddings [B, T, D] -> hidden states [B, S, D] after the final norm, at `positions` [B, S]."""
    return _language(config, params, x, positions, method="hidden_states")


def step_hidden_states(config: InternVLConfig, params: PyTree, batch: Batch) -> jax.Array:
    """Hidden states [B, S, D] after the final norm, at `batch.step_positions` only."""
    return language_states(config, params, embed_batch(config, params, batch), batch.step_positions)


def head(config: InternVLConfig, params: PyTree, hidden: jax.Array) -> jax.Array:
    """Hidden states [B, S, D] -> logits [B, S, V], float32."""
    return _language(config, params, hidden, method="logits")


def apply(config: InternVLConfig, params: PyTree, batch: Batch) -> jax.Array:
    """Logits [B, S, V], float32, at the step positions only.

    The hidden states are gathered before the head: logits of the whole sequence (1.4 GB for 2,300 tokens of the
    1B model) are never formed. Deterministic; rows do not influence each other, padding influences nothing.

    Raises:
      InputError: if the tiles have another size than the model's.
    """
    return head(config, params, step_hidden_states(config, params, batch))


def _language(config: InternVLConfig, params: PyTree, *args: jax.Array, method: str) -> jax.Array:
    return Qwen2(config).apply({"params": params["language"]}, *args, method=method)
