"""How much each training instance counts: (init, apply, project) triples of plain functions.

`step_mask` says what is supervised; a weight says how much it counts. The two never mix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dreamprm_jax.types import Batch, PyTree


class Weighting(NamedTuple):
    """A family of instance weights.

    Attributes:
      init: () -> meta_params.
      apply: (meta_params, batch, outputs) -> instance_weights [B]; `outputs` is what `Problem.losses` returned
        beside the losses, for weightings that look at the model.
      project: meta_params -> meta_params inside the permitted set; applied after every outer step.
    """

    init: Callable[[], PyTree]
    apply: Callable[[PyTree, Batch, Any], jax.Array]
    project: Callable[[PyTree], PyTree] = lambda meta_params: meta_params


def clip_as_published(x: jax.Array, minimum: float, maximum: float) -> jax.Array:
    """clamp with torch's derivative: 1 inside and on the bounds, 0 outside (`jnp.clip` has 0.5 on them)."""
    inside = (x >= minimum) & (x <= maximum)
    return jnp.where(inside, x, jax.lax.stop_gradient(jnp.clip(x, minimum, maximum)))


def uniform() -> Weighting:
    """Weight 1 for every instance, nothing to learn: "No Selection" in the paper's Table 1."""

    def apply(meta_params: PyTree, batch: Batch, outputs: Any) -> jax.Array:
        return jnp.ones(batch.example_id.shape, jnp.float32)

    return Weighting(init=dict, apply=apply)


def instance_table(num_examples: int, activation: str, minimum: float, maximum: float) -> Weighting:
    """One free parameter per training instance (DreamPRM-1.5's Instance Table), `{"table": [num_examples]}`.

    Every instance starts at weight 1.

    Args:
      num_examples: rows of the training set; `example_id` indexes them.
      activation: how a raw entry becomes a weight.

        - "projected": as it stands, kept in [minimum, maximum] by projection after each outer step, so that an entry
          on its bound can come back. A clip when reading has derivative 0 outside the range: what left it is lost
          while its raw value drifts on.
        - "clip": that clip, as published (range -1 to 3).
        - "softplus": log(1 + e^x), positive and unbounded. "sigmoid": `maximum` sigmoid(x).
      minimum, maximum: the range; "softplus" has none, "sigmoid" begins at 0.

    Raises:
      ValueError: an unknown activation.
    """
    readings: dict[str, tuple[float, Callable[[jax.Array], jax.Array]]] = {
        "projected": (1.0, lambda x: x),
        "clip": (1.0, lambda x: clip_as_published(x, minimum, maximum)),
        "softplus": (_softplus_inverse(1.0), jax.nn.softplus),
        "sigmoid": (_logit(1.0 / maximum) if maximum > 1 else 0.0, lambda x: maximum * jax.nn.sigmoid(x)),
    }
    start, read = _choose("activation", activation, readings)

    def init() -> PyTree:
        return {"table": jnp.full((num_examples,), start, jnp.float32)}

    def apply(meta_params: PyTree, batch: Batch, outputs: Any) -> jax.Array:
        return read(meta_params["table"][batch.example_id])

    def project(meta_params: PyTree) -> PyTree:
        if activation != "projected":
            return meta_params
        return {"table": jnp.clip(meta_params["table"], minimum, maximum)}

    return Weighting(init, apply, project)


def domain_table(domain_of_row: Sequence[int], num_domains: int) -> Weighting:
    """One weight per source (DreamPRM, arXiv 2505.20241): softplus over its mean, `{"table": [num_domains]}`.

    The weights' mean is 1 at all times, so that domains can only gain at each other's expense.

    Args:
      domain_of_row: [N], each training row's domain.
      num_domains: domains in all.
    """
    rows = tuple(domain_of_row)  # a constant of the program, not a parameter

    def init() -> PyTree:
        return {"table": jnp.zeros((num_domains,), jnp.float32)}

    def apply(meta_params: PyTree, batch: Batch, outputs: Any) -> jax.Array:
        weights = jax.nn.softplus(meta_params["table"])  # [domains]
        return (weights / jnp.mean(weights))[jnp.asarray(rows, jnp.int32)[batch.example_id]]

    return Weighting(init, apply)


