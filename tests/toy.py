"""A bilevel problem without images or text: linear regression, float64, in the project's own types."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dreamprm_jax.hypergradient import Problem
from dreamprm_jax.types import Batch
from dreamprm_jax.weighting import Weighting, instance_table

NUM_EXAMPLES, WIDTH = 6, 3


def batch_of(rows, mask=None) -> Batch:
    """A batch that names rows of the toy's fixed data; the model's own fields stay empty."""
    rows = np.asarray(rows, np.int32)
    mask = np.ones(len(rows), bool) if mask is None else np.asarray(mask)
    return Batch(*[np.zeros((len(rows), 1))] * 6, example_id=rows, example_mask=mask)


def toy_data(seed: int = 0):
    """Inputs [N, WIDTH] and targets [N], and the same for the meta set."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape))  # noqa: E731
    return draw(NUM_EXAMPLES, WIDTH), draw(NUM_EXAMPLES), draw(NUM_EXAMPLES, WIDTH), draw(NUM_EXAMPLES)


def toy_problem(inner_tx: optax.GradientTransformation, weighting: Weighting, seed: int = 0) -> Problem:
    """Squared error on both levels; `tanh` keeps the inner loss from being quadratic."""
    x, y, meta_x, meta_y = toy_data(seed)

    def losses(params, batch):
        return jnp.square(jnp.tanh(x[batch.example_id] @ params["kernel"]) - y[batch.example_id]), None

    def meta_loss(params, batch):
        error = meta_x[batch.example_id] @ params["kernel"] - meta_y[batch.example_id]
        return jnp.mean(jnp.square(error)), {}

    return Problem(losses, weighting.apply, meta_loss, inner_tx)


def toy_params(seed: int = 0):
    """{"kernel": [WIDTH]}, float64."""
    return {"kernel": jax.random.normal(jax.random.key(seed), (WIDTH,), jnp.float64)}


def toy_table(minimum: float = 0.0, maximum: float = 3.0) -> Weighting:
    """The instance table, begun in the type that the test runs in (float64) rather than in float32."""
    table = instance_table(NUM_EXAMPLES, minimum, maximum)
    return table._replace(init=lambda: {"table": jnp.ones(NUM_EXAMPLES)})
