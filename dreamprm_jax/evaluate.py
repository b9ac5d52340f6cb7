"""Best-of-N: what selection by the model is worth beside its baselines, question by question, with intervals."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from sklearn.metrics import roc_auc_score


class Candidates(NamedTuple):
    """One question's C candidates."""

    answers: tuple[str, ...]  # [C] final answers, for the votes
    correct: tuple[bool, ...]  # [C]
    scores: tuple[float, ...]  # [C] response scores


def majority_correct(candidates: Candidates) -> float:
    """Expected correctness of the most frequent answer; answers tied for the lead share the credit."""
    return _vote(candidates, [1.0] * len(candidates.answers))


def weighted_vote_correct(candidates: Candidates) -> float:
    """Expected correctness of the answer whose candidates' scores add up to most; ties as in `majority_correct`."""
    return _vote(candidates, candidates.scores)


def _vote(candidates: Candidates, ballots: Sequence[float]) -> float:
    totals: dict[str, float] = defaultdict(float)
    for answer, ballot in zip(candidates.answers, ballots, strict=True):
        totals[answer] += ballot
    lead = max(totals.values())
    leaders = [answer for answer, total in totals.items() if total == lead]
    return float(np.mean([candidates.correct[candidates.answers.index(answer)] for answer in leaders]))


def outcomes(questions: Sequence[Candidates]) -> dict[str, np.ndarray]:
    """(Expected) correctness of each question's chosen answer, by selection rule, [Q] each in [0, 1].

    pass_at_1: a random candidate. majority: the most frequent answer. weighted_vote: each candidate votes with its
    score. prm: the candidate with the highest score, the first of equals. oracle: any candidate right.
    """
    rules = {
        "pass_at_1": lambda question: np.mean(question.correct),
        "majority": majority_correct,
        "weighted_vote": weighted_vote_correct,
        "prm": lambda question: question.correct[int(np.argmax(question.scores))],
        "oracle": lambda question: any(question.correct),
    }
    return {name: np.array([float(rule(question)) for question in questions]) for name, rule in rules.items()}


def best_of_n(questions: Sequence[Candidates]) -> dict[str, float | int]:
    """Accuracies over the questions, as fractions, by each rule of `outcomes`; and their number."""
    figures = {name: float(np.mean(values)) for name, values in outcomes(questions).items()}
    return {**figures, "num_candidates": len(questions[0].correct), "num_questions": len(questions)}


def label_accuracy(is_right: Sequence[bool], scores: Sequence[float]) -> dict[str, float]:
    """How well step scores tell right steps from wrong ones: accuracy at 0.5, and area under the ROC curve.

    There is no such area, and no such key, where all steps are of one kind.
    """
    truth, found = np.asarray(is_right, bool), np.asarray(scores)
    accuracy = {"step_accuracy": float(np.mean((found > 0.5) == truth))}
    return {**accuracy, "step_auroc": float(roc_auc_score(truth, found))} if len(set(truth)) == 2 else accuracy


class Interval(NamedTuple):
    """A mean with a 95% interval."""

    mean: float
    low: float
    high: float


def paired_bootstrap(
    ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray], num_samples: int = 10_000, seed: int = 0
) -> Interval:
    """The mean gain of `ours` over `theirs` on the same questions, with its 95% percentile interval.

    Args:
      ours, theirs: one array of per-question outcomes [Q] for each repetition of the experiment (each seed), paired by
        position. Both levels are resampled: repetitions first, then questions within each.
      num_samples: bootstrap samples.
      seed: of the resampling.
    """
    differences = [np.asarray(a) - np.asarray(b) for a, b in zip(ours, theirs, strict=True)]
    rng, count = np.random.default_rng(seed), len(differences)
    times_drawn = rng.multinomial(count, np.full(count, 1 / count), size=num_samples)  # [samples, repetitions]
    totals = np.zeros(num_samples)
    for times, values in zip(times_drawn.T, differences, strict=True):
        # Questions differ in few ways (0, 1, shares of a tie): a resample of them is a draw of counts.
        levels, counts = np.unique(values, return_counts=True)
        totals += rng.multinomial(times * len(values), counts / len(values)) @ levels / len(values)
    low, high = np.quantile(totals / count, (0.025, 0.975))
    return Interval(float(np.mean([values.mean() for values in differences])), float(low), float(high))