def _standardized(values: jax.Array, outputs: dict[str, jax.Array], mask: jax.Array) -> jax.Array:
    """How unusual a step's value is for its label, [B, S]: in standard deviations from the mean over the batch's steps
    with that label, at most 4 either way; 0 where there is nothing to compare with."""

    def among(mask: jax.Array) -> jax.Array:
        count = jnp.maximum(jnp.sum(mask), 1)
        centred = jnp.where(mask, values - jnp.sum(jnp.where(mask, values, 0.0)) / count, 0.0)
        return centred / jnp.sqrt(jnp.sum(jnp.square(centred)) / count + 1e-6)  # below 0.001 nothing is unusual

    is_plus = outputs["label_is_plus"] > 0
    return jnp.clip(among(mask & is_plus) + among(mask & ~is_plus), -4.0, 4.0)


def _prob(outputs: dict[str, jax.Array]) -> jax.Array:
    return jax.nn.softmax(outputs["label_logits"], axis=-1)[..., 0]


class Reading(NamedTuple):
    """Something that the net takes from the outputs of `Problem.losses`.

    reads: their names.
    of: (outputs, mask [B, S] of the steps in question) -> [B, S, ...].
    """

    reads: tuple[str, ...]
    of: Callable[[dict[str, jax.Array], jax.Array], jax.Array]


FEATURES: dict[str, Reading] = {
    # Softmax over the two label logits, "+" first: the published features.
    "label_probs": Reading(("label_logits",), lambda outputs, mask: jax.nn.softmax(outputs["label_logits"], axis=-1)),
    # Cross entropy of the label, full vocabulary.
    "loss": Reading(("step_losses",), lambda outputs, mask: outputs["step_losses"][..., None]),
    # P("+") over the two labels.
    "prob": Reading(("label_logits",), lambda outputs, mask: _prob(outputs)[..., None]),
    # The step's label: 1 or -1.
    "label": Reading(("label_is_plus",), lambda outputs, mask: 2.0 * outputs["label_is_plus"][..., None] - 1.0),
    # The last hidden state, as in the paper.
    "hidden": Reading(("hidden",), lambda outputs, mask: outputs["hidden"]),
    # loss and prob, compared with the batch's other steps of the label: the level of a label's losses is a matter of
    # calibration, which a few shared parameters would follow instead of telling rows apart (docs/noisy_steps.md).
    "relative_loss": Reading(
        ("step_losses", "label_is_plus"),
        lambda outputs, mask: _standardized(outputs["step_losses"], outputs, mask)[..., None],
    ),
    "relative_prob": Reading(
        ("label_logits", "label_is_plus"),
        lambda outputs, mask: _standardized(_prob(outputs), outputs, mask)[..., None],
    ),
}
"""What the net sees of a step, [B, S, width] each; the mask is of the steps that it looks at."""


def _up_to_first_minus(outputs: dict[str, jax.Array], mask: jax.Array) -> jax.Array:
    minus = mask & (outputs["label_is_plus"] == 0)
    return mask & (jnp.cumsum(minus, axis=-1) - minus == 0)


STEPS: dict[str, Reading] = {
    "all": Reading((), lambda outputs, mask: mask),
    "up_to_first_minus": Reading(("label_is_plus",), _up_to_first_minus),
}
"""The steps that the net looks at, [B, S], of the real ones."""


def outputs_read(features: Sequence[str], steps: str) -> set[str]:
    """The outputs of `Problem.losses` that `instance_net` reads: no others need be made, and differentiated."""
    return {name for read in (STEPS[steps], *(FEATURES[feature] for feature in features)) for name in read.reads}


_einsum = partial(jnp.einsum, precision="highest")  # an accelerator would multiply float32 numbers in less


