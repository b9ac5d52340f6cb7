"""Optimizers against optax, and the traps of differentiating through them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dreamprm_jax import optimizers


def test_adam_has_optax_values():
    params = {"kernel": jnp.arange(3.0)}
    ours, theirs = optimizers.scale_by_adam_meta_safe(), optax.scale_by_adam()
    states = ours.init(params), theirs.init(params)
    for step in range(4):
        grads = {"kernel": jnp.array([0.0, 1e-4, -2.0]) * (step + 1)}
        (mine, state), (reference, other) = ours.update(grads, states[0]), theirs.update(grads, states[1])
        states = state, other
        np.testing.assert_allclose(mine["kernel"], reference["kernel"], rtol=1e-5)


def test_adam_can_be_differentiated_at_a_gradient_of_zero():
    tx = optimizers.scale_by_adam_meta_safe()
    state = tx.init(jnp.zeros(2))

    def direction(scale):
        return jnp.sum(tx.update(scale * jnp.array([0.0, 1.0]), state)[0])

    assert np.isfinite(jax.grad(direction)(1.0))
    unsafe = optax.scale_by_adam()
    unsafe_state = unsafe.init(jnp.zeros(2))
    assert np.isnan(jax.grad(lambda s: jnp.sum(unsafe.update(s * jnp.array([0.0, 1.0]), unsafe_state)[0]))(1.0))


def test_the_second_moment_is_not_shared_with_the_first():
    """Donating a state whose two moments are one buffer is an error of XLA."""
    state = optimizers.scale_by_adam_meta_safe().init(jnp.zeros(2))
    assert state.mu is not state.nu


def test_schedule_warms_up_peaks_and_ends_near_zero():
    schedule = optimizers.warmup_cosine(2.0, 100)
    rates = np.array([float(schedule(step)) for step in range(100)])
    assert rates[0] == pytest.approx(0.4)  # 1 of 5 warm-up steps
    assert rates[4] == pytest.approx(2.0)
    assert rates.argmax() in (4, 5)
    assert 0 < rates[-1] < 0.01
    assert np.all(np.diff(rates[5:]) < 0)


def test_decay_touches_matrices_and_embeddings_only():
    params = {
        "norm": {"scale": 1.0},
        "q": {"kernel": 1.0, "bias": 1.0},
        "embedding": 1.0,
        "lm_head": 1.0,
        "ls1": 1.0,
    }
    mask = optimizers.decay_mask(params)
    assert mask == {
        "norm": {"scale": False}, "q": {"kernel": True, "bias": False},
        "embedding": True, "lm_head": True, "ls1": False,
    }  # fmt: skip


def table_path(grads, **kwargs):
    tx = optimizers.per_entry_rmsprop(lambda count: 0.1, **kwargs)
    table, state = jnp.ones(len(grads[0])), tx.init(jnp.ones(len(grads[0])))
    path = []
    for grad in grads:
        updates, state = tx.update(jnp.asarray(grad), state, table)
        table = table + updates
        path.append(np.asarray(table))
    return np.array(path)


def test_an_entry_without_a_gradient_stays_and_forgets_nothing():
    path = table_path([[1.0, 1.0], [0.0, 1.0], [1.0, 1.0]])
    assert path[1, 0] == path[0, 0]
    np.testing.assert_allclose(path[2, 0], path[1, 1], rtol=1e-6)  # its second gradient counts as its second


def test_an_entry_moves_by_its_own_history():
    np.testing.assert_allclose(table_path([[3.0]] * 4)[:, 0], [0.9, 0.8, 0.7, 0.6], rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_table_does_not_see_the_scale_of_its_gradient(scale):
    grads = np.array([[1.0, -2.0], [0.5, 0.0], [-1.0, 3.0]])
    np.testing.assert_allclose(table_path(grads * scale), table_path(grads), rtol=1e-5)


def test_table_decay_pulls_touched_entries_towards_one():
    path = table_path([[1.0, 1.0]] + [[1e-12, 0.0]] * 50, weight_decay=1.0)
    assert abs(path[-1, 0] - 1.0) < abs(table_path([[1.0, 1.0]] + [[1e-12, 0.0]] * 50)[-1, 0] - 1.0)
    assert path[-1, 1] == path[0, 1]


def test_dividing_by_the_inner_rate_takes_it_out():
    tx = optimizers.divide_by_inner_rate(lambda count: jnp.where(count == 0, 0.0, 0.5))
    state = tx.init(jnp.ones(1))
    first, state = tx.update(jnp.zeros(1), state)
    second, _ = tx.update(jnp.full(1, 3.0), state)
    np.testing.assert_array_equal(first, [0.0])
    np.testing.assert_allclose(second, [6.0])
