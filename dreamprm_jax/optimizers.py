"""Optax transformations that may be differentiated through, and the table's own optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Schedule = Callable[[jax.Array], jax.Array]


def warmup_cosine(peak: float, num_steps: int, warmup_fraction: float = 0.05) -> Schedule:
    """Linear warm-up over the first `warmup_fraction` of the steps, then half a cosine to 0.

    The first step already moves (peak / warm-up steps) and the last still does: the published schedule gives
    both a rate of exactly 0, which wastes one step and makes the first meta-gradient vanish.
    """
    warmup_steps = max(1, round(warmup_fraction * num_steps))

    def schedule(count: jax.Array) -> jax.Array:
        warm = (count + 1) / warmup_steps
        progress = (count + 1 - warmup_steps) / max(1, num_steps + 1 - warmup_steps)
        cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.clip(progress, 0.0, 1.0)))
        return peak * jnp.where(count < warmup_steps, warm, cosine)

    return schedule


def warmup_constant(peak: float, num_steps: int, warmup_fraction: float = 0.05) -> Schedule:
    """Linear warm-up over the first `warmup_fraction` of the steps, then `peak` to the end.

    For the outer level: the meta-gradient tells more the further the model is, when a cosine has little rate left.
    """
    warmup_steps = max(1, round(warmup_fraction * num_steps))

    def schedule(count: jax.Array) -> jax.Array:
        return peak * jnp.minimum(1.0, (count + 1) / warmup_steps)

    return schedule


def warmup_cosine_as_published(peak: float, num_steps: int, warmup_fraction: float = 0.05) -> Schedule:
    """transformers' cosine with a warm-up of `warmup_fraction * num_steps` steps, a fraction of a step included.

    Its first rate is 0, so the first step of either level moves nothing.
    """
    warmup_steps = warmup_fraction * num_steps

    def schedule(count: jax.Array) -> jax.Array:
        warm = count / max(1.0, warmup_steps)
        progress = (count - warmup_steps) / max(1.0, num_steps - warmup_steps)
        cosine = jnp.maximum(0.0, 0.5 * (1.0 + jnp.cos(jnp.pi * progress)))
        return peak * jnp.where(count < warmup_steps, warm, cosine)

    return schedule


SCHEDULES: dict[str, Callable[[float, int, float], Schedule]] = {
    "cosine": warmup_cosine,
    "constant": warmup_constant,
    "published": warmup_cosine_as_published,
}
"""(peak, num_steps, warmup_fraction) -> schedule."""


def widen(tree: Any) -> Any:
    """Leaves as float32 at least: bfloat16 has 8 bits, so that 0.999 is 1 in it and sums of many terms stand still."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)), tree)


def norm(tree: Any) -> jax.Array:
    """Global norm, added up in float32 at least."""
    return optax.tree.norm(widen(tree))


def is_finite(tree: Any) -> jax.Array:
    """Whether all entries are finite, bool []; told by the norm, so entries whose squares overflow are not."""
    return jnp.isfinite(jax.lax.stop_gradient(norm(tree)))


def safe_sqrt(x: jax.Array) -> jax.Array:
    """sqrt with derivative 0 at 0, where the true one is infinite.

    A parameter that has never had a gradient (the embedding row of an unused token) has a second moment of
    exactly 0; infinity times its zero gradient would turn the whole meta-gradient into NaN.
    """
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1.0)), 0.0)


@jax.custom_jvp
def round_at_random(x: jax.Array, bits: jax.Array) -> jax.Array:
    """float32 -> bfloat16, one of its two neighbours there, so that the mean over the uint16 `bits` is x.

    For the derivative the rounding is the identity.
    """
    # A bfloat16 is the upper half of a float32: the lower half carries over as often as it is large.
    carried = jax.lax.bitcast_convert_type(x, jnp.uint32) + bits.astype(jnp.uint32)
    upper = jax.lax.bitcast_convert_type((carried >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), upper, x.astype(jnp.bfloat16))


@round_at_random.defjvp
def _(primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, Any]) -> tuple[jax.Array, jax.Array]:
    return round_at_random(*primals), tangents[0].astype(jnp.bfloat16)


