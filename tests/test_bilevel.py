"""The bilevel step as a whole: order of the levels, projection, scale of the outer step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy import batch_of, toy_params, toy_problem, toy_table

from dreamprm_jax import bilevel, optimizers
from dreamprm_jax.hypergradient import inner_step, unrolled

INNER = optimizers.adamw(lambda count: 0.05, weight_decay=0.0)


def run(meta_tx, table=None, steps=8, scale=1.0):
    """A few bilevel steps on the toy; `scale` multiplies the estimator's meta-gradient."""
    table = table or toy_table()
    problem = toy_problem(INNER, table)

    def scaled(*args):
        meta_grad, state, aux = unrolled(*args)
        return jax.tree.map(lambda leaf: scale * leaf, meta_grad), state, aux

    state = bilevel.init_state(INNER, meta_tx, table, toy_params())
    step = jax.jit(lambda state, batch, meta: bilevel.bilevel_step(problem, scaled, meta_tx, table, state, batch, meta))
    path = []
    for i in range(steps):
        state, metrics = step(state, batch_of([i % 5, (i + 1) % 5]), batch_of([0, 2, 3]))
        path.append((state, metrics))
    return path


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def test_the_first_inner_step_uses_the_initial_weights_and_the_table_then_moves():
    path = run(optimizers.per_entry_rmsprop(lambda count: 0.1))
    np.testing.assert_array_equal(path[0][1]["instance_weights"], [1.0, 1.0])
    assert np.any(path[0][0].meta_params["table"] != 1.0)
    assert path[-1][0].meta_params["table"][5] == 1.0  # never drawn


def test_weights_stay_in_their_range():
    table = toy_table(0.8, 1.1)
    final = run(optax.sgd(1e3), table)[-1][0].meta_params["table"]
    assert final.min() == pytest.approx(0.8)
    assert final.max() == pytest.approx(1.1)


def test_a_weight_on_its_bound_can_come_back():
    """The range is kept by projection: the gradient of an entry on its bound is not cut off."""
    table = toy_table(0.0, 1.0)  # the initial weight 1 is the upper bound
    meta_grad = run(optax.sgd(0.1), table)[0][1]["meta_grad"]["table"]
    assert np.all(meta_grad[:2] != 0.0)


def test_the_path_of_the_table_does_not_depend_on_the_scale_of_the_meta_gradient():
    tx = optimizers.per_entry_rmsprop(lambda count: 0.1, weight_decay=0.01)
    tables = [run(tx, scale=scale)[-1][0].meta_params["table"] for scale in (1.0, 1e-4)]
    np.testing.assert_allclose(*tables, rtol=1e-12)


def test_an_outer_step_lowers_the_meta_loss_as_predicted():
    """The meta-gradient's own test: predicted against real change after one small outer step."""
    table = toy_table()
    problem = toy_problem(INNER, table)
    predicted, real = [], []
    for seed in range(12):
        state = bilevel.init_train_state(INNER, toy_params(seed))
        batch, meta_batch, rate = batch_of([seed % 6, (seed + 2) % 6]), batch_of([0, 2, 3]), 1e-4
        state, _ = inner_step(problem, state, table.init(), batch)  # warm moments
        meta_grad, _, aux = unrolled(problem, state, table.init(), batch, meta_batch)
        moved = {"table": table.init()["table"] - rate * meta_grad["table"]}
        predicted.append(-rate * jnp.sum(jnp.square(meta_grad["table"])))
        real.append(unrolled(problem, state, moved, batch, meta_batch)[2]["meta_loss"] - aux["meta_loss"])
    assert np.corrcoef(predicted, real)[0, 1] > 0.99
    assert np.polyfit(predicted, real, 1)[0] == pytest.approx(1.0, abs=0.02)
