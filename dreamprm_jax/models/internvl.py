"""InternVL as pure functions of a parameter tree: `init`, `apply`, and the stages in between.

The tree is a plain nested dict of float32 arrays with the keys "vision", "projector" and "language"; the
parameters of all layers of a tower are stacked on a leading L axis under "layers".
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dreamprm_jax.errors import InputError
from dreamprm_jax.models.layers import divided
from dreamprm_jax.models.presets import IMAGENET_MEAN, IMAGENET_STD, InternVLConfig
from dreamprm_jax.models.qwen2 import KeysValues, Qwen2
from dreamprm_jax.models.vit import InternViT, Projector, pixel_shuffle
from dreamprm_jax.types import Batch, Continuations, Prefix, PyTree


@functools.partial(jax.jit, static_argnums=0)
def init(config: InternVLConfig, key: jax.Array) -> PyTree:
    """Random parameters, float32, to train from scratch. Free of memory under `jax.eval_shape`.

    Under jit, since Linen finds the shapes by a forward pass, which is then dropped as dead code.
    """
    config = dataclasses.replace(config, attention="xla")  # that pass is in float32
    vision_key, projector_key, language_key = jax.random.split(key, 3)
    side = config.vision.image_size
    shuffled_width = config.shuffle_factor**2 * config.vision.width
    modules = {
        "vision": (InternViT(config), vision_key, jnp.zeros((1, side, side, 3))),
        "projector": (Projector(config), projector_key, jnp.zeros((1, 1, shuffled_width))),
        "language": (Qwen2(config), language_key, jnp.zeros((1, 1), jnp.int32)),
    }
    return {name: module.init(key, x)["params"] for name, (module, key, x) in modules.items()}


_IN_PRODUCTS = ("kernel", "lora_a", "lora_b", "lm_head")  # not an embedding: its gradient is a sum over tokens


def cast_to_compute(config: InternVLConfig, params: PyTree) -> PyTree:
    """A tree or any part of one, what stands in products in the compute type, which the model casts it to in any case.

    Before the loop over layers it is cast once, and the gradient comes in that type: the same numbers in fewer bytes.
    """

    def cast(path: tuple, leaf: jax.Array) -> jax.Array:
        return leaf.astype(config.compute_dtype) if path[-1].key in _IN_PRODUCTS else leaf

    return jax.tree_util.tree_map_with_path(cast, params)


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
    return InternViT(config).apply({"params": cast_to_compute(config, params["vision"])}, pixels)


def encode_pixels(config: InternVLConfig, params: PyTree, pixels: jax.Array) -> jax.Array:
    """Normalised pixels [P, height, width, 3] -> image features [P, I, D] of the language model's width."""
    patches = vision_states(config, params, pixels)[:, 1:]  # the class token is dropped
    shuffled = divided(pixel_shuffle(patches, config.shuffle_factor), config)
    return divided(Projector(config).apply({"params": cast_to_compute(config, params["projector"])}, shuffled), config)


def encode_images(config: InternVLConfig, params: PyTree, tiles: jax.Array) -> jax.Array:
    """Tiles [P, height, width, 3] uint8 -> image features [P, I, D]."""
    return encode_pixels(config, params, normalise(tiles))


def merge_image_features(embeddings: jax.Array, image_index: jax.Array, features: jax.Array) -> jax.Array:
    """Put image features where the image tokens are.

    Args:
      embeddings: [B, T, D] of the text tokens.
      image_index: [B, T]: the row's feature that stands there; -1: the text token.
      features: [B, P * I, D], those of padding tiles last.

    Returns:
      [B, T, D]; NaN at an image token that has no feature: a wrong value would train a wrong model in silence.
    """
    is_image = image_index[:, :, None] >= 0
    if features.shape[1] == 0:
        return jnp.where(is_image, jnp.nan, embeddings)
    index = jnp.maximum(image_index, 0)[:, :, None]
    at_tokens = jnp.take_along_axis(features, index, axis=1, mode="fill", fill_value=jnp.nan)
    return jnp.where(is_image, at_tokens, embeddings)


