"""`task=evaluate` end to end: from candidates, judged chains and a tiny model to files that agree with one another."""

import copy
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from evaluating import (
    CANDIDATES,
    CHAINS,
    ROOT,
    SPLITS,
    best_of_n,  # noqa: F401 - a fixture
    checkpoint,  # noqa: F401 - a fixture
    config,
    no_scoring,
    read_lines,
    refused,
    results_of,
    score_lines,
    write_candidates,
    write_chains,
    write_lines,
)
from sklearn.metrics import f1_score

from configs import prepare as prepare_config
from dreamprm_jax import evaluate
from dreamprm_jax.data import noisy_steps
from dreamprm_jax.errors import InputError
from dreamprm_jax.evaluate import run_evaluation
from dreamprm_jax.prepare import run_prepare

# --- The embedded benchmark.


@pytest.fixture(scope="module")
def embedded(checkpoint, tmp_path_factory):
    """(workdir, its summary, its config) of an evaluation; others read it, or copy it."""
    workdir = tmp_path_factory.mktemp("embedded")
    cfg = config(model__checkpoint=checkpoint, evaluate__threshold=None, evaluate__held_out=0.4)
    return workdir, run_evaluation(cfg, workdir), cfg


def test_every_file_is_there(embedded):
    workdir, summary, _ = embedded
    assert sorted(path.name for path in workdir.iterdir()) == [
        "config.json", "metrics.jsonl", "outcomes.jsonl", "plots", "report.html", "results.json", "results.md",
        "scores.jsonl",
    ]  # fmt: skip
    assert {path.stem for path in (workdir / "plots").iterdir()} == {
        "accuracy", "scores", "score_by_steps", "step_scores", "calibration", "roc",
    }  # fmt: skip
    assert summary["report"] == str(workdir / "report.html")
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    (line,) = read_lines(workdir / "metrics.jsonl")
    assert line == {"step": 0, "phase": "evaluate", **summary}
    json.loads((workdir / "results.json").read_text(), parse_constant=pytest.fail)  # no NaN, no Infinity


def test_figures_are_those_of_the_scores(embedded):
    """Computed again from scores.jsonl and the benchmark, question by question in plain Python."""
    workdir, summary, _ = embedded
    questions = noisy_steps.make(0, SPLITS).test
    lines, written = (iter(read_lines(workdir / "scores.jsonl")) for _ in range(2))
    picked, votes, majority, truth, scores = [], [], [], [], []
    for question in questions:
        own = [next(lines)["step_scores_two_token"] for _ in question.answers]
        response = [np.float32(np.prod(np.float32(each))) for each in own]
        assert [next(written)["score"] for _ in own] == pytest.approx(response, rel=1e-5)
        picked.append(question.correct[int(np.argmax(response))])
        weights = {a: sum(s for b, s in zip(question.answers, response, strict=True) if b == a) for a in
                   question.answers}  # fmt: skip
        votes.append(question.correct[question.answers.index(max(weights, key=weights.get))])
        counts = {answer: question.answers.count(answer) for answer in question.answers}
        leaders = [answer for answer, count in counts.items() if count == max(counts.values())]
        majority.append(np.mean([question.correct[question.answers.index(answer)] for answer in leaders]))
        truth += [[label == "+" for label in labels] for labels in question.step_labels]
        scores += own
    assert next(lines, None) is None
    best, outcomes = summary["best_of_n"], read_lines(workdir / "outcomes.jsonl")
    assert [line["prm"] for line in outcomes] == picked
    assert [line["majority"] for line in outcomes] == pytest.approx(majority)
    assert [q.correct[line["chosen"]] for q, line in zip(questions, outcomes, strict=True)] == picked
    assert best["prm"] == pytest.approx(np.mean(picked))
    assert best["weighted_vote"] == pytest.approx(np.mean(votes))
    assert best["majority"] == pytest.approx(np.mean(majority))
    assert best["pass_at_1"] == pytest.approx(np.mean([question.correct for question in questions]))
    assert best["oracle"] == pytest.approx(np.mean([any(question.correct) for question in questions]))
    assert (summary["num_questions"], summary["num_candidates"], summary["aggregate"]) == (12, 8, "product")
    steps = results_of(workdir)["steps"]
    held_out = evaluate.evaluation.step_benchmark.held_out_keys([q.examples[0].id for q in questions], 0.4)
    counted = np.repeat(~held_out, 8)
    assert steps["num_chains"] == counted.sum() and steps["chosen_on"]["num_chains"] == (~counted).sum() > 0
    marks, found = np.concatenate(np.array(truth)[counted]), np.concatenate(np.array(scores)[counted])
    assert steps["pooled"]["macro_f1"] == pytest.approx(f1_score(marks, found > steps["threshold"], average="macro"))
    assert steps["brier"] == pytest.approx(np.mean((found - marks) ** 2))
    assert {name: steps["pooled"][name] for name in ("f1_plus", "f1_minus", "macro_f1")}.items() <= (
        summary["steps"].items()
    )


