"""Step benchmarks: how well scores tell right steps from wrong ones, as VisualProcessBench and ProcessBench ask it.

A step is taken to be right where its score is above the threshold; at the threshold it is wrong. Neutral steps count
nowhere. Of ProcessBench, which names the first error alone, steps before it are right and those after it neutral.

Shapes: K chains with N steps in all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from sklearn.metrics import roc_auc_score, roc_curve

from dreamprm_jax.data.choice import held_out_keys
from dreamprm_jax.errors import InputError

RIGHT, WRONG, NEUTRAL = 1, -1, 0
"""What people judged a step to be."""


class Steps(NamedTuple):
    """The steps of K chains, one chain after the other."""

    truth: np.ndarray  # int [N]: RIGHT, WRONG or NEUTRAL
    scores: np.ndarray  # float64 [N]: P("+")
    chain: np.ndarray  # int [N]: which chain the step is of
    sources: np.ndarray  # str [K]
    keys: np.ndarray  # str [K]: equal for chains that must not be held apart, such as those of one question


def steps_of(
    truth: Sequence[Sequence[int]],
    scores: Sequence[Sequence[float]],
    sources: Sequence[str],
    keys: Sequence[str],
) -> Steps:
    """The steps of chains, of each of which there are: truths [S], scores [S], a source and a key.

    Raises:
      InputError: a truth other than 1, -1 and 0, or a score outside [0, 1].
      ValueError: lists of different lengths, or of no step at all.
    """
    lengths = [len(of_chain) for of_chain in truth]
    if not sum(lengths) or lengths != [len(of_chain) for of_chain in scores]:
        raise ValueError(f"truths of {lengths[:8]}... steps, scores of {[len(row) for row in scores][:8]}...")
    if not len(lengths) == len(sources) == len(keys):
        raise ValueError(f"{len(lengths)} chains, {len(sources)} sources, {len(keys)} keys")
    marks, found = np.concatenate(truth), np.concatenate(scores).astype(np.float64)
    chain = np.repeat(np.arange(len(lengths)), lengths)
    for what, values, usable, must in (
        ("truth", marks, np.isin(marks, (RIGHT, WRONG, NEUTRAL)), "1, -1 or 0 (neutral)"),
        ("score", found, (found >= 0) & (found <= 1), "a probability"),
    ):
        if not usable.all():
            place = np.argmin(usable)
            step = place - np.searchsorted(chain, chain[place])
            raise InputError(f"chain {chain[place]}, step {step}: the {what} is {values[place]}; it must be {must}")
    return Steps(marks.astype(int), found, chain, np.asarray(sources, str), np.asarray(keys, str))


def of_chains(steps: Steps, wanted: np.ndarray) -> Steps:
    """The steps of the chains that `wanted`, bool [K], names."""
    kept = wanted[steps.chain]
    chain = (np.cumsum(wanted) - 1)[steps.chain[kept]]
    return Steps(steps.truth[kept], steps.scores[kept], chain, steps.sources[wanted], steps.keys[wanted])


def judged(steps: Steps) -> Steps:
    """The steps that are not neutral, and the chains that have such."""
    known = steps.truth != NEUTRAL
    only = Steps(steps.truth[known], steps.scores[known], steps.chain[known], steps.sources, steps.keys)
    return of_chains(only, np.isin(np.arange(len(steps.sources)), only.chain))


def by_source(steps: Steps, figures: Callable[[Steps], dict]) -> dict[str, dict]:
    """Figures of each source's chains, in order of their names; a source of neutral steps alone has none."""
    sources = np.unique(judged(steps).sources).tolist()
    return {source: figures(of_chains(steps, steps.sources == source)) for source in sources}


