"""Figures of step benchmarks: known values, other implementations, and the definitions spelled out."""

import json

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

from dreamprm_jax.errors import InputError
from dreamprm_jax.step_benchmark import (
    best_threshold,
    by_source,
    calibration,
    first_error,
    held_out_keys,
    label_accuracy,
    of_chains,
    roc,
    step_f1,
    steps_of,
    tuned_step_f1,
)


def made(seed=0, num_chains=200, num_questions=60):
    """Chains as lists and as steps: scores of two decimals (with ties), all three truths, three sources."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 8, num_chains)
    truth = [rng.choice([1, -1, 0], size, p=[0.6, 0.25, 0.15]).tolist() for size in lengths]
    scores = [np.clip(0.5 + 0.2 * np.array(t) + rng.normal(0, 0.25, len(t)), 0, 1).round(2).tolist() for t in truth]
    sources = rng.choice(["a", "b", "c"], num_chains).tolist()
    keys = [f"question {number}" for number in rng.integers(0, num_questions, num_chains)]
    return truth, scores, sources, keys, steps_of(truth, scores, sources, keys)


def one_chain_each(truth, scores):
    return steps_of([[t] for t in truth], [[s] for s in scores], ["s"] * len(truth), list(map(str, range(len(truth)))))


def flat(truth, scores):
    """Whether the judged steps are right, and their scores."""
    pairs = [(t == 1, s) for ts, ss in zip(truth, scores, strict=True) for t, s in zip(ts, ss, strict=True) if t]
    return np.array([t for t, _ in pairs]), np.array([s for _, s in pairs])


@pytest.mark.parametrize(
    "num_right,num_wrong,f1_plus,macro", [(49, 17, 0.8522, 0.4261), (16_585, 7_691, 0.8118, 0.4059)]
)
def test_predicting_all_right(num_right, num_wrong, f1_plus, macro):
    """The figure that goes with VisualProcessBench's counts: 40.59 for a model that finds no fault."""
    truth = np.repeat([1, -1, 0], [num_right, num_wrong, 9])
    found = step_f1(steps_of([truth], [np.ones(len(truth))], ["all"], ["0"]), 0.5)
    assert found == {
        "f1_plus": pytest.approx(f1_plus, abs=5e-5),
        "f1_minus": 0.0,
        "macro_f1": pytest.approx(macro, abs=5e-5),
        "accuracy": num_right / (num_right + num_wrong),
        "num_right": num_right,
        "num_wrong": num_wrong,
        "num_neutral": 9,
    }


def test_recorded_chains(shared):
    """Seven rows of VisualProcessBench."""
    rows = [json.loads(line) for line in (shared / "mmmu/visualprocessbench_sample.jsonl").read_text().splitlines()]
    truth = [row["response"]["process_correctness"] for row in rows]
    sources, keys = ([row[name] for row in rows] for name in ("data_source", "question"))
    steps = steps_of(truth, [np.ones(len(row)) for row in truth], sources, keys)
    found = step_f1(steps, 0.5)
    assert (found["num_right"], found["num_wrong"], found["num_neutral"]) == (49, 17, 9)
    assert [round(found[name], 4) for name in ("f1_plus", "f1_minus", "macro_f1")] == [0.8522, 0.0, 0.4261]
    perfect = steps_of(truth, [(np.array(row) + 1) / 2 for row in truth], sources, keys)
    assert step_f1(perfect, 0.5)["macro_f1"] == 1.0
    has_error = [-1 in row for row in truth]
    assert first_error(perfect, 0.5) == {
        "error_accuracy": 1.0,
        "correct_accuracy": 1.0 if not all(has_error) else None,
        "f1": 1.0 if not all(has_error) else None,
        "num_with_error": sum(has_error),
        "num_without": 7 - sum(has_error),
    }


@pytest.mark.parametrize("threshold", [-1.0, 0.3, 0.5, 0.85, 1.0])
def test_f1_as_scikit_learn_has_it(threshold):
    truth, scores, sources, _, steps = made()
    right, found_scores = flat(truth, scores)
    positive = found_scores > threshold
    found = step_f1(steps, threshold)
    assert found["f1_plus"] == pytest.approx(f1_score(right, positive, zero_division=0))
    assert found["f1_minus"] == pytest.approx(f1_score(~right, ~positive, zero_division=0))
    assert found["macro_f1"] == pytest.approx(f1_score(right, positive, average="macro", zero_division=0))
    assert found["accuracy"] == pytest.approx(accuracy_score(right, positive))
    assert found["num_neutral"] == sum(row.count(0) for row in truth) > 0
    parts = by_source(steps, lambda part: step_f1(part, threshold))
    assert list(parts) == ["a", "b", "c"]
    for source, figures in parts.items():
        rows = [(t, s) for t, s, of in zip(truth, scores, sources, strict=True) if of == source]
        right, found_scores = flat(*zip(*rows, strict=True))
        macro = f1_score(right, found_scores > threshold, average="macro", zero_division=0)
        assert figures["macro_f1"] == pytest.approx(macro)