@pytest.fixture
def copied(embedded, tmp_path):
    workdir, summary, cfg = embedded
    shutil.copytree(workdir, tmp_path / "copy")
    return tmp_path / "copy", {**summary, "report": str(tmp_path / "copy" / "report.html")}, cfg


def test_a_finished_run_gives_its_summary(copied, monkeypatch):
    workdir, summary, cfg = copied
    monkeypatch.setattr(evaluate, "load_model", lambda *a, **how: pytest.fail("loaded for nothing"))
    before = {path.name: path.stat().st_mtime_ns for path in workdir.glob("re*")}
    assert run_evaluation(cfg, workdir) == summary
    assert {path.name: path.stat().st_mtime_ns for path in workdir.glob("re*")} == before


def test_a_kill_after_scoring_loses_no_score(copied, monkeypatch):
    workdir, summary, cfg = copied
    kept = (workdir / "results.json").read_bytes()
    (workdir / "results.json").unlink()
    no_scoring(monkeypatch)
    assert run_evaluation(cfg, workdir) == summary
    assert (workdir / "results.json").read_bytes() == kept


def test_another_config_is_refused(copied):
    workdir, _, cfg = copied
    other = copy.deepcopy(cfg)
    other.evaluate.ties = "last"
    for left in (True, False):
        if not left:
            (workdir / "results.json").unlink()
        with pytest.raises(InputError, match=r"begun with config.evaluate.ties=first, now config.evaluate.ties=last"):
            run_evaluation(other, workdir)
        assert left == (workdir / "results.json").exists()


def test_its_scores_can_be_given_in_place_of_the_model(embedded, tmp_path, monkeypatch):
    workdir, _, cfg = embedded
    given = copy.deepcopy(cfg)
    given.candidates.scores = str(workdir / "scores.jsonl")
    monkeypatch.setattr(evaluate, "load_model", lambda *a, **how: pytest.fail("loaded for nothing"))
    run_evaluation(given, tmp_path)
    assert results_of(tmp_path) == results_of(workdir)
    assert not (tmp_path / "scores.jsonl").exists()


def test_a_benchmark_too_small_for_a_threshold_is_said_before_scoring(checkpoint, tmp_path, monkeypatch):
    no_scoring(monkeypatch)
    monkeypatch.setattr(evaluate, "write_scores", lambda *a: pytest.fail("scored for nothing"))
    few = {"model__checkpoint": checkpoint, "evaluate__threshold": None, "noisy_steps__test_questions": 1}
    for fields in (few, {**few, "benchmark__path": write_chains(tmp_path)}):
        assert "give another share, or a threshold" in refused(tmp_path / "work", **fields)
        assert not (tmp_path / "work").exists()


# --- A best-of-N file with images.


def test_a_best_of_n_file_with_a_model_and_with_its_scores(best_of_n, checkpoint, tmp_path):
    summary = run_evaluation(config(candidates__path=best_of_n, model__checkpoint=checkpoint), tmp_path / "model")
    scores = str(tmp_path / "model" / "scores.jsonl")
    again = config(candidates__path=best_of_n, candidates__scores=scores, candidates__images=str(tmp_path))
    run_evaluation(again, tmp_path / "scores")
    assert results_of(tmp_path / "scores") == results_of(tmp_path / "model")
    for name in ("results.md", "report.html"):
        texts = [(tmp_path / work / name).read_text().partition("<h2>Config</h2>")[0] for work in ("model", "scores")]
        assert texts[0] == texts[1].replace(f"scores of {scores}", f"scored by {checkpoint}")  # pictures too
    lines = read_lines(tmp_path / "model" / "scores.jsonl")
    assert [line["id"] for line in lines] == list("xxxxyyzzz")
    assert [len(line["step_scores"]) for line in lines] == [1, 3, 1, 2, 1, 1, 2, 1, 1]
    assert [line["num_tiles"] for line in lines] == [1] * 4 + [3] * 2 + [0] * 3
    found = results_of(tmp_path / "model")["selection"]
    assert (found["num_questions"], found["num_candidates"], found["fewest_candidates"]) == (3, 4, 2)
    assert "steps" not in results_of(tmp_path / "model")
    assert summary["best_of_n"]["pass_at_1"] == pytest.approx((2 / 4 + 1 / 2 + 2 / 3) / 3)
    assert summary["best_of_n"]["majority"] == pytest.approx((0 + 1 / 2 + 1) / 3)
    alone = run_evaluation(config(candidates__path=best_of_n), tmp_path / "alone")
    assert set(alone["best_of_n"]) == {"pass_at_1", "majority", "oracle"}
    assert alone["best_of_n"].items() <= summary["best_of_n"].items()


