"""The inner step: what plain training does, and which row counts how much in it; float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from toy import CHAINS, NUM_EXAMPLES, batch_of, toy_problem, toy_table

from dreamprm_jax import bilevel, inner
from dreamprm_jax.hypergradient import ESTIMATORS
from dreamprm_jax.losses import masked_mean
from dreamprm_jax.weighting import uniform

pytestmark = pytest.mark.usefixtures("float64")

TABLE = toy_table()
ONES = {"table": np.ones(NUM_EXAMPLES)}


def table_with(row, weight):
    return {"table": jnp.ones(NUM_EXAMPLES).at[row].set(weight)}


def small(**fields):
    """(jitted inner step on a small problem, a state, the problem)."""
    problem, params = toy.small_problem(optax.sgd(0.1), TABLE, **fields)
    step = jax.jit(lambda state, meta, batch: inner.inner_step(problem, state, meta, batch))
    return step, bilevel.init_train_state(problem.inner_tx, params), problem


@pytest.mark.parametrize("chain", ["adamw, clip", "hf_adamw"])
def test_equal_weights_give_plain_training_bit_for_bit(chain):
    steps = {}
    for weights, meta_params in ((TABLE, TABLE.init()), (uniform(), {})):
        problem = toy_problem(CHAINS[chain], weights)
        step = jax.jit(lambda state, problem=problem, meta=meta_params: inner.inner_step(
            problem, state, meta, batch_of([0, 1, 4])
        )[0])  # fmt: skip
        steps[len(meta_params)] = step(toy.warm_state(CHAINS[chain]))
    jax.tree.map(np.testing.assert_array_equal, steps[0], steps[1])


@pytest.mark.parametrize("example_clip_norm", [None, 0.5])
def test_weight_zero_removes_an_example(example_clip_norm):
    """The mean is over B whatever the weights: what is left counts as in a batch of its own, times its share of B."""
    step, state, _ = small(example_clip_norm=example_clip_norm)
    removed, _ = step(state, table_with(4, 0.0), batch_of([1, 4]))
    alone, _ = step(state, table_with(1, 0.5), batch_of([1]))
    np.testing.assert_allclose(removed.params["kernel"], alone.params["kernel"], rtol=1e-13)


@pytest.mark.parametrize("example_clip_norm", [None, 0.5])
def test_masked_rows_do_nothing(example_clip_norm):
    step, state, _ = small(example_clip_norm=example_clip_norm)
    padded, aux = step(state, ONES, batch_of([1, 4, 0], [True, True, False]))
    plain, plain_aux = step(state, ONES, batch_of([1, 4]))
    np.testing.assert_allclose(padded.params["kernel"], plain.params["kernel"], rtol=1e-13)
    for name in set(aux) - {"losses", "instance_weights"}:
        np.testing.assert_allclose(aux[name], plain_aux[name], rtol=1e-13, err_msg=name)


def test_a_batch_of_masked_rows_moves_nothing():
    step, state, _ = small()
    new_state, aux = step(state, ONES, batch_of([1, 4], [False, False]))
    np.testing.assert_array_equal(new_state.params["kernel"], state.params["kernel"])
    assert all(np.all(np.isfinite(value)) for value in aux.values())


def test_permuting_the_batch_permutes_the_record():
    step, state, _ = small()
    (one, record), (other, permuted) = (step(state, ONES, batch_of(rows)) for rows in ([0, 1, 4], [4, 0, 1]))
    np.testing.assert_allclose(one.params["kernel"], other.params["kernel"], rtol=1e-13)
    np.testing.assert_allclose(permuted["losses"], record["losses"][jnp.array([2, 0, 1])], rtol=1e-13)


def test_the_gradient_is_the_mean_of_clipped_gradients_weighted():
    step, state, problem = small(example_clip_norm=0.5)
    weights, rows = {"table": jnp.linspace(0.2, 1.2, NUM_EXAMPLES)}, batch_of([0, 1, 4, 5])
    new_state, aux = step(state, weights, rows)
    _, own = jax.jit(lambda batch: inner.example_gradients(problem, state.params, batch))(rows)
    own = inner.in_order(own)
    norms = np.linalg.norm(own["kernel"].reshape(4, -1), axis=1)
    clipped = np.minimum(1.0, 0.5 / norms)[:, None, None] * own["kernel"]
    expected = np.mean(np.asarray(weights["table"])[rows.example_id][:, None, None] * clipped, axis=0)
    moved = (state.params["kernel"] - new_state.params["kernel"]) / 0.1
    np.testing.assert_allclose(moved, expected, rtol=1e-12)
    assert 0 < aux["example_clip_share"] == np.mean(norms > 0.5) < 1


def test_the_gradient_is_that_of_the_weighted_loss():
    """Detached: with the weights held. Attached: with the weights moving."""
    weighting, _ = toy.WEIGHTINGS["net, published"]
    problem, params, rows = toy_problem(CHAINS["sgd"], weighting), toy.toy_params(), batch_of([0, 1, 4])
    meta_params = optax.tree.scale(3.0, weighting.init())  # weights that depend on the model clearly

    def loss(params, detached):
        losses, outputs = problem.losses(params, rows)
        weights = problem.weights(meta_params, rows, outputs)
        return jnp.mean((jax.lax.stop_gradient(weights) if detached else weights) * losses)

    @jax.jit
    def both():
        gradient = lambda detached: inner.inner_gradient(  # noqa: E731
            problem._replace(detached=detached), params, meta_params, rows
        )[0]
        return [(gradient(detached), jax.grad(loss)(params, detached)) for detached in (True, False)]

    pairs = both()
    for gradient, expected in pairs:
        jax.tree.map(
            lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-11, atol=1e-16), gradient, expected
        )
    assert np.max(np.abs(pairs[0][0]["out"] - pairs[1][0]["out"])) > 1e-3


def test_rows_in_turn_are_strided_and_come_back_in_order():
    rows = jnp.arange(12.0).reshape(6, 2)
    turns = inner.in_turns(rows, 2)  # two devices have rows 0 to 2 and 3 to 5: each turn has one of either
    np.testing.assert_array_equal(turns[:, :, 0] / 2, [[0, 3], [1, 4], [2, 5]])
    np.testing.assert_array_equal(inner.in_order(turns), rows)


@pytest.mark.parametrize(
    ("estimator", "kind", "example_clip_norm"),
    [(None, "net", None), (None, "net, published", None), (None, "table", 0.3), ("dot", "table", None),
     ("dot", "net", 0.3), ("recompute", "table", 0.3), ("tangent", "net", None), ("mixed", "table", 0.3)],
)  # fmt: skip
def test_a_micro_batch_changes_nothing(estimator, kind, example_clip_norm):
    """Of the inner step (None) and of every estimator that takes rows in turn; one row at a time, and three of six."""
    weighting, detached = toy.WEIGHTINGS[kind]
    rows, found = batch_of([0, 1, 4, 5, 2, 2], [True] * 5 + [False]), []
    for size in (None, 1, 3):
        problem = toy_problem(
            toy.SMOOTH_ADAMW, weighting, detached=detached, example_clip_norm=example_clip_norm, micro_batch_size=size
        )
        if estimator is None:
            take = lambda state, problem=problem: inner.inner_step(problem, state, weighting.init(), rows)  # noqa: E731
        else:
            take = lambda state, problem=problem: ESTIMATORS[estimator](  # noqa: E731
                problem, state, weighting.init(), rows, rows
            )
        found.append(jax.jit(take)(toy.warm_state(toy.SMOOTH_ADAMW)))
    for other in found[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-13), found[0], other)


def test_a_micro_batch_keeps_the_activations_of_its_rows_alone():
    """Read off the program: its gradient has no array of all four rows."""
    shapes = {}
    for size in (None, 2):
        problem, params = toy.small_problem(optax.sgd(0.1), TABLE, width=31, height=29, micro_batch_size=size)
        gradient = lambda batch, problem=problem, params=params: inner.inner_gradient(  # noqa: E731
            problem, params, TABLE.init(), batch
        )[0]
        text = jax.jit(gradient).lower(batch_of([0, 1, 4, 5])).compile().as_text()
        shapes[size] = {"[4,29]" in text, "[29,4]" in text}
    assert True in shapes[None] and True not in shapes[2]


def test_the_clip_factor_is_one_up_to_the_norm_and_a_ratio_above():
    problem = small(example_clip_norm=2.0)[2]
    np.testing.assert_allclose(inner.clip_factor(problem, jnp.array([0.0, 2.0, 8.0])), [1.0, 1.0, 0.25])
    np.testing.assert_array_equal(inner.clip_factor(small()[2], jnp.array([0.0, 8.0])), 1.0)


def test_the_record_tells_what_the_step_saw():
    step, state, problem = small()
    weights, rows = {"table": jnp.arange(1.0, 7.0)}, batch_of([0, 1, 3], [True, True, False])
    new_state, record = step(state, weights, rows)
    losses = np.asarray(problem.losses(state.params, rows)[0])
    np.testing.assert_allclose(record["losses"], losses)
    np.testing.assert_allclose(record["inner_loss"], losses[:2].mean())
    np.testing.assert_allclose(record["weighted_loss"], (losses[0] + 2 * losses[1]) / 2)
    np.testing.assert_array_equal(record["instance_weights"], [1, 2, 4])
    np.testing.assert_allclose(record["effective_sample_size"], 3**2 / (1 + 4))
    moved = np.linalg.norm(new_state.params["kernel"] - state.params["kernel"]) / 0.1
    np.testing.assert_allclose(record["grad_norm"], moved)
    assert new_state.step == 1


def test_several_steps_are_steps_in_a_row():
    step, state, problem = small()
    batches, meta_params = batch_of([[0, 1], [4, 2], [5, 5]]), {"table": jnp.linspace(0.4, 1.4, NUM_EXAMPLES)}
    final, record = inner.inner_steps(problem._replace(num_inner_steps=3), state, meta_params, batches)
    records = []
    for rows in ([0, 1], [4, 2], [5, 5]):
        state, one = step(state, meta_params, batch_of(rows))
        records.append(one)
    np.testing.assert_allclose(final.params["kernel"], state.params["kernel"], rtol=1e-13)
    np.testing.assert_allclose(record["losses"], [one["losses"] for one in records], rtol=1e-13)
    np.testing.assert_allclose(record["inner_loss"], np.mean([one["inner_loss"] for one in records]), rtol=1e-13)
    np.testing.assert_array_equal(inner.last_batch(problem._replace(num_inner_steps=3), batches).example_id, [5, 5])


@pytest.mark.parametrize("size", [1, 2, 3, 6])
@pytest.mark.parametrize("mask", [[True] * 6, [True, True, True, False, False, True], [True] * 3 + [False] * 3])
def test_a_meta_loss_in_parts_is_the_whole(size, mask):
    """Loss, aux and gradient; chunks count by their real rows, one without any not at all."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)))

    def meta_loss(params, batch):
        values = jnp.tanh(batch["x"] @ params["kernel"])
        mean = partial(masked_mean, mask=batch["example_mask"])
        return mean(values**2), {"mean": mean(values)}

    params, batch = {"kernel": jnp.asarray([0.3, -1.0, 0.5])}, {"x": x, "example_mask": jnp.asarray(mask)}

    def taken(loss):  # three times, so that a cotangent other than 1 comes back
        thrice = lambda params: jax.tree.map(lambda leaf: 3 * leaf, loss(params, batch))  # noqa: E731
        return jax.jit(jax.value_and_grad(thrice, has_aux=True))(params)

    whole, parts = taken(meta_loss), taken(inner.micro_batched(meta_loss, size))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-13), whole, parts)
    np.testing.assert_allclose(inner.micro_batched(meta_loss, size)(params, batch)[0], meta_loss(params, batch)[0])