def instance_net(
    features: Sequence[str],
    num_inputs: int,
    activation: str,
    key: jax.Array,
    hidden: int = 10,
    zero_output: bool = False,
    steps: str = "all",
) -> Weighting:
    """A small MLP that predicts the weight (DreamPRM-1.5's Instance Net).

    Each step's features -> Linear(hidden) -> LeakyReLU -> Linear(1), mean over the row's steps, activation. Its
    meta_params are `hidden.kernel` [num_inputs, hidden], `hidden.bias`, `output.kernel` [hidden, 1], `output.bias`.

    Args:
      features: names in `FEATURES`, concatenated in this order.
      num_inputs: their widths together.
      activation: "sigmoid" (paper and published code) | "softplus" | "clip" (to [-1, 3]) | "softmax": B times the
        softmax over the batch's real rows, so that rows compete and the mean weight is 1 (DataRater).
      key: of the layers, uniform within 1/sqrt(inputs) as torch's Linear.
      hidden: width of the hidden layer.
      zero_output: the output layer starts at 0, so that every instance starts with the same weight. A random one, as
        published, prefers some rows for no reason.
      steps: which it looks at. "all" | "up_to_first_minus": a chain that has gone wrong stays wrong, so that what a
        model says after the first "-" only repeats it.

    Raises:
      ValueError: an unknown feature, activation or choice of steps.
    """
    columns = [_choose("features", name, FEATURES) for name in features]
    seen = _choose("steps", steps, STEPS)
    read = _choose("activation", activation, _NET_ACTIVATIONS)

    def init() -> PyTree:
        keys = jax.random.split(key, 4)
        last = 0.0 if zero_output else hidden**-0.5
        bounds = (num_inputs**-0.5, num_inputs**-0.5, last, last)
        shapes = ((num_inputs, hidden), (hidden,), (hidden, 1), (1,))
        names = ("hidden.kernel", "hidden.bias", "output.kernel", "output.bias")
        return {
            name: bound * jax.random.uniform(key, shape, jnp.float32, -1.0, 1.0)
            for name, shape, bound, key in zip(names, shapes, bounds, keys, strict=True)
        }

    def apply(meta_params: PyTree, batch: Batch, outputs: dict[str, jax.Array]) -> jax.Array:
        mask = seen.of(outputs, batch.step_mask & batch.example_mask[:, None])
        x = jnp.concatenate([column.of(outputs, mask) for column in columns], axis=-1)  # [B, S, num_inputs]
        x = _einsum("bsi,ih->bsh", x, meta_params["hidden.kernel"]) + meta_params["hidden.bias"][None, None]
        x = jax.nn.leaky_relu(x, 0.01)
        x = _einsum("bsh,ho->bso", x, meta_params["output.kernel"])[..., 0] + meta_params["output.bias"][None]
        count = jnp.maximum(jnp.sum(mask, axis=-1), 1)
        return read(jnp.sum(jnp.where(mask, x, 0.0), axis=-1) / count, batch.example_mask)

    return Weighting(init, apply)


def _softmax_within_batch(x: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.sum(mask) * jax.nn.softmax(jnp.where(mask, x, -jnp.inf))


_NET_ACTIVATIONS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "sigmoid": lambda x, mask: jax.nn.sigmoid(x),
    "softplus": lambda x, mask: jax.nn.softplus(x),
    "clip": lambda x, mask: clip_as_published(x, -1.0, 3.0),
    "softmax": _softmax_within_batch,
}
"""(score [B], real rows [B]) -> instance_weights [B]."""


def _choose(what: str, name: str, choices: dict[str, Any]) -> Any:
    if name not in choices:
        raise ValueError(f"{what} is {name!r}; choose from {', '.join(choices)}")
    return choices[name]


def _softplus_inverse(y: float) -> float:
    return math.log(math.expm1(y))


def _logit(p: float) -> float:
    return math.log(p / (1 - p))
