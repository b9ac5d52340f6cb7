"""The meta-gradient: every estimator against the definition, the definition against differences; float64.

Compilation is nearly all that these tests cost. So a program holds all estimators of a setting, takes everything that
can be data for data (batch, state, weighting), and is compiled once.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from jax.test_util import check_grads
from toy import CHAINS, NUM_EXAMPLES, WEIGHTINGS, batch_of, distance

from dreamprm_jax import bilevel
from dreamprm_jax.check import check_meta_gradient
from dreamprm_jax.hypergradient import ESTIMATORS, EXACT
from dreamprm_jax.inner import inner_step, inner_steps
from dreamprm_jax.weighting import uniform

pytestmark = pytest.mark.usefixtures("float64")

META_BATCH = batch_of([0, 2, 3])


class Setting(NamedTuple):
    """What needs a compilation of its own. K inner steps, B rows in a batch, the clip per example's norm."""

    chain: str
    example_clip_norm: float | None
    K: int
    B: int
    weightings: tuple[str, ...]

    @property
    def detached(self) -> bool:
        return WEIGHTINGS[self.weightings[0]][1]

    @property
    def exact(self) -> list[str]:
        """The estimators that cover the setting."""
        if self.K > 1:
            return ["unrolled", "mixed"]
        return [name for name in EXACT if self.detached or name not in ("dot", "recompute")]


SETTINGS = [
    #       chain          clip  K  B
    Setting("adamw",       None, 1, 4, ("table", "domain", "net, hidden", "by position")),
    Setting("adamw, clip",  1.5, 1, 4, ("table", "table, clip", "net, softmax")),
    Setting("hf_adamw",     1.5, 1, 1, ("table", "table, softplus", "table, sigmoid")),
    Setting("adamw, clip", None, 1, 1, ("table", "net")),
    Setting("adamw, clip", None, 2, 4, ("table, sigmoid", "net, hidden", "net, softmax")),
    Setting("sgd",          1.5, 5, 4, ("table, softplus", "domain", "net")),
    Setting("adamw, clip", None, 1, 4, ("net, published", "net, attached, softmax")),
    Setting("momentum",     1.5, 2, 4, ("net, published", "net, attached, softmax")),
    Setting("hf_adamw",    None, 5, 1, ("net, published",)),
]  # fmt: skip
FIRST, CLIPS, SINGLE, SINGLE_CLIP = SETTINGS[:4]
RUNS = [(setting, name) for setting in SETTINGS for name in setting.weightings]


def batches(setting: Setting) -> list:
    """Distinct rows, copies of a row, and a row that is masked."""
    if setting.B == 1:
        starts, masks = [[1], [4]], [[True], [True]]
    else:
        starts, masks = [[0, 1, 4, 5], [1, 1, 2, 1], [0, 1, 4, 2]], [[True] * 4, [True] * 4, [True, True, True, False]]
    if setting.K == 1:
        return [batch_of(rows, mask) for rows, mask in zip(starts, masks, strict=True)]
    shifted = lambda rows: [[(row + k) % NUM_EXAMPLES for row in rows] for k in range(setting.K)]  # noqa: E731
    return [
        batch_of(shifted(rows), [mask] + [[True] * setting.B] * (setting.K - 1))
        for rows, mask in zip(starts, masks, strict=True)
    ]


