"""Pieces that both towers are made of."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dreamprm_jax.models.presets import InternVLConfig
from dreamprm_jax.sharding import by_rows, by_width

# What remat "dots" keeps goes by these names: outputs of `Linear`, and a `LayerNorm`'s means and variances.
PROJECTION, STATISTIC = "projection", "statistic"
_has_kept_name = jax.checkpoint_policies.save_only_these_names(PROJECTION, STATISTIC)


def match_rank(parameter: jax.Array, x: jax.Array) -> jax.Array:
    """Leading axes of size 1, so that a parameter of the last axes of `x` broadcasts over the others."""
    return parameter.reshape((1,) * (x.ndim - parameter.ndim) + parameter.shape)


def spread(parameter: jax.Array, x: jax.Array) -> jax.Array:
    """A parameter of the last axes of `x`, over the others: [...] like `x`, in its type.

    Cast after it is spread, so that its gradient, a sum over rows, is added up in float32 at least: XLA's GPU code adds
    bfloat16 numbers up in bfloat16.
    """
    wide = parameter.astype(jnp.promote_types(parameter.dtype, jnp.float32))
    return jnp.broadcast_to(match_rank(wide, x), x.shape).astype(x.dtype)


def gelu(x: jax.Array) -> jax.Array:
    """x Phi(x), exactly.

    `jax.nn.gelu` takes erfc in the type of x, which costs a GPU three times its memory traffic and bfloat16 its digits,
    and leaves two arrays to its gradient. For types narrower than float32 it is taken by erf, in float32.
    """
    return _narrow_gelu(x) if x.dtype.itemsize < 4 else jax.nn.gelu(x, approximate=False)


@jax.custom_jvp
def _narrow_gelu(x: jax.Array) -> jax.Array:
    """Its derivative is said outright, so that the gradient needs one array: of x alone, forward mode included."""
    wide = x.astype(jnp.float32)
    return (wide * _normal_cdf(wide)).astype(x.dtype)


@_narrow_gelu.defjvp
def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (x,), (tangent,) = primals, tangents
    wide = x.astype(jnp.float32)
    density = jnp.exp(-0.5 * jnp.square(wide)) * (2 * jnp.pi) ** -0.5
    slope = (_normal_cdf(wide) + wide * density).astype(x.dtype)
    return _narrow_gelu(x), slope * tangent


def _normal_cdf(x: jax.Array) -> jax.Array:
    return 0.5 * (1 + jax.lax.erf(x * 2**-0.5))


class Linear(nn.Module):
    """A projection written as an einsum, e.g. "btd,dnh->btnh"; the kernel's axes carry their legend letters.

    The letters summed over come last in the input and first in the kernel; the output is what remains of both, in that
    order. The bias has the kernel's share of it. What has not been cast to the type of the input is cast here.
    """

    equation: str
    kernel_shape: tuple[int, ...]
    use_bias: bool = True
    init_scale: float = 1.0  # variance of the output for inputs of variance 1
    is_apart: bool = False  # a product for each entry of the kernel's first output axis, and a tuple of them

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array | tuple[jax.Array, ...]:
        operands, output = self.equation.split("->")
        letters = operands.split(",")[1]
        sizes = dict(zip(letters, self.kernel_shape, strict=True))
        inputs = tuple(axis for axis, letter in enumerate(letters) if letter not in output)
        outputs = tuple(axis for axis, letter in enumerate(letters) if letter in output)
        init = nn.initializers.variance_scaling(
            self.init_scale, "fan_in", "truncated_normal", in_axis=inputs, out_axis=outputs
        )
        kernel = self.param("kernel", init, self.kernel_shape)
        bias_shape = tuple(sizes[letter] for letter in output if letter in sizes)
        bias = self.param("bias", nn.initializers.zeros, bias_shape) if self.use_bias else None
        if not self.is_apart:
            return self.project(x, len(inputs), kernel, bias)
        kernels = jnp.unstack(kernel, axis=len(inputs))
        biases = [None] * len(kernels) if bias is None else jnp.unstack(bias)
        return tuple(self.project(x, len(inputs), *part) for part in zip(kernels, biases, strict=True))

    def project(self, x: jax.Array, num_inputs: int, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
        """One product of two matrices. XLA's CPU code transposes the activations first where a kernel's gradient sums
        over two axes, and its GPU code adds the bias within the product only where no reshape comes between."""
        shape = (*x.shape[: x.ndim - num_inputs], *kernel.shape[num_inputs:])
        num_entries = math.prod(kernel.shape[:num_inputs])
        rows = x.reshape(-1, num_entries)
        y = rows @ kernel.reshape(num_entries, -1).astype(x.dtype)
        if self.has_variable("params", "lora_a"):  # beside the kernel, whose own gradient is then never formed
            y = y + self.adapter(rows)
        if bias is not None:
            y = y + spread(bias.reshape(-1), y)
        return checkpoint_name(y, PROJECTION).reshape(shape)

    def adapter(self, rows: jax.Array) -> jax.Array:
        """What a low-rank adapter adds to rows [R, inputs]: scale (rows a) b, with a [inputs, r] and b [r, outputs]."""
        names = ("lora_a", "lora_b", "lora_scale")
        a, b, scale = (self.get_variable("params", name).astype(rows.dtype) for name in names)
        few = rows @ a.reshape(rows.shape[1], -1)  # [R, r]
        return few * match_rank(scale, few) @ b.reshape(len(b), -1)


class LayerNorm(nn.Module):
    """Zero mean and unit variance over D, then scale and bias; float32, since bfloat16 loses the variance.

    Mean and variance are kept for the gradient: where they are computed again, XLA's GPU code writes the terms of the
    scale's gradient out in float32, [..., D] of them, before it adds them up.
    """

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # [..., D] -> [..., D]
        width = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, width)
        bias = self.param("bias", nn.initializers.zeros, width)
        x32 = x.astype(jnp.float32)
        centred = x32 - checkpoint_name(x32.mean(-1, keepdims=True), STATISTIC)
        variance = checkpoint_name(jnp.square(centred).mean(-1, keepdims=True), STATISTIC)
        y = centred * jax.lax.rsqrt(variance + self.eps) * match_rank(scale, x) + match_rank(bias, x)
        return y.astype(x.dtype)


class RMSNorm(nn.Module):
    """Unit mean square over D, then scale; float32, since bfloat16 loses the mean square."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # [..., D] -> [..., D]
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        x32 = x.astype(jnp.float32)
        mean_square = jnp.square(x32).mean(-1, keepdims=True)
        return (x32 * jax.lax.rsqrt(mean_square + self.eps) * match_rank(scale, x)).astype(x.dtype)


