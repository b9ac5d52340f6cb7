"""Is a meta-gradient the derivative? An estimator against `unrolled` and against differences, on losses of your own."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dreamprm_jax.hypergradient import Estimator, unrolled
from dreamprm_jax.inner import Problem, inner_steps
from dreamprm_jax.optimizers import norm
from dreamprm_jax.types import Batch, PyTree, TrainState


class MetaGradientCheck(NamedTuple):
    """Relative errors of a meta-gradient: distances over the norm of the one from `unrolled`."""

    against_unrolled: float
    against_differences: float
    norm: float


def check_meta_gradient(
    problem: Problem,
    estimate: Estimator,
    state: TrainState,
    meta_params: PyTree,
    batch: Batch,
    meta_batch: Batch,
    *,
    key: jax.Array,
    step: float = 1e-3,
    num_directions: int = 2,
    tolerance: float | None = None,
) -> MetaGradientCheck:
    """Compares an estimator with `unrolled` and with differences of the meta loss, for losses of your own.

    The differences are central, along random directions in meta_params, Richardson-extrapolated to order `step`^6.
    Call it in float64 (`with jax.enable_x64(True)` and float64 parameters), where exact estimators agree to about
    1e-10, and with warm moments: Adam's first step is nearly sign(g), whose derivative no difference can see.

    Returns:
      The errors; they are also checked where `tolerance` is given.

    Raises:
      ValueError: an error above `tolerance`, or a value that is not finite.
    """

    def meta_loss(meta_params: PyTree) -> jax.Array:
        new_state, _ = inner_steps(problem, state, meta_params, batch)
        return problem.meta_loss(new_state.params, meta_batch)[0]

    @jax.jit
    def both(meta_params: PyTree) -> tuple[PyTree, PyTree]:
        exact, _, _ = unrolled(problem, state, meta_params, batch, meta_batch)
        return exact, estimate(problem, state, meta_params, batch, meta_batch)[0]

    @jax.jit
    def slope(direction: PyTree, step: float) -> jax.Array:
        at = lambda t: meta_loss(jax.tree.map(lambda leaf, d: leaf + t * d, meta_params, direction))  # noqa: E731
        return (at(step) - at(-step)) / (2 * step)

    exact, estimated = both(meta_params)
    size = float(norm(exact))
    scale = size if size > 0 else 1.0
    differences: list[float] = []
    for one in jax.random.split(key, num_directions):
        direction = optax.tree.random_like(one, meta_params)
        direction = jax.tree.map(lambda leaf: leaf / norm(direction), direction)  # noqa: B023
        whole, half, quarter = (slope(direction, step / n) for n in (1, 2, 4))
        numeric = (64 * quarter - 20 * half + whole) / 45
        differences.append(abs(float(numeric - optax.tree.vdot(direction, estimated))) / scale)
    distance = float(norm(jax.tree.map(jnp.subtract, estimated, exact))) / scale
    check = MetaGradientCheck(distance, float(np.max(differences)), size)  # np.max keeps a NaN
    if tolerance is not None and not (distance <= tolerance and check.against_differences <= tolerance):
        raise ValueError(f"the meta-gradient is off by more than {tolerance}: {check}")
    return check
