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


def test_a_constant_schedule_warms_up_and_stays():
    schedule = optimizers.warmup_constant(2.0, 100, warmup_fraction=0.04)
    np.testing.assert_allclose([schedule(step) for step in (0, 1, 3, 4, 99)], [0.5, 1.0, 2.0, 2.0, 2.0], rtol=1e-6)


@pytest.mark.parametrize("name", ["cosine", "constant"])
def test_without_a_warm_up_the_first_rate_is_the_peak(name):
    schedule = optimizers.SCHEDULES[name](2.0, 100, 0.0)
    assert float(schedule(0)) == 2.0


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


def test_dividing_by_the_inner_rate_knows_several_inner_steps():
    """The mean rate over an outer step's inner steps: 1, 2, 3, then 4, 5, 6, then 7, 8, 9."""
    tx = optimizers.divide_by_inner_rate(lambda count: 1.0 + count, num_inner_steps=3)
    state, scaled = tx.init(jnp.ones(1)), []
    for _ in range(3):
        update, state = tx.update(jnp.ones(1), state)
        scaled.append(float(update[0]))
    np.testing.assert_allclose(scaled, [1 / 2, 1 / 5, 1 / 8], rtol=1e-6)


def test_the_published_schedule_by_hand():
    """12 steps, a warm-up of 0.6 step: the first rate is 0."""
    schedule = optimizers.warmup_cosine_as_published(5e-4, 12)
    expected = [0.0, 4.984826693294874e-4, 4.816235168037004e-4, 4.4728512734909845e-4]
    with jax.enable_x64(True):
        np.testing.assert_allclose([schedule(jnp.array(step)) for step in range(4)], expected, rtol=1e-12)
    assert 0 < schedule(jnp.array(11)) < 1e-5 * 5


def test_the_published_schedule_warms_up_over_whole_steps_too():
    schedule = optimizers.warmup_cosine_as_published(2.0, 100)
    rates = np.array([float(schedule(jnp.array(step))) for step in range(101)])
    np.testing.assert_allclose(rates[:6], [0, 0.4, 0.8, 1.2, 1.6, 2.0], rtol=1e-6)
    np.testing.assert_allclose(rates[[52, 53, 100]], 1 + np.cos(np.pi * np.array([47, 48, 95]) / 95), atol=1e-6)


def test_hf_adamw_is_transformers_rule():
    """Epsilon before the bias correction, decay of the stepped parameter, on every parameter."""
    rng, decay, eps, b1, b2 = np.random.default_rng(0), 0.1, 1e-2, 0.9, 0.999
    p, m, v = rng.normal(size=3), np.zeros(3), np.zeros(3)
    rate_of = lambda count: 0.05 * (1 + count)  # noqa: E731
    with jax.enable_x64(True):
        tx = optimizers.hf_adamw(rate_of, weight_decay=decay, eps=eps)
        params = {"bias": jnp.array(p)}
        state = tx.init(params)
        for step in range(1, 6):
            g, rate = rng.normal(size=3) * [1.0, 1e-3, 0.0], rate_of(step - 1)
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            p = p - rate * np.sqrt(1 - b2**step) / (1 - b1**step) * m / (np.sqrt(v) + eps)
            p = p - rate * decay * p
            updates, state = tx.update({"bias": jnp.array(g)}, state, params)
            params = optax.apply_updates(params, updates)
            np.testing.assert_allclose(params["bias"], p, rtol=1e-9)


def test_hf_adamw_can_be_differentiated_at_a_gradient_of_zero():
    tx = optimizers.hf_adamw(lambda count: 0.1, weight_decay=0.1)
    state = tx.init(jnp.zeros(2))
    slope = jax.grad(lambda scale: jnp.sum(tx.update(scale * jnp.array([0.0, 1.0]), state, jnp.ones(2))[0]))(1.0)
    assert np.isfinite(slope)


@pytest.mark.parametrize("scale", [0.1, 1.0, 7.0])
def test_the_clip_has_optax_values(scale):
    grads = {"a": scale * jnp.array([0.3, -0.4]), "b": scale * jnp.full((2, 2), 0.2)}
    ours, theirs = optimizers.clip_by_global_norm(0.5), optax.clip_by_global_norm(0.5)
    clipped, expected = (tx.update(grads, tx.init(grads))[0] for tx in (ours, theirs))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-6), clipped, expected)


def test_the_clip_can_be_differentiated_at_a_gradient_of_zero():
    """There it is the identity; optax's own norm has no derivative."""
    tx = optimizers.clip_by_global_norm(0.5)
    slope = lambda tx: jax.jacobian(lambda grads: tx.update(grads, tx.init(grads))[0])(jnp.zeros(2))  # noqa: E731
    np.testing.assert_array_equal(slope(tx), np.eye(2))


