"""What is trained: parted and put together, adapters against their kernels, and that what is frozen costs nothing."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import roofline, step, workload
from dreamprm_jax import optimizers
from dreamprm_jax.hypergradient import ESTIMATORS
from dreamprm_jax.models import internvl, presets, trained
from dreamprm_jax.models.layers import Linear

CONFIG = presets.InternVLConfig(
    vision=presets.VisionConfig(width=16, num_layers=2, num_heads=2, mlp_width=24, patch_size=14, image_size=56),
    language=presets.LanguageConfig(vocab_size=67, width=32, num_layers=2, num_heads=4, num_kv_heads=2, mlp_width=40),
)
NUM_TOKENS = 30
FROZEN = ("language", "adapters")
KEY = jax.random.key(7)


def _flops(jaxpr):
    return sum(roofline.products(jaxpr))


def choice(what):
    return trained.Choice(what, rank=3, alpha=6.0)


@pytest.fixture(scope="module")
def params():
    """Away from where they begin: scales of 1 and biases of 0 are exact in any type."""
    start = internvl.init(CONFIG, jax.random.key(0))
    return jax.tree.map(lambda leaf, noise: leaf + 0.05 * noise, start, optax.tree.random_like(KEY, start))


@pytest.fixture(scope="module")
def batch():
    return workload.random_batch(CONFIG, [(1, NUM_TOKENS), (1, NUM_TOKENS - 3)], (1, NUM_TOKENS), 0)


def parted(params, what, config=CONFIG):
    """(trained, frozen), the adapters in the midst of training."""
    moved, frozen = trained.part(params, choice(what), config.compute_dtype, KEY)
    if what == "adapters":
        noise = optax.tree.random_like(KEY, moved, jax.random.normal)
        moved = jax.tree.map(lambda leaf, n: leaf + 0.1 * n, moved, noise)
    return moved, frozen


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    return all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True))


@pytest.mark.parametrize("what", trained.TRAINED)
@pytest.mark.parametrize("compute_dtype", presets.COMPUTE_DTYPES)
def test_a_run_starts_at_the_models_own_logits(params, batch, what, compute_dtype):
    """Bit for bit, frozen parameters in the compute type or not; b = 0 adds nothing."""
    config = dataclasses.replace(CONFIG, compute_dtype=compute_dtype)
    moved, frozen = trained.part(params, choice(what), compute_dtype, KEY)
    apply = jax.jit(partial(internvl.apply, config))
    own = apply(params, batch)
    np.testing.assert_array_equal(apply(trained.merge(moved, frozen), batch), own)
    np.testing.assert_array_equal(apply(trained.whole(moved, frozen), batch), own)
    assert jax.tree.structure(trained.whole(moved, frozen)) == jax.tree.structure(params)


def test_what_is_moved_stays_float32_and_what_is_frozen_is_kept_in_the_compute_type(params):
    for what in FROZEN:
        moved, frozen = trained.part(params, choice(what), "bfloat16", KEY)
        assert {leaf.dtype for leaf in jax.tree.leaves(moved)} == {jnp.dtype("float32")}
        assert frozen["vision"]["layers"]["qkv"]["kernel"].dtype == "bfloat16"
        assert frozen["vision"]["layers"]["norm1"]["scale"].dtype == "float32"  # norms compute in it
        assert same(trained.as_kept(frozen, what, "bfloat16"), frozen)
    assert set(moved["language"]["layers"]) == {"q", "k", "v", "out", "gate", "up", "down"}
    assert moved["language"]["layers"]["out"]["lora_a"].shape == (2, 4, 8, 3)
    assert moved["language"]["layers"]["q"]["lora_b"].shape == (2, 3, 4, 8)
    assert frozen["language"]["layers"]["q"]["lora_scale"].tolist() == [2.0, 2.0]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("name", "equation", "shape", "num_inputs"),
    [("q", "btd,dnh->btnh", (6, 4, 2), 1), ("out", "btnh,nhd->btd", (4, 2, 6), 2), ("gate", "btd,df->btf", (6, 9), 1)],
)
def test_an_adapter_is_its_product_added_to_the_kernel(name, equation, shape, num_inputs):
    """Values and gradients beside the kernel against those through it, in float64."""
    keys = jax.random.split(jax.random.key(1), 5)
    inputs, outputs = shape[:num_inputs], shape[num_inputs:]
    x, kernel = jax.random.normal(keys[0], (2, 5, *inputs)), jax.random.normal(keys[1], shape)
    adapter = {
        "lora_a": jax.random.normal(keys[2], (*inputs, 3)),
        "lora_b": jax.random.normal(keys[3], (3, *outputs)),
    }
    linear = Linear(equation, shape, use_bias=False)

    def beside(adapter):
        return linear.apply({"params": {"kernel": kernel, "lora_scale": jnp.array(1.7), **adapter}}, x)

    def through(adapter):
        leaves = {"kernel": kernel, "lora_scale": jnp.array(1.7), **adapter}
        layers = jax.tree.map(lambda leaf: leaf[None], {"q": leaves, name: leaves})
        folded = trained.whole({"language": {"layers": layers}}, {})["language"]["layers"][name]
        return linear.apply({"params": jax.tree.map(lambda leaf: leaf[0], folded)}, x)

    wave = jnp.cos(jnp.arange(through(adapter).size)).reshape(through(adapter).shape)
    for value in (
        lambda f: f(adapter),
        lambda f: jax.grad(lambda adapter: jnp.sum(wave * jnp.sin(f(adapter))))(adapter),
    ):
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12), value(beside), value(through))


def test_the_models_gradient_in_its_adapters_is_that_through_the_kernels(params, batch):
    moved, frozen = parted(params, "adapters")

    def total(put_together, moved):
        return jnp.sum(jnp.sin(internvl.apply(CONFIG, put_together(moved, frozen), batch)))

    beside, through = (jax.jit(jax.grad(partial(total, f)))(moved) for f in (trained.merge, trained.whole))
    for one, other in zip(*map(jax.tree.leaves, (beside, through)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5 * float(jnp.max(jnp.abs(other))))


def gradient_flops(config, params, batch, what):
    """Products of a gradient in the trained part, and the shapes that they leave."""
    moved, frozen = trained.part(params, choice(what), config.compute_dtype, KEY)

    def total(moved, frozen):
        return jnp.sum(internvl.apply(config, trained.merge(moved, frozen), batch))

    return _flops(jax.make_jaxpr(jax.grad(total))(moved, frozen).jaxpr)


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_nothing_goes_back_into_what_is_frozen(params, batch, monkeypatch, remat):
    """Of the frozen tower the forward pass alone; beside adapters no kernel has a gradient."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # a CPU's attention takes its products in blocks
    config = dataclasses.replace(CONFIG, remat=remat)
    flops = {what: gradient_flops(config, params, batch, what) for what in trained.TRAINED}
    tower = _flops(jax.make_jaxpr(partial(internvl.features_of_rows, config))(params, batch.tiles).jaxpr)
    forward = _flops(jax.make_jaxpr(partial(internvl.apply, config))(params, batch).jaxpr)
    rows, language = batch.tokens.size, CONFIG.language
    patches = 2 * 2 * 16 * (14 * 14 * 3) * CONFIG.vision.width  # two tiles' 16 patches; pixels have no gradient
    attention = language.num_layers * 2 * 2 * rows * NUM_TOKENS * language.width  # both of its operands have one
    adapters = trained.part(params, choice("adapters"), "float32", KEY)[0]["language"]["layers"]
    added = 2 * rows * sum(leaf.size for leaf in jax.tree.leaves(adapters))
    least = {
        "all": 3 * forward - patches,
        "language": tower + 3 * (forward - tower),
        "adapters": tower + 2 * (forward - tower) + attention + 3 * added,
    }
    if remat == "none":
        assert flops == least
    else:  # what remat takes again is attention's products, and an adapter's first one: it is no projection's output
        again = {"all": 1, "language": 0, "adapters": 0}
        vision = CONFIG.vision.num_layers * 2 * 2 * 2 * 17**2 * CONFIG.vision.width
        assert {what: flops[what] - least[what] for what in ("all", "language")} == {
            what: attention + again[what] * vision for what in ("all", "language")
        }
        first = 2 * rows * sum(leaves["lora_a"].size for leaves in adapters.values())
        assert flops["adapters"] - least["adapters"] == attention + first


