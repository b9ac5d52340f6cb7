"""Losses and scores against their definitions; masked steps have no influence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamprm_jax import losses

LOGITS = jax.random.normal(jax.random.key(0), (2, 3, 5))
LABELS = jnp.array([[1, 2, 0], [4, 0, 0]])
MASK = jnp.array([[True, True, True], [True, False, False]])


def reference_step_losses():
    probabilities = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)
    return -np.log(np.take_along_axis(probabilities, np.asarray(LABELS)[..., None], -1)[..., 0])


@pytest.mark.parametrize(("reduce", "reference"), [("mean", np.mean), ("sum", np.sum)])
def test_example_losses(reduce, reference):
    steps = reference_step_losses()
    expected = [reference(steps[0]), steps[1, 0]]
    np.testing.assert_allclose(
        losses.example_losses(losses.label_log_probs(LOGITS, LABELS), MASK, reduce), expected, rtol=1e-5
    )


def test_masked_steps_get_no_gradient_even_where_their_logits_are_infinite():
    logits = LOGITS.at[1, 1].set(jnp.inf)
    grad = jax.grad(lambda x: losses.example_losses(losses.label_log_probs(x, LABELS), MASK, "mean").sum())(LOGITS)
    np.testing.assert_array_equal(grad[1, 1:], 0.0)
    assert np.all(np.isfinite(losses.example_losses(losses.label_log_probs(logits, LABELS), MASK, "mean")))


def test_soft_labels_are_the_expected_loss():
    plus, minus = (losses.label_log_probs(LOGITS, jnp.full((2, 3), label)) for label in (1, 3))
    soft = jnp.array([[0.25, 1.0, 0.0], [0.5, 0.0, 0.0]])
    found = losses.soft_label_log_probs(LOGITS, soft, 1, 3)
    np.testing.assert_allclose(found, soft * plus + (1 - soft) * minus, rtol=1e-5)
    np.testing.assert_allclose(found[0, 1:], [plus[0, 1], minus[0, 2]], rtol=1e-6)


def test_step_scores():
    full = losses.step_scores(LOGITS, 1)
    np.testing.assert_allclose(full, jax.nn.softmax(LOGITS)[..., 1], rtol=1e-5)
    two = losses.step_scores_two_token(LOGITS, 1, 3)
    np.testing.assert_allclose(two, jax.nn.softmax(LOGITS[..., jnp.array([1, 3])])[..., 0], rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mean", 0.5),
        ("min", 0.2),
        ("max", 0.8),
        ("last", 0.8),
        ("product", 0.08),
        ("log_mean", 0.08 ** (1 / 3)),
    ],
)
def test_aggregations(name, expected):
    scores = jnp.array([[0.2, 0.5, 0.8, 0.0], [0.6, 0.0, 0.0, 0.0]])
    mask = jnp.array([[True, True, True, False], [True, False, False, False]])
    np.testing.assert_allclose(losses.AGGREGATIONS[name](scores, mask), [expected, 0.6], rtol=1e-5)


def test_meta_losses_are_zero_at_one_and_finite_at_zero():
    for loss in losses.META_LOSSES.values():
        values = loss(jnp.array([1.0, 0.5, 0.0]))
        assert values[0] == 0
        assert np.all(np.isfinite(values))
        assert values[2] > values[1] > values[0]
