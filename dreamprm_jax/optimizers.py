"""Optax transformations that may be differentiated through, and the table's own optimizer."""

from __future__ import annotations

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


def safe_sqrt(x: jax.Array) -> jax.Array:
    """sqrt with derivative 0 at 0, where the true one is infinite.

    A parameter that has never had a gradient (the embedding row of an unused token) has a second moment of
    exactly 0; infinity times its zero gradient would turn the whole meta-gradient into NaN.
    """
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1.0)), 0.0)


def scale_by_adam_meta_safe(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> optax.GradientTransformation:
    """`optax.scale_by_adam` with the same values, whose derivative is finite everywhere."""

    def init(params: Any) -> optax.ScaleByAdamState:
        mu, nu = jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.zeros_like, params)
        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), mu, nu)

    def update(grads: Any, state: optax.ScaleByAdamState, params: Any = None) -> tuple[Any, optax.ScaleByAdamState]:
        count = state.count + 1
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, grads)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * jnp.square(g), state.nu, grads)
        correction1 = 1 - b1 ** count.astype(jnp.float32)
        correction2 = 1 - b2 ** count.astype(jnp.float32)
        updates = jax.tree.map(
            lambda m, v: (m / correction1) / (safe_sqrt(v / correction2) + eps),
            mu,
            nu,
        )
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def decay_mask(params: Any) -> Any:
    """True for matrices and embeddings; norms, biases, layer scales and position tables are not decayed."""

    def is_decayed(path: tuple, _: jax.Array) -> bool:
        return path[-1].key in ("kernel", "embedding", "lm_head")

    return jax.tree_util.tree_map_with_path(is_decayed, params)


def adamw(
    learning_rate: Schedule, *, weight_decay: float, eps: float = 1e-8, clip_norm: float | None = None
) -> optax.GradientTransformation:
    """The inner optimizer: optional clip by global norm, meta-safe Adam, decoupled decay on matrices.

    The clip acts on the gradient of the *weighted* loss. At batch size 1 an active clip makes the update
    independent of the weight, so the meta-gradient of that step is truly 0.
    """
    return optax.chain(
        optax.clip_by_global_norm(clip_norm) if clip_norm is not None else optax.identity(),
        scale_by_adam_meta_safe(eps=eps),
        optax.add_decayed_weights(weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(learning_rate),
    )


class PerEntryState(NamedTuple):
    count: Any  # int32, shaped like the table: how often each entry has had a gradient
    nu: Any  # second moments, shaped like the table


def per_entry_rmsprop(
    learning_rate: Schedule, *, decay: float = 0.999, weight_decay: float = 0.0, centre: float = 1.0
) -> optax.GradientTransformation:
    """RMSprop for a sparse table: an entry's second moment and its bias correction count its own gradients only.

    Dense Adam moves an untouched entry for about ten more steps on its old momentum and gives a rarely
    touched one a step many times the learning rate. Here an entry without a gradient stays where it is,
    bit for bit. There is no epsilon, so the path does not depend on the gradient's scale: the exact
    meta-gradient carries the inner learning rate and would sink below any fixed epsilon.

    There is no momentum either: an entry is drawn once an epoch, so the usual ten gradients of memory would be
    ten epochs old, and the model that they spoke of is gone (docs/bilevel.md has the measurement).

    Decay pulls touched entries towards `centre`, the initial weight, not towards 0.
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


def divide_by_inner_rate(inner_rate: Schedule) -> optax.GradientTransformation:
    """Divides the meta-gradient by the inner learning rate of the same step.

    The exact meta-gradient is proportional to that rate (at 5e-5 about 20,000 times smaller than the
    gradient of the loss it looks through): undivided, a clip at 1 never acts, Adam's epsilon eats it, and
    the inner cosine fades it out. Where the rate is 0 the gradient is 0 and stays so.
    """

    def factor(count: jax.Array) -> jax.Array:
        rate = inner_rate(count)
        return jnp.where(rate > 0, 1.0 / jnp.where(rate > 0, rate, 1.0), 0.0)

    return optax.scale_by_schedule(factor)