@pytest.mark.parametrize("what", FROZEN)
def test_a_step_moves_what_is_trained_and_hands_the_rest_through(params, batch, what):
    """Donated, unchanged, and in the same buffers."""
    moved, frozen = parted(params, what)
    problem_of = partial(workload.prm_problem, CONFIG, workload.TABLE)
    state = workload.fresh_state(problem_of(), workload.TABLE, moved, frozen)
    before = jax.tree.map(jnp.copy, state)  # a numpy view would keep the buffers from being donated
    places = jax.tree.map(lambda leaf: leaf.unsafe_buffer_pointer(), state.frozen)
    after, _ = workload.jitted(problem_of, workload.TABLE, "dot")(state, batch, batch)
    assert same(after.frozen, before.frozen)
    assert jax.tree.map(lambda leaf: leaf.unsafe_buffer_pointer(), after.frozen) == places
    assert not any(np.array_equal(a, b) for a, b in zip(
        *map(jax.tree.leaves, (after.train.params["language"]["layers"], before.train.params["language"]["layers"])),
        strict=True,
    ))  # fmt: skip
    assert (
        sum(leaf.size for leaf in jax.tree.leaves(after.train.opt_state))
        == 1 + 2 * sum(leaf.size for leaf in jax.tree.leaves(moved)) + 1
    )


def test_the_cheapest_estimator_is_exact_through_adapters(params, batch):
    """`tests/test_hypergradient.py` has all of them on problems that hold other parameters fast."""
    moved, frozen = parted(params, "adapters")
    inner_tx = optimizers.adamw(lambda count: 1e-2, weight_decay=0.1, eps=1e-3)
    problem = workload.prm_problem(CONFIG, workload.TABLE, frozen)._replace(inner_tx=inner_tx)
    state = workload.fresh_state(problem, workload.TABLE, moved, frozen)
    found = {
        name: np.asarray(
            jax.jit(partial(ESTIMATORS[name], problem))(state.train, state.meta_params, batch, batch)[0]["table"]
        )
        for name in ("unrolled", "dot")
    }
    assert np.count_nonzero(found["unrolled"]) == 2
    np.testing.assert_allclose(found["dot"], found["unrolled"], rtol=1e-3)


def test_model_flops_leave_out_what_is_frozen():
    setting = step.Setting("bilevel", 1, 2, 1)
    tower = step.forward_flops(CONFIG, 2, 40) - step.forward_flops(CONFIG, 0, 40)
    language = step.forward_flops(CONFIG, 0, 40)
    found = {what: step.model_flops(CONFIG, setting, 40, what) for what in trained.TRAINED}
    assert found["all"] == 2 * 3 * (tower + language)
    assert found["language"] == 2 * (tower + 3 * language)
    assert found["adapters"] == 2 * (tower + 2 * language)
