"""The meta-gradient: how the meta loss after the inner steps changes with the weighting's parameters.

    inner loss     L_in(params, meta_params) = (1/B) sum_i c_i w_i l_i(params),  w_i = weights(meta_params, ...)
    inner step     params' = params + U(g; opt_state, params),                   U any optax transformation
    meta-gradient  d L_meta(params'(meta_params)) / d meta_params

c_i is 1, or the factor that clips example i's own gradient before it is weighted. The estimators differ in cost and
memory, not in signature (`Estimator`); all share `cotangents` and `advance` with plain training, and tests compare
their step with its. docs/bilevel.md has the derivations, docs/reproduction.md the measured costs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from dreamprm_jax.inner import (
    InnerPass,
    Problem,
    Values,
    advance,
    clip_factor,
    cotangents,
    example_gradients,
    example_loss,
    in_order,
    in_turns,
    inner_gradient,
    inner_steps,
    last_batch,
    mean_weighted_loss,
    of_each,
    over_steps,
    real_rows,
    rows_at_once,
    side_by_side,
    step_record,
    unit_factors,
)
from dreamprm_jax.optimizers import norm, widen
from dreamprm_jax.sharding import beside_rows
from dreamprm_jax.types import Batch, PyTree, TrainState

Result = tuple[PyTree, TrainState, dict[str, jax.Array]]

Estimator = Callable[[Problem, TrainState, PyTree, Batch, Batch], Result]
"""(problem, state, meta_params, batch, meta_batch) -> (meta_grad, new_state, aux)."""


def unrolled(problem: Problem, state: TrainState, meta_params: PyTree, batch: Batch, meta_batch: Batch) -> Result:
    """`jax.grad` straight through the optimizer steps: the definition, and the reference for all others.

    Invariant: exact for any optax transformation, any weighting and any number of inner steps. Costs about 8 forward
    passes at one inner step (a plain step: 3) and keeps the activations of all passes.
    """

    def objective(meta_params: PyTree) -> tuple[jax.Array, tuple[TrainState, dict[str, jax.Array]]]:
        new_state, aux = inner_steps(problem, state, meta_params, batch)
        loss, meta_aux = problem.meta_loss(new_state.params, meta_batch)
        return loss, (new_state, {**aux, **meta_aux, "meta_loss": loss})

    meta_grad, (new_state, aux) = jax.grad(objective, has_aux=True)(meta_params)
    return meta_grad, new_state, aux


def dot(problem: Problem, state: TrainState, meta_params: PyTree, batch: Batch, meta_batch: Batch) -> Result:
    """Each example's unweighted gradient, kept from the inner step, times u.

    Invariant: dL_meta/dw_i = c_i <u, grad l_i> / B, u = (dU/dg)^T grad L_meta(params'); exact for one inner step
    and weights that are detached from the model. It costs one training and one meta gradient and nothing more, which
    is the floor, and keeps B copies of the parameters' size in the compute type; the examples are taken in turn, so it
    suits models of which one example fills the machine. The gradients are weighted after they are taken, since a weight
    of 0 would leave nothing to divide by. Reverse mode alone.
    """
    check_estimator(problem, "dot")
    values, gradients = example_gradients(problem, state.params, batch)  # leaves [turns, at_once, ...]

    def of_gradients(take: Callable[[PyTree], PyTree]) -> PyTree:  # leaves [B]
        return in_order(jax.lax.map(lambda turn: side_by_side(take, turn), gradients))

    factors = clip_factor(problem, of_gradients(norm))
    coefficients = cotangents(problem, meta_params, batch, values, factors)[0]  # [B]: c_i w_i / B
    grads = _weighted_gradient(coefficients, gradients, state.params)
    new_state, u, meta_aux = _look_back(problem, state, grads, meta_batch)
    u = beside_rows(problem.mesh, u)
    slopes, zero = _drop_residues(*of_gradients(partial(_slope_and_scale, u)))  # <u, grad l_i>
    meta_grad = _meta_slope(problem, meta_params, batch, values, (slopes, None), factors)
    record = step_record(problem, meta_params, batch, values, factors, grads)
    return meta_grad, new_state, {**record, **meta_aux, "zero_share": _share(batch, zero)}


def recompute(problem: Problem, state: TrainState, meta_params: PyTree, batch: Batch, meta_batch: Batch) -> Result:
    """Each example's gradient taken again, one by one, times u.

    Invariant: that of `dot`. Reverse mode alone, so it serves attention kernels without forward mode; 9 forward
    passes, and the memory of one gradient whatever B is.
    """
    check_estimator(problem, "recompute")
    grads, inner = inner_gradient(problem, state.params, meta_params, batch)
    new_state, u, meta_aux = _look_back(problem, state, grads, meta_batch)
    u, computed = beside_rows(problem.mesh, u), problem.cast_to_compute(state.params)

    def slope(example: Batch) -> tuple[jax.Array, jax.Array]:
        return _slope_and_scale(u, jax.grad(example_loss, argnums=1)(problem, computed, example))

    slopes, zero = _drop_residues(*in_order(of_each(problem, slope, batch)))
    meta_grad = _meta_slope(problem, meta_params, batch, inner.values, (slopes, None), inner.factors)
    return meta_grad, new_state, {**inner.record, **meta_aux, "zero_share": _share(batch, zero)}


def tangent(problem: Problem, state: TrainState, meta_params: PyTree, batch: Batch, meta_batch: Batch) -> Result:
    """The slope of the per-example losses along u, from one linearisation that the inner gradient shares.

    Invariant: with J the derivative of (losses, outputs) and h their weighted mean, the inner gradient is
    J^T grad h and the meta-gradient d<grad h, J u>/d meta_params; weights that depend on the model are covered. One
    inner step; about 8 forward passes; the activations of the inner pass are kept until u is known.
    """
    check_estimator(problem, "tangent")
    if problem.example_clip_norm is not None:  # its gradient is taken example by example: nothing to share
        return tangent_recomputed(problem, state, meta_params, batch, meta_batch)
    values, push = jax.linearize(lambda params: problem.losses(params, batch), state.params)
    factors = unit_factors(values)
    (grads,) = jax.linear_transpose(push, state.params)(cotangents(problem, meta_params, batch, values, factors))
    inner = InnerPass(values, factors, None, step_record(problem, meta_params, batch, values, factors, grads))
    return _along_u(problem, state, meta_params, batch, meta_batch, grads, inner, push)


def tangent_recomputed(
    problem: Problem, state: TrainState, meta_params: PyTree, batch: Batch, meta_batch: Batch
) -> Result:
    """`tangent` with the losses pushed forward anew (`jax.jvp`): 9 forward passes, no activations kept.

    Invariant: that of `tangent`; an active clip per example is a constant of its one step.
    """
    check_estimator(problem, "tangent_recomputed")
    grads, inner = inner_gradient(problem, state.params, meta_params, batch)

    def push(direction: PyTree) -> Values:
        return jax.jvp(lambda params: problem.losses(params, batch), (state.params,), (direction,))[1]

    return _along_u(problem, state, meta_params, batch, meta_batch, grads, inner, push)


def _along_u(
    problem: Problem,
    state: TrainState,
    meta_params: PyTree,
    batch: Batch,
    meta_batch: Batch,
    grads: PyTree,
    inner: InnerPass,
    push: Callable[[PyTree], Values],
) -> Result:
    """What both tangents share: step, look back, push u forward."""
    new_state, u, meta_aux = _look_back(problem, state, grads, meta_batch)
    slopes, outputs_slope = push(u)
    if problem.detached:
        # No example's own gradient is at hand; the batch's, over its largest coefficient, is just that at B = 1.
        coefficients = cotangents(problem, meta_params, batch, inner.values, inner.factors)[0]
        largest = jnp.max(jnp.abs(coefficients))
        scale = _slope_and_scale(u, grads)[1] / jnp.where(largest > 0, largest, jnp.inf)
        slopes, zero = _drop_residues(slopes, scale)
        meta_aux["zero_share"] = _share(batch, zero)
    meta_grad = _meta_slope(problem, meta_params, batch, inner.values, (slopes, outputs_slope), inner.factors)
    return meta_grad, new_state, {**inner.record, **meta_aux}


def mixed(problem: Problem, state: TrainState, meta_params: PyTree, batch: Batch, meta_batch: Batch) -> Result:
    """Reverse through the optimizer steps, forward over reverse through each step's gradient.

    Invariant: exact for any number of inner steps. A cotangent of g(params, meta_params) needs <cotangent, g>
    differentiated, which is one `jax.jvp` of g along it, so no activations outlive their step: 9 forward passes a step
    and 3. Of a step only g is kept. The states between are recomputed from the first one by replaying the optimizer,
    K (K - 1) / 2 further steps of it, cheap beside K gradients while K is small.
    """
    one_step = problem.num_inner_steps == 1
    batches = jax.tree.map(lambda leaf: leaf[None], batch) if one_step else batch  # leaves [K, B, ...]

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Any]:
        grads, inner = inner_gradient(problem, state.params, meta_params, batch)
        _, new_state = advance(problem, state, grads)
        return new_state, (grads, inner.factors, inner.example_norms, inner.record)

    new_state, (kept, factors, norms, record) = jax.lax.scan(step, state, batches)
    v, meta_aux = _meta_loss_gradient(problem, new_state.params, meta_batch)

    def step_back(carry: tuple[TrainState, PyTree], now: Any) -> tuple[tuple[TrainState, PyTree], None]:
        cotangent, meta_grad = carry
        k, batch, factors, norms = now
        before = jax.lax.fori_loop(0, k, lambda j, earlier: advance(problem, earlier, _row(kept, j))[1], state)

        def after(grads: PyTree, floats: PyTree) -> PyTree:
            return _floats(advance(problem, _with_floats(before, floats), grads)[1])

        _, pull = jax.vjp(after, _row(kept, k), _floats(before))
        direction, cotangent = pull(cotangent)
        slopes = _gradient_slopes(problem, before.params, meta_params, batch, factors, norms, direction)
        cotangent = cotangent._replace(params=jax.tree.map(jnp.add, cotangent.params, slopes[0]))
        return (cotangent, jax.tree.map(jnp.add, meta_grad, slopes[1])), None

    cotangent, meta_grad = jax.tree.map(jnp.zeros_like, (_floats(new_state), meta_params))
    steps = (jnp.arange(problem.num_inner_steps), batches, factors, norms)
    (_, meta_grad), _ = jax.lax.scan(step_back, (cotangent._replace(params=v), meta_grad), steps, reverse=True)
    record = _row(record, 0) if one_step else over_steps(record)
    return meta_grad, new_state, {**record, **meta_aux}


def _row(tree: PyTree, index: int | jax.Array) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[index], tree)


def _floats(tree: PyTree) -> PyTree:
    """`tree` with None in place of what has no derivative: counters."""
    return jax.tree.map(lambda leaf: leaf if jnp.issubdtype(leaf.dtype, jnp.inexact) else None, tree)


def _with_floats(tree: PyTree, floats: PyTree) -> PyTree:
    """`tree` with the leaves of `floats` where that has any."""
    return jax.tree.map(lambda leaf, other: leaf if other is None else other, tree, floats)


def _gradient_slopes(
    problem: Problem,
    params: PyTree,
    meta_params: PyTree,
    batch: Batch,
    factors: jax.Array,
    norms: jax.Array | None,
    direction: PyTree,
) -> tuple[PyTree, PyTree]:
    """The derivatives of <direction, g> with respect to params and meta_params.

    g = J^T gamma(values). With s = J direction, the one in params is J^T (d gamma / d values)^T s plus the curvature
    of the values along direction: forward mode through g, except that gamma's derivative is *transposed*. Where the
    weights are detached, gamma is no gradient and its derivative not symmetric, so the transpose is spelt out.
    """

    def gamma(meta_params: PyTree, values: Values, factors: jax.Array) -> Values:
        return cotangents(problem, meta_params, batch, values, factors)

    @jax.custom_jvp
    def transposed(values: Values) -> Values:
        return gamma(meta_params, values, factors)

    @transposed.defjvp
    def _(primals: tuple[Values], tangents: tuple[Values]) -> tuple[Values, Values]:
        out, pull = jax.vjp(lambda values: gamma(meta_params, values, factors), *primals)
        return out, pull(*tangents)[0]

    def pulled(params: PyTree) -> tuple[PyTree, Values]:
        values, pull = jax.vjp(lambda params: problem.losses(params, batch), params)
        return pull(transposed(values))[0], values

    (_, values), (params_slope, values_slope) = jax.jvp(pulled, (params,), (direction,))
    _, pull = jax.vjp(lambda meta_params, factors: gamma(meta_params, values, factors), meta_params, factors)
    meta_slope, factors_slope = pull(values_slope)
    if problem.example_clip_norm is not None:
        clip_slope = _clip_slope(problem, params, batch, factors, norms, factors_slope)
        params_slope = jax.tree.map(jnp.add, params_slope, clip_slope)
    return params_slope, meta_slope


def _clip_slope(
    problem: Problem, params: PyTree, batch: Batch, factors: jax.Array, norms: jax.Array, slopes: jax.Array
) -> PyTree:
    """sum_i slopes_i d c_i / d params, with c_i = clip / |grad l_i| where it is active: one jvp of each gradient."""
    active = norms > problem.example_clip_norm
    scales = jnp.where(active, -slopes * factors / jnp.where(active, jnp.square(norms), 1.0), 0.0)

    def curvature(example: Batch, scale: jax.Array) -> PyTree:
        gradient = jax.grad(lambda params: example_loss(problem, params, example))
        direction = jax.tree.map(lambda leaf: (scale * leaf).astype(leaf.dtype), gradient(params))
        return jax.jvp(gradient, (params,), (direction,))[1]

    def add(total: PyTree, turn: tuple[Batch, jax.Array]) -> tuple[PyTree, None]:
        parts = side_by_side(curvature, *turn)
        return jax.tree.map(lambda leaf, part: leaf + jnp.sum(part, axis=0), total, parts), None

    rows = in_turns((jax.tree.map(lambda leaf: leaf[:, None], batch), scales), rows_at_once(problem, batch))
    total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), rows)
    return total


def identity(problem: Problem, state: TrainState, meta_params: PyTree, batch: Batch, meta_batch: Batch) -> Result:
    """The published formula without its noise: -d/d meta_params of the slope of L_in at params' along v.

    It takes the optimizer for plain descent at rate 1 and the gradient for the one at params' (Betty's `darts`,
    REFERENCE 3). Not the derivative of anything; for comparison. Looks at the last inner step alone.
    """
    new_state, aux, meta_aux, v = _published_parts(problem, state, meta_params, batch, meta_batch)
    batch = last_batch(problem, batch)
    losses = lambda params: problem.losses(params, batch)  # noqa: E731
    values, slopes = jax.jvp(losses, (new_state.params,), (v,))
    problem = problem._replace(detached=False)  # the slope of L_in itself, as its differences have it
    meta_grad = _meta_slope(problem, meta_params, batch, values, slopes, unit_factors(values))
    return jax.tree.map(jnp.negative, meta_grad), new_state, {**aux, **meta_aux}


def published_fd(problem: Problem, state: TrainState, meta_params: PyTree, batch: Batch, meta_batch: Batch) -> Result:
    """`identity` by the published finite difference: `params' +- eps v` with `eps = 0.01 / |v|` (REFERENCE 3)."""
    new_state, aux, meta_aux, v = _published_parts(problem, state, meta_params, batch, meta_batch)
    batch = last_batch(problem, batch)
    eps = 0.01 / (meta_aux["v_norm"] + 1e-15)

    def slope(sign: float) -> PyTree:
        params = jax.tree.map(lambda p, d: (p + sign * eps * d).astype(p.dtype), new_state.params, v)
        values = problem.losses(params, batch)
        loss = lambda meta_params: mean_weighted_loss(problem, meta_params, batch, values, unit_factors(values))[0]  # noqa: E731
        return jax.grad(loss)(meta_params)

    meta_grad = jax.tree.map(lambda plus, minus: (minus - plus) / (2 * eps), slope(1.0), slope(-1.0))
    return meta_grad, new_state, {**aux, **meta_aux}


def _published_parts(
    problem: Problem, state: TrainState, meta_params: PyTree, batch: Batch, meta_batch: Batch
) -> tuple[TrainState, dict[str, Any], dict[str, Any], PyTree]:
    """The inner steps with their record, and the meta loss's record and gradient v at their end."""
    new_state, aux = inner_steps(problem, state, meta_params, batch)
    v, meta_aux = _meta_loss_gradient(problem, new_state.params, meta_batch)
    return new_state, aux, meta_aux, v


