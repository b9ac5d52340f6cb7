"""The bilevel problem as functions, and its inner level: the step that plain training takes and every estimator sees.

    inner loss  L_in(params, meta_params) = (1/B) sum_i c_i w_i l_i(params),   w_i = weights(meta_params, ...)
    inner step  params' = params + U(g; opt_state, params),                    g = grad L_in, U any optax transformation

With (losses, outputs) = f(params), J its derivative and h the weighted mean above, g = J^T gamma and gamma = grad h
(`cotangents`). Weights that are `detached` leave the outputs' part of gamma out: the model cannot lower its own
weight; the meta-gradient still sees that later weights depend on earlier steps.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from dreamprm_jax.optimizers import is_finite, norm, widen
from dreamprm_jax.sharding import APART, ROWS, num_row_shards
from dreamprm_jax.types import Batch, PyTree, TrainState

Values = tuple[jax.Array, Any]
"""(losses [B], outputs): what the model says about a batch."""

MetaLoss = Callable[[PyTree, Batch], tuple[jax.Array, dict[str, jax.Array]]]
"""(params, meta_batch) -> (loss [], aux: dict of arrays for the log)."""


def as_they_are(params: PyTree) -> PyTree:
    """The parameters of a problem that computes in their own types."""
    return params


class Problem(NamedTuple):
    """A bilevel problem as functions; nothing here knows about models, images or text.

    `batch` is any pytree whose leaves lead with B. Where it has a field or key `example_mask` [B], rows that are false
    there count for nothing.

    Attributes:
      losses: (params, batch) -> (losses [B], outputs), outputs any pytree of float arrays that lead with B, or None.
        Row i depends on example i alone.
      weights: (meta_params, batch, outputs) -> instance_weights [B].
      meta_loss: (params, meta_batch) -> (loss [], aux: dict of arrays for the log).
      inner_tx: the inner optimizer.
      num_inner_steps: K. Above 1, every leaf of `batch` leads with K: one batch per step.
      detached: the inner gradient takes the weights for constants. False lets it flow through them, as published.
      example_clip_norm: clip of each example's own gradient before it is weighted; None for no clip. (A clip of the
        weighted gradient is part of `inner_tx`.)
      micro_batch_size: rows at a time on each device, at most, whose activations are held together (`in_turns`). None:
        all of them, but one where every row needs a gradient of its own.
      mesh: the devices that divide the rows of a batch (sharding.py); None: one.
      cast_to_compute: params -> those in the types that `losses` computes with, which changes no value of it; a row's
        own gradient is taken and kept in these types.
    """

    losses: Callable[[PyTree, Batch], Values]
    weights: Callable[[PyTree, Batch, Any], jax.Array]
    meta_loss: MetaLoss
    inner_tx: optax.GradientTransformation
    num_inner_steps: int = 1
    detached: bool = True
    example_clip_norm: float | None = None
    micro_batch_size: int | None = None
    mesh: Mesh | None = None
    cast_to_compute: Callable[[PyTree], PyTree] = as_they_are


class InnerPass(NamedTuple):
    """What an inner gradient leaves behind."""

    values: Values
    factors: jax.Array  # [B]: c_i
    example_norms: jax.Array | None  # [B]: |grad l_i|, where there is a clip per example
    record: dict[str, jax.Array]  # for the log: `step_record`


def real_rows(batch: Batch, like: jax.Array) -> jax.Array:
    """Which rows count, bool [B]; all of them where the batch has no `example_mask`."""
    mask = batch.get("example_mask") if isinstance(batch, dict) else getattr(batch, "example_mask", None)
    return jnp.ones(like.shape, bool) if mask is None else mask


def micro_batched(
    meta_loss: MetaLoss, size: int, cast_to_compute: Callable[[PyTree], PyTree] = as_they_are
) -> MetaLoss:
    """`meta_loss`, taken at most `size` rows at a time, its gradient added up on the way: the activations of so many.

    For a loss and aux that are means over the real rows. Reverse mode once, which is all that an estimator asks of a
    meta loss. `cast_to_compute`: as the problem's, done once for all turns. Raises (when called) as `in_turns`.
    """

    def mean_of(take: Callable[[Batch], PyTree], batch: Batch) -> PyTree:
        """The mean over chunks of what `take` gives for each, by their real rows; float32 at least on the way."""
        at_once = min(size, num_rows(batch))
        real = jnp.sum(in_turns(real_rows(batch, jnp.zeros(num_rows(batch))), at_once), axis=1)
        shares = real / jnp.maximum(jnp.sum(real), 1)  # of each chunk
        chunks = in_turns(batch, at_once)

        def add(total: PyTree, part: tuple[jax.Array, Batch]) -> tuple[PyTree, None]:
            share, chunk = part
            return jax.tree.map(lambda old, new: old + (share * new).astype(old.dtype), total, take(chunk)), None

        shapes = jax.eval_shape(take, jax.tree.map(lambda leaf: leaf[0], chunks))
        begin = widen(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes))
        total, _ = jax.lax.scan(add, begin, (shares, chunks))
        return jax.tree.map(lambda leaf, shape: leaf.astype(shape.dtype), total, shapes)

    @jax.custom_vjp
    def loss(params: PyTree, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        return mean_of(partial(meta_loss, cast_to_compute(params)), batch)

    def forward(params: PyTree, batch: Batch) -> tuple[tuple[jax.Array, dict[str, jax.Array]], PyTree]:
        computed = cast_to_compute(params)

        def take(chunk: Batch) -> tuple[tuple[jax.Array, dict[str, jax.Array]], PyTree]:
            found, gradient = jax.value_and_grad(meta_loss, has_aux=True)(computed, chunk)
            return found, widen(gradient)

        found, gradient = mean_of(take, batch)
        return found, jax.tree.map(lambda leaf, param: leaf.astype(param.dtype), gradient, params)

    def backward(gradient: PyTree, cotangent: tuple[jax.Array, dict[str, jax.Array]]) -> tuple[PyTree, None]:
        return jax.tree.map(lambda leaf: (cotangent[0] * leaf).astype(leaf.dtype), gradient), None

    loss.defvjp(forward, backward)
    return loss


def example_loss(problem: Problem, params: PyTree, example: Batch) -> jax.Array:
    """The loss [] of a batch of one."""
    return jnp.sum(problem.losses(params, example)[0])


def num_rows(batch: Batch) -> int:
    """B."""
    return jax.tree.leaves(batch)[0].shape[0]


def in_turns(tree: PyTree, at_once: int) -> PyTree:
    """[B, ...] -> [B / at_once, at_once, ...]: rows that are taken one after the other, `at_once` of them side by side.

    Turn t has the rows t, t + B / at_once, ...: where devices have neighbouring rows, each has its share of every turn.

    Raises:
      ValueError: B is not a multiple of `at_once`.
    """

    def split(leaf: jax.Array) -> jax.Array:
        if leaf.shape[0] % at_once:
            raise ValueError(f"{leaf.shape[0]} rows cannot be taken {at_once} at a time: give a divisor")
        return leaf.reshape(at_once, leaf.shape[0] // at_once, *leaf.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, tree)


def in_order(tree: PyTree) -> PyTree:
    """[turns, at_once, ...] -> [B, ...]: the inverse of `in_turns`."""
    return jax.tree.map(lambda leaf: leaf.swapaxes(0, 1).reshape(-1, *leaf.shape[2:]), tree)


def of_each(problem: Problem, take: Callable[[Batch], PyTree], batch: Batch) -> PyTree:
    """What `take` gives for every row as a batch of one: leaves [turns, at_once, ...]."""
    ones = jax.tree.map(lambda leaf: leaf[:, :, None], in_turns(batch, rows_at_once(problem, batch)))
    return _map(lambda turn: side_by_side(take, turn), ones)


def rows_at_once(problem: Problem, batch: Batch) -> int:
    """How many rows of a batch are taken at a time, on all devices together, where rows are taken in turn."""
    return min((problem.micro_batch_size or 1) * num_row_shards(problem.mesh), num_rows(batch))


def side_by_side(take: Callable[..., PyTree], *trees: PyTree) -> PyTree:
    """`take`, of each entry of the leading axis; no batched products where there is one entry alone."""
    if jax.tree.leaves(trees)[0].shape[0] > 1:
        return jax.vmap(take, axis_name=APART, spmd_axis_name=ROWS)(*trees)  # each device takes its own rows
    return jax.tree.map(lambda leaf: leaf[None], take(*jax.tree.map(lambda leaf: leaf[0], trees)))


def _map(take: Callable[[PyTree], PyTree], trees: PyTree) -> PyTree:
    """`jax.lax.map`, without a loop where there is nothing to repeat."""
    if jax.tree.leaves(trees)[0].shape[0] > 1:
        return jax.lax.map(take, trees)
    return jax.tree.map(lambda leaf: leaf[None], take(jax.tree.map(lambda leaf: leaf[0], trees)))


def mean_weighted_loss(
    problem: Problem, meta_params: PyTree, batch: Batch, values: Values, factors: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """h = (1/B) sum_i c_i w_i l_i over the B real examples, and the weights [B]."""
    losses, outputs = values
    weights = problem.weights(meta_params, batch, outputs)
    mask = real_rows(batch, losses)
    total = jnp.sum(jnp.where(mask, factors * weights * losses, 0.0))
    return total / jnp.maximum(jnp.sum(mask), 1), weights


def cotangents(problem: Problem, meta_params: PyTree, batch: Batch, values: Values, factors: jax.Array) -> Values:
    """gamma, shaped like `values`: c_i w_i / B for the losses; for the outputs 0 if detached, else grad h."""

    def mean(values: Values) -> jax.Array:
        return mean_weighted_loss(problem, meta_params, batch, values, factors)[0]

    for_losses, for_outputs = jax.grad(mean)(values)
    return for_losses, jax.tree.map(jnp.zeros_like, for_outputs) if problem.detached else for_outputs


def inner_gradient(problem: Problem, params: PyTree, meta_params: PyTree, batch: Batch) -> tuple[PyTree, InnerPass]:
    """g, the gradient of the weighted loss."""
    if problem.example_clip_norm is not None:
        return _clipped_gradient(problem, params, meta_params, batch)
    if problem.micro_batch_size and rows_at_once(problem, batch) < num_rows(batch):
        return _gradient_in_turns(problem, params, meta_params, batch)
    values, grads = _pulled(
        problem, params, batch, lambda values: cotangents(problem, meta_params, batch, values, unit_factors(values))
    )
    factors = unit_factors(values)
    return grads, InnerPass(values, factors, None, step_record(problem, meta_params, batch, values, factors, grads))


def _pulled(problem: Problem, params: PyTree, batch: Batch, gamma: Callable[[Values], Values]) -> tuple[Values, PyTree]:
    """(values, J^T gamma(values))."""
    if problem.detached:  # the outputs get no cotangent at all, rather than zeros that cost a pass over the logits
        losses, pull, outputs = jax.vjp(lambda params: problem.losses(params, batch), params, has_aux=True)
        values = (losses, outputs)
        return values, pull(gamma(values)[0])[0]
    values, pull = jax.vjp(lambda params: problem.losses(params, batch), params)
    return values, pull(gamma(values))[0]


def _gradient_in_turns(problem: Problem, params: PyTree, meta_params: PyTree, batch: Batch) -> tuple[PyTree, InnerPass]:
    """g added up over the turns, in the memory of `micro_batch_size` rows a device."""
    values = problem.losses(params, batch)  # where the weights look at no outputs, the compiler drops this pass
    gammas = cotangents(problem, meta_params, batch, values, unit_factors(values))
    computed = problem.cast_to_compute(params)  # once for all turns

    def add(total: PyTree, turn: tuple[Batch, Values]) -> tuple[PyTree, jax.Array]:
        rows, gamma = turn
        (losses, _), part = _pulled(problem, computed, rows, lambda values: gamma)
        return jax.tree.map(jnp.add, total, widen(part)), losses

    turns = in_turns((batch, gammas), rows_at_once(problem, batch))
    grads, losses = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, widen(params)), turns)
    grads = jax.tree.map(lambda leaf, param: leaf.astype(param.dtype), grads, params)
    values, factors = (in_order(losses), values[1]), unit_factors(values)
    return grads, InnerPass(values, factors, None, step_record(problem, meta_params, batch, values, factors, grads))


def _clipped_gradient(problem: Problem, params: PyTree, meta_params: PyTree, batch: Batch) -> tuple[PyTree, InnerPass]:
    """g with a clip per example: the examples' own gradients in turn, in the memory of two whatever B is."""
    values = problem.losses(params, batch)  # where the weights look at no outputs, the compiler drops this pass
    coefficients = cotangents(problem, meta_params, batch, values, unit_factors(values))[0]  # [B]: w_i / B
    computed = problem.cast_to_compute(params)

    def add(total: PyTree, row: tuple[Batch, jax.Array]) -> tuple[PyTree, tuple[jax.Array, ...]]:
        example, coefficient = row
        loss, own = side_by_side(
            lambda example: jax.value_and_grad(example_loss, argnums=1)(problem, computed, example), example
        )
        sizes = side_by_side(norm, own)
        factors = clip_factor(problem, sizes)
        total = jax.tree.map(lambda leaf, part: leaf + weighted_sum(factors * coefficient, part), total, own)
        return total, (loss, sizes, factors)

    rows = in_turns((jax.tree.map(lambda leaf: leaf[:, None], batch), coefficients), rows_at_once(problem, batch))
    grads, found = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, widen(params)), rows)
    losses, norms, factors = in_order(found)
    grads = jax.tree.map(lambda leaf, param: leaf.astype(param.dtype), grads, params)
    values = (losses, values[1])
    if not problem.detached:  # the weights' share couples the rows: only now are all the factors known
        values, pull = jax.vjp(lambda params: problem.losses(params, batch), params)
        (grads,) = pull(cotangents(problem, meta_params, batch, values, factors))
    return grads, InnerPass(values, factors, norms, step_record(problem, meta_params, batch, values, factors, grads))