@functools.cache
def program(setting: Setting):
    """(meta_params of all weightings, state, batch, direction) -> what the tests below compare.

    `meta_params["pick"]` is 1 at the weighting in use and 0 elsewhere.
    """

    def weights(meta_params, batch, outputs):
        every = [WEIGHTINGS[name][0].apply(meta_params[name], batch, outputs) for name in setting.weightings]
        return jnp.einsum("n,nb->b", jax.lax.stop_gradient(meta_params["pick"]), jnp.stack(every))

    problem = toy.toy_problem(
        CHAINS[setting.chain],
        toy.toy_table(),
        detached=setting.detached,
        example_clip_norm=setting.example_clip_norm,
        num_inner_steps=setting.K,
    )._replace(weights=weights)

    @jax.jit
    def run(meta_params, state, batch, direction):
        estimates = {name: ESTIMATORS[name](problem, state, meta_params, batch, META_BATCH) for name in setting.exact}

        def meta_loss(shift):
            moved = jax.tree.map(lambda leaf, along: leaf + shift * along, meta_params, direction)
            return problem.meta_loss(inner_steps(problem, state, moved, batch)[0].params, META_BATCH)[0]

        _, _, record = estimates["unrolled"]
        return {
            "gradients": {name: meta_grad for name, (meta_grad, _, _) in estimates.items()},
            "params": {name: state.params for name, (_, state, _) in estimates.items()},
            "zero_share": {name: aux["zero_share"] for name, (_, _, aux) in estimates.items() if "zero_share" in aux},
            "record": record,
            "slope": richardson(meta_loss),
        }

    return run


def richardson(function, step=1e-4):
    """The derivative at 0 by central differences of three step sizes: an error of the sixth order.

    Short, since between the steps must lie no kink: the nets' leaky ReLU has many, a clip has one.
    """
    shifts = step * jnp.array([1.0, -1.0, 0.5, -0.5, 0.25, -0.25])
    values = jax.lax.map(function, shifts)
    wide, middle, narrow = (values[::2] - values[1::2]) / (2 * shifts[::2])
    return (64 * narrow - 20 * middle + wide) / 45


def start(name: str, seed: int = 0):
    """The weighting's initial parameters, a little moved."""
    meta_params = WEIGHTINGS[name][0].init()
    noise = optax.tree.random_like(jax.random.key(seed), meta_params)
    return jax.tree.map(lambda leaf, noise: leaf + 0.2 * noise, meta_params, noise)


def run(setting: Setting, name: str, state, batch, meta_params=None, seed: int = 0):
    """The program with one weighting in use; gradients are those of its own parameters."""
    everything = {other: start(other, seed) for other in setting.weightings}
    everything[name] = start(name, seed) if meta_params is None else meta_params
    everything["pick"] = jnp.array([float(name == other) for other in setting.weightings])
    silent = jax.tree.map(jnp.zeros_like, everything)
    direction = optax.tree.random_like(jax.random.key(seed + 7), everything[name])
    direction = optax.tree.scale(1 / optax.tree.norm(direction), direction)
    out = program(setting)(everything, state, batch, {**silent, name: direction})
    gradients = {estimator: every[name] for estimator, every in out["gradients"].items()}
    return {**out, "gradients": gradients, "direction": direction}


@functools.cache
def state_of(chain: str, moments: str, seed: int = 0):
    return toy.warm_state(CHAINS[chain], seed) if moments == "warm" else toy.cold_state(CHAINS[chain], seed)


SMALL = 1e-4  # of a gradient; the toy's are about 1e-2. Where the truth is 0 or nearly so, errors are relative to this


def test_the_settings_cover_every_pair_of_factors():
    """Each two of: the optimizer's clip, the clip per example, K, B, detached; and each weighting somewhere."""
    factors = [
        ("clip" in setting.chain, setting.example_clip_norm is not None, setting.K > 1, setting.B > 1, setting.detached)
        for setting in SETTINGS
    ]
    for one, other in itertools.combinations(range(5), 2):
        assert len({(row[one], row[other]) for row in factors}) == 4, (one, other)
    assert {name for _, name in RUNS} == set(WEIGHTINGS)


@pytest.mark.parametrize("moments", ["warm", "cold"])
@pytest.mark.parametrize("setting, name", RUNS)
def test_every_estimator_equals_unrolled(setting, name, moments):
    for batch in batches(setting):
        gradients = run(setting, name, state_of(setting.chain, moments), batch)["gradients"]
        reference = gradients.pop("unrolled")
        norm = float(optax.tree.norm(reference))
        for estimator, meta_grad in gradients.items():
            assert distance(meta_grad, reference) <= 1e-10 * max(norm, SMALL), estimator


