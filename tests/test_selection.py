"""Best-of-N by hand, and against the rules spelled out question by question."""

import math
from collections import defaultdict

import numpy as np
import pytest
from scipy.stats import norm, spearmanr

from dreamprm_jax.errors import InputError
from dreamprm_jax.selection import (
    LOG_SCORES,
    best_of_n,
    by_group,
    chosen,
    field_of,
    gain,
    length_effect,
    of_score,
    outcomes,
    packed,
    paired_bootstrap,
    run_accuracy,
    scores_by_length,
    sign_flip_p_value,
    tie_figures,
    vote_weights,
)

ANSWERS = [("A", "B", "B", "C"), ("D", "D", "E", "F")]
CORRECT = [(True, False, False, False), (True, True, False, False)]
FIELD = field_of(ANSWERS, CORRECT)
SCORES = np.array([(0.9, 0.1, 0.2, 0.3), (0.1, 0.2, 0.8, 0.8)])


def of_one(answers, correct, scores, ties="first", name="mean"):
    """Outcomes by rule of a single question."""
    found = of_score(outcomes(field_of([answers], [correct]), {name: np.array([scores], float)}, ties), name)
    return {rule: float(values[0]) for rule, values in found.items()}


def spelled_out(answers, correct, scores, ties, weigh):
    """Outcomes by rule of a single question, in plain Python: the candidates one after the other."""

    def vote(ballots):
        totals = defaultdict(float)
        for answer, ballot in zip(answers, ballots, strict=True):
            if answer is not None:
                totals[answer] += ballot
        leaders = [answer for answer, total in totals.items() if math.isclose(total, max(totals.values()))]
        of_leader = [np.mean([c for a, c in zip(answers, correct, strict=True) if a == leader]) for leader in leaders]
        return float(np.mean(of_leader)) if leaders else 0.0

    best = 0
    for place, score in enumerate(scores):
        if score > scores[best] or (ties == "last" and score == scores[best]):
            best = place
    return {
        "pass_at_1": sum(correct) / len(correct),
        "majority": vote([1.0] * len(answers)),
        "oracle": float(any(correct)),
        "weighted_vote": vote([weigh(score) for score in scores]),
        "prm": float(correct[best]),
    }


def random_questions(seed, num_questions=300, width=7, *, dirty=False):
    """Answers, some of them None, correctness, and scores with many ties, of 1 to `width` candidates a question."""
    rng = np.random.default_rng(seed)
    answers, correct, scores = [], [], []
    for count in rng.integers(1, width + 1, num_questions):
        drawn = rng.integers(-1, 4, count)
        right = rng.random(5) < 0.4
        answers.append([None if answer < 0 else "ABCD"[answer] for answer in drawn])
        correct.append((rng.random(count) < 0.5 if dirty else (drawn >= 0) & right[drawn]).tolist())
        scores.append((rng.integers(1, 6, count) / 8).tolist())
    return answers, correct, scores


@pytest.mark.parametrize("ties", ["first", "last"])
@pytest.mark.parametrize("dirty", [False, True])
@pytest.mark.parametrize("name,weigh,shift", [("mean", float, 0.0), ("sum_logprob", math.exp, -9.0)])
def test_every_rule_as_spelled_out(name, weigh, shift, dirty, ties):
    answers, correct, scores = random_questions(seed=1, dirty=dirty)
    scores = [[score + shift for score in of_question] for of_question in scores]
    field = field_of(answers, correct)
    found = of_score(outcomes(field, {name: packed(field, np.concatenate(scores))}, ties), name)
    expected = [spelled_out(*question, ties, weigh) for question in zip(answers, correct, scores, strict=True)]
    assert set(found) == set(expected[0])
    for rule, values in found.items():
        np.testing.assert_allclose(values, [question[rule] for question in expected], atol=1e-12, err_msg=rule)


def test_accuracies():
    assert best_of_n(FIELD, SCORES, "mean") == {
        "pass_at_1": pytest.approx(3 / 8),
        "majority": 0.5,
        "weighted_vote": 0.5,
        "prm": 0.5,
        "oracle": 1.0,
        "num_candidates": 4,
        "num_questions": 2,
    }