def test_the_derivative_of_an_active_clip_leaves_the_gradients_direction_out():
    tx, g = optimizers.clip_by_global_norm(0.5), jnp.array([3.0, 4.0])
    _, tangent = jax.jvp(lambda grads: tx.update(grads, tx.init(grads))[0], (g,), (g,))
    np.testing.assert_allclose(tangent, 0.0, atol=1e-7)


def test_adamw_decays_what_the_mask_says():
    params = {"kernel": jnp.ones(2), "bias": jnp.ones(2)}
    still = jax.tree.map(jnp.zeros_like, params)
    for decay_all, expected in ((False, {"kernel": -0.05, "bias": 0.0}), (True, {"kernel": -0.05, "bias": -0.05})):
        tx = optimizers.adamw(lambda count: 0.5, weight_decay=0.1, decay_all=decay_all)
        updates, _ = tx.update(still, tx.init(params), params)
        for name, value in expected.items():
            np.testing.assert_allclose(updates[name], value, rtol=1e-6)


def test_a_warning_is_due_where_steps_do_not_depend_on_their_gradient():
    """tests/test_hypergradient_precision.py asks for every optax optimizer; here chains of the project's own."""
    params = {"kernel": jnp.ones((3, 2))}
    ours = optax.chain(
        optimizers.clip_by_global_norm(1.0),
        optimizers.hf_adamw(optimizers.warmup_cosine_as_published(1e-4, 12), weight_decay=0.1),
    )
    assert not optimizers.derivative_vanishes(ours, params)
    assert optimizers.derivative_vanishes(optax.chain(optax.clip_by_global_norm(1.0), optax.lion(1e-4)), params)


def test_any_optimizer_can_be_tried_on_any_tree():
    """One that looks at the tree itself, such as a mask shaped like it."""
    params = [jnp.ones((3, 2)), {"a": jnp.ones(2), "b": jnp.ones(2)}]
    masked = [optax.adamw(1e-3, mask=[True, {"a": False, "b": True}]), optax.masked(optax.lion(1e-3), [True, True])]
    assert [optimizers.derivative_vanishes(tx, params) for tx in masked] == [False, True]


def test_of_each_kind_of_leaf_one_is_tried():
    kernel, bias, other = jnp.ones((3, 2)), jnp.ones(2), jnp.ones((5, 2))
    params = {"first": {"kernel": kernel, "bias": bias}, "second": {"kernel": other, "bias": other.astype("bfloat16")}}
    found = jax.tree.map(lambda leaf: leaf.shape, optimizers.one_of_each(params))
    assert found == {"1 float32": {"bias": (2,)}, "2 float32": {"kernel": (3, 2)}, "2 bfloat16": {"bias": (5, 2)}}


@pytest.mark.parametrize("moment_dtype", [None, "float32", "bfloat16"])
@pytest.mark.parametrize("make", [optimizers.adamw, optimizers.hf_adamw])
def test_an_optimizer_of_bfloat16_parameters_is_tried_in_their_type(make, moment_dtype):
    params = {"kernel": jnp.ones((3, 2), jnp.bfloat16), "bias": jnp.ones(2)}
    tx = make(lambda count: 0.1, weight_decay=0.1, moment_dtype=moment_dtype)
    assert not optimizers.derivative_vanishes(tx, params)


def test_the_average_of_the_parameters_moves_by_its_decay():
    ema = optimizers.update_ema({"a": jnp.array([1.0, 2.0])}, {"a": jnp.array([2.0, 0.0])}, 0.75)
    np.testing.assert_allclose(ema["a"], [1.25, 1.5])


def test_moments_and_averages_of_bfloat16_parameters_move():
    """0.999 is 1 in bfloat16: computed in that type, a second moment would never decay nor an average move."""
    tx = optimizers.hf_adamw(lambda count: 0.1, weight_decay=0.0)
    params = {"kernel": jnp.ones(3, jnp.bfloat16)}
    state = tx.init(params)._replace(nu={"kernel": jnp.full(3, 2.0, jnp.bfloat16)})
    for _ in range(20):
        updates, state = tx.update({"kernel": jnp.zeros(3, jnp.bfloat16)}, state, params)
    assert updates["kernel"].dtype == jnp.bfloat16
    wide = optimizers.widen(params)
    assert float(optimizers.update_ema(wide, {"kernel": jnp.full(3, 2.0, jnp.bfloat16)}, 0.999)["kernel"][0]) > 1
    assert float(optimizers.norm({"kernel": jnp.ones(70_000, jnp.bfloat16)})) == pytest.approx(70_000**0.5, rel=1e-3)