@pytest.mark.parametrize("setting, name", RUNS)
def test_unrolled_equals_differences(setting, name):
    for seed, batch in enumerate(batches(setting)):
        out = run(setting, name, state_of(setting.chain, "warm", seed), batch, seed=seed)
        meta_grad, direction = out["gradients"]["unrolled"], out["direction"]
        norm = float(optax.tree.norm(meta_grad))
        assert norm > SMALL or setting == SINGLE_CLIP
        assert abs(out["slope"] - optax.tree.vdot(meta_grad, direction)) <= 1e-6 * max(norm, SMALL)


@pytest.mark.parametrize("key", [0, 1, 2])
def test_the_meta_loss_passes_jaxs_own_check_of_its_gradient(key):
    """Both modes against differences, through two steps: nothing of the project's own does the checking."""
    weighting = toy.toy_table()
    problem = toy.toy_problem(CHAINS["adamw, clip"], weighting)._replace(num_inner_steps=2)
    state = state_of("adamw, clip", "warm", key)
    steps = jax.tree.map(lambda *leaves: jnp.stack(leaves), batch_of([0, 1, 4]), batch_of([4, 2, 5]))

    @jax.jit
    def objective(meta_params):
        return problem.meta_loss(inner_steps(problem, state, meta_params, steps)[0].params, META_BATCH)[0]

    check_grads(objective, (weighting.init(),), order=1, rtol=1e-7, atol=1e-9)


def test_the_clips_act_and_not_on_every_row():
    shares = []
    for setting in SETTINGS:
        record = run(setting, setting.weightings[0], state_of(setting.chain, "warm"), batches(setting)[0])["record"]
        assert "clip" not in setting.chain or np.all(record["grad_norm"] > 0.05)
        if setting.example_clip_norm is not None:
            shares.append(float(record["example_clip_share"]))
    assert all(share > 0 for share in shares)
    assert any(share < 1 for share in shares)


def test_parameters_without_a_gradient_leave_every_estimator_finite():
    """`unused` has a second moment of 0 at the first step: a plain square root gives NaN."""
    for batch in batches(FIRST):
        out = run(FIRST, "table", state_of("adamw", "cold"), batch)
        for estimator, meta_grad in out["gradients"].items():
            assert np.all(np.isfinite(meta_grad["table"])), estimator
            assert np.any(meta_grad["table"] != 0), estimator


def test_the_published_clip_has_derivative_one_on_its_bounds_and_zero_outside():
    """`jnp.clip` would give half a gradient on them."""
    raw = jnp.array([0.0, 3.0, 1.0, 1.0, -0.1, 3.1])
    state, batch = state_of("adamw, clip", "warm"), batch_of([0, 1, 4, 5])
    clipped = run(CLIPS, "table, clip", state, batch, {"table": raw})["gradients"]
    free = run(CLIPS, "table", state, batch, {"table": jnp.clip(raw, 0.0, 3.0)})["gradients"]["unrolled"]["table"]
    assert np.all(free[jnp.array([0, 1, 4, 5])] != 0)
    for estimator, meta_grad in clipped.items():
        inside = np.array([1, 1, 0, 0, 0, 0])
        np.testing.assert_allclose(meta_grad["table"], inside * free, rtol=1e-10, atol=1e-15, err_msg=estimator)