def test_outcomes_are_question_by_question():
    found = outcomes(FIELD, {"mean": SCORES})
    expected = {
        "pass_at_1": [1 / 4, 1 / 2],
        "majority": [0.0, 1.0],  # B with two votes, D with two
        "weighted_vote/mean": [1.0, 0.0],  # A .9 against B .3; D .3 against E and F .8
        "prm/mean": [1.0, 0.0],  # A; E, the first of two equals
        "oracle": [1.0, 1.0],
    }
    assert {name: values.tolist() for name, values in found.items()} == expected


def test_several_scores_share_the_other_rules():
    found = outcomes(FIELD, {"mean": SCORES, "min": 1 - SCORES})
    assert set(found) - set(outcomes(FIELD, {"mean": SCORES})) == {"prm/min", "weighted_vote/min"}
    np.testing.assert_array_equal(found["prm/min"], outcomes(FIELD, {"min": 1 - SCORES})["prm/min"])


def test_answers_tied_for_the_lead_share_the_credit():
    assert of_one(("A", "B"), (True, False), (0.0, 0.0))["majority"] == 0.5


def test_the_tie_rule_decides_between_equal_scores():
    for correct, first in (((True, False), 1.0), ((False, True), 0.0)):
        assert of_one(("A", "B"), correct, (0.5, 0.5))["prm"] == first
        assert of_one(("A", "B"), correct, (0.5, 0.5), "last")["prm"] == 1 - first
    with pytest.raises(ValueError, match="ties='any'"):
        outcomes(FIELD, {"mean": SCORES}, "any")


def test_the_weighted_vote_adds_the_scores_of_equal_answers():
    answers, correct = ("A", "B", "A", "C"), (True, False, True, False)
    assert of_one(answers, correct, (0.3, 0.5, 0.3, 0.1))["weighted_vote"] == 1.0
    assert of_one(answers, correct, (0.2, 0.5, 0.2, 0.1))["weighted_vote"] == 0.0
    assert of_one(answers, correct, (0.25, 0.5, 0.25, 0.1))["weighted_vote"] == 0.5  # tied


def test_the_order_of_adding_breaks_no_tie():
    """.1 + .2 + .3 is not .3 + .2 + .1 in floating point."""
    answers, scores = ("A", "A", "A", "B", "B", "B"), (0.1, 0.2, 0.3, 0.3, 0.2, 0.1)
    assert sum(scores[:3]) != sum(scores[3:])
    assert of_one(answers, (True,) * 3 + (False,) * 3, scores)["weighted_vote"] == 0.5


def test_without_an_answer_there_is_no_vote_but_there_may_be_a_choice():
    found = of_one((None, None, "A"), (False, False, True), (0.9, 0.8, 0.1))
    assert (found["majority"], found["weighted_vote"], found["prm"]) == (1.0, 1.0, 0.0)
    found = of_one((None, None), (True, False), (0.9, 0.1))  # dirty: right without an answer
    assert (found["majority"], found["weighted_vote"]) == (0.0, 0.0)
    assert (found["prm"], found["pass_at_1"], found["oracle"]) == (1.0, 0.5, 1.0)


def test_an_answer_judged_both_ways_is_as_right_as_on_average():
    found = of_one(("A", "A", "A", "B"), (True, False, False, True), (0.1, 0.1, 0.1, 0.1))
    assert found["majority"] == pytest.approx(1 / 3)


def test_votes_of_logarithms_are_a_softmax():
    weights = vote_weights(FIELD, np.log(SCORES) - 800, logarithms=True)  # exp alone would be 0
    np.testing.assert_allclose(weights, SCORES / SCORES.max(axis=1, keepdims=True))
    np.testing.assert_allclose(weights, vote_weights(FIELD, SCORES), rtol=1e-12)
    with pytest.raises(ValueError, match="LOG_SCORES"):
        vote_weights(FIELD, SCORES - 0.5)
    assert {"sum_logprob", "sum_logit"} == LOG_SCORES


