"""Best-of-N by hand."""

import numpy as np
import pytest

from dreamprm_jax.evaluate import (
    Candidates,
    best_of_n,
    label_accuracy,
    majority_correct,
    outcomes,
    paired_bootstrap,
    weighted_vote_correct,
)

QUESTIONS = [
    Candidates(("A", "B", "B", "C"), (True, False, False, False), (0.9, 0.1, 0.2, 0.3)),
    Candidates(("D", "D", "E", "F"), (True, True, False, False), (0.1, 0.2, 0.8, 0.8)),
]


def test_accuracies():
    figures = best_of_n(QUESTIONS)
    assert figures == {
        "pass_at_1": pytest.approx(3 / 8),
        "majority": 0.5,
        "weighted_vote": 0.5,
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


def test_outcomes_are_question_by_question():
    found = outcomes(QUESTIONS)
    expected = {
        "pass_at_1": [1 / 4, 1 / 2],
        "majority": [0.0, 1.0],  # B with two votes, D with two
        "weighted_vote": [1.0, 0.0],  # A .9 against B .3; D .3 against E and F .8
        "prm": [1.0, 0.0],  # A; E, the first of two equals
        "oracle": [1.0, 1.0],
    }
    assert {name: values.tolist() for name, values in found.items()} == expected


def test_the_weighted_vote_adds_the_scores_of_equal_answers():
    votes = Candidates(("A", "B", "A", "C"), (True, False, True, False), (0.3, 0.5, 0.3, 0.1))
    assert (weighted_vote_correct(votes), majority_correct(votes)) == (1.0, 1.0)
    assert weighted_vote_correct(votes._replace(scores=(0.2, 0.5, 0.2, 0.1))) == 0.0
    assert weighted_vote_correct(votes._replace(scores=(0.25, 0.5, 0.25, 0.1))) == 0.5  # tied


def test_label_accuracy_counts_steps_and_pairs():
    # At 0.5: .4 is wrongly low, .6 wrongly high. Of the pairs (.9, .4) x (.6, .1), three are in order.
    figures = label_accuracy([True, True, False, False], [0.9, 0.4, 0.6, 0.1])
    assert figures == {"step_accuracy": 0.5, "step_auroc": pytest.approx(3 / 4)}
    assert label_accuracy([True, True], [0.9, 0.4]) == {"step_accuracy": 0.5}


def test_the_interval_of_one_repetition_is_that_of_a_mean():
    """400 questions, gains of +1, 0 and -1: the percentiles lie where the normal approximation has them."""
    gain = np.repeat([1.0, 0.0, -1.0], [120, 240, 40])
    found = paired_bootstrap([gain], [np.zeros(400)])
    reach = 1.96 * gain.std() / 20
    assert found.mean == pytest.approx(0.2)
    assert (found.low, found.high) == pytest.approx((0.2 - reach, 0.2 + reach), abs=0.004)


def test_pairs_are_compared_question_by_question():
    ours, theirs = np.tile([1.0, 0.0], 50), np.tile([0.0, 0.0], 50)
    assert paired_bootstrap([ours], [ours]) == (0.0, 0.0, 0.0)
    assert paired_bootstrap([ours + 0.25], [ours]) == pytest.approx((0.25, 0.25, 0.25))
    assert paired_bootstrap([ours], [theirs]).mean == 0.5


def test_repetitions_that_disagree_widen_the_interval():
    """Five seeds with all questions alike within each: only the seeds vary, and the interval knows it."""
    gains = [np.full(100, gain) for gain in (0.0, 0.1, 0.2, 0.3, 0.4)]
    found = paired_bootstrap(gains, [np.zeros(100)] * 5)
    reach = 1.96 * np.std([0.0, 0.1, 0.2, 0.3, 0.4]) / np.sqrt(5)
    assert found.mean == pytest.approx(0.2)
    assert (found.low, found.high) == pytest.approx((0.2 - reach, 0.2 + reach), abs=0.02)
    same = [np.tile(np.repeat([1.0, 0.0], [1, 4]), 20)] * 5  # 0.2 in every seed
    narrow = paired_bootstrap(same, [np.zeros(100)] * 5)
    assert narrow.high - narrow.low < (found.high - found.low) * 0.75


def test_the_bootstrap_is_the_same_every_time_and_another_with_another_seed():
    gains, zeros = [np.random.default_rng(seed).normal(size=30) for seed in (1, 2)], [np.zeros(30)] * 2
    assert paired_bootstrap(gains, zeros) == paired_bootstrap(gains, zeros)
    assert paired_bootstrap(gains, zeros) != paired_bootstrap(gains, zeros, seed=1)
