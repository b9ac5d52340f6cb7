"""The bilevel step as a whole: order of the levels, projection, scale of the outer step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy import batch_of, small_problem, toy_table

from dreamprm_jax import bilevel, optimizers
from dreamprm_jax.hypergradient import ESTIMATORS, EXACT, unrolled
from dreamprm_jax.inner import inner_step

pytestmark = pytest.mark.usefixtures("float64")

INNER = optimizers.adamw(lambda count: 0.05, weight_decay=0.0)


def run(meta_tx, table=None, steps=8, scale=1.0):
    """A few bilevel steps on the toy; `scale` multiplies the estimator's meta-gradient."""
    table = table or toy_table()
    problem, params = small_problem(INNER, table)

    def scaled(*args):
        meta_grad, state, aux = unrolled(*args)
        return jax.tree.map(lambda leaf: scale * leaf, meta_grad), state, aux

    state = bilevel.init_state(INNER, meta_tx, table, params)
    step = jax.jit(lambda state, batch, meta: bilevel.bilevel_step(problem, scaled, meta_tx, table, state, batch, meta))
    path = []
    for i in range(steps):
        state, metrics = step(state, batch_of([i % 5, (i + 1) % 5]), batch_of([0, 2, 3]))
        path.append((state, metrics))
    return path


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


@pytest.mark.parametrize("name", EXACT)
def test_an_outer_step_lowers_the_meta_loss_as_predicted(name):
    """The meta-gradient's own test: predicted against real change after one small outer step."""
    table, rate, meta_batch = toy_table(), 1e-4, batch_of([0, 2, 3])
    problem, params = small_problem(INNER, table)

    @jax.jit
    def changes(key, batch):
        noise = 0.5 * jax.random.normal(key, params["kernel"].shape)
        state = bilevel.init_train_state(INNER, {"kernel": params["kernel"] + noise})
        state, _ = inner_step(problem, state, table.init(), batch)  # warm moments
        meta_grad, _, aux = ESTIMATORS[name](problem, state, table.init(), batch, meta_batch)
        moved = {"table": table.init()["table"] - rate * meta_grad["table"]}
        after, _ = inner_step(problem, state, moved, batch)
        real = problem.meta_loss(after.params, meta_batch)[0] - aux["meta_loss"]
        return -rate * jnp.sum(jnp.square(meta_grad["table"])), real

    pairs = [changes(jax.random.key(seed), batch_of([seed % 6, (seed + 2) % 6])) for seed in range(12)]
    predicted, real = np.array(pairs).T
    assert np.corrcoef(predicted, real)[0, 1] > 0.999
    assert np.polyfit(predicted, real, 1)[0] == pytest.approx(1.0, abs=0.005)


@pytest.mark.parametrize("name, num_inner_steps", [("dot", 1), ("tangent", 1), ("mixed", 2)])
def test_a_scan_over_steps_is_the_steps_in_a_row(name, num_inner_steps):
    table, meta_tx = toy_table(), optimizers.per_entry_rmsprop(lambda count: 0.1)
    problem, params = small_problem(INNER, table, num_inner_steps=num_inner_steps)
    rows = np.array([[0, 1], [4, 2], [5, 5]])
    rows = rows if num_inner_steps == 1 else np.stack([rows, rows[::-1]], axis=1)
    batches, meta = batch_of(rows), batch_of([0, 2, 3])

    def step(state, batch):
        return bilevel.bilevel_step(problem, ESTIMATORS[name], meta_tx, table, state, batch, meta)

    state = bilevel.init_state(INNER, meta_tx, table, params)
    scanned, metrics = jax.jit(lambda state: jax.lax.scan(step, state, batches))(state)
    one, records = jax.jit(step), []
    for k in range(3):
        state, record = one(state, jax.tree.map(lambda leaf: leaf[k], batches))  # noqa: B023
        records.append(record)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), scanned, state)
    np.testing.assert_allclose(metrics["meta_loss"], [record["meta_loss"] for record in records], rtol=1e-12)
    assert np.any(scanned.meta_params["table"] != 1.0)


def test_the_metrics_carry_the_estimators_own_gradient():
    """Before the outer optimizer scales or clips it."""
    _, metrics = run(optax.chain(optax.clip_by_global_norm(1e-12), optax.sgd(1.0)), steps=1)[0]
    norm = np.linalg.norm(metrics["meta_grad"]["table"])
    assert norm > 1e-9
    np.testing.assert_allclose(metrics["meta_grad_norm"], norm)