@pytest.mark.parametrize("setting", [FIRST, CLIPS, SINGLE, SINGLE_CLIP])
def test_weights_of_zero_still_have_a_gradient(setting):
    """dL_meta / dw_i = c_i <u, grad l_i> / B does not ask for the weight; with all at 0 no clip is active."""
    state, zeros = state_of(setting.chain, "warm"), {"table": jnp.zeros(NUM_EXAMPLES)}
    for batch in batches(setting):
        gradients = run(setting, "table", state, batch, zeros)["gradients"]
        reference = gradients["unrolled"]
        assert float(optax.tree.norm(reference)) > SMALL
        for estimator, meta_grad in gradients.items():
            assert distance(meta_grad, reference) <= 1e-10 * float(optax.tree.norm(reference)), estimator


def test_a_clip_after_weighting_makes_a_batch_of_one_independent_of_its_weight():
    out = run(SINGLE_CLIP, "table", state_of("adamw, clip", "warm"), batch_of([1]))
    assert out["record"]["grad_norm"] > 0.05
    for estimator, meta_grad in out["gradients"].items():
        np.testing.assert_allclose(meta_grad["table"], 0.0, atol=1e-15, err_msg=estimator)
    assert out["zero_share"] == dict.fromkeys(("dot", "recompute", "tangent", "tangent_recomputed"), 1.0)


def test_a_clip_per_example_leaves_a_batch_of_one_its_gradient():
    out = run(SINGLE, "table", state_of("hf_adamw", "warm"), batch_of([1]))
    assert out["record"]["example_clip_share"] == 1
    for estimator, meta_grad in out["gradients"].items():
        assert abs(meta_grad["table"][1]) > SMALL, estimator
    assert out["zero_share"] == dict.fromkeys(("dot", "recompute", "tangent", "tangent_recomputed"), 0.0)


def test_rows_outside_the_batch_have_no_gradient():
    gradients = run(FIRST, "table", state_of("adamw", "warm"), batch_of([0, 1, 4, 2], [True, True, False, True]))
    for estimator, meta_grad in gradients["gradients"].items():
        np.testing.assert_array_equal(meta_grad["table"][jnp.array([3, 4, 5])], 0.0, err_msg=estimator)


def test_permuting_the_batch_permutes_the_gradient():
    state, order, one = state_of("adamw", "warm"), np.array([2, 0, 3, 1]), np.array([0, 1, 4, 5])
    place = {"place": jnp.array([0.3, 0.9, 1.4, 0.6])}
    straight = run(FIRST, "by position", state, batch_of(one), place)["gradients"]
    permuted = run(FIRST, "by position", state, batch_of(one[order]), {"place": place["place"][order]})["gradients"]
    table = [run(FIRST, "table", state, batch_of(rows))["gradients"] for rows in (one, one[order])]
    for name in FIRST.exact:
        np.testing.assert_allclose(permuted[name]["place"], straight[name]["place"][order], rtol=1e-11, err_msg=name)
        np.testing.assert_allclose(table[0][name]["table"], table[1][name]["table"], rtol=1e-11, err_msg=name)


def test_copies_of_an_example_share_its_gradient():
    """Each copy's own weight gets an equal part; a table's entry and a domain's collect the sum."""
    state, rows = state_of("adamw", "warm"), batch_of([1, 1, 2, 1])
    place = run(FIRST, "by position", state, rows, {"place": jnp.ones(4)})["gradients"]
    table = run(FIRST, "table", state, rows, {"table": jnp.ones(NUM_EXAMPLES)})["gradients"]
    for name in FIRST.exact:
        own = np.asarray(place[name]["place"])
        np.testing.assert_allclose(own[[0, 1, 3]], own[0], rtol=1e-11, err_msg=name)
        np.testing.assert_allclose(table[name]["table"][:3], [0, 3 * own[0], own[2]], rtol=1e-11, err_msg=name)