def test_at_the_threshold_a_step_is_wrong():
    steps = one_chain_each([1, -1], [0.5, 0.5])
    assert step_f1(steps, 0.5)["f1_plus"] == 0.0
    assert step_f1(steps, 0.4999)["f1_minus"] == 0.0
    assert first_error(steps, 0.5)["error_accuracy"] == 1.0


def test_nothing_there_and_nothing_found_is_zero():
    found = step_f1(one_chain_each([1, 1], [0.9, 0.8]), 0.5)
    assert (found["f1_plus"], found["f1_minus"], found["macro_f1"]) == (1.0, 0.0, 0.5)
    with pytest.raises(InputError, match="nothing to count"):
        step_f1(one_chain_each([0, 0], [0.9, 0.8]), 0.5)


def test_a_source_of_neutral_steps_alone_has_no_figures():
    steps = steps_of([[1, 0], [0]], [[0.9, 0.1], [0.9]], ["a", "b"], ["0", "1"])
    found = by_source(steps, lambda part: step_f1(part, 0.5))
    assert list(found) == ["a"]
    assert found["a"]["num_neutral"] == 1


@pytest.mark.parametrize("seed", range(4))
def test_the_best_threshold_is_the_best_of_all(seed):
    truth, scores, _, _, steps = made(seed, num_chains=30)
    values = sorted({score for row in scores for score in row})
    macro = [step_f1(steps, value)["macro_f1"] for value in [-1.0, *values]]
    threshold = best_threshold(steps)
    assert step_f1(steps, threshold)["macro_f1"] == pytest.approx(max(macro))
    lowest = [-1.0, *values][int(np.argmax(macro))]  # the lowest of equally good ones
    assert threshold >= lowest
    assert not any(lowest < value <= threshold for value in flat(truth, scores)[1])


def test_thresholds_at_the_ends_and_between_neighbours():
    first = np.nextafter(0.5, 1)
    second = np.nextafter(first, 1)
    for low, high in ((0.5, first), (first, second)):  # the half of their sum is rounded to either
        assert best_threshold(one_chain_each([-1, 1], [low, high])) == low
    assert best_threshold(one_chain_each([-1, 1], [0.25, 0.75])) == 0.5
    upside_down = one_chain_each([1, 1, -1], [0.0, 0.2, 0.9])  # all right is best, a score of 0 included
    assert best_threshold(upside_down) < 0
    assert step_f1(upside_down, best_threshold(upside_down))["f1_plus"] == pytest.approx(0.8)
    upside_down = one_chain_each([1, -1, -1], [0.1, 0.5, 0.9])  # all wrong
    assert step_f1(upside_down, best_threshold(upside_down))["f1_minus"] == pytest.approx(0.8)


def test_held_out_keys_are_whole_questions_and_stay_the_same():
    keys = [f"question {number // 3}" for number in range(30_000)]
    held_out = held_out_keys(keys, 0.2)
    assert set(held_out.reshape(-1, 3).sum(axis=1).tolist()) == {0, 3}
    assert held_out.mean() == pytest.approx(0.2, abs=0.012)
    np.testing.assert_array_equal(held_out_keys(keys[::-1], 0.2), held_out[::-1])
    assert np.all(held_out_keys(keys, 0.3) >= held_out)
    assert np.any(held_out_keys(keys, 0.2, seed=1) != held_out)
    # The hash of a key is a promise: figures published with a split must come out again.
    assert held_out_keys([str(number) for number in range(12)], 0.3).tolist() == [0, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0]


def test_the_threshold_is_chosen_on_one_side_and_counted_on_the_other():
    *_, keys, steps = made()
    found = tuned_step_f1(steps, share=0.3)
    np.testing.assert_array_equal(found.held_out, held_out_keys(keys, 0.3))
    assert 0 < found.held_out.sum() < 200
    assert not set(np.array(keys)[found.held_out]) & set(np.array(keys)[~found.held_out])
    ours, others = of_chains(steps, found.held_out), of_chains(steps, ~found.held_out)
    assert found.threshold == best_threshold(ours) != best_threshold(others)
    assert found.held_out_figures == step_f1(ours, found.threshold)
    assert found.figures == step_f1(others, found.threshold)
    assert found.by_source == by_source(others, lambda part: step_f1(part, found.threshold))


def test_a_side_that_cannot_serve_is_an_error():
    *_, steps = made()
    with pytest.raises(InputError, match="held-out part of 200 chains has no chains"):
        tuned_step_f1(steps, share=0.0)
    with pytest.raises(InputError, match="other part of 200 chains has no chains"):
        tuned_step_f1(steps, share=1.0)
    right = steps._replace(truth=np.abs(steps.truth))
    with pytest.raises(InputError, match="no right and wrong steps both"):
        tuned_step_f1(right)
    with pytest.raises(InputError, match="all of one kind"):
        best_threshold(right)


