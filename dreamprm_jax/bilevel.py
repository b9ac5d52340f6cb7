"""One bilevel iteration: an inner step, the meta-gradient through it, an outer step. Pure functions."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from dreamprm_jax.hypergradient import Estimator
from dreamprm_jax.inner import Problem
from dreamprm_jax.optimizers import is_finite, norm, update_ema, widen
from dreamprm_jax.types import Batch, BilevelState, PyTree, TrainState
from dreamprm_jax.weighting import Weighting

Step = Callable[..., tuple[BilevelState, dict[str, jax.Array]]]
"""`(state, *batches) -> (state, metrics)`: what a training loop drives, jitted."""


def init_train_state(inner_tx: optax.GradientTransformation, params: PyTree) -> TrainState:
    """A fresh inner level at `params`: step 0, empty moments."""
    return TrainState(jnp.zeros([], jnp.int32), params, inner_tx.init(params))


def init_state(
    inner_tx: optax.GradientTransformation,
    meta_tx: optax.GradientTransformation,
    weighting: Weighting,
    params: PyTree,
    num_remembered: int = 0,
    frozen: PyTree = None,
) -> BilevelState:
    """Both levels, fresh: `params` as given, the weighting as it starts.

    `num_remembered` training rows have their last weight kept, for weightings that cannot tell it afterwards. `frozen`
    goes through every step as it is; None: there is nothing frozen.
    """
    meta_params = weighting.init()
    last_weights = {"rows": jnp.full((num_remembered,), jnp.nan)} if num_remembered else {}
    train = init_train_state(inner_tx, params)
    meta_opt_state = meta_tx.init(meta_params)
    return BilevelState(train, meta_params, meta_opt_state, ema={}, last_weights=last_weights, frozen=frozen or {})


def with_ema(state: BilevelState) -> BilevelState:
    """Starts the moving average at the present parameters: a copy, as both are donated to the next step; float32 at
    least, as an average of bfloat16 numbers would stand still."""
    return state._replace(ema=jax.tree.map(jnp.copy, widen(state.train.params)))


def scoring_params(state: BilevelState) -> PyTree:
    """The trained parameters that score: the moving average where one is kept."""
    return state.ema or state.train.params


def track_ema(state: BilevelState, decay: float | None) -> BilevelState:
    """Moves the average one step; None: there is none."""
    return state if decay is None else state._replace(ema=update_ema(state.ema, state.train.params, decay))


def outer_step(
    meta_tx: optax.GradientTransformation,
    weighting: Weighting,
    meta_grad: PyTree,
    meta_params: PyTree,
    meta_opt_state: PyTree,
) -> tuple[PyTree, PyTree]:
    """One step of the outer optimizer, then the projection onto the permitted weights.

    A meta-gradient that is not finite leaves both as they are, but for counters: a schedule is by steps.
    """
    updates, new_state = meta_tx.update(meta_grad, meta_opt_state, meta_params)
    moved = weighting.project(optax.apply_updates(meta_params, updates)), new_state
    finite = is_finite(meta_grad)

    def kept(new: jax.Array, old: jax.Array) -> jax.Array:
        return new if jnp.issubdtype(old.dtype, jnp.integer) and not old.ndim else jax.lax.select(finite, new, old)

    return jax.tree.map(kept, moved, (meta_params, meta_opt_state))


def bilevel_step(
    problem: Problem,
    estimate: Estimator,
    meta_tx: optax.GradientTransformation,
    weighting: Weighting,
    state: BilevelState,
    batch: Batch,
    meta_batch: Batch,
) -> tuple[BilevelState, dict[str, jax.Array]]:
    """(state, batch, meta_batch) -> (state, metrics).

    The weights that the inner step uses are those before the outer step; the meta-gradient in the metrics
    is the estimator's own, before any scaling or clipping by `meta_tx`.
    """
    meta_grad, train, metrics = estimate(problem, state.train, state.meta_params, batch, meta_batch)
    meta_params, meta_opt_state = outer_step(meta_tx, weighting, meta_grad, state.meta_params, state.meta_opt_state)
    metrics["meta_grad"] = meta_grad
    metrics["meta_grad_norm"] = norm(meta_grad)
    if state.last_weights:
        rows = state.last_weights["rows"]
        weights = metrics["instance_weights"]
        # A padded row has no slot, and a weight that is not finite was not applied.
        slots = jnp.where(batch.example_mask & jnp.isfinite(weights), batch.example_id, rows.size)
        seen = rows.at[slots].set(weights, mode="drop")
        state = state._replace(last_weights={"rows": seen})
    return state._replace(train=train, meta_params=meta_params, meta_opt_state=meta_opt_state), metrics