def divided(x: jax.Array, config: InternVLConfig, num_rows: int | None = None) -> jax.Array:
    """An activation that leads with rows (or their tiles), on the devices that have the rows: without a word XLA might
    rather move activations to the parts of the weights. `num_rows`: where the axis also has their positions."""
    if config.mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, by_rows(config.mesh, num_rows or x.shape[0]))


def divided_by_width(x: jax.Array, config: InternVLConfig) -> jax.Array:
    """Rows of an embedding [B, T, D] on the devices that have their rows, by way of those that have their part of D:
    in one step XLA would send everything to everyone."""
    if config.mesh is None:
        return x
    return divided(jax.lax.with_sharding_constraint(x, by_width(config.mesh, x.shape)), config)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    config: InternVLConfig,
    causal: bool,
    num_filler: int = 0,
    seen: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention; logits and softmax in float32, since bfloat16 cannot tell close logits apart.

    Args:
      q: [B, T, N, H].
      k, v: [B, U, K, H]; each of the K heads serves N / K query heads. U = T but where `seen` is given.
      causal: position t sees positions <= t only.
      num_filler: the last positions, which no other sees; fused attention alone has any (`with_filler`).
      seen: bool [B, T, U], in place of all that: what each query sees, itself at least. The queries are at the last T
        of the U positions, and none sees a later one.

    Returns:
      [B, T, N, H].
    """
    if seen is not None and (jax.default_backend() != "cpu" or config.mesh is not None):
        return jax.nn.dot_product_attention(q, k, v, mask=seen[:, None], implementation=config.attention)
    if config.attention == "cudnn":
        lengths = {}
        if num_filler:
            num_tokens = q.shape[1]
            # Of q, since under vmap jax 0.10 takes them for mapped where q is.
            nought = 0 * jnp.isnan(q[:, 0, 0, 0]).astype(jnp.int32)
            lengths["query_seq_lengths"] = nought + num_tokens
            lengths["key_value_seq_lengths"] = nought + num_tokens - num_filler
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn", **lengths)
    if jax.default_backend() == "cpu" and config.mesh is None:  # its loop over heads cannot be divided
        return attend_in_blocks(q, k, v, causal or seen is not None, seen)
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="xla")


def choose_attention(compute_dtype: str, forward_mode: bool) -> str:
    """The fastest attention here that serves: "cudnn" on an NVIDIA GPU from Ampere on, in bfloat16, else "xla".

    `forward_mode`: whether the model will be pushed forward (`jax.jvp`) or differentiated twice, which "cudnn" cannot.
    """
    device = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", ""))  # "9.0"; AMD has names such as "gfx942"
    is_new = capability.replace(".", "", 1).isdigit() and float(capability) >= 8
    return "cudnn" if is_new and compute_dtype == "bfloat16" and not forward_mode else "xla"


def with_filler(x: jax.Array, config: InternVLConfig) -> jax.Array:
    """[B, T, D] with filler after the last position, where attention is fused.

    Its gradient takes even numbers of positions alone, and XLA first copies what a product sums over to a multiple of
    8: the positions, in every kernel's gradient.
    """
    num_filler = -x.shape[1] % 8 if config.attention == "cudnn" else 0
    return jnp.pad(x, ((0, 0), (0, num_filler), (0, 0))) if num_filler else x


_CACHED_LOGITS = 2**18  # float32 logits at a time, 1 MiB: with their neighbours they stay in a core's cache


def attend_in_blocks(
    q: jax.Array, k: jax.Array, v: jax.Array, causal: bool, seen: jax.Array | None = None
) -> jax.Array:
    """What `attend` computes, in the order that suits a CPU: few logits at a time, which stay in its cache.

    The gradient forms them again, since that takes less time than to write and read them.
    """
    num_rows, num_tokens, num_heads, width = q.shape
    num_past = k.shape[1] - num_tokens
    # Blocks of queries; if causal, with the keys up to the block's end alone, so that almost half of the logits are
    # never formed. At most 8 blocks, since each is code to compile.
    size = -(-num_tokens // min(8, -(-num_tokens // 256)))

    def one_head(inputs: tuple[jax.Array, ...]) -> jax.Array:
        q, k, v, row = inputs  # [T, H], [H, U], [U, H], []
        blocks = []
        for start in range(0, num_tokens, size):
            end = min(start + size, num_tokens)
            last = num_past + end if causal else num_tokens
            visible = jnp.tri(end - start, last, num_past + start, dtype=bool) if causal else None
            if seen is not None:
                visible = seen[row, start:end, :last]
            blocks.append(_weigh(q[start:end], k[:, :last], v[:last], visible))
        return jnp.concatenate(blocks)

    # Heads go before positions, and k and v are copied for every query head, as each is a product of its own. Of k the
    # positions come last: its gradient is then a product with long rows.
    q, k, v = (jnp.repeat(x.swapaxes(1, 2), num_heads // x.shape[2], axis=1) for x in (q, k, v))
    q, k, v = (x.reshape(-1, x.shape[2], width) for x in (q, k, v))
    rows = jnp.repeat(jnp.arange(num_rows), num_heads)
    # As many heads at once as fit, a divisor of all; one is not a batch of one, whose products are slower.
    fitting = [n for n in range(2, len(q) + 1) if len(q) % n == 0 and n * size * k.shape[1] <= _CACHED_LOGITS]
    at_once = max(fitting, default=None)
    mixed = jax.lax.map(jax.checkpoint(one_head, prevent_cse=False), (q, k.swapaxes(1, 2), v, rows), batch_size=at_once)
    return mixed.reshape(num_rows, num_heads, num_tokens, width).swapaxes(1, 2)


def _weigh(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array | None) -> jax.Array:
    """[Q, H], [H, T], [T, H] -> [Q, H]; `visible` [Q, T] says what each query sees, None: everything."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    logits = jnp.einsum("qh,ht->qt", q, k, preferred_element_type=wide) * q.shape[-1] ** -0.5
    if visible is not None:
        logits = jnp.where(visible, logits, jnp.finfo(wide).min)
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
    mixed = jnp.einsum("qt,th->qh", weights.astype(v.dtype), v, preferred_element_type=wide)
    # The sums divide [Q, H], not [Q, T]: of that size the gradient then needs the weights alone.
    return (mixed / weights.sum(-1, keepdims=True)).astype(v.dtype)


def _is_kept(primitive: Any, *args: Any, **params: Any) -> bool:
    """What remat "dots" keeps: projections, their bias included, statistics of `LayerNorm`, and what fused attention
    hands to its gradient."""
    return _has_kept_name(primitive, *args, **params) or primitive.name.startswith("dot_product_attention_fwd")


def scan_layers(block: type[nn.Module], config: InternVLConfig, num_layers: int, inputs: str = "") -> Any:
    """`block` repeated `num_layers` times in one loop: parameters stacked on a leading L axis, compiled once.

    The block maps (x, *inputs) to (x, output). `inputs` has a letter for each: "s", the same for every layer, or "l",
    each layer its own, stacked on a leading L axis, as the outputs are. `config.remat` says what the backward pass
    recomputes.
    """
    if config.remat != "none":
        saved = _is_kept if config.remat == "dots" else None
        # A loop already keeps XLA from merging the recomputation with the forward pass; without one it has to be told.
        block = nn.remat(block, policy=saved, prevent_cse=config.scan_unroll >= num_layers)
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=tuple(nn.broadcast if letter == "s" else 0 for letter in inputs),
        length=num_layers,
        unroll=min(config.scan_unroll, num_layers),
    )