@pytest.mark.parametrize(
    "name,scores,weights",
    [
        ("mean_odd", (math.inf, math.inf, 3.0, 0.0), (1.0, 1.0, 0.0, 0.0)),
        ("product", (0.0, 0.0, 0.0, 0.0), (1.0, 1.0, 1.0, 1.0)),
        ("sum_logprob", (-math.inf,) * 4, (1.0, 1.0, 1.0, 1.0)),
        ("sum_logit", (math.inf, 5.0, -math.inf, math.inf), (1.0, 0.0, 0.0, 1.0)),
        ("sum_logit", (-900.0, 1000.0, 1000.0 + math.log(0.5), 0.0), (0.0, 1.0, 0.5, 0.0)),
    ],
)
def test_weights_are_numbers_whatever_the_scores(name, scores, weights):
    field = field_of([("A", "B", "C", "D")], [(True, False, False, False)])
    found = vote_weights(field, np.array([scores]), logarithms=name in LOG_SCORES)
    np.testing.assert_allclose(found, [weights], rtol=1e-9, atol=1e-200)
    assert np.all(found > 0)  # among candidates that all score 0, the number of votes still decides


def test_a_candidate_without_a_vote_does_not_set_the_scale():
    """Beside its score of 900, the others' exponentials would all be 0."""
    found = of_one((None, "A", "B"), (False, True, False), (900.0, 1.0, 0.0), name="sum_logit")
    assert found["weighted_vote"] == 1.0


def test_a_score_that_is_no_number_is_an_error_where_there_is_a_candidate():
    field = field_of([("A",), ("A", "B")], [(True,), (True, False)])
    scores = np.array([(0.5, math.nan), (0.5, 0.6)])
    assert outcomes(field, {"mean": scores})["prm/mean"].tolist() == [1.0, 0.0]
    scores[1, 1] = math.nan
    for figure in (lambda: outcomes(field, {"mean": scores}), lambda: tie_figures(field, scores)):
        with pytest.raises(InputError, match="question 1, candidate 1"):
            figure()


def test_questions_may_have_different_numbers_of_candidates():
    field = field_of([("A",), (None, "B", "B")], [(True,), (False, True, True)])
    assert field.answers.tolist() == [[0, -1, -1], [-1, 0, 0]]
    assert field.correct.tolist() == [[True, False, False], [False, True, True]]
    assert field.present.tolist() == [[True, False, False], [True, True, True]]
    assert packed(field, [0.1, 0.2, 0.3, 0.4]).tolist() == [[0.1, 0.0, 0.0], [0.2, 0.3, 0.4]]
    # A missing candidate has no score: not even a lower one is chosen for it.
    assert chosen(field, packed(field, [-5.0, -1.0, -2.0, -3.0])).tolist() == [0, 0]


def test_fields_that_do_not_fit_are_refused():
    for answers, correct in (([], []), ([()], [()]), ([("A",)], [(True, False)]), ([("A",)], [(True,), (True,)])):
        with pytest.raises(ValueError, match="verdicts"):
            field_of(answers, correct)
    with pytest.raises(ValueError, match="for 8 candidates"):
        packed(FIELD, [0.5] * 7)


def test_accuracy_by_place_counts_the_candidates_there_are():
    field = field_of([("A",), ("B", "A"), ("A", "A")], [(True,), (False, True), (True, False)])
    assert run_accuracy(field).tolist() == [2 / 3, 1 / 2]


def test_ties_are_counted_with_what_they_decide():
    answers = [("A", "B", "C"), ("A", "A", "B"), ("A", "B", "C"), ("A", "B")]
    correct = [(True, False, False), (True, True, False), (False, True, False), (True, False)]
    field = field_of(answers, correct)
    scores = packed(field, [0.5, 0.5, 0.5, 0.7, 0.7, 0.1, 0.2, 0.9, 0.9, 0.3, 0.4])
    assert tie_figures(field, scores) == {
        "num_shared": 3,
        "num_deciding": 2,
        "first": 3 / 4,  # right, right, right, wrong
        "last": 1 / 4,  # wrong, right, wrong, wrong
        "expected": pytest.approx((1 / 3 + 1 + 1 / 2) / 4),
    }
    assert tie_figures(field, np.log(scores + 1e-9))["num_shared"] == 3  # negative scores are scores


def test_groups_of_questions():
    found = {"prm": np.array([1.0, 0.0, 1.0, 0.5]), "oracle": np.ones(4)}
    assert by_group(found, ["physics", "art", None, "physics"]) == {
        "art": {"prm": 0.0, "oracle": 1.0, "num_questions": 1},
        "physics": {"prm": 0.75, "oracle": 1.0, "num_questions": 2},
    }
    assert list(by_group(found, ["b", "a", "c", "b"])) == ["a", "b", "c"]
    assert by_group(found, [None] * 4) == {}