def weighted_sum(coefficients: jax.Array, leaf: jax.Array) -> jax.Array:
    """[B], [B, ...] -> [...], in full float32, which an accelerator's products are not by default."""
    return jnp.einsum("b,b...->...", coefficients, leaf, precision="highest")


def example_gradients(problem: Problem, params: PyTree, batch: Batch) -> tuple[Values, PyTree]:
    """(values, every example's own gradient with leaves [turns, at_once, ...]: `in_turns`), in the compute type."""
    computed = problem.cast_to_compute(params)

    def own(example: Batch) -> tuple[PyTree, Values]:
        def loss(params: PyTree) -> tuple[jax.Array, Values]:
            losses, outputs = problem.losses(params, example)
            return jnp.sum(losses), (losses, outputs)

        return jax.grad(loss, has_aux=True)(computed)

    gradients, values = of_each(problem, own, batch)
    return jax.tree.map(lambda leaf: leaf[:, 0], in_order(values)), gradients


def clip_factor(problem: Problem, norm: jax.Array) -> jax.Array:
    """`min(1, clip / |grad l_i|)`, elementwise."""
    if problem.example_clip_norm is None:
        return jnp.ones_like(norm)
    clip = problem.example_clip_norm
    return jnp.where(norm > clip, clip / jnp.where(norm > clip, norm, 1.0), 1.0)


