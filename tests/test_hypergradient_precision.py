"""The estimators where numbers are coarse, and through any optimizer: float32, bfloat16, remat, all of optax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from toy import CHAINS, NUM_EXAMPLES, batch_of, distance

from dreamprm_jax import bilevel, optimizers
from dreamprm_jax.hypergradient import ESTIMATORS, EXACT
from dreamprm_jax.inner import Problem, as_they_are
from dreamprm_jax.types import TrainState
from dreamprm_jax.weighting import instance_table

pytestmark = pytest.mark.usefixtures("float64")

META_BATCH = batch_of([0, 2, 3])
SMALL = 1e-4  # of a gradient, to be taken for 0


def clipped_problem(**fields):
    """Float32; the optimizer's clip is always active. Also a warm state and its meta_params."""
    tx = optax.chain(optimizers.clip_by_global_norm(1e-3), optimizers.adamw(lambda count: 0.01, weight_decay=0.1))
    table = instance_table(NUM_EXAMPLES, "projected", 0.0, 3.0)
    problem, params = toy.small_problem(tx, table, **fields)
    opt_state = tx.init(params)
    for key in (0, 1):
        grads = optax.tree.random_like(jax.random.key(key), params)
        _, opt_state = tx.update(grads, opt_state, params)
    return problem, TrainState(jnp.zeros([], jnp.int32), params, opt_state), table.init()


@functools.cache
def float32_with_an_active_clip():
    """B = 1, 4,096 parameters, the optimizer's clip active: the truth is 0, and rounding leaves residues."""
    with jax.enable_x64(False):
        problem, state, table = clipped_problem(width=64, height=64)
        names = ("dot", "recompute", "tangent", "tangent_recomputed", "unrolled")
        arguments = state, table, batch_of([1]), META_BATCH
        return jax.jit(lambda *args: {name: ESTIMATORS[name](problem, *args)[::2] for name in names})(*arguments)


@pytest.mark.parametrize("name", ["dot", "recompute", "tangent", "tangent_recomputed"])
def test_rounding_residues_are_zero_and_move_nothing(name):
    out = float32_with_an_active_clip()
    meta_grad, record = out[name]
    assert record["grad_norm"] > 1e-3
    assert meta_grad["table"].dtype == jnp.float32
    np.testing.assert_array_equal(meta_grad["table"], 0.0)
    assert record["zero_share"] == 1
    table, tx = {"table": jnp.ones(NUM_EXAMPLES, jnp.float32)}, optimizers.per_entry_rmsprop(lambda count: 0.1)
    np.testing.assert_array_equal(tx.update(meta_grad, tx.init(table), table)[0]["table"], 0.0)
    residue = out["unrolled"][0]
    if float(optax.tree.norm(residue)) > 0:  # what a normalising optimizer makes of it
        assert abs(tx.update(residue, tx.init(table), table)[0]["table"][1]) > 0.01


def test_entries_that_never_had_a_gradient_do_not_drown_the_others():
    """Adam's derivative is 1/eps there: all of |u| comes from them, and none of <u, grad l_i>."""
    with jax.enable_x64(False):
        tx, table = optimizers.adamw(lambda count: 0.01, weight_decay=0.1), instance_table(6, "projected", 0.0, 3.0)
        problem, params = toy.small_problem(tx, table, width=4)
        used = jnp.ones((4, 2)).at[0].set(0.0)
        losses_of = problem.losses
        problem = problem._replace(losses=lambda params, batch: losses_of({"kernel": used * params["kernel"]}, batch))
        _, opt_state = tx.update({"kernel": 0.1 * used}, tx.init(params), params)
        arguments = TrainState(jnp.zeros([], jnp.int32), params, opt_state), table.init(), batch_of([0, 4]), META_BATCH
        names = ("unrolled", "dot", "recompute", "tangent", "tangent_recomputed")
        out = jax.jit(lambda: {name: ESTIMATORS[name](problem, *arguments)[::2] for name in names})()
    reference, _ = out.pop("unrolled")
    for name, (meta_grad, record) in out.items():
        assert distance(meta_grad, reference) <= 1e-4 * float(optax.tree.norm(reference)), name
        assert record["zero_share"] == 0
        assert record["u_norm"] > 1e4


def test_bfloat16_compute_agrees_to_a_few_percent():
    names = ("unrolled", "dot", "tangent", "mixed")
    with jax.enable_x64(False):
        problem, state, table = clipped_problem(width=16, height=16, dtype=jnp.bfloat16)

        @jax.jit
        def estimates(four, one):
            every = {name: ESTIMATORS[name](problem, state, table, four, META_BATCH)[0]["table"] for name in names}
            return every, ESTIMATORS["dot"](problem, state, table, one, META_BATCH)[0]["table"]

        every, single = estimates(batch_of([0, 1, 4, 5]), batch_of([1]))
        for name, meta_grad in every.items():
            assert meta_grad.dtype == jnp.float32
            assert distance(meta_grad, every["unrolled"]) < 0.08 * float(optax.tree.norm(every["unrolled"])), name
        np.testing.assert_array_equal(single, 0.0)