def test_the_interval_of_one_repetition_is_that_of_a_mean():
    """400 questions, gains of +1, 0 and -1: the percentiles lie where the normal approximation has them."""
    gains = np.repeat([1.0, 0.0, -1.0], [120, 240, 40])
    found = paired_bootstrap([gains], [np.zeros(400)])
    reach = 1.96 * gains.std() / 20
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


def test_right_against_wrong_is_mcnemars_test():
    """15 questions gained, 5 lost, whatever the number of those that stay: two-sided binomial of 15 in 20."""
    ours = np.repeat([1.0, 0.0, 1.0, 0.0], [15, 5, 40, 40])
    theirs = np.repeat([0.0, 1.0, 1.0, 0.0], [15, 5, 40, 40])
    expected = 2 * sum(math.comb(20, wins) for wins in range(15, 21)) / 2**20
    assert sign_flip_p_value(ours, theirs) == pytest.approx(expected)
    assert sign_flip_p_value(theirs, ours) == pytest.approx(expected)
    assert sign_flip_p_value(ours, ours) == 1.0


def test_shares_of_ties_are_flipped_as_they_are():
    few = np.array([0.5, 1.0, 1.0, 0.25, 1.0, -0.5, 0.0])  # six that differ: all 64 ways
    signs = 1 - 2 * ((np.arange(64)[:, None] >> np.arange(6)) & 1)
    expected = np.mean(np.abs(signs @ few[:6]) >= few.sum())
    assert sign_flip_p_value(few, np.zeros(7)) == pytest.approx(expected)
    many = np.repeat([1.0, 0.5, 0.0, -0.5, -1.0], [68, 40, 200, 40, 52])
    found = sign_flip_p_value(many, np.zeros(400))
    normal = 2 * norm.sf(many.sum() / np.sqrt(np.square(many).sum()))
    assert 0.05 < normal < 0.5
    assert found == pytest.approx(normal, abs=0.02)
    assert found == sign_flip_p_value(many, np.zeros(400))


def test_a_gain_has_its_interval_and_its_significance():
    ours, theirs = np.repeat([1.0, 0.0], [70, 30]), np.repeat([1.0, 0.0], [40, 60])
    found = gain(ours, theirs)
    assert found.interval == paired_bootstrap([ours], [theirs])
    assert found.p_value == sign_flip_p_value(ours, theirs) < 1e-6


def test_correlations_with_length_are_spearmans():
    answers, correct, scores = random_questions(seed=3, num_questions=60)
    field = field_of(answers, correct)
    scores = packed(field, np.concatenate(scores))
    lengths = np.random.default_rng(4).integers(1, 5, field.present.shape)
    found = length_effect(field, scores, lengths)
    assert found.correlation == pytest.approx(spearmanr(scores[field.present], lengths[field.present]).statistic)
    own = [
        spearmanr(of_question[there], length[there]).statistic
        for of_question, length, there in zip(scores, lengths, field.present, strict=True)
        if len(set(of_question[there])) > 1 and len(set(length[there])) > 1
    ]
    assert 0 < len(own) < 60
    assert (found.within_questions, found.num_questions) == (pytest.approx(np.mean(own)), len(own))


def test_the_chosen_are_longer_where_the_score_likes_length():
    lengths = packed(field := field_of([("A",) * 3, ("A",)], [(True,) * 3, (True,)]), [2, 4, 6, 5])
    found = length_effect(field, lengths**2, lengths)
    assert found == (1.0, pytest.approx(1.0), 1, 4.5, 5.5)
    assert length_effect(field, -lengths, lengths)[:2] == (-1.0, pytest.approx(-1.0))
    assert length_effect(field, -lengths, lengths).mean_chosen == 3.5
    constant = length_effect(field, np.ones((2, 3)), lengths, ties="last")
    assert constant == (None, None, 0, 4.5, 5.5)


def test_scores_by_length():
    field = field_of([("A", "B"), ("A",)], [(True, False), (True,)])
    found = scores_by_length(field, packed(field, [0.2, 0.4, 0.6]), packed(field, [7, 3, 7]))
    assert found == {
        3: {"mean_score": 0.4, "num_candidates": 1},
        7: {"mean_score": pytest.approx(0.4), "num_candidates": 2},
    }
    assert list(found) == [3, 7]
