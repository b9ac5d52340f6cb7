"""InternViT-300M: the vision tower."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from dreamprm_jax.models.layers import LayerNorm, Linear, attend, divided, gelu, scan_layers, spread, with_filler
from dreamprm_jax.models.presets import InternVLConfig


class VisionBlock(nn.Module):
    """Pre-norm block; each residual branch is multiplied by a learnt vector (layer scale).

    It takes the positions of all tiles as one axis. With two, XLA's GPU code lays tiles innermost where the loop over
    layers is written out, and every norm and product then begins with a transpose.
    """

    config: InternVLConfig
    num_positions: int  # of a tile (T): the class token, the patches and filler

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:  # [P * T, D] -> the same
        vision = self.config.vision
        num_tiles = len(x) // self.num_positions
        scale_init = nn.initializers.constant(vision.layer_scale_init)
        ls1 = self.param("ls1", scale_init, (vision.width,))
        ls2 = self.param("ls2", scale_init, (vision.width,))
        attention = self.attention(LayerNorm(vision.layer_norm_eps, name="norm1")(x))
        x = divided(x + attention * spread(ls1, x), self.config, num_tiles)
        mlp = self.mlp(LayerNorm(vision.layer_norm_eps, name="norm2")(x))
        return divided(x + mlp * spread(ls2, x), self.config, num_tiles), None

    def attention(self, x: jax.Array) -> jax.Array:
        vision = self.config.vision
        heads = (vision.num_heads, vision.width // vision.num_heads)
        # One kernel for queries, keys and values; heads have an axis of their own, so that it can be split by head.
        # Three products: out of a common one, each would have to be copied before attention takes it.
        qkv = Linear("rd,dknh->rknh", (vision.width, 3, *heads), is_apart=True, name="qkv")(x)
        q, k, v = (part.reshape(-1, self.num_positions, *heads) for part in qkv)
        num_filler = self.num_positions - (1 + vision.grid**2)
        mixed = attend(q, k, v, self.config, causal=False, num_filler=num_filler).reshape(-1, *heads)
        return Linear("rnh,nhd->rd", (*heads, vision.width), name="out")(mixed)

    def mlp(self, x: jax.Array) -> jax.Array:
        vision = self.config.vision
        hidden = Linear("rd,df->rf", (vision.width, vision.mlp_width), name="fc1")(x)
        hidden = gelu(hidden)
        return Linear("rf,fd->rd", (vision.mlp_width, vision.width), name="fc2")(hidden)


class InternViT(nn.Module):
    """Patches, a class token, position embeddings and the blocks; no final norm."""

    config: InternVLConfig

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Normalised pixels [P, height, width, 3] -> [P, 1 + patches, D]; the class token comes first."""
        vision = self.config.vision
        position_init = nn.initializers.truncated_normal(0.02)
        class_token = self.param("class_embedding", position_init, (vision.width,))
        positions = self.param("position_embedding", position_init, (1 + vision.grid**2, vision.width))
        x = self.embed_patches(pixels)
        x = jnp.concatenate([spread(class_token, x[:, :1]), x], axis=1)
        x = x + spread(positions, x)
        x = with_filler(divided(x, self.config), self.config)
        layers = scan_layers(VisionBlock, self.config, vision.num_layers)(self.config, x.shape[1], name="layers")
        rows, _ = layers(x.reshape(-1, vision.width))
        return rows.reshape(x.shape)[:, : 1 + vision.grid**2]

    def embed_patches(self, pixels: jax.Array) -> jax.Array:  # -> [P, patches, D]
        vision = self.config.vision
        grid, size = vision.grid, vision.patch_size
        # Patches do not overlap, so this is a matrix product, which is faster than a convolution on a CPU.
        patches = pixels.reshape(pixels.shape[0], grid, size, grid, size, 3).swapaxes(2, 3)
        equation, kernel = "prchwi,hwid->prcd", (size, size, 3, vision.width)
        x = Linear(equation, kernel, name="patch_embedding")(patches)
        return divided(x.reshape(x.shape[0], grid**2, vision.width), self.config)


def pixel_shuffle(x: jax.Array, factor: int) -> jax.Array:
    """Each `factor` x `factor` square of patches becomes one token, its patches row by row ("v2").

    Args:
      x: [P, patches, D], the patches of a square grid row by row, without the class token.

    Returns:
      [P, I, factor * factor * D].
    """
    num_tiles, num_patches, width = x.shape
    side = round(num_patches**0.5) // factor
    squares = x.reshape(num_tiles, side, factor, side, factor, width).transpose(0, 1, 3, 2, 4, 5)
    return squares.reshape(num_tiles, side * side, factor * factor * width)


class Projector(nn.Module):
    """Image tokens to the language model's width: norm, linear, exact GELU, linear."""

    config: InternVLConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # [P, I, shuffled D] -> [P, I, D]
        width = self.config.language.width
        x = LayerNorm(1e-5, name="norm")(x)  # eps: torch's default, not the vision tower's
        x = gelu(Linear("pid,df->pif", (x.shape[-1], width), name="fc1")(x))
        return Linear("pif,fd->pid", (width, width), name="fc2")(x)