def _bits(shape: tuple[int, ...], count: jax.Array, number: int) -> jax.Array:
    """uint16 [shape], a hash of each entry's place, the step and the leaf's number.

    Plain arithmetic on the place, which XLA computes where the bits are used: `jax.random` would write them to memory
    first, half a gigabyte for every 268 million parameters, and takes twice as long to compile.
    """

    def mixed(x: jax.Array) -> jax.Array:  # the last steps of MurmurHash3: every bit of x moves every other
        x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
        x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
        return x ^ (x >> 16)

    seed = mixed(mixed(count.astype(jnp.uint32)) + jnp.uint32(number))
    place = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    return (mixed(mixed(place) + seed) >> 16).astype(jnp.uint16)


def _no_moments(params: Any, moment_dtype: str | None) -> optax.ScaleByAdamState:
    mu, nu = (jax.tree.map(lambda leaf: jnp.zeros_like(leaf, moment_dtype), params) for _ in range(2))
    return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), mu, nu)


def _moments(
    state: optax.ScaleByAdamState, grads: Any, b1: float, b2: float, moment_dtype: str | None
) -> tuple[jax.Array, Any, Any]:
    """Adam's next count and moments, computed in float32 at least and rounded once to the type they are kept in.

    A gradient that is not finite leaves all three as they are. (A schedule goes on: it is by steps.)

    A second moment that moves by 1/1000 a step would stand still in bfloat16, whose numbers are 1/128 to 1/256 apart.
    Where that type is asked for it is rounded at random, by bits that are a function of the step's number: on average
    it is right, and a resumed run has the same. Where the type is the parameters' own it stands still, as published.
    For the derivative either rounding is the identity.
    """

    finite = is_finite(grads)
    count = state.count + finite

    def mix(old: jax.Array, new: jax.Array, decay: float) -> jax.Array:
        return jax.lax.select(finite, decay * widen(old) + (1 - decay) * new, widen(old))

    mu = jax.tree.map(lambda m, g: mix(m, widen(g), b1).astype(m.dtype), state.mu, grads)
    nu = jax.tree.map(lambda v, g: mix(v, jnp.square(widen(g)), b2), state.nu, grads)
    if moment_dtype != "bfloat16":
        return count, mu, jax.tree.map(lambda new, old: new.astype(old.dtype), nu, state.nu)
    leaves, tree = jax.tree.flatten(nu)
    rounded = [
        round_at_random(leaf.astype(jnp.float32), _bits(leaf.shape, state.count, number))
        for number, leaf in enumerate(leaves)
    ]
    return count, mu, tree.unflatten(rounded)


def scale_by_adam_meta_safe(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, moment_dtype: str | None = None
) -> optax.GradientTransformation:
    """`optax.scale_by_adam` with the same values, whose derivative is finite everywhere.

    `moment_dtype`: "float32" or "bfloat16", that the moments are kept in; None: the parameters' own. The step itself is
    computed in float32.
    """

    def update(grads: Any, state: optax.ScaleByAdamState, params: Any = None) -> tuple[Any, optax.ScaleByAdamState]:
        count, mu, nu = _moments(state, grads, b1, b2, moment_dtype)
        correction1 = 1 - b1 ** count.astype(jnp.float32)
        correction2 = 1 - b2 ** count.astype(jnp.float32)

        # For the way back only the moments are kept, which are the next state in any case. Quotients and roots would be
        # two more arrays of the parameters' size, while the meta loss takes its memory.
        @jax.checkpoint
        def direction(m: jax.Array, v: jax.Array) -> jax.Array:
            return (widen(m) / correction1) / (safe_sqrt(widen(v) / correction2) + eps)

        directions = jax.tree.map(lambda g, m, v: direction(m, v).astype(g.dtype), grads, mu, nu)
        return directions, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(lambda params: _no_moments(params, moment_dtype), update)