@pytest.mark.parametrize("make", [optimizers.adamw, optimizers.hf_adamw])
def test_the_way_back_through_adam_starts_from_its_moments(make):
    """Bytes that `jax.vjp` keeps: moments and gradient, not the quotients and roots in between as well."""
    params = {"kernel": jnp.ones((100, 10))}
    tx = make(lambda count: 1e-3, weight_decay=0.0)
    back = jax.eval_shape(
        lambda grads: jax.vjp(lambda grads: tx.update(grads, tx.init(params), params)[0], grads)[1], params
    )
    kept = sum(leaf.size for leaf in jax.tree.leaves(back))
    assert kept <= 5.1 * 1000  # with two of zeros, which a compiler does not keep


def second_moments(moment_dtype, num_steps, make=optimizers.scale_by_adam_meta_safe):
    """The second moments after gradients of variance 1, of 4096 entries that began at a variance of 4."""
    params = {"kernel": jnp.zeros(4096)}
    tx = make(moment_dtype=moment_dtype)
    state = tx.init(params)
    state = state._replace(nu=jax.tree.map(lambda leaf: jnp.full_like(leaf, 4.0), state.nu))

    @jax.jit
    def steps(state):
        def one(state, key):
            grads = {"kernel": jax.random.normal(key, (4096,))}
            return tx.update(grads, state, params)[1], None

        return jax.lax.scan(one, state, jax.random.split(jax.random.key(0), num_steps))[0]

    return np.asarray(steps(state).nu["kernel"])


def hf_adamw(moment_dtype):
    return optimizers.hf_adamw(lambda count: 1e-3, weight_decay=0.0, moment_dtype=moment_dtype)


@pytest.mark.parametrize("make", [optimizers.scale_by_adam_meta_safe, hf_adamw])
def test_second_moments_in_bfloat16_follow_those_in_float32(make):
    """From 4 towards 1 in 2,000 steps of 1/1000 each. Rounded to the nearest they cannot move, and do not."""
    wide, narrow = second_moments(None, 2000, make), second_moments("bfloat16", 2000, make)
    assert narrow.dtype == jnp.bfloat16
    narrow = narrow.astype(np.float32)
    assert np.mean(wide) == pytest.approx(1 + 3 * 0.999**2000, rel=0.01)
    assert np.mean(narrow) == pytest.approx(np.mean(wide), rel=0.01)
    assert 0.02 < np.std(narrow / wide) < 0.1  # each for itself
    mixed = lambda old, new: (0.999 * old.astype(jnp.float32) + 0.001 * new).astype(jnp.bfloat16)  # noqa: E731
    assert mixed(jnp.bfloat16(4.0), 1.0) == 4.0


def test_rounding_at_random_is_right_on_average_and_goes_to_neighbours():
    x = jnp.full((2**16,), 1 + 0.3 / 128, jnp.float32)
    found = optimizers.round_at_random(x, jnp.arange(2**16).astype(jnp.uint16)).astype(jnp.float32)
    assert set(np.unique(found)) == {1.0, 1 + 1 / 128}
    assert np.mean(found) == pytest.approx(1 + 0.3 / 128, abs=1e-6)
    exact = jnp.array([0.0, 1.5, jnp.inf, jnp.nan], jnp.float32)
    rounded = optimizers.round_at_random(exact, jnp.full(4, 65535, jnp.uint16))
    np.testing.assert_array_equal(rounded.astype(jnp.float32), exact)


def test_the_bits_of_a_step_are_its_own_and_fair():
    """By step, by leaf and by place; the same whenever the step is taken again."""
    draws = [optimizers._bits((64, 64), jnp.int32(step), leaf) for step in (0, 1, 2) for leaf in (0, 1)]
    flat = np.stack([np.asarray(draw, np.float64).ravel() for draw in draws])
    assert np.abs(np.corrcoef(flat) - np.eye(6)).max() < 0.06  # 4096 draws: 1 / 64
    assert np.abs(np.corrcoef(flat[:, :-1], flat[:, 1:])).min() < 0.06
    assert np.abs(flat.mean(axis=1) / 65536 - 0.5).max() < 0.02
    np.testing.assert_array_equal(draws[3], optimizers._bits((64, 64), jnp.int32(1), 1))


def test_narrow_moments_leave_the_step_in_the_parameters_type():
    params = {"kernel": jnp.ones(3)}
    for make in (optimizers.scale_by_adam_meta_safe, hf_adamw):
        for params_dtype, moment_dtype in (("float32", "bfloat16"), ("bfloat16", "float32"), ("bfloat16", None)):
            tx, cast = make(moment_dtype=moment_dtype), jax.tree.map(lambda p: p.astype(params_dtype), params)  # noqa: B023
            updates, state = tx.update(cast, tx.init(cast), cast)
            assert updates["kernel"].dtype == params_dtype
            assert state.mu["kernel"].dtype == state.nu["kernel"].dtype == (moment_dtype or params_dtype)