def embed_tokens(config: InternVLConfig, params: PyTree, tokens: jax.Array) -> jax.Array:
    """Token ids [B, T] -> embeddings [B, T, D]; NaN for an id outside the vocabulary."""
    return _language(config, params, tokens, method="embed")


def embed_batch(config: InternVLConfig, params: PyTree, batch: Batch) -> jax.Array:
    """Text and images of a batch as the language model's input [B, T, D]."""
    features = features_of_rows(config, params, batch.tiles)
    return merge_image_features(embed_tokens(config, params, batch.tokens), image_index(batch.image_mask), features)


def image_index(image_mask: jax.Array) -> jax.Array:
    """[B, T] bool -> [B, T]: the n-th image token of a row takes its n-th feature; -1 where there is none."""
    return jnp.where(image_mask, jnp.cumsum(image_mask, axis=1) - 1, -1)


def features_of_rows(config: InternVLConfig, params: PyTree, tiles: jax.Array) -> jax.Array:
    """Tiles [B, P, height, width, 3] uint8 -> image features [B, P * I, D] in the compute type."""
    num_rows, num_tiles = tiles.shape[:2]
    if num_tiles == 0:
        return jnp.zeros((num_rows, 0, config.language.width), config.compute_dtype)
    features = encode_images(config, params, tiles.reshape(-1, *tiles.shape[2:]))
    return divided(features.reshape(num_rows, num_tiles * config.image_tokens_per_tile, -1), config)


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


class Past(NamedTuple):
    """What is kept of a row's beginning, so that its chains can go on from there."""

    keys_values: KeysValues  # [L, B, T, K, H]
    length: jax.Array  # [B]: positions that count; those after it are padding
    features: jax.Array  # [B, P * I, D], for image tokens that come later


def begin(config: InternVLConfig, params: PyTree, prefix: Prefix) -> Past:
    """Runs what a row's chains have in common: its tiles through the vision tower, its tokens through the layers."""
    features = features_of_rows(config, params, prefix.tiles)
    x = merge_image_features(embed_tokens(config, params, prefix.tokens), prefix.image_index, features)
    keys_values = Qwen2(config, keeps=True).apply({"params": params["language"]}, x, method="begin")
    return Past(keys_values, prefix.length, features)


def go_on(
    config: InternVLConfig, params: PyTree, past: Past, continuations: Continuations
) -> tuple[jax.Array, KeysValues]:
    """Logits [B, S, V], float32, at the step positions of each row's chains; and keys and values [L, B, T, K, H].

    The same, up to rounding, as `apply` to every chain alone.
    """
    embeddings = embed_tokens(config, params, continuations.tokens)
    x = merge_image_features(embeddings, continuations.image_index, past.features)
    num_past, num_tokens = past.keys_values.keys.shape[2], x.shape[1]
    sees_past = jnp.arange(num_past)[None, None, :] < past.length[:, None, None]
    sees_past = jnp.broadcast_to(sees_past, (len(x), num_tokens, num_past))
    own_chain = continuations.chain[:, :, None] == continuations.chain[:, None, :]
    sees_present = own_chain & jnp.tri(num_tokens, dtype=bool)[None]
    seen = jnp.concatenate([sees_past, sees_present], axis=2)
    hidden, keys_values = Qwen2(config, keeps=True).apply(
        {"params": params["language"]},
        x,
        continuations.positions,
        past.keys_values,
        seen,
        continuations.step_positions,
        method="go_on",
    )
    return head(config, params, hidden), keys_values


def _language(config: InternVLConfig, params: PyTree, *args: jax.Array, method: str) -> jax.Array:
    return Qwen2(config).apply({"params": cast_to_compute(config, params["language"])}, *args, method=method)