def test_a_meta_loss_in_parts_needs_a_divisor():
    with pytest.raises(ValueError, match="6 rows cannot be taken 4 at a time: give a divisor"):
        inner.micro_batched(lambda params, batch: (0.0, {}), 4)({}, {"x": jnp.zeros((6, 1))})


def test_a_meta_batch_without_tiles_may_be_taken_in_parts():
    batch = {"x": jnp.ones((4, 1)), "tiles": jnp.zeros((4, 0, 2, 2, 3))}
    loss = lambda params, batch: (jnp.mean(params * batch["x"]) + jnp.sum(batch["tiles"]), {})  # noqa: E731
    assert jax.grad(inner.micro_batched(loss, 2), has_aux=True)(jnp.ones([]), batch)[0] == 1.0


def test_a_meta_loss_in_parts_keeps_the_activations_of_one():
    """Read off the program: no array of the whole batch's activations, forward or back."""

    def meta_loss(params, batch):
        return jnp.mean(jnp.sum(jnp.tanh(jnp.tanh(batch @ params)), axis=-1)), {}

    params, batch = jnp.zeros((3, 7)), jnp.zeros((6, 3))
    program = lambda loss: str(jax.make_jaxpr(jax.grad(loss, has_aux=True))(params, batch))  # noqa: E731
    assert "f64[6,7]" in program(meta_loss)
    parts = program(inner.micro_batched(meta_loss, 2))
    assert "f64[2,7]" in parts and "f64[6,7]" not in parts


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])  # of the parameters
def test_parameters_are_cast_once_for_all_turns(dtype):
    """Every turn is given them as they are computed with; gradients come in the parameters' own type, sums are wide."""
    narrow = partial(jax.tree.map, lambda leaf: leaf.astype("bfloat16"))
    seen = []

    def losses(params, batch):
        seen.append((len(batch["x"]), str(params["kernel"].dtype)))
        return jnp.sum(jnp.tanh(batch["x"].astype("bfloat16") * narrow(params)["kernel"]).astype("float32"), axis=1)

    def meta_loss(params, batch):
        return jnp.mean(losses(params, batch)), {}

    # Of these numbers the sums are no bfloat16 numbers.
    params, x = {"kernel": jnp.ones((1, 3), dtype)}, np.random.default_rng(1).uniform(0.5, 1, size=(8, 3))
    batch, found = {"x": jnp.asarray(x, "float32")}, []
    for cast in (narrow, inner.as_they_are):
        problem, _ = toy.small_problem(optax.sgd(0.1), TABLE)
        problem = problem._replace(
            losses=lambda params, batch: (losses(params, batch), None), micro_batch_size=2, cast_to_compute=cast,
            weights=lambda meta_params, batch, outputs: jnp.ones(len(batch["x"]), "float32"),
        )  # fmt: skip
        in_parts = inner.micro_batched(meta_loss, 2, cast)
        seen.clear()
        in_parts(params, batch)
        found += [
            jax.grad(in_parts, has_aux=True)(params, batch)[0],
            inner.inner_gradient(problem, params, {}, batch)[0],
        ]
        assert {kind for size, kind in seen if size == 2} == {"bfloat16" if cast is narrow else dtype}
    for grad in found:
        assert grad["kernel"].dtype == dtype
        np.testing.assert_allclose(*(np.float64(each["kernel"]) for each in (grad, found[0])), rtol=1e-6)


@pytest.mark.parametrize("estimator", list(ESTIMATORS))
def test_every_estimator_takes_a_meta_loss_in_parts(estimator):
    problem, state = toy_problem(CHAINS["adamw, clip"], TABLE), toy.warm_state(CHAINS["adamw, clip"])
    parts = problem._replace(meta_loss=inner.micro_batched(problem.meta_loss, 2))
    batch, meta_batch = batch_of([0, 1, 4]), batch_of([2, 0, 5, 3])
    estimate = jax.jit(
        lambda: [ESTIMATORS[estimator](one, state, TABLE.init(), batch, meta_batch) for one in (problem, parts)]
    )
    (whole, _, aux), (grad, _, parts_aux) = estimate()
    assert toy.distance(grad, whole) < 1e-12
    np.testing.assert_allclose(parts_aux["meta_loss"], aux["meta_loss"], rtol=1e-12)