def test_a_bfloat16_model_keeps_its_slopes():
    """Sums over the parameters are taken in float32: else the bound of the residues would swallow every slope."""
    with jax.enable_x64(False):
        problem = toy.toy_problem(CHAINS["sgd"], toy.toy_table())
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), toy.toy_params())
        state = bilevel.init_train_state(problem.inner_tx, params)
        table = {"table": jnp.ones(NUM_EXAMPLES, jnp.float32)}
        for name in ("dot", "recompute"):
            meta_grad, _, aux = ESTIMATORS[name](problem, state, table, batch_of([0, 1, 4]), META_BATCH)
            assert aux["zero_share"] == 0
            assert np.all(meta_grad["table"][np.array([0, 1, 4])] != 0), name
        two = jax.tree.map(lambda *leaves: jnp.stack(leaves), batch_of([0, 1, 4]), batch_of([2, 3, 1]))
        problem = problem._replace(num_inner_steps=2)
        names = ("unrolled", "mixed")
        estimates = jax.jit(lambda: [ESTIMATORS[name](problem, state, table, two, META_BATCH)[0] for name in names])
        unrolled, mixed = estimates()
        assert distance(mixed, unrolled) < 0.03 * float(optax.tree.norm(unrolled))


def test_losses_may_be_rematerialised():
    table = toy.toy_table()
    problem, params = toy.small_problem(toy.SMOOTH_ADAMW, table)
    state = bilevel.init_train_state(problem.inner_tx, params)
    remat = problem._replace(losses=jax.checkpoint(problem.losses), meta_loss=jax.checkpoint(problem.meta_loss))
    arguments = state, table.init(), batch_of([0, 1, 4]), META_BATCH
    gradient = lambda name, problem: ESTIMATORS[name](problem, *arguments)[0]  # noqa: E731
    plain, others = jax.jit(lambda: (gradient("unrolled", problem), {name: gradient(name, remat) for name in EXACT}))()
    for name, meta_grad in others.items():
        assert distance(meta_grad, plain) <= 1e-12 * float(optax.tree.norm(plain)), name


NEVER_ZERO = {
    "sgd": optax.sgd(0.1),
    "nesterov": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": optax.adam(0.1, eps_root=1e-12),
    "adamw": optax.adamw(0.1, eps_root=1e-12),
    "rmsprop": optax.rmsprop(0.1),
    "adagrad": optax.adagrad(0.1),
    "adafactor": optax.adafactor(0.1, min_dim_size_to_factor=2),
    "lamb": optax.lamb(0.1, eps_root=1e-12),
    "yogi": optax.yogi(0.1),
    "novograd": optax.novograd(0.1),
    "radam": optax.radam(0.1, eps_root=1e-12),
    "noise": optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(0)), optax.sgd(0.1)),  # a key in its state
    "rate in the state": optax.inject_hyperparams(optax.sgd)(learning_rate=0.1),
}
SOMETIMES_ZERO = {
    "lion": optax.lion(0.1),
    "sign_sgd": optax.sign_sgd(0.1),
    "MultiSteps": optax.MultiSteps(optax.sgd(0.1), 2),
}


@pytest.mark.parametrize("name", [*NEVER_ZERO, *SOMETIMES_ZERO])
def test_every_optax_optimizer(name):
    tx, table = {**NEVER_ZERO, **SOMETIMES_ZERO}[name], toy.toy_table()
    problem, params = toy.small_problem(tx, table)
    names = ("unrolled", "dot", "tangent", "mixed")

    @jax.jit
    def estimates(state, batch):
        results = {name: ESTIMATORS[name](problem, state, table.init(), batch, META_BATCH) for name in names}
        return {name: meta_grad for name, (meta_grad, _, _) in results.items()}, results["unrolled"][1]

    @jax.jit
    def through_two(state, batches):
        two = problem._replace(num_inner_steps=2)
        return [ESTIMATORS[name](two, state, table.init(), batches, META_BATCH)[0] for name in ("unrolled", "mixed")]

    state = bilevel.init_train_state(tx, params)
    if name == "radam":  # its first 5 steps take the root of a negative number, under a `where`: NaN even in unrolled
        for _ in range(6):
            state = state._replace(opt_state=tx.update(params, state.opt_state, params)[1])
    norms = []
    for rows in ([0, 1, 4], [1, 2, 5], [3, 3, 0]):
        gradients, state = estimates(state, batch_of(rows))
        reference = gradients.pop("unrolled")
        norms.append(float(optax.tree.norm(reference)))
        assert np.isfinite(norms[-1])
        for estimator, meta_grad in gradients.items():
            assert distance(meta_grad, reference) <= 1e-9 * max(norms[-1], SMALL), estimator
    reference, mixed = through_two(
        state, jax.tree.map(lambda *x: jnp.stack(x), batch_of([0, 1, 4]), batch_of([2, 5, 1]))
    )
    assert distance(mixed, reference) <= 1e-9 * max(float(optax.tree.norm(reference)), SMALL)
    assert (min(norms[1:]) < 1e-12) == (name in SOMETIMES_ZERO), norms
    assert optimizers.derivative_vanishes(tx, params) == (name in SOMETIMES_ZERO)