def unit_factors(values: Values) -> jax.Array:
    """c_i = 1: no clip per example."""
    return jnp.ones_like(values[0])


def step_record(
    problem: Problem, meta_params: PyTree, batch: Batch, values: Values, factors: jax.Array, grads: PyTree
) -> dict[str, jax.Array]:
    """What a step tells the log.

    inner_loss and weighted_loss: means over the real rows. losses, instance_weights [B]. grad_norm: of the weighted
    gradient, before any clip in the optimizer. effective_sample_size: (sum w)^2 / sum w^2, in rows.
    example_clip_share: rows whose own gradient is clipped.
    """
    losses = values[0]
    mask = real_rows(batch, losses)
    count = jnp.maximum(jnp.sum(mask), 1)
    total, weights = mean_weighted_loss(problem, meta_params, batch, values, factors)
    weights = jnp.broadcast_to(weights, losses.shape)
    real = jnp.where(mask, weights, 0.0)
    square = jnp.sum(jnp.square(real))
    record = {
        "inner_loss": jnp.sum(jnp.where(mask, losses, 0.0)) / count,
        "weighted_loss": total,
        "losses": losses,
        "instance_weights": weights,
        "grad_norm": norm(grads),
        "effective_sample_size": jnp.square(jnp.sum(real)) / jnp.where(square > 0, square, 1.0),
    }
    if problem.example_clip_norm is not None:
        record["example_clip_share"] = jnp.sum(mask & (factors < 1)) / count
    return record


