"""Best-of-N: what selection by the model is worth, beside its baselines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Candidates(NamedTuple):
    """One question's C candidates."""

    answers: tuple[str, ...]  # [C] final answers, for the vote
    correct: tuple[bool, ...]  # [C]
    scores: tuple[float, ...]  # [C] response scores


def majority_correct(candidates: Candidates) -> float:
    """Expected correctness of the most frequent answer; answers tied for the lead share the credit."""
    counts = Counter(candidates.answers)
    lead = max(counts.values())
    leaders = [answer for answer, count in counts.items() if count == lead]
    first = [candidates.correct[candidates.answers.index(answer)] for answer in leaders]
    return float(np.mean(first))


def best_of_n(questions: Sequence[Candidates]) -> dict[str, float | int]:
    """Accuracies over the questions, as fractions.

    pass_at_1: a random candidate. majority: the most frequent answer. prm: the candidate with the highest
    score, the first of equals. oracle: any candidate right.
    """
    chosen = [question.correct[int(np.argmax(question.scores))] for question in questions]
    return {
        "pass_at_1": float(np.mean([np.mean(question.correct) for question in questions])),
        "majority": float(np.mean([majority_correct(question) for question in questions])),
        "prm": float(np.mean(chosen)),
        "oracle": float(np.mean([any(question.correct) for question in questions])),
        "num_candidates": len(questions[0].correct),
        "num_questions": len(questions),
    }
