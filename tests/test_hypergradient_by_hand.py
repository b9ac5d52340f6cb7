"""Problems whose meta-gradient can be written down: every exact estimator against the closed form; float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from toy import batch_of

from dreamprm_jax import bilevel
from dreamprm_jax.hypergradient import ESTIMATORS, EXACT
from dreamprm_jax.inner import Problem

pytestmark = pytest.mark.usefixtures("float64")

META_BATCH = batch_of([0, 2, 3])


def by_hand(inner_tx, losses, meta_loss, param, weights, batch, num_inner_steps=1):
    """Gradients of all estimators, and params', for a problem of one parameter."""
    problem = Problem(losses, toy.toy_table().apply, meta_loss, inner_tx, num_inner_steps)
    state = bilevel.init_train_state(inner_tx, jnp.array(param))
    names = EXACT if num_inner_steps == 1 else ("unrolled", "mixed")
    arguments = {"table": jnp.array(weights)}, batch, batch_of([0])
    out = jax.jit(lambda: {name: ESTIMATORS[name](problem, state, *arguments)[:2] for name in names})()
    return {name: np.asarray(meta_grad["table"]) for name, (meta_grad, _) in out.items()}, out["unrolled"][1].params


def test_quadratic_problem_by_hand():
    """One weight, one parameter: params' = p - lr w (p - y), L_meta = (params' - m)^2."""
    p, y, m, rate, w = 2.0, 0.5, -1.0, 0.1, 0.7
    gradients, params = by_hand(
        optax.sgd(rate),
        lambda params, batch: (0.5 * jnp.square(params - y) + jnp.zeros(1), None),
        lambda params, batch: (jnp.square(params - m), {}),
        p, [w], batch_of([0]),
    )  # fmt: skip
    stepped = p - rate * w * (p - y)
    np.testing.assert_allclose(params, stepped, rtol=1e-14)
    for name, meta_grad in gradients.items():
        np.testing.assert_allclose(meta_grad, [-2 * (stepped - m) * rate * (p - y)], rtol=1e-13, err_msg=name)


def test_two_steps_with_momentum_by_hand():
    """Row k has the target y_k, and the second step remembers the first gradient."""
    p, y, m, rate, memory, (w0, w1) = 2.0, (0.5, -0.3), -1.0, 0.1, 0.9, (0.7, 1.2)
    targets = jnp.array(y)
    gradients, params = by_hand(
        optax.sgd(rate, momentum=memory),
        lambda params, batch: (0.5 * jnp.square(params - targets[batch.example_id]), None),
        lambda params, batch: (jnp.square(params - m), {}),
        p, [w0, w1], batch_of([[0], [1]]), num_inner_steps=2,
    )  # fmt: skip
    first = w0 * (p - y[0])
    p1 = p - rate * first
    p2 = p1 - rate * (w1 * (p1 - y[1]) + memory * first)
    p1_slope = -rate * (p - y[0])
    slopes = [p1_slope - rate * (w1 * p1_slope + memory * (p - y[0])), -rate * (p1 - y[1])]
    np.testing.assert_allclose(params, p2, rtol=1e-14)
    for name, meta_grad in gradients.items():
        np.testing.assert_allclose(meta_grad, 2 * (p2 - m) * np.array(slopes), rtol=1e-13, err_msg=name)


def test_sgd_has_the_closed_form_of_the_gradients_dot_product():
    """dL_meta / dw_i = -lr <grad L_meta(params'), grad l_i(params)> / B."""
    rate, rows, table = 0.1, batch_of([1, 3]), toy.toy_table()
    problem, params = toy.small_problem(optax.sgd(rate), table)
    state = bilevel.init_train_state(problem.inner_tx, params)

    @jax.jit
    def both():
        out = {name: ESTIMATORS[name](problem, state, table.init(), rows, META_BATCH) for name in EXACT}
        after = out["unrolled"][1].params
        v = jax.grad(lambda params: problem.meta_loss(params, META_BATCH)[0])(after)["kernel"]
        own = jax.jacrev(lambda params: problem.losses(params, rows)[0])(params)["kernel"]  # [B, width, height]
        return {name: meta_grad["table"] for name, (meta_grad, _, _) in out.items()}, jnp.einsum("bwh,wh->b", own, v)

    gradients, products = both()
    for name, meta_grad in gradients.items():
        np.testing.assert_allclose(meta_grad[np.array([1, 3])], -rate * products / 2, rtol=1e-12, err_msg=name)