def spelled_out(truth, scores, threshold):
    """ProcessBench's figures, chain by chain."""
    on_error, on_correct = [], []
    for marks, found in zip(truth, scores, strict=True):
        pairs = [(mark, score) for mark, score in zip(marks, found, strict=True) if mark != 0]
        true = next((place for place, (mark, _) in enumerate(pairs) if mark == -1), None)
        guess = next((place for place, (_, score) in enumerate(pairs) if score <= threshold), None)
        if pairs:
            (on_correct if true is None else on_error).append(true == guess)
    first, second = np.mean(on_error), np.mean(on_correct)
    return first, second, 2 * first * second / (first + second), len(on_error), len(on_correct)


@pytest.mark.parametrize("threshold", [0.3, 0.45, 0.6])
def test_first_errors_as_spelled_out(threshold):
    truth, scores, _, _, steps = made(seed=2)
    assert [0] in truth
    assert tuple(first_error(steps, threshold).values()) == pytest.approx(spelled_out(truth, scores, threshold))


def test_first_errors_by_hand():
    truth = [[1, 0, -1], [1, -1, -1], [1, 1], [1, -1]]
    scores = [[0.9, 0.1, 0.2], [0.9, 0.9, 0.1], [0.9, 0.6], [0.4, 0.1]]  # found; too late; none; too early
    steps = steps_of(truth, scores, ["s"] * 4, list("0123"))
    expected = {"error_accuracy": 1 / 3, "correct_accuracy": 1.0, "f1": 0.5, "num_with_error": 3, "num_without": 1}
    assert first_error(steps, 0.5) == pytest.approx(expected)
    assert first_error(steps, 0.05)["f1"] == 0.0  # errors are never found
    assert first_error(steps, 1.0)["correct_accuracy"] == 0.0
    alone = first_error(of_chains(steps, np.array([False, False, True, False])), 0.5)
    assert (alone["error_accuracy"], alone["correct_accuracy"], alone["f1"]) == (None, 1.0, None)


def test_the_area_is_the_share_of_pairs_in_order():
    truth, scores, *_ = made(seed=3)
    right, found = flat(truth, scores)
    differences = found[right][:, None] - found[~right]
    curve = roc(right, found)
    assert curve.auroc == pytest.approx(np.mean(differences > 0) + np.mean(differences == 0) / 2)
    assert np.trapezoid(curve.true_positive, curve.false_positive) == pytest.approx(curve.auroc)
    assert roc_auc_score(right, found) == pytest.approx(curve.auroc)
    assert roc(np.array([True, True]), np.array([0.1, 0.2])) is None


def test_calibration_as_spelled_out():
    truth, scores, *_ = made(seed=4)
    right, values = flat(truth, scores)
    found = calibration(right, values)
    error = 0.0
    for number, (low, high) in enumerate(zip(found.edges[:-1], found.edges[1:], strict=True)):
        inside = (values >= low) & ((values < high) | (high == 1))
        assert found.counts[number] == inside.sum() > 0
        assert found.mean_score[number] == pytest.approx(values[inside].mean())
        assert found.share_right[number] == pytest.approx(right[inside].mean())
        error += inside.mean() * abs(values[inside].mean() - right[inside].mean())
    assert found.counts.sum() == len(right)
    assert found.expected_error == pytest.approx(error)
    assert found.brier == pytest.approx(np.mean((values - right) ** 2))
    np.testing.assert_allclose(found.edges, np.arange(11) / 10)


def test_calibration_by_hand():
    found = calibration(np.array([True, True, False, False]), np.array([1.0, 0.5, 0.5, 0.0]), num_bins=4)
    assert found.counts.tolist() == [1, 0, 2, 1]
    assert np.isnan(found.mean_score[1]) and np.isnan(found.share_right[1])
    assert (found.expected_error, found.brier) == (0.0, 0.125)


def test_label_accuracy_counts_steps_and_pairs():
    # At 0.5: .4 is wrongly low, .6 wrongly high. Of the pairs (.9, .4) x (.6, .1), three are in order.
    figures = label_accuracy([True, True, False, False], [0.9, 0.4, 0.6, 0.1])
    assert figures == {"step_accuracy": 0.5, "step_auroc": pytest.approx(3 / 4)}
    assert label_accuracy([True, True], [0.9, 0.4]) == {"step_accuracy": 0.5}


def test_chains_that_cannot_be_used_are_named():
    for truth, scores, message in (
        ([[1], [1, 2]], [[0.5], [0.5, 0.5]], "chain 1, step 1: the truth is 2; it must be 1, -1 or 0"),
        ([[1, 1], [1]], [[0.5, np.nan], [0.5]], "chain 0, step 1: the score is nan"),
        ([[1, 1], [1]], [[0.5, 0.5], [1.5]], "chain 1, step 0: the score is 1.5; it must be a probability"),
    ):
        with pytest.raises(InputError, match=message):
            steps_of(truth, scores, ["s", "s"], ["0", "1"])
    for truth, scores, sources in (([[1]], [[0.5, 0.5]], ["s"]), ([[1]], [[0.5]], ["s", "s"]), ([[]], [[]], ["s"])):
        with pytest.raises(ValueError, match="steps|sources"):
            steps_of(truth, scores, sources, ["0"])
