"""What `task=evaluate` refuses, each with one message, before anything is scored or written."""

import pytest
from evaluating import (
    CANDIDATES,
    best_of_n,  # noqa: F401 - a fixture
    checkpoint,  # noqa: F401 - a fixture
    config,
    read_lines,
    refused,
    results_of,
    score_lines,
    write_candidates,
    write_chains,
    write_lines,
)

from configs import prepare as prepare_config
from dreamprm_jax.errors import InputError
from dreamprm_jax.evaluate import run_evaluation
from dreamprm_jax.prepare import run_prepare


def test_a_benchmark_needs_a_model_or_scores(tmp_path):
    message = refused(tmp_path / "work", benchmark__path=write_chains(tmp_path))
    assert message.startswith("--config.benchmark.path=") and "needs a --config.model.checkpoint" in message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"benchmark__scores": "s.jsonl"}, "--config.benchmark.scores=s.jsonl: belongs to --config.benchmark.path"),
        ({"benchmark__images": "d"}, "--config.benchmark.images=d: belongs to --config.benchmark.path"),
        ({"candidates__images": "d"}, "--config.candidates.images=d: belongs to --config.candidates.path"),
        (
            {"benchmark__path": "b.jsonl", "candidates__scores": "s"},
            "--config.candidates.scores=s: belongs to --config.candidates.path, which is not given",
        ),
        ({"candidates__scores": "gone.jsonl"}, "--config.candidates.scores=gone.jsonl: no such file"),
        ({"candidates__path": "gone"}, "gone: no such file or directory; give raw files"),
        ({"benchmark__path": "gone.jsonl", "model__checkpoint": "x"}, "gone.jsonl: no such file or directory"),
    ],
)
def test_what_is_not_there_is_said(tmp_path, fields, message):
    assert message in refused(tmp_path / "work", **fields)
    assert not (tmp_path / "work").exists()


COUNTS = [1, 3, 1, 2, 1, 1, 2, 1, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[:-1], "s.jsonl: has 8 lines for 9 chains; it must have one each"),
        (
            lambda lines: [*lines[:2], *score_lines([2]), *lines[3:]],
            's.jsonl row 2: "step_scores_two_token" must be a list of 1 probabilities, one for each step of '
            "candidates.jsonl row 0 candidate 2",
        ),
        (lambda lines: [*lines[:8], *score_lines([1], 1.5)], "s.jsonl row 8: "),
        (lambda lines: [*lines[:8], *score_lines([1], float("nan"))], "s.jsonl row 8: "),
        (lambda lines: [*lines[:8], *score_lines([1], "0.5")], "s.jsonl row 8: "),
        (lambda lines: [*lines[:8], *score_lines([1], True)], "s.jsonl row 8: "),
        (lambda lines: [*lines[:8], 5], "s.jsonl row 8: "),
        (
            lambda lines: [{"step_scores": line["step_scores"]} for line in lines],
            's.jsonl row 0: "step_scores_two_token" is missing; --config.evaluate.step_score=full takes "step_scores"',
        ),
        (
            lambda lines: [*lines[:7], {**lines[7], "id": "y"}, lines[8]],
            's.jsonl row 7: "id" is "y", but candidates.jsonl row 2 candidate 1 is of "z"; score that file, in its '
            "order",
        ),
        (lambda lines: [*lines[:8], *score_lines([1], num_tokens="9")], 's.jsonl row 8: "num_tokens" is "9"; it must'),
    ],
)
def test_scores_that_do_not_fit(best_of_n, tmp_path, change, message):
    scores = write_lines(tmp_path / "s.jsonl", change(score_lines(COUNTS, num_tokens=9)))
    assert message in refused(tmp_path / "work", candidates__path=best_of_n, candidates__scores=scores)
    assert not (tmp_path / "work").exists()


def test_scores_that_are_no_json(best_of_n, tmp_path):
    path = write_lines(tmp_path / "s.jsonl", score_lines(COUNTS[:-1]))
    with open(path, "a") as file:
        file.write("{broken\n")
    assert "s.jsonl row 8: " in refused(tmp_path / "work", candidates__path=best_of_n, candidates__scores=path)


def test_candidates_that_nothing_judges(tmp_path):
    rows = [{name: value for name, value in CANDIDATES[2].items() if name != "true_false"}]
    path = write_candidates(tmp_path, rows)
    message = refused(tmp_path / "work", candidates__path=path)
    assert (
        'candidates.jsonl row 0 candidate 0: "true_false" is missing, and there is no "answer" to judge by' in message
    )
    assert "(and" not in message  # one row


def test_a_prepared_set_without_the_truth_of_its_steps(best_of_n, checkpoint, tmp_path):
    rows = [{"id": -1, "image": "a.png", "question": "Which is it?", "dataset": "d",
             "steps_with_score": [{"step": "so", "score": 1.0}]}]  # fmt: skip
    prepare = prepare_config.get_config("visualprm400k")
    prepare.prepare.source, prepare.prepare.images = write_lines(tmp_path / "r.jsonl", rows), str(tmp_path)
    prepare.prepare.output, prepare.prepare.processes = str(tmp_path / "data"), 1
    prepared = run_prepare(prepare, tmp_path / "prepare")["directory"]
    message = refused(tmp_path / "work", benchmark__path=prepared, model__checkpoint=checkpoint)
    assert "has no truth of its steps; prepare the set with :visualprocessbench" in message


def test_a_chain_that_is_too_long_is_counted_as_unscored(checkpoint, tmp_path):
    rows = [*CANDIDATES[:2], {**CANDIDATES[2], "candidates": ["so " * 1100, *CANDIDATES[2]["candidates"][1:]]}]
    fields = {"candidates__path": write_candidates(tmp_path, rows), "model__checkpoint": checkpoint}
    message = refused(tmp_path / "work", **fields)
    assert "candidates.jsonl row 2 candidate 0" in message
    cfg = config(**fields, data__on_error="skip", data__max_bad_share=0.2)
    run_evaluation(cfg, tmp_path / "work")
    found = results_of(tmp_path / "work")["selection"]
    assert found["num_unscored"] == 1 and found["num_responses"] == 9
    assert len(read_lines(tmp_path / "work" / "scores.jsonl")) == 8
    for name in ("results.md", "report.html"):
        assert "1 response could not be scored: the steps count as scored 0" in (tmp_path / "work" / name).read_text()


def test_candidates_that_changed_are_refused(tmp_path):
    fields = {"candidates__path": write_candidates(tmp_path, CANDIDATES)}
    run_evaluation(config(**fields), tmp_path / "work")
    write_candidates(tmp_path, CANDIDATES[:2])
    with pytest.raises(
        InputError, match=r"config.json: was begun with data\..*candidates.jsonl=.*give another --workdir"
    ):
        run_evaluation(config(**fields), tmp_path / "work")
