"""The meta-gradient: how the meta loss after one inner step changes with the weighting's parameters.

    inner loss     L_in(params, meta_params) = (1/B) sum_i w_i l_i(params),   w_i = weights(meta_params, ...)
    inner step     params' = params + U(grad L_in; opt_state, params),        U any optax transformation
    meta-gradient  d L_meta(params'(meta_params)) / d meta_params

Every estimator has the signature of `Estimator`; the inner step that it differentiates is the very
function that plain training calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dreamprm_jax.types import Batch, PyTree, TrainState


class Problem(NamedTuple):
    """A bilevel problem as functions; nothing here knows about models, images or text.

    losses: (params, batch) -> (losses [B], outputs). Row i depends on example i alone.
    weights: (meta_params, batch, outputs) -> instance_weights [B].
    meta_loss: (params, meta_batch) -> (loss [], aux: dict of arrays for the log).
    inner_tx: the inner optimizer.
    """

    losses: Callable[[PyTree, Batch], tuple[jax.Array, Any]]
    weights: Callable[[PyTree, Batch, Any], jax.Array]
    meta_loss: Callable[[PyTree, Batch], tuple[jax.Array, dict[str, jax.Array]]]
    inner_tx: optax.GradientTransformation


Estimator = Callable[[Problem, TrainState, PyTree, Batch, Batch], tuple[PyTree, TrainState, dict[str, jax.Array]]]
"""(problem, state, meta_params, batch, meta_batch) -> (meta_grad, new_state, aux)."""


def weighted_loss(
    problem: Problem, params: PyTree, meta_params: PyTree, batch: Batch
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(1/B) sum_i w_i l_i over the B real examples of the batch, with its parts for the log."""
    losses, outputs = problem.losses(params, batch)
    weights = problem.weights(meta_params, batch, outputs)
    count = jnp.maximum(jnp.sum(batch.example_mask), 1)
    total = jnp.sum(jnp.where(batch.example_mask, weights * losses, 0.0)) / count
    mean = jnp.sum(jnp.where(batch.example_mask, losses, 0.0)) / count
    return total, {"weighted_loss": total, "inner_loss": mean, "losses": losses, "instance_weights": weights}


def inner_step(
    problem: Problem, state: TrainState, meta_params: PyTree, batch: Batch
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step on the weighted loss: plain training, and what the meta loss looks through."""
    grads, aux = jax.grad(weighted_loss, argnums=1, has_aux=True)(problem, state.params, meta_params, batch)
    updates, opt_state = problem.inner_tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    aux["grad_norm"] = optax.tree.norm(grads)
    return TrainState(state.step + 1, params, opt_state), aux


def unrolled(
    problem: Problem, state: TrainState, meta_params: PyTree, batch: Batch, meta_batch: Batch
) -> tuple[PyTree, TrainState, dict[str, jax.Array]]:
    """`jax.grad` straight through the optimizer step: the definition, and the reference for all others.

    Invariant: exact for any optax transformation and any weighting, weights that depend on the model
    included. Costs about 8 forward passes (a plain step: 3) and keeps the activations of both passes. The
    advanced inner state comes back through `has_aux`: nothing is computed twice.
    """

    def objective(meta_params: PyTree) -> tuple[jax.Array, tuple[TrainState, dict[str, jax.Array]]]:
        new_state, aux = inner_step(problem, state, meta_params, batch)
        loss, meta_aux = problem.meta_loss(new_state.params, meta_batch)
        return loss, (new_state, {**aux, **meta_aux, "meta_loss": loss})

    meta_grad, (new_state, aux) = jax.grad(objective, has_aux=True)(meta_params)
    return meta_grad, new_state, aux


ESTIMATORS: dict[str, Estimator] = {"unrolled": unrolled}