def step_f1(steps: Steps, threshold: float) -> dict[str, float | int]:
    """How well right and wrong steps are found at a threshold, as VisualProcessBench counts.

    f1_plus, f1_minus: F1 of the right and of the wrong steps, 0 where none is found; macro_f1: their mean; accuracy;
    num_right, num_wrong, num_neutral.

    Raises:
      InputError: no step is right or wrong.
    """
    _, right, positive = _known(steps, threshold)
    hits, rejections = int((right & positive).sum()), int((~right & ~positive).sum())
    missed = len(right) - hits - rejections
    plus, minus = _f1(hits, missed), _f1(rejections, missed)
    return {
        "f1_plus": float(plus),
        "f1_minus": float(minus),
        "macro_f1": float((plus + minus) / 2),
        "accuracy": (hits + rejections) / len(right),
        "num_right": int(right.sum()),
        "num_wrong": int((~right).sum()),
        "num_neutral": len(steps.truth) - len(right),
    }


def _known(steps: Steps, threshold: float = 0.5) -> tuple[Steps, np.ndarray, np.ndarray]:
    """The judged steps; which are right, and which are taken to be, bool [N]."""
    known = judged(steps)
    if not len(known.truth):
        raise InputError("no step is right or wrong: there is nothing to count")
    return known, known.truth == RIGHT, known.scores > threshold


def _f1(hits: np.ndarray | int, errors: np.ndarray | int) -> np.ndarray:
    """2 hits / (2 hits + errors), where errors are false finds and misses; 0 of nothing."""
    return 2 * np.asarray(hits) / np.maximum(2 * np.asarray(hits) + errors, 1)


def best_threshold(steps: Steps) -> float:
    """The threshold of the highest macro-F1: halfway between two scores, the lowest of equally good ones.

    Raises:
      InputError: no right step, or no wrong one.
    """
    known, right, _ = _known(steps)
    if right.all() or not right.any():
        raise InputError("a threshold cannot be chosen on steps that are all of one kind; hold out a larger share")
    values, place = np.unique(known.scores, return_inverse=True)
    # With the cut above value number c: all right steps at or below it are lost, all wrong ones there are found.
    lost, found = (np.append(0, np.cumsum(np.bincount(place[kind], minlength=len(values)))) for kind in (right, ~right))
    errors = lost + (~right).sum() - found
    macro = (_f1(right.sum() - lost, errors) + _f1(found, errors)) / 2
    cuts = [np.nextafter(values[0], -1), *(_between(*pair) for pair in pairwise(values)), values[-1]]
    return float(cuts[int(np.argmax(macro))])


def _between(low: float, high: float) -> float:
    middle = (low + high) / 2
    return middle if middle < high else low  # neighbours have nothing between them


class Tuned(NamedTuple):
    """Figures at a threshold that was chosen on other chains."""

    threshold: float
    held_out: np.ndarray  # bool [K]: the chains it was chosen on
    held_out_figures: dict[str, float | int]  # of `step_f1` there
    figures: dict[str, float | int]  # of `step_f1` on the other chains
    by_source: dict[str, dict]  # the same, by source


def tuned_step_f1(steps: Steps, share: float = 0.2, seed: int = 0) -> Tuned:
    """Chooses the threshold on a part of the chains and counts on the others; chains of one key are on one side.

    Args:
      steps: of all chains.
      share: of the keys that are held out for the choice, about.
      seed: of the split.

    Raises:
      InputError: a side without chains, or with steps of one kind alone.
    """
    held_out = held_out_keys(steps.keys, share, seed)
    sides = [of_chains(steps, wanted) for wanted in (held_out, ~held_out)]
    for side, title in zip(sides, ("held-out", "other"), strict=True):
        kinds = set(side.truth.tolist()) - {NEUTRAL}
        if len(kinds) < 2:
            problem = "no chains" if not len(side.keys) else "no right and wrong steps both"
            raise InputError(
                f"held-out share {share}, seed {seed}: the {title} part of {len(steps.keys)} chains has {problem}; "
                "give another share, or a threshold"
            )
    threshold = best_threshold(sides[0])
    figures = by_source(sides[1], lambda part: step_f1(part, threshold))
    return Tuned(threshold, held_out, step_f1(sides[0], threshold), step_f1(sides[1], threshold), figures)


