"""What an evaluation finds, by hand: best-of-N on a few questions, and how a few steps are judged."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dreamprm_jax import evaluation
from dreamprm_jax.data.candidates import Candidate, Contest
from dreamprm_jax.data.example import GPT, HUMAN, PLUS, Example, Question, Turn
from dreamprm_jax.data.formats.visualprm import conversation
from dreamprm_jax.errors import InputError
from dreamprm_jax.evaluation import Judged, Scores, Settings
from dreamprm_jax.losses import AGGREGATIONS, PROBABILITIES

FEW = Settings(num_samples=5, threshold=0.5)


def contest(number, candidates, **fields):
    """`candidates`: answer, "+" or "-", and a number of steps, such as ("A", "+", 2)."""
    made = []
    for answer, sign, num_steps in candidates:
        turns = tuple(turn for _ in range(num_steps) for turn in (Turn(HUMAN, "s"), Turn(GPT, PLUS)))
        example = Example(0, str(number), turns, true_false=sign == "+")
        made.append(Candidate("text", answer, sign == "+", None, example))
    options = ("red", "green", "blue")
    question = Question(number, f"q{number}", "Which?", "A", options, place=f"file row {number}", **fields)
    return Contest(question, tuple(made))


def three_questions():
    """Majority right, in a tie, wrong; 4, 2 and 3 candidates, of which two have no answer."""
    return [
        contest(0, [("A", "+", 1), ("A", "+", 2), ("B", "-", 2), (None, "-", 1)], subject="Art", image_type="Photo"),
        contest(1, [("A", "+", 1), ("B", "-", 1)], subject="Physics", difficulty="Hard"),
        contest(2, [("B", "-", 2), (None, "-", 1), ("A", "+", 1)], subject="Music"),
    ]


SCORES = Scores(
    [np.array(values) for values in
     ([0.2], [0.4, 0.6], [0.9, 0.9], [0.1],  # picks the third, wrong
      [0.7], [0.7],  # of equals the first is right, the last wrong
      [0.6, 0.2], [0.3], [0.8])],  # picks the third, right
    [3, 6, 5, 2, 4, 4, 6, 3, 5],
)  # fmt: skip


def results_of(contests, scores, settings=FEW):
    ballot = evaluation.ballot_of(contests, scores, settings)
    found = evaluation.finite(evaluation.selection_results(contests, scores, ballot, settings))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    return found


def means(found):
    return {rule: figures["mean"] for rule, figures in found["accuracy"].items()}


def test_best_of_n_by_hand():
    found = results_of(three_questions(), SCORES)
    accuracy = means(found)
    assert accuracy["pass_at_1"] == pytest.approx((2 / 4 + 1 / 2 + 1 / 3) / 3)
    assert accuracy["majority"] == pytest.approx((1 + 1 / 2 + 1 / 2) / 3)  # the third question's votes: one B, one A
    assert accuracy["oracle"] == 1
    assert accuracy["prm/mean"] == pytest.approx(2 / 3)
    assert accuracy["weighted_vote/mean"] == pytest.approx((0 + 1 / 2 + 1) / 3)  # 0.2 + 0.5 for A, 0.9 for B
    assert (found["num_questions"], found["num_responses"]) == (3, 9)
    assert (found["num_candidates"], found["fewest_candidates"], found["num_without_answer"]) == (4, 2, 2)
    assert found["runs"] == pytest.approx([2 / 3, 1 / 3, 1 / 2, 0])  # of the questions that have so many
    for figures in found["accuracy"].values():
        assert figures["low"] <= figures["mean"] <= figures["high"]


def test_gains_have_their_sign_on_the_same_questions():
    gains = results_of(three_questions(), SCORES)["gains"]
    assert set(gains) == set(AGGREGATIONS)
    assert gains["mean"]["pass_at_1"]["mean"] == pytest.approx((-1 / 2 + 1 / 2 + 2 / 3) / 3)
    assert gains["mean"]["majority"]["mean"] == pytest.approx((-1 + 1 / 2 + 1 / 2) / 3, abs=1e-12)
    assert gains["mean"]["weighted_vote"]["mean"] == pytest.approx((0 + 1 / 2 + 0) / 3)
    assert gains["mean"]["weighted_vote"]["p_value"] == 1.0  # one question differs
    worst = [contest(n, [("A", "+", 1), ("A", "+", 1), ("B", "-", 1)]) for n in range(8)]
    lost = results_of(worst, Scores([np.array([p]) for p in [0.1, 0.2, 0.3] * 8], None))
    figures = lost["gains"]["mean"]["majority"]
    assert (figures["mean"], figures["low"], figures["high"]) == (-1, -1, -1)
    assert figures["p_value"] == pytest.approx(2 * 0.5**8)  # McNemar's exact test


def test_of_equals_the_first_or_the_last_is_chosen():
    first, last = (results_of(three_questions(), SCORES, FEW._replace(ties=ties)) for ties in ("first", "last"))
    assert means(first)["prm/mean"] - means(last)["prm/mean"] == pytest.approx(1 / 3)
    for found in (first, last):
        ties = found["ties"]["mean"]
        assert (ties["num_shared"], ties["num_deciding"]) == (1, 1)
        assert [ties[kind] for kind in ("first", "last", "expected")] == pytest.approx([2 / 3, 1 / 3, 1 / 2])


def test_groups_are_of_the_questions_that_have_the_label():
    groups = results_of(three_questions(), SCORES)["groups"]
    assert list(groups) == list(evaluation.FACETS)
    assert {label: row["num_questions"] for label, row in groups["subject"].items()} == {
        "Art": 1, "Music": 1, "Physics": 1,
    }  # fmt: skip
    assert groups["discipline"]["Art & Design"]["num_questions"] == 2
    assert groups["discipline"]["Art & Design"]["prm/mean"] == pytest.approx(1 / 2)
    assert groups["discipline"]["Science"]["majority"] == pytest.approx(1 / 2)
    assert groups["image type"] == {"Photo": {**groups["subject"]["Art"]}}
    assert list(groups["difficulty"]) == ["Hard"]
    assert list(results_of([contest(0, [("A", "+", 1)])], None)["groups"]) == []


def test_without_a_model_there_are_the_baselines_alone():
    found = results_of(three_questions(), None)
    assert list(found["accuracy"]) == ["pass_at_1", "oracle", "majority"]
    assert not {"gains", "ties", "lengths", "responses"} & set(found)
    assert set(found["curves"]["mean"]) == {"pass_at_1", "oracle", "majority"}
    assert "prm/mean" not in found["groups"]["subject"]["Art"]
    with_model = results_of(three_questions(), SCORES)
    assert found["accuracy"] == {rule: with_model["accuracy"][rule] for rule in found["accuracy"]}


def test_curves_end_at_all_candidates():
    found = results_of(three_questions(), SCORES)
    assert found["curves"]["sizes"] == [1, 2, 4]
    assert {rule: values[-1] for rule, values in found["curves"]["mean"].items()} == pytest.approx(means(found))


def test_lengths_are_of_questions_that_were_scored_whole():
    """A 0 that stands for no score, with its 0 tokens, must not look like a preference for long responses."""
    whole = results_of(three_questions(), SCORES)["lengths"]
    assert whole["steps"]["mean_chosen"] == pytest.approx((2 + 1 + 1) / 3)
    assert whole["tokens"]["mean_length"] == pytest.approx((16 / 4 + 8 / 2 + 14 / 3) / 3)
    steps = [np.zeros(1), *SCORES.steps[1:]]
    lost = Scores(steps, [0, *SCORES.num_tokens[1:]], unscored=(0,))
    found = results_of(three_questions(), lost)
    assert found["num_unscored"] == 1
    assert found["lengths"]["tokens"]["mean_length"] == pytest.approx((8 / 2 + 14 / 3) / 2)
    none = results_of(three_questions(), lost._replace(unscored=(0, 5, 8)))
    assert none["lengths"] == {}
    assert list(results_of(three_questions(), SCORES._replace(num_tokens=None))["lengths"]) == ["steps"]


@pytest.mark.parametrize("aggregate", AGGREGATIONS)
def test_scores_of_exactly_0_and_1_are_still_json(aggregate):
    """Their log-odds have no bound."""
    contests = [contest(0, [("A", "+", 2), ("B", "-", 2), ("C", "-", 1)])]
    scores = Scores([np.array([1.0, 1.0]), np.array([0.0, 1.0]), np.array([0.0])], None)
    found = results_of(contests, scores, FEW._replace(aggregate=aggregate))
    assert (means(found)["prm/min"], means(found)["weighted_vote/sum_logit"]) == (1, 1)
    assert ("calibration_error" in found["responses"]) == (aggregate in PROBABILITIES)


def test_what_json_has_not_is_null():
    given = {1: [float("inf"), 2.0], "b": {"c": float("nan"), "d": (True, None, "x")}}
    assert evaluation.finite(given) == {"1": [None, 2.0], "b": {"c": None, "d": [True, None, "x"]}}


def test_response_scores_tell_right_from_wrong():
    found = results_of([contest(0, [("A", "+", 1), ("B", "-", 1)])], Scores([np.array([0.9]), np.array([0.3])], None))
    assert found["responses"] == pytest.approx({"auroc": 1, "calibration_error": 0.2, "brier": (0.01 + 0.09) / 2})
    all_right = results_of([contest(0, [("A", "+", 1)])], Scores([np.array([0.9])], None))
    assert all_right["responses"]["auroc"] is None


def test_a_question_without_candidates_is_named():
    empty = contest(1, [])
    with pytest.raises(InputError, match="file row 1: has no candidates; add them, or take the question out"):
        evaluation.ballot_of([contest(0, [("A", "+", 1)]), empty], None, FEW)


# --- Steps.


def chain(truth, question="q", source="a", images=()):
    turns = conversation(question, ["s"] * len(truth), [PLUS] * len(truth))
    return Example(0, 0, turns, tuple(images), dataset=source, step_truth=tuple(truth), place="file row 0")


def figures_of(chains, scores, settings=FEW):
    judged = evaluation.judged_chains(chains)
    evaluation.check_judged(judged, settings)
    steps = evaluation.judged_steps(judged, Scores([np.array(values) for values in scores], None))
    chosen, counted = evaluation.choose_threshold(steps, settings)
    found = evaluation.finite({**chosen, **evaluation.step_results(counted, chosen["threshold"])})
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    return found


def test_steps_by_hand_at_a_given_threshold():
    chains = [chain([1, 1, -1]), chain([1, 0, -1, 1], source="b"), chain([1, 1], source="b")]
    found = figures_of(chains, [[0.9, 0.5, 0.2], [0.8, 0.1, 0.7, 0.6], [0.9, 0.9]])
    assert (found["threshold"], found["chosen_on"], found["num_chains"]) == (0.5, None, 3)
    pooled = found["pooled"]  # right: 5 of 6 found (0.5 is not above 0.5); wrong: 1 of 2
    assert pooled["f1_plus"] == pytest.approx(2 * 5 / (2 * 5 + 2))
    assert pooled["f1_minus"] == pytest.approx(2 * 1 / (2 * 1 + 2))
    assert pooled["macro_f1"] == pytest.approx((10 / 12 + 1 / 2) / 2)
    assert pooled["accuracy"] == pytest.approx(6 / 8)
    assert (pooled["num_right"], pooled["num_wrong"], pooled["num_neutral"]) == (6, 2, 1)
    # The first chain is stopped too early, at step 1 for step 2; the second one's error passes; the third one passes.
    assert (pooled["first_error_error_accuracy"], pooled["first_error_correct_accuracy"]) == (0, 1)
    assert list(found["by_source"]) == ["a", "b"]
    assert found["by_source"]["a"]["f1_minus"] == pytest.approx(2 / 3)
    assert found["mean_of_sources"]["f1_minus"] == pytest.approx((2 / 3 + 0) / 2)
    assert found["all_right"]["f1_plus"] == pytest.approx(2 * 6 / (2 * 6 + 2))
    assert (found["all_right"]["f1_minus"], found["all_right"]["num_neutral"]) == (0, 1)
    assert (found["all_right"]["first_error_correct_accuracy"], found["all_right"]["first_error_f1"]) == (1, 0)
    assert 0 < found["auroc"] < 1
    assert found["brier"] == pytest.approx(np.mean(np.square([0.1, 0.5, 0.2, 0.2, 0.7, 0.4, 0.1, 0.1])))


def test_what_a_source_lacks_has_no_mean():
    found = figures_of([chain([1, -1]), chain([1], source="b")], [[0.9, 0.1], [0.9]])
    assert found["by_source"]["b"]["first_error_error_accuracy"] is None
    assert "first_error_error_accuracy" not in found["mean_of_sources"]
    assert found["by_source"]["a"]["first_error_correct_accuracy"] is None
    assert "first_error_correct_accuracy" not in found["mean_of_sources"]
    assert (found["pooled"]["first_error_error_accuracy"], found["pooled"]["first_error_f1"]) == (1, 1)
    assert found["mean_of_sources"]["f1_minus"] == 0.5  # that of a source without wrong steps is 0
    one = figures_of([chain([1, -1])], [[0.9, 0.1]])
    assert one["mean_of_sources"]["macro_f1"] == one["pooled"]["macro_f1"] == 1
    unnamed = figures_of([chain([1, -1], source=None)], [[0.9, 0.1]])
    assert list(unnamed["by_source"]) == ["no source"]


def many_chains(count=40):
    rng = np.random.default_rng(0)
    chains = [chain([1, -1], question=f"q{number}") for number in range(count)]
    return chains, [[0.6 + 0.3 * rng.random(), 0.2 + 0.3 * rng.random()] for _ in chains]


def test_a_chosen_threshold_is_from_chains_that_do_not_count():
    chains, scores = many_chains()
    settings = FEW._replace(threshold=None, held_out=0.3)
    found = figures_of(chains, scores, settings)
    held_out = found["chosen_on"]["num_chains"]
    assert 0 < held_out < 40
    assert found["num_chains"] == 40 - held_out
    assert found["pooled"]["num_right"] == found["all_right"]["num_right"] == 40 - held_out
    assert 0.4 < found["threshold"] < 0.65
    assert found["chosen_on"]["macro_f1"] == 1
    given = figures_of(chains, scores)
    assert given["pooled"]["num_right"] == 40
    assert figures_of(chains, scores, settings._replace(seed=1))["chosen_on"]["seed"] == 1


def png(colour, size=(4, 4)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def test_chains_about_one_question_have_one_key(tmp_path):
    """Whatever their first steps, and wherever their picture lies: Python's own hash differs in each process."""
    (tmp_path / "a.png").write_bytes(png("red"))
    one, other = chain([1], images=[tmp_path / "a.png"]), chain([-1, 1], images=[png("red")])
    turns = tuple(turn._replace(text=turn.text.replace("\ns", "\nanother")) for turn in other.turns)
    keys = evaluation.judged_chains([one, other, other._replace(turns=turns)]).keys
    assert len(set(keys)) == 1
    assert keys == ["### Question:\nq\n(4, 4)"] * 3
    assert len(set(evaluation.judged_chains([one, chain([1], question="r", images=one.images)]).keys)) == 2
    assert len(set(evaluation.judged_chains([one, chain([1], images=[png("red", (5, 4))])]).keys)) == 2
    gone = [chain([1], images=[Path(name)]) for name in ("gone/1.png", "gone/2.png", "gone/1.png")]
    assert evaluation.judged_chains(gone).keys == [f"### Question:\nq\ngone/{n}.png" for n in (1, 2, 1)]
    assert [evaluation.has_pictures(each) for each in (one, other, gone[0])] == [True, True, False]


def test_candidates_of_a_question_have_one_key():
    contests = three_questions()
    assert evaluation.judged_candidates(contests) is None
    told = [
        each._replace(
            candidates=tuple(
                c._replace(example=c.example._replace(step_truth=(1,) * c.example.num_steps)) for c in each.candidates
            )
        )
        for each in contests
    ]
    judged = evaluation.judged_candidates(told)
    assert judged.keys == ["q0"] * 4 + ["q1"] * 2 + ["q2"] * 3
    assert len(judged.chains) == 9
    assert evaluation.judged_candidates([told[0], contests[1]]) is None  # of some only


def test_what_has_no_figures_is_said_before_scoring():
    chains = [chain([1, 1]), chain([1])]
    with pytest.raises(InputError, match=r"held-out share 0.2, seed 0: .* give another share, or a threshold"):
        evaluation.check_judged(Judged(chains, ["a", "b"]), FEW._replace(threshold=None))
    with pytest.raises(InputError, match="no step is right or wrong"):
        evaluation.check_judged(Judged([chain([0, 0])], ["a"]), FEW)
    evaluation.check_judged(Judged(chains, ["a", "b"]), FEW)  # right ones alone have figures
