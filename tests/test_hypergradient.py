"""The meta-gradient against differences, against a closed form, and its properties; float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy import NUM_EXAMPLES, batch_of, toy_data, toy_params, toy_problem, toy_table

from dreamprm_jax import bilevel, optimizers
from dreamprm_jax.hypergradient import inner_step, unrolled
from dreamprm_jax.weighting import Weighting, instance_table

TABLE = toy_table()
META_BATCH = batch_of([0, 2, 3])
CHAINS = {
    "sgd": optax.sgd(0.1),
    "adamw": optimizers.adamw(lambda count: 0.05, weight_decay=0.1),
    "adamw, clip": optimizers.adamw(lambda count: 0.05, weight_decay=0.1, clip_norm=0.3),
    "momentum": optax.sgd(0.1, momentum=0.9),
}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def warm_state(problem, steps=3):
    state = bilevel.init_train_state(problem.inner_tx, toy_params())
    for _ in range(steps):
        state, _ = inner_step(problem, state, {"table": jnp.ones(NUM_EXAMPLES)}, batch_of([0, 1, 4, 5]))
    return state


def meta_loss_after_step(problem, state, meta_params, batch):
    new_state, _ = inner_step(problem, state, meta_params, batch)
    return problem.meta_loss(new_state.params, META_BATCH)[0]


def richardson(function, table, entry, step=1e-3):
    """Fourth-order difference of `function` in one table entry."""

    def difference(h):
        shift = jnp.zeros_like(table).at[entry].set(h)
        return (function({"table": table + shift}) - function({"table": table - shift})) / (2 * h)

    return (4 * difference(step / 2) - difference(step)) / 3


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("rows", [[1], [0, 1, 4, 5], [1, 1, 2]])
def test_unrolled_is_the_derivative_of_the_meta_loss(chain, rows):
    problem = toy_problem(CHAINS[chain], TABLE)
    state, batch = warm_state(problem), batch_of(rows)
    table = jnp.linspace(0.4, 1.4, NUM_EXAMPLES)
    meta_grad, _, _ = unrolled(problem, state, {"table": table}, batch, META_BATCH)
    numeric = [
        richardson(lambda meta: meta_loss_after_step(problem, state, meta, batch), table, entry)
        for entry in range(NUM_EXAMPLES)
    ]
    scale = max(np.abs(np.asarray(numeric)))
    np.testing.assert_allclose(meta_grad["table"], numeric, atol=1e-8 * max(scale, 1e-3))
    untouched = sorted(set(range(NUM_EXAMPLES)) - set(rows))
    np.testing.assert_array_equal(meta_grad["table"][np.array(untouched)], 0.0)


def test_sgd_has_the_closed_form_of_the_gradients_dot_product():
    """dL_meta / dw_i = -lr <grad L_meta(params'), grad l_i(params)> / B."""
    rate, batch = 0.1, batch_of([1, 3])
    problem = toy_problem(optax.sgd(rate), TABLE)
    state, meta_params = warm_state(problem), TABLE.init()
    meta_grad, new_state, _ = unrolled(problem, state, meta_params, batch, META_BATCH)
    v = jax.grad(lambda params: problem.meta_loss(params, META_BATCH)[0])(new_state.params)["kernel"]
    per_example = jax.jacobian(lambda params: problem.losses(params, batch)[0])(state.params)["kernel"]  # [B, WIDTH]
    np.testing.assert_allclose(meta_grad["table"][np.array([1, 3])], -rate * per_example @ v / 2, rtol=1e-12)


def test_quadratic_problem_by_hand():
    """One weight, one parameter: params' = p - lr w (p - y), L_meta = (params' - m)^2."""
    p, y, m, rate, w = 2.0, 0.5, -1.0, 0.1, 0.7
    table = instance_table(1, 0.0, 3.0)
    problem = toy_problem(optax.sgd(rate), table)._replace(
        losses=lambda params, batch: (0.5 * jnp.square(params["kernel"] - y) + jnp.zeros(1), None),
        meta_loss=lambda params, batch: (jnp.sum(jnp.square(params["kernel"] - m)), {}),
    )
    state = bilevel.init_train_state(problem.inner_tx, {"kernel": jnp.array([p])})
    meta_grad, new_state, _ = unrolled(problem, state, {"table": jnp.array([w])}, batch_of([0]), batch_of([0]))
    stepped = p - rate * w * (p - y)
    np.testing.assert_allclose(new_state.params["kernel"], [stepped], rtol=1e-14)
    np.testing.assert_allclose(meta_grad["table"], [-2 * (stepped - m) * rate * (p - y)], rtol=1e-13)


def test_a_clip_after_weighting_makes_a_batch_of_one_independent_of_its_weight():
    problem = toy_problem(optimizers.adamw(lambda count: 0.05, weight_decay=0.0, clip_norm=1e-3), TABLE)
    meta_grad, _, aux = unrolled(problem, warm_state(problem), TABLE.init(), batch_of([1]), META_BATCH)
    assert aux["grad_norm"] > 1e-3
    np.testing.assert_allclose(meta_grad["table"], 0.0, atol=1e-15)


def test_unused_parameters_leave_the_meta_gradient_finite():
    """At the first step an unused embedding row has a second moment of 0; a plain square root gives NaN."""
    problem = toy_problem(CHAINS["adamw"], TABLE)
    params = {**toy_params(), "embedding": jnp.zeros((4, 2))}
    state = bilevel.init_train_state(problem.inner_tx, params)
    meta_grad, _, _ = unrolled(problem, state, TABLE.init(), batch_of([0, 1]), META_BATCH)
    assert np.all(np.isfinite(meta_grad["table"]))
    assert np.any(meta_grad["table"] != 0)


def test_weight_zero_removes_an_example():
    """With the sum over B as denominator fixed, a weight of 0 equals a masked row up to the factor of B."""
    problem = toy_problem(optax.sgd(0.1), TABLE)
    state, ones = warm_state(problem), jnp.ones(NUM_EXAMPLES)
    removed, _ = inner_step(problem, state, {"table": ones.at[4].set(0.0)}, batch_of([1, 4]))
    alone, _ = inner_step(problem, state, {"table": ones / 2}, batch_of([1]))
    np.testing.assert_allclose(removed.params["kernel"], alone.params["kernel"], rtol=1e-14)


def test_masked_rows_do_nothing():
    problem = toy_problem(CHAINS["adamw"], TABLE)
    state = warm_state(problem)
    padded, aux = inner_step(problem, state, TABLE.init(), batch_of([1, 4, 0], [True, True, False]))
    plain, plain_aux = inner_step(problem, state, TABLE.init(), batch_of([1, 4]))
    np.testing.assert_allclose(padded.params["kernel"], plain.params["kernel"], rtol=1e-14)
    np.testing.assert_allclose(aux["inner_loss"], plain_aux["inner_loss"], rtol=1e-14)


def test_permuting_the_batch_leaves_the_table_gradient():
    problem = toy_problem(CHAINS["adamw"], TABLE)
    state = warm_state(problem)
    one, _, _ = unrolled(problem, state, TABLE.init(), batch_of([0, 1, 4]), META_BATCH)
    other, _, _ = unrolled(problem, state, TABLE.init(), batch_of([4, 0, 1]), META_BATCH)
    np.testing.assert_allclose(one["table"], other["table"], rtol=1e-12)


def test_the_inner_step_of_a_bilevel_step_is_the_plain_one():
    problem = toy_problem(CHAINS["adamw"], TABLE)
    state, batch = warm_state(problem), batch_of([0, 3])
    _, through, _ = unrolled(problem, state, TABLE.init(), batch, META_BATCH)
    plain, _ = inner_step(problem, state, TABLE.init(), batch)
    for one, other in zip(jax.tree.leaves(through), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-14)


def test_weights_that_look_at_the_model_are_differentiated_through():
    """`outputs` may carry anything; here the losses themselves, as a small net would see them."""

    def apply(meta_params, batch, outputs):
        return jax.nn.sigmoid(meta_params["slope"] * outputs)

    weighting = Weighting(lambda: {"slope": jnp.array(0.3)}, apply, lambda meta_params: meta_params)
    problem = toy_problem(CHAINS["sgd"], weighting)
    x, y, _, _ = toy_data()

    def losses(params, batch):
        loss = jnp.square(jnp.tanh(x[batch.example_id] @ params["kernel"]) - y[batch.example_id])
        return loss, loss

    problem = problem._replace(losses=losses)
    state = bilevel.init_train_state(problem.inner_tx, toy_params())
    batch, slope, h = batch_of([0, 1, 2]), 0.3, 1e-5
    meta_grad, _, _ = unrolled(problem, state, {"slope": jnp.array(slope)}, batch, META_BATCH)
    ends = [meta_loss_after_step(problem, state, {"slope": jnp.array(slope + s)}, batch) for s in (h, -h)]
    np.testing.assert_allclose(meta_grad["slope"], (ends[0] - ends[1]) / (2 * h), rtol=1e-8)