def _meta_loss_gradient(problem: Problem, params: PyTree, meta_batch: Batch) -> tuple[PyTree, dict[str, Any]]:
    """v, and what the meta level tells the log."""
    (loss, aux), v = jax.value_and_grad(problem.meta_loss, has_aux=True)(params, meta_batch)
    return v, {**aux, "meta_loss": loss, "v_norm": norm(v)}


def _look_back(
    problem: Problem, state: TrainState, grads: PyTree, meta_batch: Batch
) -> tuple[TrainState, PyTree, dict[str, Any]]:
    """The step, and u: the meta loss's gradient at params' pulled back through the optimizer onto `grads`."""
    params, pull, new_state = jax.vjp(lambda grads: advance(problem, state, grads), grads, has_aux=True)
    v, aux = _meta_loss_gradient(problem, params, meta_batch)
    (u,) = pull(v)
    return new_state, u, {**aux, "u_norm": norm(u)}


def _meta_slope(
    problem: Problem,
    meta_params: PyTree,
    batch: Batch,
    values: Values,
    values_slope: tuple[jax.Array, Any],
    factors: jax.Array,
) -> PyTree:
    """d/d meta_params of <grad h, values_slope>: what the slopes of losses and outputs mean for the weights.

    An outputs' part of None stands for zeros.
    """
    losses_slope, outputs_slope = values_slope
    if outputs_slope is None:
        outputs_slope = jax.tree.map(jnp.zeros_like, values[1])
    _, pull = jax.vjp(lambda meta_params: cotangents(problem, meta_params, batch, values, factors), meta_params)
    return pull((losses_slope, outputs_slope))[0]