def advance(problem: Problem, state: TrainState, grads: PyTree) -> tuple[PyTree, TrainState]:
    """One optimizer step: (params', the whole new state).

    A gradient that is not finite moves no parameter. The moments of our optimizers keep theirs too; one of the user's
    own belongs into `optax.apply_if_finite`.
    """
    updates, opt_state = problem.inner_tx.update(grads, state.opt_state, state.params)
    finite = is_finite(grads)
    moved = optax.apply_updates(state.params, updates)
    params = jax.tree.map(partial(jax.lax.select, finite), moved, state.params)
    return params, TrainState(state.step + 1, params, opt_state)


def inner_step(
    problem: Problem, state: TrainState, meta_params: PyTree, batch: Batch
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step on the weighted loss: plain training, and what the meta loss looks through."""
    grads, inner = inner_gradient(problem, state.params, meta_params, batch)
    _, new_state = advance(problem, state, grads)
    return new_state, inner.record


def inner_steps(
    problem: Problem, state: TrainState, meta_params: PyTree, batch: Batch
) -> tuple[TrainState, dict[str, jax.Array]]:
    """K inner steps, and their record: that of the step at K = 1, above `over_steps`."""
    if problem.num_inner_steps == 1:
        return inner_step(problem, state, meta_params, batch)
    state, record = jax.lax.scan(lambda state, batch: inner_step(problem, state, meta_params, batch), state, batch)
    return state, over_steps(record)


def over_steps(record: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Records stacked by K as one: means over the steps, but losses and weights [K, B] and gradient norms [K]."""
    kept = ("losses", "instance_weights", "grad_norm")
    return {name: value if name in kept else jnp.mean(value, axis=0) for name, value in record.items()}


def last_batch(problem: Problem, batch: Batch) -> Batch:
    """The batch of the last inner step."""
    return batch if problem.num_inner_steps == 1 else jax.tree.map(lambda leaf: leaf[-1], batch)
