"""Weightings: which row gets which weight, and who gets a gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import batch_of, in_the_midst

from dreamprm_jax.weighting import (
    STEPS,
    clip_as_published,
    domain_table,
    instance_net,
    instance_table,
    outputs_read,
    uniform,
)

ACTIVATIONS = ["projected", "clip", "softplus", "sigmoid"]


def table_of(activation="projected", minimum=0.0, maximum=3.0, rows=4):
    return instance_table(rows, activation, minimum, maximum)


def test_table_gives_each_row_its_own_entry():
    meta_params = {"table": np.arange(4.0, dtype=np.float32)}
    np.testing.assert_array_equal(table_of().apply(meta_params, batch_of([2, 0, 2]), None), [2.0, 0.0, 2.0])


def test_a_row_drawn_twice_collects_both_gradients():
    table = table_of()
    grad = jax.grad(lambda meta: table.apply(meta, batch_of([2, 0, 2]), None).sum())(table.init())
    np.testing.assert_array_equal(grad["table"], [1.0, 0.0, 2.0, 0.0])


def test_projection_keeps_the_range_and_leaves_the_inside_alone():
    table = table_of("projected", -1.0, 2.0, rows=3)
    raw = {"table": np.array([-5.0, 0.3, 2.5], np.float32)}
    np.testing.assert_allclose(table.project(raw)["table"], [-1.0, 0.3, 2.0])
    for activation in ("clip", "softplus", "sigmoid"):
        assert table_of(activation, -1.0, 2.0, rows=3).project(raw) is raw


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("maximum", [1.5, 3.0])
def test_every_table_starts_at_weight_one(activation, maximum):
    table = table_of(activation, 0.0, maximum)
    np.testing.assert_allclose(table.apply(table.init(), batch_of([0, 3]), None), 1.0, rtol=1e-6)
    assert table.init()["table"].dtype == jnp.float32


def test_a_sigmoid_that_cannot_reach_one_starts_in_its_middle():
    table = table_of("sigmoid", 0.0, 1.0)
    np.testing.assert_allclose(table.apply(table.init(), batch_of([0]), None), 0.5)


@pytest.mark.parametrize(
    "activation, expected",
    [
        ("projected", [-2.0, 0.5, 4.0]),
        ("clip", [-1.0, 0.5, 3.0]),
        ("softplus", np.log1p(np.exp([-2.0, 0.5, 4.0]))),
        ("sigmoid", 3.0 / (1.0 + np.exp([2.0, -0.5, -4.0]))),
    ],
)
def test_how_a_raw_entry_becomes_a_weight(activation, expected):
    meta_params = {"table": jnp.array([-2.0, 0.5, 4.0])}
    weights = table_of(activation, -1.0, 3.0).apply(meta_params, batch_of([0, 1, 2]), None)
    np.testing.assert_allclose(weights, expected, rtol=1e-6)


def test_the_published_clip_has_torchs_derivative():
    x = jnp.array([-1.1, -1.0, 0.3, 3.0, 3.1])
    np.testing.assert_allclose(clip_as_published(x, -1.0, 3.0), np.clip(x, -1.0, 3.0))
    slope = jax.grad(lambda x: clip_as_published(x, -1.0, 3.0).sum())(x)
    np.testing.assert_array_equal(slope, [0.0, 1.0, 1.0, 1.0, 0.0])
    assert jax.grad(lambda x: jnp.clip(x, -1.0, 3.0).sum())(x)[1] == 0.5


def test_uniform_is_one_and_has_nothing_to_learn():
    assert uniform().init() == {}
    np.testing.assert_array_equal(uniform().apply({}, batch_of([3, 1]), None), [1.0, 1.0])


def test_domains_start_at_one_and_keep_a_mean_of_one():
    domains = domain_table([0, 1, 2, 0], 3)
    np.testing.assert_allclose(domains.apply(domains.init(), batch_of([0, 1, 2]), None), 1.0, rtol=1e-6)
    meta_params = {"table": jnp.array([-3.0, 0.4, 2.0])}
    weights = domains.apply(meta_params, batch_of([0, 1, 2]), None)
    np.testing.assert_allclose(np.mean(weights), 1.0, rtol=1e-6)
    soft = np.log1p(np.exp([-3.0, 0.4, 2.0]))
    np.testing.assert_allclose(weights, soft / soft.mean(), rtol=1e-6)


def test_rows_of_a_domain_share_its_weight():
    domains = domain_table([0, 1, 2, 0], 3)
    weights = domains.apply({"table": jnp.array([-3.0, 0.4, 2.0])}, batch_of([3, 2, 0]), None)
    assert weights[0] == weights[2] != weights[1]


def outputs_of(rows, steps, seed=0):
    rng = np.random.default_rng(seed)
    shape = (rows, steps)
    return {
        "label_logits": rng.normal(size=(*shape, 2)).astype(np.float32),
        "step_losses": rng.exponential(size=shape).astype(np.float32),
        "label_is_plus": rng.integers(0, 2, size=shape).astype(np.float32),
        "hidden": rng.normal(size=(*shape, 5)).astype(np.float32),
    }


ROWS = batch_of([0, 1, 2, 5])  # chains of 1, 2, 3 and 3 steps
WIDTHS = {"label_probs": 2, "loss": 1, "prob": 1, "label": 1, "hidden": 5, "relative_loss": 1, "relative_prob": 1}


def net_of(activation="sigmoid", features=("label_probs",), steps="all"):
    return instance_net(features, sum(WIDTHS[name] for name in features), activation, jax.random.key(1), steps=steps)


def test_the_published_net_is_the_published_formula():
    net, outputs = net_of(), outputs_of(4, 3)
    params = {name: np.asarray(value) for name, value in in_the_midst(net).items()}
    expected = []
    for row, logits in enumerate(outputs["label_logits"]):
        logits = logits[ROWS.step_mask[row]]  # [steps, 2], "+" first
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        x = exponentials / exponentials.sum(axis=1, keepdims=True)
        x = x @ params["hidden.kernel"] + params["hidden.bias"]
        x = np.where(x > 0, x, 0.01 * x)
        score = np.mean(x @ params["output.kernel"] + params["output.bias"])
        expected.append(1 / (1 + np.exp(-score)))
    np.testing.assert_allclose(net.apply(in_the_midst(net), ROWS, outputs), expected, rtol=1e-5)


@pytest.mark.parametrize("feature", WIDTHS)
def test_a_net_sees_its_features_and_no_others(feature):
    net, outputs = net_of(features=(feature,)), outputs_of(4, 3)
    params = in_the_midst(net)
    slopes = jax.grad(lambda outputs: net.apply(params, ROWS, outputs).sum())(outputs)
    seen = {name for name, slope in slopes.items() if np.any(slope != 0)}
    sources = {"loss": "step_losses", "label": "label_is_plus", "hidden": "hidden", "relative_loss": "step_losses"}
    assert seen == {sources.get(feature, "label_logits")}


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("feature", WIDTHS)
def test_a_net_needs_what_it_says_it_reads(feature, steps):
    net, outputs = net_of(features=(feature,), steps=steps), outputs_of(4, 3)
    params, needed = in_the_midst(net), outputs_read((feature,), steps)
    read = {name: outputs[name] for name in needed}
    np.testing.assert_array_equal(net.apply(params, ROWS, read), net.apply(params, ROWS, outputs))
    for name in needed:
        with pytest.raises(KeyError, match=name):
            net.apply(params, ROWS, {other: outputs[other] for other in needed - {name}})


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("feature", ["relative_loss", "relative_prob"])
def test_relative_features_are_standard_deviations_among_the_real_steps_of_a_label(feature, steps):
    rows, outputs = batch_of([2, 5] * 5)._replace(example_mask=np.arange(10) != 4), outputs_of(10, 3)
    net = net_of("softplus", (feature,), steps)
    params = {**in_the_midst(net), "hidden.bias": jnp.full(10, 9.0)}  # no unit is ever off: the net is linear
    logits = outputs["label_logits"].astype(np.float64)
    values = 1 / (1 + np.exp(logits[..., 1] - logits[..., 0])) if feature == "relative_prob" else outputs["step_losses"]
    labels, mask = outputs["label_is_plus"], rows.step_mask & rows.example_mask[:, None]
    if steps == "up_to_first_minus":
        mask = mask & np.array([[0.0 not in row[:step] for step in range(3)] for row in labels])
    x = np.zeros((10, 3))
    for label in (0, 1):
        own = values[mask & (labels == label)]
        x = np.where(labels == label, (values - own.mean()) / np.sqrt(own.var() + 1e-6), x)
    x = np.clip(x, -4, 4)[..., None] @ np.asarray(params["hidden.kernel"]) + 9.0
    scores = (x @ np.asarray(params["output.kernel"]))[..., 0] + np.asarray(params["output.bias"])
    scores = np.where(mask, scores, 0.0).sum(axis=1) / np.maximum(mask.sum(axis=1), 1)
    expected = np.log1p(np.exp(scores))[rows.example_mask]
    np.testing.assert_allclose(net.apply(params, rows, outputs)[rows.example_mask], expected, rtol=1e-5)


def test_relative_features_do_not_see_the_level_of_a_labels_losses():
    net, outputs = net_of(features=("relative_loss",)), outputs_of(4, 3)
    moved = {**outputs, "step_losses": outputs["step_losses"] * 2 + 5 * outputs["label_is_plus"]}
    params = in_the_midst(net)
    np.testing.assert_allclose(net.apply(params, ROWS, moved), net.apply(params, ROWS, outputs), rtol=1e-5)
    outputs["label_is_plus"] = np.array([[0, 0, 0], [0, 0, 0], [0, 0, 0], [1, 0, 0]], np.float32)  # one "+" in all
    slopes = jax.grad(lambda outputs: net.apply(params, ROWS, outputs).sum())(outputs)["step_losses"]
    assert np.all(np.isfinite(slopes))
    assert slopes[3, 0] == 0
    assert np.any(slopes[3, 1:] != 0)


def test_a_net_may_look_no_further_than_the_first_minus():
    net, outputs = (
        net_of(features=("label_probs", "relative_loss", "label"), steps="up_to_first_minus"),
        outputs_of(4, 3),
    )
    outputs["label_is_plus"] = np.array([[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]], np.float32)
    seen = np.array([[1, 0, 0], [1, 1, 0], [1, 0, 0], [1, 1, 1]], bool)  # row 0 has one step
    params = in_the_midst(net)
    slopes = jax.grad(lambda outputs: net.apply(params, ROWS, outputs).sum())(outputs)
    np.testing.assert_array_equal(np.any(slopes["label_logits"] != 0, axis=-1), seen)
    assert np.all((slopes["step_losses"] != 0) <= seen)


def test_features_stand_side_by_side_in_the_order_given():
    net, outputs = net_of(features=("loss", "label", "hidden")), outputs_of(4, 3)
    shapes = {name: leaf.shape for name, leaf in net.init().items()}
    assert shapes == {"hidden.kernel": (7, 10), "hidden.bias": (10,), "output.kernel": (10, 1), "output.bias": (1,)}
    params = in_the_midst(net)
    blind = {**params, "hidden.kernel": params["hidden.kernel"].at[0].set(0.0).at[2:].set(0.0)}
    slopes = jax.grad(lambda outputs: net.apply(blind, ROWS, outputs).sum())(outputs)
    assert [name for name, slope in slopes.items() if np.any(slope != 0)] == ["label_is_plus"]


def test_the_nets_kernels_start_as_torchs_do():
    params = net_of(features=("hidden",)).init()
    for name, bound in (("hidden.kernel", 5**-0.5), ("hidden.bias", 5**-0.5), ("output.kernel", 10**-0.5)):
        assert 0.5 * bound < np.abs(params[name]).max() <= bound
    jax.tree.map(np.testing.assert_array_equal, params, net_of(features=("hidden",)).init())


def test_a_net_with_a_zero_output_layer_starts_neutral():
    net = instance_net(("hidden",), 5, "sigmoid", jax.random.key(0), zero_output=True)
    np.testing.assert_array_equal(net.apply(net.init(), ROWS, outputs_of(4, 3)), 0.5)
    assert np.any(net.init()["hidden.kernel"] != 0)


@pytest.mark.parametrize("activation", ["sigmoid", "softplus", "clip", "softmax"])
def test_masked_steps_do_not_influence_a_net(activation):
    net, outputs = net_of(activation, ("label_probs", "loss", "hidden")), outputs_of(4, 3)
    params = in_the_midst(net)
    weights = net.apply(params, ROWS, outputs)
    noise = outputs_of(4, 3, seed=9)
    mask = ROWS.step_mask
    mixed = {
        name: np.where(mask.reshape(mask.shape + (1,) * (leaf.ndim - 2)), leaf, noise[name])
        for name, leaf in outputs.items()
    }
    np.testing.assert_array_equal(net.apply(params, ROWS, mixed), weights)
    assert np.any(net.apply(params, ROWS, noise) != weights)


def test_softmax_within_the_batch_has_a_mean_of_one_over_the_real_rows():
    net, outputs = net_of("softmax", ("loss", "label")), outputs_of(4, 3)
    padded = ROWS._replace(example_mask=np.array([True, True, False, True]))
    params = in_the_midst(net)
    weights = np.asarray(net.apply(params, padded, outputs))
    np.testing.assert_allclose(weights.sum(), 3.0, rtol=1e-6)
    assert weights[2] == 0
    others = {name: np.where(np.arange(4).reshape(-1, *[1] * (x.ndim - 1)) == 2, 7.0, x) for name, x in outputs.items()}
    np.testing.assert_allclose(net.apply(params, padded, others), weights, rtol=1e-6)


@pytest.mark.parametrize(
    "activation, function",
    [("softplus", lambda x: np.log1p(np.exp(x))), ("clip", lambda x: np.clip(x, -1.0, 3.0))],
)
def test_activations_of_the_net(activation, function):
    outputs = outputs_of(4, 3)
    shifted = {**in_the_midst(net_of()), "output.bias": jnp.array([2.6])}  # some scores above 3
    sigmoid = np.asarray(net_of().apply(shifted, ROWS, outputs), np.float64)
    scores = np.log(sigmoid / (1 - sigmoid))
    np.testing.assert_allclose(net_of(activation).apply(shifted, ROWS, outputs), function(scores), rtol=1e-4)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: table_of("relu"), "activation is 'relu'; choose from projected, clip, softplus, sigmoid"),
        (
            lambda: instance_net(("loss", "los"), 2, "sigmoid", jax.random.key(0)),
            "features is 'los'; choose from label",
        ),
        (
            lambda: instance_net(("loss",), 1, "tanh", jax.random.key(0)),
            "activation is 'tanh'; choose from sigmoid, so",
        ),
        (lambda: net_of(steps="some"), "steps is 'some'; choose from all, up_to_first_minus"),
    ],
)
def test_unknown_names_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_the_nets_products_are_in_full_precision():
    """An accelerator takes float32 products in less unless told."""
    net = net_of()
    program = str(jax.make_jaxpr(net.apply)(net.init(), batch_of([0, 1, 2, 3]), outputs_of(4, 3)))
    assert program.count("dot_general[") == program.count("HIGHEST, Precision.HIGHEST") == 2