@pytest.mark.parametrize("setting", [FIRST, CLIPS])
def test_equal_weights_give_plain_training(setting):
    """Whichever estimator looks through the step, the model's own step is that of plain training."""
    state, batch = state_of(setting.chain, "warm"), batch_of([0, 1, 4, 5])
    plain = toy.toy_problem(CHAINS[setting.chain], uniform(), example_clip_norm=setting.example_clip_norm)
    expected, _ = jax.jit(lambda state, batch: inner_step(plain, state, {}, batch))(state, batch)
    through = run(setting, "table", state, batch, {"table": jnp.ones(NUM_EXAMPLES)})["params"]
    for name, params in through.items():
        assert distance(params, expected.params) <= 1e-12 * float(optax.tree.norm(expected.params)), name
    assert distance(state.params, expected.params) > 0.01


def test_losses_may_close_over_arrays_that_are_traced():
    """Frozen parameters, say, that a jitted step gets as an argument."""
    state, meta_params = toy.cold_state(CHAINS["sgd"]), toy.toy_table().init()
    steps = jax.tree.map(lambda *leaves: jnp.stack(leaves), batch_of([0, 1]), batch_of([4, 1]))
    problem = toy.toy_problem(CHAINS["sgd"], toy.toy_table())._replace(num_inner_steps=2)

    def meta_grads(frozen):
        def losses(params, batch):
            values, outputs = problem.losses(params, batch)
            return frozen * values, outputs

        return [
            ESTIMATORS[name](problem._replace(losses=losses), state, meta_params, steps, META_BATCH)[0]
            for name in ("unrolled", "mixed")
        ]

    unrolled, mixed = jax.jit(meta_grads)(jnp.array(1.5))
    assert optax.tree.norm(unrolled) > 0
    assert distance(mixed, unrolled) <= 1e-12 * float(optax.tree.norm(unrolled))


def test_estimators_refuse_what_they_cannot_differentiate():
    problem = toy.toy_problem(CHAINS["sgd"], toy.toy_table())
    arguments = toy.cold_state(CHAINS["sgd"]), toy.toy_table().init(), batch_of([1]), META_BATCH
    for name in ("dot", "recompute", "tangent", "tangent_recomputed"):
        with pytest.raises(ValueError, match=f"{name} looks through one inner step, not 2: use mixed or unrolled"):
            ESTIMATORS[name](problem._replace(num_inner_steps=2), *arguments)
    for name in ("dot", "recompute"):
        with pytest.raises(ValueError, match=f"{name} needs weights that are detached from the model"):
            ESTIMATORS[name](problem._replace(detached=False), *arguments)


@pytest.mark.parametrize("detached", [True, False])
def test_weights_may_look_at_anything_that_the_losses_return(detached):
    """`outputs` may carry anything; here the losses themselves."""
    apply = lambda meta_params, batch, outputs: jax.nn.sigmoid(meta_params["slope"] * outputs)  # noqa: E731
    problem, params = toy.small_problem(optax.sgd(0.1), toy.toy_table(), detached=detached)
    losses_of = problem.losses
    problem = problem._replace(losses=lambda params, batch: (losses_of(params, batch)[0],) * 2, weights=apply)
    state, rows = bilevel.init_train_state(problem.inner_tx, params), batch_of([0, 1, 2])
    names = EXACT if detached else ("unrolled", "tangent", "tangent_recomputed", "mixed")

    def meta_loss(slope):
        new_state, _ = inner_step(problem, state, {"slope": slope}, rows)
        return problem.meta_loss(new_state.params, META_BATCH)[0]

    @jax.jit
    def both(slope):
        gradients = [ESTIMATORS[name](problem, state, {"slope": slope}, rows, META_BATCH)[0]["slope"] for name in names]
        return jnp.stack(gradients), richardson(lambda shift: meta_loss(slope + shift))

    gradients, numeric = both(jnp.array(0.3))
    np.testing.assert_allclose(gradients, numeric, rtol=1e-8)