def products(program):
    """Precisions of all products of a program, those of its loops and branches too."""
    for equation in program.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.params["precision"]
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from products(inner)


@pytest.mark.parametrize("name", ["dot", "recompute", "tangent"])
def test_an_estimators_own_products_are_in_full_precision(name):
    """An accelerator takes float32 products in less unless told; losses without products show the estimator's own."""
    batch = {"x": jnp.ones((2, 3))}
    problem = Problem(
        lambda params, batch: (jnp.sum((params[None] * batch["x"]) ** 2, axis=-1), None),
        lambda meta_params, batch, outputs: meta_params,
        lambda params, batch: (jnp.sum(params**4), {}),
        optax.adam(0.1),
    )
    state = bilevel.init_train_state(problem.inner_tx, jnp.ones(3))
    program = jax.make_jaxpr(functools.partial(ESTIMATORS[name], problem))(state, jnp.ones(2), batch, batch)
    highest = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)
    assert set(products(program.jaxpr)) == {highest}


def with_moments(dtype, warm=20, num_inner_steps=1):
    """Float32 parameters, moments kept in `dtype` and warmed up by `warm` random gradients."""
    tx = optimizers.adamw(lambda count: 0.01, weight_decay=0.1, moment_dtype=dtype)
    table = instance_table(NUM_EXAMPLES, "projected", 0.0, 3.0)
    problem, params = toy.small_problem(tx, table, width=32, height=32, num_inner_steps=num_inner_steps)
    opt_state = tx.init(params)
    for key in range(warm):
        grads = optax.tree.scale(1e-2, optax.tree.random_like(jax.random.key(key), params, jax.random.normal))
        _, opt_state = tx.update(grads, opt_state, params)
    return problem, TrainState(jnp.zeros([], jnp.int32), params, opt_state), table.init()


def meta_gradients(names, dtype, batch, **fields):
    problem, state, table = with_moments(dtype, **fields)
    return jax.jit(lambda: {name: ESTIMATORS[name](problem, state, table, batch, META_BATCH)[0] for name in names})()


@pytest.mark.parametrize(("num_inner_steps", "warm"), [(1, 1), (1, 20), (2, 20)])
def test_moments_in_bfloat16_keep_the_meta_gradient(num_inner_steps, warm):
    """Their rounding is the identity to the derivative: all estimators agree, and with float32 moments to their 8 bits.

    Not so at the first step of all (warm = 0), a sign, whose derivative is 0 but for eps: rounding leaves a residue.
    """
    batch, names = batch_of([0, 1, 4, 5]), EXACT
    if num_inner_steps == 2:
        batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), batch, batch_of([2, 3, 1, 0]))
        names = ("unrolled", "mixed")
    with jax.enable_x64(False):
        fields = {"warm": warm, "num_inner_steps": num_inner_steps}
        wide = meta_gradients(("unrolled",), None, batch, **fields)["unrolled"]
        narrow = meta_gradients(names, "bfloat16", batch, **fields)
    size = float(optax.tree.norm(wide))
    for name in names:
        assert distance(narrow[name], wide) < 0.01 * size, name
        assert distance(narrow[name], narrow["unrolled"]) < 1e-5 * size, name


@pytest.mark.parametrize("clip", [None, 0.02])
def test_gradients_kept_in_the_compute_type_are_the_same(clip):
    """Kernels enter products in bfloat16 alone, so their rows' gradients come from these and lose nothing in it."""
    problem, state, table = with_moments(None)
    to_bfloat16 = functools.partial(jax.tree.map, lambda leaf: leaf.astype(jnp.bfloat16))
    in_bfloat16 = lambda params, batch: problem.losses(to_bfloat16(params), batch)  # noqa: E731
    found = {}
    for cast in (as_they_are, to_bfloat16):
        given = problem._replace(losses=in_bfloat16, cast_to_compute=cast, example_clip_norm=clip)
        for name in ("dot", "recompute"):
            found[name, cast] = ESTIMATORS[name](given, state, table, batch_of([0, 1, 4]), META_BATCH)
    for name in ("dot", "recompute"):
        one, other = (found[name, cast] for cast in (as_they_are, to_bfloat16))
        assert np.abs(one[0]["table"]).max() > 0
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-9), one[:2], other[:2])