def first_error(steps: Steps, threshold: float) -> dict[str, float | int | None]:
    """How well the first error is found, as ProcessBench counts.

    error_accuracy: of the chains with a wrong step, the share where the first one is the first taken to be wrong.
    correct_accuracy: of the others, the share where no step is taken to be wrong. f1: their harmonic mean. None where
    there are no such chains. num_with_error, num_without: chains; those of neutral steps alone are neither.

    Raises:
      InputError: no step is right or wrong.
    """
    known, right, positive = _known(steps, threshold)
    true, found = (_first(known, wrong) for wrong in (~right, ~positive))
    has_error, same = true < len(right), true == found
    on_error, on_correct = (float(same[kind].mean()) if kind.any() else None for kind in (has_error, ~has_error))
    f1 = None
    if on_error is not None and on_correct is not None:
        f1 = 2 * on_error * on_correct / (on_error + on_correct) if on_error + on_correct else 0.0
    return {
        "error_accuracy": on_error,
        "correct_accuracy": on_correct,
        "f1": f1,
        "num_with_error": int(has_error.sum()),
        "num_without": int((~has_error).sum()),
    }


def _first(steps: Steps, mask: np.ndarray) -> np.ndarray:
    """Each chain's first step in `mask`, bool [N], as a position in [0, N); N where it has none: int [K]."""
    found = np.full(len(steps.sources), len(mask))
    np.minimum.at(found, steps.chain[mask], np.flatnonzero(mask))
    return found


class Roc(NamedTuple):
    """A ROC curve of P points; what is right is to be found."""

    false_positive: np.ndarray  # [P]
    true_positive: np.ndarray  # [P]
    auroc: float


def roc(is_right: np.ndarray, scores: np.ndarray) -> Roc | None:
    """The ROC curve of scores [N], bool [N] says of what is right; None where all are of one kind."""
    area = auroc(is_right, scores)
    return None if area is None else Roc(*roc_curve(is_right, scores)[:2], area)


def auroc(is_right: np.ndarray, scores: np.ndarray) -> float | None:
    """Area under the ROC curve of scores [N]; None where all are of one kind."""
    return float(roc_auc_score(is_right, scores)) if len(set(is_right.tolist())) == 2 else None


class Calibration(NamedTuple):
    """Whether of what is scored 0.7 seven in ten are right; by bins of equal width, M of them."""

    edges: np.ndarray  # [M + 1]: a bin has its lower edge, the last one also its upper
    counts: np.ndarray  # int [M]
    mean_score: np.ndarray  # [M]; NaN in an empty bin
    share_right: np.ndarray  # [M]; NaN in an empty bin
    expected_error: float  # mean |share_right - mean_score| over the scored (ECE)
    brier: float  # mean (score - is right)^2


def calibration(is_right: np.ndarray, scores: np.ndarray, num_bins: int = 10) -> Calibration:
    """How far scores in [0, 1] are from probabilities of being right: [N], [N]."""
    edges = np.linspace(0, 1, num_bins + 1)
    place = np.digitize(scores, edges[1:-1])
    counts, scored, hits = (np.bincount(place, values, num_bins) for values in (None, scores, is_right))
    mean_score, share_right = (
        np.divide(sums, counts, out=np.full(num_bins, np.nan), where=counts > 0) for sums in (scored, hits)
    )
    expected_error = float(np.abs(hits - scored).sum() / len(scores))
    brier = float(np.mean(np.square(scores - is_right)))
    return Calibration(edges, counts, mean_score, share_right, expected_error, brier)


def label_accuracy(is_right: Sequence[bool], scores: Sequence[float]) -> dict[str, float]:
    """How well step scores tell right steps from wrong ones: accuracy at 0.5, and area under the ROC curve.

    There is no such area, and no such key, where all steps are of one kind.
    """
    truth, found = np.asarray(is_right, bool), np.asarray(scores)
    area = auroc(truth, found)
    accuracy = {"step_accuracy": float(np.mean((found > 0.5) == truth))}
    return accuracy if area is None else {**accuracy, "step_auroc": area}
