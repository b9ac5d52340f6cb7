"""Qwen2.5: the language model."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dreamprm_jax.models.layers import Linear, RMSNorm, attend, scan_layers, with_filler
from dreamprm_jax.models.presets import InternVLConfig, LanguageConfig


def rotary_angles(language: LanguageConfig, num_tokens: int) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of position times frequency, each [T, H / 2]; float32, since angles reach 1e4 radians."""
    head_width = language.width // language.num_heads
    exponents = np.arange(0, head_width, 2, dtype=np.float32) / np.float32(head_width)
    frequencies = np.float32(1) / np.float32(language.rope_theta) ** exponents
    angles = jnp.arange(num_tokens, dtype=jnp.float32)[:, None] * frequencies[None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turn the pairs (x[h], x[h + H / 2]) of [B, T, N, H] by their angles, in float32 as the angles are."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[None, :, None, :], sin[None, :, None, :]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


class LanguageBlock(nn.Module):
    """Pre-norm block: grouped-query attention with rotary positions, then SwiGLU."""

    config: InternVLConfig

    @nn.compact
    def __call__(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, None]:
        eps = self.config.language.rms_norm_eps
        x = x + self.attention(RMSNorm(eps, name="norm1")(x), cos, sin)
        return x + self.mlp(RMSNorm(eps, name="norm2")(x)), None  # [B, T, D]

    def attention(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        language = self.config.language
        width, heads, kv_heads = language.width, language.num_heads, language.num_kv_heads
        head_width = width // heads
        q = Linear("btd,dnh->btnh", (width, heads, head_width), name="q")(x)
        k = Linear("btd,dkh->btkh", (width, kv_heads, head_width), name="k")(x)
        v = Linear("btd,dkh->btkh", (width, kv_heads, head_width), name="v")(x)
        mixed = attend(rotate(q, cos, sin), rotate(k, cos, sin), v, self.config, causal=True)
        return self.residual("btnh,nhd->btd", (heads, head_width, width), "out")(mixed)

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

    def setup(self) -> None:
        language = self.config.language
        shape = (language.vocab_size, language.width)
        # Variance 1 / D per entry: a tied head then begins with logits of variance 1.
        init = nn.initializers.normal(language.width**-0.5)
        self.embedding = self.param("embedding", init, shape)
        self.layers = scan_layers(LanguageBlock, self.config, language.num_layers, num_shared=2)(self.config)
        self.norm = RMSNorm(language.rms_norm_eps)
        self.lm_head = self.embedding if language.tie_embeddings else self.param("lm_head", init, shape)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Token ids [B, T] -> [B, T, D] in the compute type; an id outside the vocabulary gives NaN."""
        rows = jnp.take(self.embedding, tokens, axis=0, mode="fill", fill_value=jnp.nan)
        return rows.astype(self.config.compute_dtype)

    def hidden_states(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """Embeddings [B, T, D] -> normalised hidden states [B, S, D] at `positions` [B, S]."""
        x, _ = with_filler(x, self.config)  # it comes last, where causal attention sees it from itself alone
        cos, sin = rotary_angles(self.config.language, x.shape[1])
        x, _ = self.layers(x, cos, sin)
        return self.norm(jnp.take_along_axis(x, positions[:, :, None], axis=1))

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [B, S, D] -> logits [B, S, V], float32, since a loss subtracts nearly equal ones."""
        head = self.lm_head.astype(hidden.dtype)
        return jnp.einsum("bsd,vd->bsv", hidden, head, preferred_element_type=jnp.float32)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """All parameters used once, for initialisation: ids [B, T] -> logits [B, T, V]."""
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        return self.logits(self.hidden_states(self.embed(tokens), positions))