def _weighted_gradient(coefficients: jax.Array, gradients: PyTree, params: PyTree) -> PyTree:
    """[B] and leaves [turns, at_once, ...] -> [...], in the types of `params`."""

    def add_up(leaf: jax.Array, param: jax.Array) -> jax.Array:
        in_turn = in_turns(coefficients, leaf.shape[1])
        return jnp.einsum("tb,tb...->...", in_turn, leaf, precision="highest").astype(param.dtype)

    return jax.tree.map(add_up, gradients, params)


def _slope_and_scale(u: PyTree, gradient: PyTree) -> tuple[jax.Array, jax.Array]:
    """<u, gradient>, and the sum of its terms' sizes, which its rounding error is proportional to."""
    u, gradient = widen(u), widen(gradient)
    return _inner(u, gradient), _inner(jax.tree.map(jnp.abs, u), jax.tree.map(jnp.abs, gradient))


def _inner(one: PyTree, other: PyTree) -> jax.Array:
    """<one, other>, over all axes as they are: optax flattens arrays first, for which devices would gather them."""
    products = jax.tree.map(lambda a, b: jnp.tensordot(a, b, axes=a.ndim, precision="highest"), one, other)
    return sum(jax.tree.leaves(products))


def _drop_residues(slopes: jax.Array, scales: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Slopes [B] that are rounding residues become 0; also says which, [B] bool.

    Where the truth is 0 (B = 1 and an active clip), floating point leaves about one part in 1e7 of the terms, which an
    outer optimizer that normalises would blow up to a full step. 8 units of rounding: 1e-6 in float32. The scale is
    sum |u_k g_k|, not |u| |g|: where an entry never had a gradient (the embedding of an unused token), Adam's
    derivative is 1/eps, and such entries alone make |u| thousands of times larger than anything that g meets.
    """
    zero = jnp.abs(slopes) <= 8 * jnp.finfo(slopes.dtype).eps * scales
    return jnp.where(zero, 0.0, slopes), zero


def _share(batch: Batch, flags: jax.Array) -> jax.Array:
    mask = real_rows(batch, flags)
    return jnp.sum(flags & mask) / jnp.maximum(jnp.sum(mask), 1)


REVERSE_ONLY = ("dot", "recompute", "published_fd")
"""The estimators that need no forward mode of the losses, so that attention may be fused."""

_DETACHED_ONLY = ("dot", "recompute")
_ONE_STEP_ONLY = ("dot", "recompute", "tangent", "tangent_recomputed")


def check_estimator(problem: Problem, name: str) -> None:
    """Raises ValueError where the estimator of that name would not be what it says for this problem."""
    if name in _ONE_STEP_ONLY and problem.num_inner_steps != 1:
        raise ValueError(f"{name} looks through one inner step, not {problem.num_inner_steps}: use mixed or unrolled")
    if name in _DETACHED_ONLY and not problem.detached:
        raise ValueError(f"{name} needs weights that are detached from the model: use tangent, mixed or unrolled")


def choose(
    problem: Problem,
    batch_size: int,
    *,
    forward_mode: bool = True,
    remat: bool = False,
    gradients_that_fit: int = 1,
) -> str:
    """The name of the cheapest exact estimator for a problem: what `hypergradient=auto` means.

    Args:
      problem: its inner steps, detachment and clip decide.
      batch_size: B of one inner step.
      forward_mode: whether the losses can be pushed forward (`jax.jvp`); fused attention kernels cannot.
      remat: whether the model recomputes its activations anyway, so that a linearisation would save nothing.
      gradients_that_fit: the most examples of which `dot` may keep a gradient each.

    Raises:
      ValueError: no exact estimator can do it.
    """
    if problem.num_inner_steps == 1:
        if problem.detached and batch_size <= gradients_that_fit:
            return "dot"
        if forward_mode:
            return "tangent_recomputed" if remat or problem.example_clip_norm is not None else "tangent"
        if problem.detached:
            return "recompute"
    elif forward_mode:
        return "mixed"
    raise ValueError(
        "no exact estimator: several inner steps, or weights that are not detached, need forward mode, which fused "
        "attention lacks; use model.attention=xla"
    )


ESTIMATORS: dict[str, Estimator] = {
    "unrolled": unrolled,
    "dot": dot,
    "tangent": tangent,
    "tangent_recomputed": tangent_recomputed,
    "recompute": recompute,
    "mixed": mixed,
    "identity": identity,
    "published_fd": published_fd,
}

EXACT = tuple(name for name in ESTIMATORS if name not in ("identity", "published_fd"))
"""The estimators that give the derivative, not a stand-in for it."""
