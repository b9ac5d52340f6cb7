"""Step losses, step scores and meta losses: pure functions of the logits at the step positions.

All take float32 logits [B, S, V]: a cross entropy over 151,674 entries loses its small terms in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

# Guards log and power at a probability of exactly 0; below the smallest P("+") float32 softmax resolves.
_TINY = 1e-30


def log_sum_exp(logits: jax.Array) -> jax.Array:
    """Over the vocabulary: [B, S, V] -> [B, S]."""
    return jax.nn.logsumexp(logits, axis=-1)


@jax.custom_jvp
def log_sum_exp_as_torch(logits: jax.Array) -> jax.Array:
    """`log_sum_exp` with the rounding error of torch's float32 `log_softmax` on a CPU with AVX-512.

    It adds the V exponentials in 16 running sums. Beside a term near 1, terms of 1e-8 are lost: a loss of 0.005 over
    151,674 tokens comes out wrong by 6e-5, and its gradient by 1%. Runs recorded with it can only be reproduced with
    it. Torch on a GPU and XLA add in trees and have no such error.
    """
    highest = jnp.max(logits, axis=-1, keepdims=True)
    terms = jnp.exp(logits - highest)
    terms = jnp.pad(terms, ((0, 0), (0, 0), (0, -terms.shape[-1] % _LANES)))
    rounds = jnp.moveaxis(terms.reshape(*terms.shape[:2], -1, _LANES), 2, 0)  # [V / 16, B, S, 16]
    sums, _ = jax.lax.scan(lambda total, term: (total + term, None), jnp.zeros_like(rounds[0]), rounds)
    return highest[..., 0] + jnp.log(jnp.sum(sums, axis=-1))


_LANES = 16  # float32 numbers in an AVX-512 register


@log_sum_exp_as_torch.defjvp
def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Softmax by the value itself, as torch's backward pass takes it, error included."""
    (logits,), (slope,) = primals, tangents
    value = log_sum_exp_as_torch(logits)
    return value, jnp.sum(jnp.exp(logits - value[..., None]) * slope, axis=-1)


LogSumExp = Callable[[jax.Array], jax.Array]


def label_log_probs(logits: jax.Array, labels: jax.Array, over_vocabulary: LogSumExp = log_sum_exp) -> jax.Array:
    """log P(label) over the full vocabulary: logits [B, S, V], labels [B, S] -> [B, S]."""
    chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return chosen - over_vocabulary(logits)


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean over the last axis where `mask` is true; 0 where a row has no true entry."""
    total = jnp.sum(jnp.where(mask, values, 0.0), axis=-1)
    return total / jnp.maximum(jnp.sum(mask, axis=-1), 1)


def soft_label_log_probs(
    logits: jax.Array, soft_labels: jax.Array, plus_id: int, minus_id: int, over_vocabulary: LogSumExp = log_sum_exp
) -> jax.Array:
    """Expected log P(label) where the label is "+" with probability `soft_labels` [B, S], else "-": [B, S]."""
    chosen = soft_labels * logits[..., plus_id] + (1.0 - soft_labels) * logits[..., minus_id]
    return chosen - over_vocabulary(logits)


def example_losses(label_log_probs: jax.Array, step_mask: jax.Array, reduce: str) -> jax.Array:
    """Cross entropy of each example's step labels, [B] in nats.

    A loss that is not finite has a gradient that is not: a softmax's own would be, and the step would be taken.

    Args:
      label_log_probs: [B, S], of `label_log_probs` or `soft_label_log_probs`.
      step_mask: [B, S]; masked steps have no influence, not even through their gradient.
      reduce: "mean" over an example's steps (published code) or "sum" (paper, Eq. 1).
    """
    step_losses = jnp.where(step_mask, -label_log_probs, 0.0)  # [B, S]
    losses = jnp.sum(step_losses, axis=-1) if reduce == "sum" else masked_mean(step_losses, step_mask)
    return losses * jnp.where(jnp.isfinite(losses), 1.0, jnp.nan)


def step_scores(logits: jax.Array, plus_id: int) -> jax.Array:
    """P("+") over the full vocabulary at every step: [B, S, V] -> [B, S]. The published score."""
    return jnp.exp(logits[..., plus_id] - log_sum_exp(logits))


def step_scores_two_token(logits: jax.Array, plus_id: int, minus_id: int) -> jax.Array:
    """P("+") over {"+", "-"} alone: [B, S, V] -> [B, S]. VisualPRM's score."""
    return jax.nn.sigmoid(logits[..., plus_id] - logits[..., minus_id])


def _last(scores: jax.Array, mask: jax.Array) -> jax.Array:
    last = jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True) - 1, 0)
    return jnp.take_along_axis(scores, last, axis=-1)[..., 0]


def _log(scores: jax.Array) -> jax.Array:
    return jnp.log(jnp.maximum(scores, _TINY))


def _log_odds(scores: jax.Array) -> jax.Array:
    return _log(scores) - jnp.log(jnp.maximum(1.0 - scores, jnp.finfo(scores.dtype).eps))


AGGREGATIONS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "mean": masked_mean,
    "min": lambda scores, mask: jnp.min(jnp.where(mask, scores, jnp.inf), axis=-1),
    "max": lambda scores, mask: jnp.max(jnp.where(mask, scores, -jnp.inf), axis=-1),
    "last": _last,
    "product": lambda scores, mask: jnp.prod(jnp.where(mask, scores, 1.0), axis=-1),
    "log_mean": lambda scores, mask: jnp.exp(masked_mean(_log(scores), mask)),
    # sigmoid of the mean log-odds: DreamPRM (arXiv 2505.20241)
    "mean_log_odds": lambda scores, mask: jax.nn.sigmoid(masked_mean(_log_odds(scores), mask)),
    # No probabilities: for selection alone (MM-PRM's list)
    "sum_logprob": lambda scores, mask: jnp.sum(jnp.where(mask, _log(scores), 0.0), axis=-1),
    "sum_logit": lambda scores, mask: jnp.sum(jnp.where(mask, _log_odds(scores), 0.0), axis=-1),
    "mean_odd": lambda scores, mask: masked_mean(jnp.exp(_log_odds(scores)), mask),
}
"""Step scores [B, S] and their mask [B, S] -> response score [B]; a row's steps are its first ones."""

PROBABILITIES = ("mean", "min", "max", "last", "product", "log_mean", "mean_log_odds")
"""The aggregations that give a probability, as a meta loss needs."""


def meta_loss_mse(response_score: jax.Array) -> jax.Array:
    """(a - 1)^2, a = aggregated P(target): the published upper loss, [B] -> [B]."""
    return jnp.square(response_score - 1.0)


def meta_loss_cross_entropy(response_score: jax.Array) -> jax.Array:
    """-log a: unlike the squared error it does not go flat where the model is surely wrong. [B] -> [B]."""
    return -_log(response_score)


META_LOSSES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "mse": meta_loss_mse,
    "cross_entropy": meta_loss_cross_entropy,
}
"""Aggregated probability of the target tokens [B] -> loss [B]."""