def test_the_published_recipe_takes_the_last_of_equals_and_the_published_splitter(tmp_path):
    """Its splitter cuts at "2." inside a sentence, so one step of the corrected one is two."""
    row = {
        "image_path": None,
        "candidates": ["It is 2. Then stop.", "So", "Think."],
        "true_false": [True, False, False],
    }
    path = write_candidates(tmp_path, [{**row, "id": "x"}, {**row, "id": "y", "true_false": [False, False, True]}])
    for recipe, place, counts in (("published", 2, [2, 1, 1]), ("corrected", 0, [1, 1, 1])):
        scores = write_lines(tmp_path / f"{recipe}.jsonl", score_lines(2 * counts, 1.0))
        cfg = config(recipe, candidates__path=path, candidates__scores=scores)
        run_evaluation(cfg, tmp_path / recipe)
        found = results_of(tmp_path / recipe)
        assert found["selection"]["groups"] == {}
        ties = found["selection"]["ties"]["mean"]
        assert (ties["num_deciding"], ties["first"], ties["last"]) == (2, 0.5, 0.5)
        assert found["settings"]["ties"] == ("last" if recipe == "published" else "first")
        page = (tmp_path / recipe / "report.html").read_text()
        data = json.loads(re.search(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL)[1])
        chosen = [[c["chosen"] for c in question["candidates"]] for question in data["questions"]]
        assert [[number for number, rules in enumerate(each) if "PRM" in rules] for each in chosen] == [[place]] * 2


# --- Step benchmarks.


def test_raw_rows_and_a_prepared_set_give_the_same(checkpoint, tmp_path):
    raw = write_chains(tmp_path)
    prepare = prepare_config.get_config("visualprocessbench")
    prepare.prepare.source, prepare.prepare.output, prepare.prepare.processes = raw, str(tmp_path / "data"), 1
    prepared = run_prepare(prepare, tmp_path / "prepare")["directory"]
    for name, path in (("raw", raw), ("prepared", prepared)):
        summary = run_evaluation(config(benchmark__path=path, model__checkpoint=checkpoint), tmp_path / name)
        assert "best_of_n" not in summary and 0 <= summary["steps"]["macro_f1"] <= 1
    found = results_of(tmp_path / "raw")
    assert found == results_of(tmp_path / "prepared")
    assert list(found["steps"]["by_source"]) == ["MMMU", "MathVision"]
    lines = read_lines(tmp_path / "raw" / "step_scores.jsonl")
    scores = [score for line in lines for score in line["step_scores_two_token"]]
    truth = [mark for _, _, marks, _, _ in CHAINS for mark in marks]
    pairs = [(mark > 0, score > 0.5) for mark, score in zip(truth, scores, strict=True) if mark]
    assert found["steps"]["pooled"]["accuracy"] == pytest.approx(np.mean([mark == taken for mark, taken in pairs]))
    assert not (tmp_path / "raw" / "scores.jsonl").exists()
    chosen = {"evaluate__threshold": None, "evaluate__held_out": 0.5, "seed": 9}
    for name, path in (("raw", raw), ("prepared", prepared)):
        scores = str(tmp_path / name / "step_scores.jsonl")
        run_evaluation(config(benchmark__path=path, benchmark__scores=scores, **chosen), tmp_path / f"{name} split")
    assert results_of(tmp_path / "raw split") == results_of(tmp_path / "prepared split")
    (tmp_path / "a.png").unlink()  # who has the scores needs no images
    given = config(benchmark__path=raw, benchmark__scores=str(tmp_path / "raw" / "step_scores.jsonl"))
    run_evaluation(given, tmp_path / "without")
    assert results_of(tmp_path / "without") == found


def test_chains_of_several_files_are_numbered_through(tmp_path):
    path = Path(write_chains(tmp_path))
    (tmp_path / "split").mkdir()
    for name in ("first.jsonl", "second.jsonl"):
        shutil.copy(path, tmp_path / "split" / name)
    cfg = config(benchmark__path=str(tmp_path / "split"), benchmark__images=str(tmp_path))
    judged = evaluate.read_judged_of(cfg)
    assert [chain.row for chain in judged.chains] == list(range(8))
    assert judged.chains[4].place == "second.jsonl row 0"
    assert judged.keys[:4] == judged.keys[4:]