@functools.cache
def stand_ins():
    """`identity`, `published_fd` and two nested gradients, at K = 2, for a detached and an attached weighting."""
    weightings = {name: WEIGHTINGS[name][0] for name in ("table", "net, published")}

    def weights(meta_params, batch, outputs):
        every = [weighting.apply(meta_params[name], batch, outputs) for name, weighting in weightings.items()]
        return jnp.einsum("n,nb->b", jax.lax.stop_gradient(meta_params["pick"]), jnp.stack(every))

    problem = toy.toy_problem(CHAINS["adamw"], toy.toy_table(), num_inner_steps=2)._replace(weights=weights)

    @jax.jit
    def estimates(meta_params, state, batch):
        found = {name: ESTIMATORS[name](problem, state, meta_params, batch, META_BATCH) for name in STAND_INS}
        after, last = found["identity"][1].params, jax.tree.map(lambda leaf: leaf[-1], batch)
        v = jax.grad(lambda params: problem.meta_loss(params, META_BATCH)[0])(after)

        def slope(meta_params):
            def inner_loss(params):
                losses, outputs = problem.losses(params, last)
                return jnp.mean(problem.weights(meta_params, last, outputs) * losses)

            return optax.tree.vdot(jax.grad(inner_loss)(after), v)

        naive = optax.tree.scale(-1.0, jax.grad(slope)(meta_params))
        return {"naive": naive, **{name: meta_grad for name, (meta_grad, _, _) in found.items()}}

    return {
        name: {
            estimator: meta_grad[name]
            for estimator, meta_grad in estimates(
                {
                    **{other: start(other) for other in weightings},
                    "pick": jnp.array([name == o for o in weightings], float),
                },
                state_of("adamw", "warm"),
                batch_of([[0, 1, 4], [2, 3, 3]]),
            ).items()
        }
        for name in weightings
    }


STAND_INS = ("identity", "published_fd")


@pytest.mark.parametrize("name", ["table", "net, published"])
def test_identity_is_the_published_formula(name):
    found = stand_ins()[name]
    norm = float(optax.tree.norm(found["naive"]))
    assert norm > SMALL
    assert distance(found["identity"], found["naive"]) <= 1e-12 * norm
    assert 0 < distance(found["published_fd"], found["naive"]) <= 1e-3 * norm


def test_the_published_formula_looks_at_the_last_batch_alone():
    for name in STAND_INS:
        meta_grad = stand_ins()["table"][name]["table"]
        assert np.all(meta_grad[jnp.array([2, 3])] != 0)
        np.testing.assert_array_equal(meta_grad[jnp.array([0, 1, 4, 5])], 0.0)


def test_mixed_keeps_one_gradient_for_each_step():
    """Read off the program: what its loop over the inner steps puts aside, beside a few numbers per example."""
    problem = toy.toy_problem(CHAINS["adamw"], toy.toy_table())._replace(num_inner_steps=5)
    state, table = toy.cold_state(CHAINS["adamw"]), toy.toy_table().init()
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[batch_of([0, 1])] * 5)
    estimate = lambda state: ESTIMATORS["mixed"](problem, state, table, batch, META_BATCH)[0]  # noqa: E731
    loop = next(eqn for eqn in jax.make_jaxpr(estimate)(state).eqns if eqn.primitive.name == "scan")
    put_aside = sum(var.aval.size for var in loop.outvars[loop.params["num_carry"] :])
    num_params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert 5 * num_params <= put_aside < 10 * num_params


def test_a_check_does_not_let_nan_through():
    problem = toy.toy_problem(CHAINS["sgd"], toy.toy_table())
    state, meta_params = bilevel.init_train_state(problem.inner_tx, toy.toy_params()), toy.toy_table().init()

    def broken(*arguments):
        meta_grad, state, aux = ESTIMATORS["dot"](*arguments)
        return jax.tree.map(lambda leaf: leaf * jnp.nan, meta_grad), state, aux

    with pytest.raises(ValueError, match="off by more than"):
        check_meta_gradient(
            problem, broken, state, meta_params, batch_of([0]), META_BATCH, key=jax.random.key(0), tolerance=1e-6
        )
