"""Qwen2.5: the language model."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dreamprm_jax.models.layers import Linear, RMSNorm, attend, divided, divided_by_width, scan_layers, with_filler
from dreamprm_jax.models.presets import InternVLConfig, LanguageConfig


class KeysValues(NamedTuple):
    """What attention needs of positions that it has passed, a leading L axis for the layers; keys are rotated."""

    keys: jax.Array  # [L, B, T, K, H]
    values: jax.Array  # [L, B, T, K, H]


def rotary_angles(language: LanguageConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of position times frequency: [B, T] -> [B, T, H / 2]; float32, since angles reach 1e4 radians."""
    head_width = language.width // language.num_heads
    exponents = np.arange(0, head_width, 2, dtype=np.float32) / np.float32(head_width)
    frequencies = np.float32(1) / np.float32(language.rope_theta) ** exponents
    angles = positions.astype(jnp.float32)[:, :, None] * frequencies[None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turn the pairs (x[h], x[h + H / 2]) of [B, T, N, H] by angles [B or 1, T, H / 2], in float32 as those are."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


class LanguageBlock(nn.Module):
    """Pre-norm block: grouped-query attention with rotary positions, then SwiGLU."""

    config: InternVLConfig
    keeps: bool = False  # hand out keys and values

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
        past: KeysValues | None = None,
        seen: jax.Array | None = None,
    ) -> tuple[jax.Array, KeysValues | None]:
        """[B, T, D] -> [B, T, D], causal; with a past of U positions, what `seen` [B, T, U + T] says."""
        eps = self.config.language.rms_norm_eps
        mixed, keys_values = self.attention(RMSNorm(eps, name="norm1")(x), cos, sin, past, seen)
        x = divided(x + mixed, self.config)
        x = divided(x + self.mlp(RMSNorm(eps, name="norm2")(x)), self.config)
        return x, keys_values if self.keeps else None

    def attention(
        self, x: jax.Array, cos: jax.Array, sin: jax.Array, past: KeysValues | None, seen: jax.Array | None
    ) -> tuple[jax.Array, KeysValues]:
        language = self.config.language
        width, heads, kv_heads = language.width, language.num_heads, language.num_kv_heads
        head_width = width // heads
        q = Linear("btd,dnh->btnh", (width, heads, head_width), name="q")(x)
        k = Linear("btd,dkh->btkh", (width, kv_heads, head_width), name="k")(x)
        v = Linear("btd,dkh->btkh", (width, kv_heads, head_width), name="v")(x)
        k = rotate(k, cos, sin)
        keys, values = k, v
        if past is not None:
            keys, values = jnp.concatenate([past.keys, k], axis=1), jnp.concatenate([past.values, v], axis=1)
        mixed = attend(rotate(q, cos, sin), keys, values, self.config, causal=True, seen=seen)
        return self.residual("btnh,nhd->btd", (heads, head_width, width), "out")(mixed), KeysValues(k, v)

    def mlp(self, x: jax.Array) -> jax.Array:
        language = self.config.language
        shape = (language.width, language.mlp_width)
        gate = nn.silu(Linear("btd,df->btf", shape, use_bias=False, name="gate")(x))
        up = Linear("btd,df->btf", shape, use_bias=False, name="up")(x)
        return self.residual("btf,fd->btd", shape[::-1], "down")(gate * up)

    def residual(self, equation: str, kernel_shape: tuple[int, ...], name: str) -> Linear:
        """A projection into the residual stream, begun small enough that 2 L of them add up to variance 1."""
        scale = 1 / (2 * self.config.language.num_layers)
        return Linear(equation, kernel_shape, use_bias=False, init_scale=scale, name=name)


class Qwen2(nn.Module):
    """Embedding, blocks, final norm and head, callable one by one."""

    config: InternVLConfig
    keeps: bool = False  # `begin` and `go_on`: the blocks hand out keys and values, and take those of a past

    def setup(self) -> None:
        language = self.config.language
        shape = (language.vocab_size, language.width)
        # Variance 1 / D per entry: a tied head then begins with logits of variance 1.
        init = nn.initializers.normal(language.width**-0.5)
        self.embedding = self.param("embedding", init, shape)
        inputs = "ssls" if self.keeps else "ss"
        self.layers = scan_layers(LanguageBlock, self.config, language.num_layers, inputs)(self.config, self.keeps)
        self.norm = RMSNorm(language.rms_norm_eps)
        self.lm_head = self.embedding if language.tie_embeddings else self.param("lm_head", init, shape)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Token ids [B, T] -> [B, T, D] in the compute type; an id outside the vocabulary gives NaN."""
        rows = jnp.take(self.embedding, tokens, axis=0, mode="fill", fill_value=jnp.nan)
        return divided_by_width(rows.astype(self.config.compute_dtype), self.config)

    def hidden_states(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """Embeddings [B, T, D] -> normalised hidden states [B, S, D] at `positions` [B, S]."""
        x = with_filler(x, self.config)  # it comes last, where causal attention sees it from itself alone
        cos, sin = rotary_angles(self.config.language, jnp.arange(x.shape[1])[None])
        x, _ = self.layers(x, cos, sin)
        return self.norm(divided(jnp.take_along_axis(x, positions[:, :, None], axis=1), self.config))

    def begin(self, x: jax.Array) -> KeysValues:
        """Embeddings [B, T, D] -> keys and values of every position; causal."""
        cos, sin = rotary_angles(self.config.language, jnp.arange(x.shape[1])[None])
        return self.layers(x, cos, sin, None, None)[1]

    def go_on(
        self, x: jax.Array, positions: jax.Array, past: KeysValues, seen: jax.Array, wanted: jax.Array
    ) -> tuple[jax.Array, KeysValues]:
        """Runs what comes after a past of U positions.

        Args:
          x: embeddings [B, T, D].
          positions: [B, T], for the rotary angles.
          past: keys and values [L, B, U, K, H].
          seen: bool [B, T, U + T], what each position sees.
          wanted: [B, S], positions of the T whose states are asked for.

        Returns:
          Normalised hidden states [B, S, D]; keys and values [L, B, T, K, H].
        """
        cos, sin = rotary_angles(self.config.language, positions)
        x, keys_values = self.layers(x, cos, sin, past, seen)
        return self.norm(divided(jnp.take_along_axis(x, wanted[:, :, None], axis=1), self.config)), keys_values

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [B, S, D] -> logits [B, S, V], float32, since a loss subtracts nearly equal ones."""
        head = self.lm_head.astype(hidden.dtype)
        return jnp.einsum("bsd,vd->bsv", hidden, head, preferred_element_type=jnp.float32)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """All parameters used once, for initialisation: ids [B, T] -> logits [B, T, V]."""
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        return self.logits(self.hidden_states(self.embed(tokens), positions))