def decay_mask(params: Any) -> Any:
    """True for matrices and embeddings; norms, biases, layer scales and position tables are not decayed."""

    def is_decayed(path: tuple, _: jax.Array) -> bool:
        return path[-1].key in ("kernel", "embedding", "lm_head", "lora_a", "lora_b")

    return jax.tree_util.tree_map_with_path(is_decayed, params)


def clip_by_global_norm(clip_norm: float) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm` whose derivative is finite at a gradient of 0 (a batch whose weights are all 0)."""

    def update(grads: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        size = safe_sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(widen(grads))))
        active = size > clip_norm
        factor = jnp.where(active, clip_norm / jnp.where(active, size, 1.0), 1.0)
        return jax.tree.map(lambda leaf: (leaf * factor).astype(leaf.dtype), grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def adamw(
    learning_rate: Schedule,
    *,
    weight_decay: float,
    eps: float = 1e-8,
    decay_all: bool = False,
    moment_dtype: str | None = None,
) -> optax.GradientTransformation:
    """Meta-safe Adam with decoupled decay, on matrices and embeddings or on all parameters."""
    return optax.chain(
        scale_by_adam_meta_safe(eps=eps, moment_dtype=moment_dtype),
        optax.add_decayed_weights(weight_decay, mask=None if decay_all else decay_mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def _one_minus_power(base: float, count: jax.Array) -> jax.Array:
    """1 - base^count to full precision: as a float32, 0.999 alone puts 1e-5 of error into 1 - 0.999."""
    return -jnp.expm1(count * math.log(base))


def hf_adamw(
    learning_rate: Schedule,
    *,
    weight_decay: float,
    eps: float = 1e-6,
    b1: float = 0.9,
    b2: float = 0.999,
    moment_dtype: str | None = None,
) -> optax.GradientTransformation:
    """transformers' own AdamW, which the published code uses (REFERENCE 3), with a derivative that is finite.

    It differs from the usual one in two places: eps is added to sqrt(v) before the bias correction, and the decay
    acts on every parameter *after* the step: p' = p - lr c m / (sqrt(v) + eps); p' - lr decay p'.
    """

    def update(grads: Any, state: optax.ScaleByAdamState, params: Any) -> tuple[Any, optax.ScaleByAdamState]:
        # One count for schedule and bias correction, which goes on past a gradient that is not finite.
        rate, count = learning_rate(state.count), state.count + 1
        _, mu, nu = _moments(state, grads, b1, b2, moment_dtype)
        size = rate * jnp.sqrt(_one_minus_power(b2, count)) / _one_minus_power(b1, count)

        @jax.checkpoint  # as in scale_by_adam_meta_safe
        def change(p: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
            step = -size * widen(m) / (safe_sqrt(widen(v)) + eps)
            return (step - rate * weight_decay * (p + step)).astype(p.dtype)

        return jax.tree.map(change, params, mu, nu), optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(lambda params: _no_moments(params, moment_dtype), update)


class PerEntryState(NamedTuple):
    count: Any  # int32, shaped like the table: how often each entry has had a gradient
    nu: Any  # second moments, shaped like the table


def per_entry_rmsprop(
    learning_rate: Schedule, *, decay: float = 0.8, weight_decay: float = 0.0, centre: float = 1.0
) -> optax.GradientTransformation:
    """RMSprop for a sparse table: an entry's second moment and its bias correction count its own gradients only.

    Dense Adam moves an untouched entry for about ten more steps on its old momentum and gives a rarely
    touched one a step many times the learning rate. Here an entry without a gradient stays where it is,
    bit for bit. There is no epsilon, so the path does not depend on the gradient's scale: the exact
    meta-gradient carries the inner learning rate and would sink below any fixed epsilon.

    There is no momentum either: an entry is drawn once an epoch, so the usual ten gradients of memory would be
    ten epochs old, and the model that they spoke of is gone (docs/bilevel.md says what it is worth).

    The second moment remembers about five gradients (`decay`), not a whole run: the meta-gradient shrinks as the model
    comes to fit the meta set, and divided by its early size it could no longer move an entry that was wrong early.

    The weight decay pulls touched entries towards `centre`, the initial weight, not towards 0.
    """

    def init(params: Any) -> PerEntryState:
        count = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.int32), params)
        return PerEntryState(count, jax.tree.map(jnp.zeros_like, params))

    def update_entry(grad: jax.Array, param: jax.Array, count: jax.Array, nu: jax.Array) -> tuple[jax.Array, ...]:
        touched = grad != 0
        count = count + touched
        nu = jnp.where(touched, decay * nu + (1 - decay) * jnp.square(grad), nu)
        corrected = nu / (1 - decay ** jnp.maximum(count, 1).astype(jnp.float32))
        direction = grad / jnp.sqrt(jnp.where(nu > 0, corrected, 1.0)) + weight_decay * (param - centre)
        return jnp.where(touched, direction, 0.0), count, nu

    def update(grads: Any, state: PerEntryState, params: Any) -> tuple[Any, PerEntryState]:
        results = jax.tree.map(update_entry, grads, params, state.count, state.nu)
        direction, count, nu = jax.tree.transpose(jax.tree.structure(grads), jax.tree.structure((0, 0, 0)), results)
        return direction, PerEntryState(count, nu)

    return optax.chain(optax.GradientTransformation(init, update), optax.scale_by_learning_rate(learning_rate))


def divide_by_inner_rate(inner_rate: Schedule, num_inner_steps: int = 1) -> optax.GradientTransformation:
    """Divides the meta-gradient by the inner learning rate of the same iteration (the mean over its inner steps).

    The exact meta-gradient is proportional to that rate (at 5e-5 about 20,000 times smaller than the
    gradient of the loss it looks through): undivided, a clip at 1 never acts, Adam's epsilon eats it, and
    the inner cosine fades it out. Where the rate is 0 the gradient is 0 and stays so.
    """

    def factor(count: jax.Array) -> jax.Array:
        rate = jnp.mean(jax.vmap(inner_rate)(count * num_inner_steps + jnp.arange(num_inner_steps)))
        return jnp.where(rate > 0, 1.0 / jnp.where(rate > 0, rate, 1.0), 0.0)

    return optax.scale_by_schedule(factor)


def one_of_each(params: Any) -> dict[str, dict[str, jax.Array]]:
    """Of the leaves of one name, rank and type the first. The name comes last in a path, as in the model's parameters.

    Enough to try `steps.inner_optimizer` on, which tells no others apart, in a fraction of the time to compile.
    """
    found: dict[str, dict[str, jax.Array]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        found.setdefault(f"{leaf.ndim} {leaf.dtype}", {}).setdefault(path[-1].key, leaf)
    return found


def derivative_vanishes(tx: optax.GradientTransformation, params: Any, num_steps: int = 4) -> bool:
    """Whether an optimizer's step sometimes does not depend on its gradient at all: a warning is due.

    Sign-type optimizers never depend on it, accumulating ones only in every n-th step; the exact meta-gradient is 0
    there. The optimizer is tried on stand-ins for `params`, same tree and rank, at most 2 wide. The first step does
    not count: a schedule may begin at 0.
    """
    small = jax.tree.map(lambda leaf: jnp.ones([min(2, n) for n in leaf.shape], leaf.dtype), params)

    @jax.jit
    def look_back(step: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        grads = jax.tree.map(
            lambda leaf: (jnp.arange(leaf.size) + 1.0 + step).reshape(leaf.shape).astype(leaf.dtype), small
        )
        _, pull, state = jax.vjp(lambda grads: tx.update(grads, state, small), grads, has_aux=True)
        return jnp.any(jnp.array([jnp.any(leaf != 0) for leaf in jax.tree.leaves(pull(small)[0])])), state

    state, silent = tx.init(small), []
    for step in range(num_steps):
        depends, state = look_back(step, state)
        silent.append(not bool(depends))
    return any(silent[1:])


def update_ema(ema: Any, params: Any, decay: float) -> Any:
    """Moving average of the parameters, for scoring: decay ema + (1 - decay) params."""
    return jax.tree.map(lambda average, leaf: decay * average + (1 - decay) * leaf, ema, params)