def test_candidates_and_a_benchmark_in_one_run(best_of_n, checkpoint, tmp_path):
    chains = write_lines(tmp_path / "s.jsonl", score_lines([2, 2, 3, 2]))
    cfg = config(candidates__path=best_of_n, benchmark__path=write_chains(tmp_path), benchmark__scores=chains)
    write_candidates(tmp_path, CANDIDATES)
    summary = run_evaluation(cfg, tmp_path / "work")
    assert summary["num_questions"] == 3 and summary["steps"]["f1_plus"] == 0  # 0.5 is not above 0.5
    assert list(results_of(tmp_path / "work")) == ["settings", "selection", "steps"]


# --- Recorded data.


def test_visualprocessbenchs_sample_with_every_step_right(shared, tmp_path):
    source = shared / "mmmu/visualprocessbench_sample.jsonl"
    counts = [len(row["response"]["steps"]) for row in read_lines(source)]
    scores = write_lines(tmp_path / "ones.jsonl", score_lines(counts, 1.0))
    summary = run_evaluation(config(benchmark__path=str(source), benchmark__scores=scores), tmp_path / "work")
    steps = summary["steps"]
    assert (round(steps["f1_plus"], 4), steps["f1_minus"], round(steps["macro_f1"], 4)) == (0.8522, 0, 0.4261)
    found = results_of(tmp_path / "work")["steps"]
    assert found["pooled"] == found["all_right"]
    assert [found["pooled"][f"num_{kind}"] for kind in ("right", "wrong", "neutral")] == [49, 17, 9]
    assert (steps["threshold"], steps["auroc"]) == (0.5, 0.5)


def test_gpt4os_runs_without_a_model(shared, tmp_path):
    cfg = config(candidates__path=str(shared / "mmmu/gpt4o"), evaluate__questions_shown=3)
    summary = run_evaluation(cfg, tmp_path)
    found = results_of(tmp_path)["selection"]
    assert [round(run, 4) for run in found["runs"]] == [0.5503, 0.4012, 0.5006, 0.4243]
    text = (tmp_path / "results.md").read_text()
    assert "| 4 | 42.43 | gpt-4o_vision_direct.jsonl |" in text and "mmmu/gpt4o, not scored. 1,730 questions" in text
    assert {name: round(value, 4) for name, value in summary["best_of_n"].items()} == {
        "pass_at_1": 0.4691, "majority": 0.5310, "oracle": 0.7364,
    }  # fmt: skip
    assert len(read_lines(tmp_path / "disagreements.jsonl")) == summary["num_disagreements"] == 94
    assert sum(row["num_questions"] for row in found["groups"]["discipline"].values()) == 1730
    assert "disagree on 94 responses, listed in disagreements.jsonl" in text


def test_the_published_meta_set(shared, tmp_path):
    cfg = config(candidates__path=str(shared / "mmmu/meta_MMMU_Pro.json"), evaluate__questions_shown=0)
    summary = run_evaluation(cfg, tmp_path)
    assert summary["best_of_n"]["oracle"] == pytest.approx(281 / 414)
    assert summary["num_disagreements"] == 0 and not (tmp_path / "disagreements.jsonl").exists()
    assert 'class="browser"' not in (tmp_path / "report.html").read_text()
    outcomes = read_lines(tmp_path / "outcomes.jsonl")
    assert set(outcomes[0]) == {"id", "pass_at_1", "majority", "oracle"}
    assert sum(line["oracle"] for line in outcomes) == 281


# --- The command line.


def call(*arguments):
    command = [sys.executable, "run.py", "--config=configs/evaluate.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_the_command_prints_the_summary(best_of_n, tmp_path):
    path, work = f"--config.candidates.path={best_of_n}", f"--workdir={tmp_path / 'work'}"
    done = call(path, work, "--config.evaluate.num_samples=5")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["num_questions"], summary["report"]) == (3, str(tmp_path / "work" / "report.html"))
    assert summary["best_of_n"]["oracle"] == 1


def test_a_wrong_value_is_one_line(tmp_path):
    done = call("--config.evaluate.held_out=1.5", f"--workdir={tmp_path / 'work'}")
    assert done.returncode == 2
    assert done.stderr.strip() == "error: --config.evaluate.held_out=1.5: must be between 0 and 1"
