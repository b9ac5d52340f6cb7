"""Best-of-N by hand."""

import pytest

from dreamprm_jax.evaluate import Candidates, best_of_n, majority_correct

QUESTIONS = [
    Candidates(("A", "B", "B", "C"), (True, False, False, False), (0.9, 0.1, 0.2, 0.3)),
    Candidates(("D", "D", "E", "F"), (True, True, False, False), (0.1, 0.2, 0.8, 0.8)),
]


def test_accuracies():
    figures = best_of_n(QUESTIONS)
    assert figures == {
        "pass_at_1": pytest.approx(3 / 8),
        "majority": 0.5,
        "prm": 0.5,
        "oracle": 1.0,
        "num_candidates": 4,
        "num_questions": 2,
    }


def test_answers_tied_for_the_lead_share_the_credit():
    assert majority_correct(Candidates(("A", "B"), (True, False), (0.0, 0.0))) == 0.5


def test_of_equal_scores_the_first_is_taken():
    assert best_of_n([Candidates(("A", "B"), (True, False), (0.5, 0.5))])["prm"] == 1.0
    assert best_of_n([Candidates(("A", "B"), (False, True), (0.5, 0.5))])["prm"] == 0.0
