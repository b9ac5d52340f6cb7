"""Curves over the number of candidates, against closed forms and all sub-samples there are."""

from itertools import combinations
from math import comb

import numpy as np
import pytest

from dreamprm_jax import selection
from dreamprm_jax.selection import curves, field_of, outcomes, packed, run_accuracy
from tests.test_selection import random_questions

NUM_SAMPLES = 400


def made(seed, num_questions=300, width=8, counts=None):
    """A field of `width` candidates a question (or as many as `counts` says), and scores without ties."""
    rng = np.random.default_rng(seed)
    counts = np.full(num_questions, width) if counts is None else counts
    chance = rng.random(num_questions)
    correct = [(rng.random(count) < one).tolist() for count, one in zip(counts, chance, strict=True)]
    answers = [["right" if c else f"wrong {rng.integers(3)}" for c in of_question] for of_question in correct]
    field = field_of(answers, correct)
    return field, packed(field, rng.permutation(field.present.sum())) + 0.3 * field.correct * field.present.sum()


def expected_oracle(field, size):
    counts, right = field.present.sum(axis=1), field.correct.sum(axis=1)
    drawn = np.minimum(size, counts)
    return np.mean([1 - comb(c - r, n) / comb(c, n) for c, r, n in zip(counts, right, drawn, strict=True)])


def expected_best(field, scores, size):
    """The k-th best of c is chosen where it is drawn and none of the k before it is: C(c - 1 - k, n - 1) / C(c, n)."""
    found = []
    for correct, of_question, present in zip(field.correct, scores, field.present, strict=True):
        order = np.argsort(-of_question[present])
        count, drawn = len(order), min(size, len(order))
        chances = [comb(count - 1 - place, drawn - 1) / comb(count, drawn) for place in range(count)]
        found.append(np.dot(chances, correct[present][order]))
    return np.mean(found)


def near(found, number):
    """Within four standard errors of the sampled mean."""
    return 4 * found[number] / np.sqrt(NUM_SAMPLES) + 1e-12


@pytest.mark.parametrize("counts", [None, np.random.default_rng(9).integers(1, 9, 300)])
def test_sampled_means_are_those_of_the_closed_forms(counts):
    field, scores = made(seed=0, counts=counts)
    found = curves(field, {"mean": scores}, num_samples=NUM_SAMPLES)
    assert found.sizes == (1, 2, 4, 8)
    right = (field.correct.sum(axis=1) / field.present.sum(axis=1)).mean()
    for number, size in enumerate(found.sizes):
        expected = {
            "pass_at_1": right,
            "oracle": expected_oracle(field, size),
            "prm/mean": expected_best(field, scores, size),
        }
        for rule, value in expected.items():
            assert found.mean[rule][number] == pytest.approx(value, abs=near(found.std[rule], number)), (rule, size)
    assert found.mean["prm/mean"][3] > found.mean["prm/mean"][0] + 0.1  # else there is little to see


def test_votes_are_those_over_all_sub_samples():
    answers, correct, scores = random_questions(seed=5, num_questions=40, width=5)
    field = field_of(answers, correct)
    found = curves(field, {"mean": packed(field, np.concatenate(scores))}, "last", num_samples=NUM_SAMPLES)
    assert found.sizes == (1, 2, 4, 5)
    for number, size in enumerate(found.sizes):
        for rule in ("majority", "weighted_vote/mean", "prm/mean"):
            means = []
            for question in zip(answers, correct, scores, strict=True):
                subsets = list(combinations(range(len(question[0])), min(size, len(question[0]))))
                drawn = [[[values[place] for place in subset] for values in question] for subset in subsets]
                of_subsets = field_of([a for a, _, _ in drawn], [c for _, c, _ in drawn])
                means.append(outcomes(of_subsets, {"mean": np.array([s for _, _, s in drawn])}, "last")[rule].mean())
            assert found.mean[rule][number] == pytest.approx(np.mean(means), abs=near(found.std[rule], number)), size


def test_the_spread_is_that_of_independent_draws():
    """One of two candidates of each question: the accuracy over Q questions has variance sum p (1 - p) / Q^2."""
    field, scores = made(seed=2, num_questions=200, width=2)
    found = curves(field, {"mean": scores}, num_samples=4000)
    share = field.correct.mean(axis=1)
    assert found.std["pass_at_1"][0] == pytest.approx(np.sqrt(np.sum(share * (1 - share))) / 200, rel=0.05)


def test_at_all_candidates_there_is_one_sample():
    field, scores = made(seed=1, width=6, counts=np.random.default_rng(0).integers(2, 7, 300))
    found, whole = curves(field, {"mean": scores}), outcomes(field, {"mean": scores})
    assert found.sizes == (1, 2, 4, 6)
    assert set(found.mean) == set(found.std) == set(whole)
    for rule, values in whole.items():
        assert (found.mean[rule][-1], found.std[rule][-1]) == (values.mean(), 0.0)
    assert all(found.std["prm/mean"][:-1] > 0)


def test_of_one_candidate_every_rule_is_that_candidate():
    """Rules and scores meet the same sub-samples: at n = 1 they cannot differ."""
    field, scores = made(seed=3)
    found = curves(field, {"mean": scores, "min": -scores + scores.max()})
    for values in (found.mean, found.std):
        assert len({round(float(of_rule[0]), 12) for of_rule in values.values()}) == 1


def test_a_field_of_single_candidates_has_one_point():
    field, scores = made(seed=4, num_questions=5, width=1)
    found = curves(field, {"mean": scores})
    assert found.sizes == (1,)
    assert found.mean["prm/mean"] == run_accuracy(field)


def test_the_same_seed_draws_the_same_whatever_the_parts(monkeypatch):
    field, scores = made(seed=6, num_questions=50)
    first, again = (curves(field, {"mean": scores}, num_samples=20) for _ in range(2))
    monkeypatch.setattr(selection, "_CELLS", 3 * 8 * 20)
    assert [part.stop for part in selection._parts(field, 20)][:2] == [3, 6]
    parted = curves(field, {"mean": scores}, num_samples=20)
    other = curves(field, {"mean": scores}, num_samples=20, seed=1)
    for rule, values in first.std.items():
        np.testing.assert_array_equal(values, again.std[rule])
        np.testing.assert_allclose(values, parted.std[rule], rtol=1e-9, atol=1e-12)
    assert first.std["prm/mean"][0] != other.std["prm/mean"][0]
