"""Run by test_sharding.py on eight forced devices: a sharded batch reads and moves the table as one device does."""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from toy import batch_of, in_float64, toy_params, toy_problem

from dreamprm_jax import bilevel, optimizers, weighting
from dreamprm_jax.hypergradient import ESTIMATORS, EXACT

BATCHES = [
    [0, 5, 2, 3, 0, 1, 4, 5],
    [1, 1, 1, 1, 4, 3, 2, 0],
    [5, 4, 3, 2, 1, 0, 5, 4],
]  # rows met twice, on two devices


def run(estimator, place_batch, place_table):
    inner_tx = optimizers.adamw(lambda count: 0.05, weight_decay=0.1, eps=0.01)
    meta_tx = optimizers.per_entry_rmsprop(lambda count: 0.1)
    table = in_float64(weighting.instance_table(16, "projected", 0.0, 3.0))
    problem = toy_problem(inner_tx, table)
    state = bilevel.init_state(inner_tx, meta_tx, table, toy_params())
    state = state._replace(meta_params=place_table(state.meta_params), meta_opt_state=place_table(state.meta_opt_state))
    step = jax.jit(
        lambda state, batch, meta: bilevel.bilevel_step(problem, estimator, meta_tx, table, state, batch, meta)
    )
    for rows in BATCHES:
        state, metrics = step(state, place_batch(batch_of(rows)), place_batch(batch_of(rows[::-1])))
    return state, metrics


def main() -> None:
    jax.config.update("jax_enable_x64", True)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    by_row = NamedSharding(mesh, PartitionSpec("data"))
    whole = NamedSharding(mesh, PartitionSpec())

    def share(tree, sharding):
        return jax.tree.map(lambda leaf: jax.device_put(leaf, sharding if jnp.ndim(leaf) else whole), tree)

    for name in EXACT:
        alone = run(ESTIMATORS[name], lambda batch: batch, lambda table: table)
        for sharding in (whole, by_row):
            shared = run(ESTIMATORS[name], partial(share, sharding=by_row), partial(share, sharding=sharding))
            if len(shared[0].meta_params["table"].sharding.device_set) != 8:
                sys.exit("the table left its devices")
            if np.ptp(shared[0].meta_params["table"][:6]) < 0.1:
                sys.exit("the table did not move, so nothing was compared")
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), alone, shared)


if __name__ == "__main__":
    main()
