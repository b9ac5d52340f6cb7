"""`task=evaluate` end to end: from candidates, judged chains and a tiny model to files that agree with one another."""

import copy
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
from PIL import Image
from sklearn.metrics import f1_score

from configs import evaluate as evaluate_config
from configs import prepare as prepare_config
from dreamprm_jax import evaluate, scoring
from dreamprm_jax.data import noisy_steps
from dreamprm_jax.data.formats.prompts import (
    DREAMPRM_CHOICES,
    DREAMPRM_SYSTEM,
    VISUALPRM_FIRST_STEP,
    VISUALPRM_SYSTEM,
)
from dreamprm_jax.errors import InputError
from dreamprm_jax.evaluate import run_evaluation
from dreamprm_jax.models import convert, internvl, presets
from dreamprm_jax.prepare import run_prepare

ROOT = Path(__file__).parent.parent
WORDS = "Which is it? It look Look. think Think. Answer: A B C (A) (B) red green blue so So"
SPLITS = noisy_steps.Sizes(
    pretrain=1, cold_start=1, clean=1, flipped=0, always_plus=0, trivial=0, shifted=0, test_questions=12
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """An untrained model; its tokenizer has the embedded benchmark's words, those of the prompts, and WORDS."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = noisy_steps.tokenizer()
    texts = (DREAMPRM_SYSTEM, VISUALPRM_SYSTEM, VISUALPRM_FIRST_STEP, DREAMPRM_CHOICES, "Question:", WORDS)
    known = tokenizer.get_vocab()
    words = dict.fromkeys(word for text in texts for word in text.split() if word not in known)
    vocab = {**known, **{word: len(known) + number for number, word in enumerate(words)}}
    tokenizer.model = tokenizers.models.WordLevel(vocab, unk_token="<unknown>")
    config = presets.tiny(tokenizer.get_vocab_size())
    convert.save_checkpoint(config, internvl.init(config, jax.random.key(0, impl="rbg")), folder, "original")
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder)


def config(argument="", **fields):
    """Few sub-samples, no pictures unless asked for; `candidates__path` sets candidates.path."""
    cfg = evaluate_config.get_config(argument)
    cfg.evaluate.num_samples, cfg.evaluate.threshold = 5, 0.5
    cfg.noisy_steps.update(SPLITS._asdict())
    cfg.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return cfg


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def results_of(workdir):
    return json.loads((workdir / "results.json").read_text())


def refused(workdir, **fields):
    with pytest.raises(InputError) as error:
        run_evaluation(config(**fields), workdir)
    assert not (workdir / "results.json").exists()
    return str(error.value)


def no_scoring(monkeypatch):
    monkeypatch.setattr(scoring, "score_windows", lambda *a, **k: pytest.fail("scored for nothing"))


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
        "config.json", "metrics.jsonl", "plots", "report.html", "results.json", "results.md", "scores.jsonl",
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
    lines = iter(read_lines(workdir / "scores.jsonl"))
    picked, votes, majority, truth, scores = [], [], [], [], []
    for question in questions:
        own = [next(lines)["step_scores_two_token"] for _ in question.answers]
        response = [np.float32(np.prod(np.float32(each))) for each in own]
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
    best = summary["best_of_n"]
    assert best["prm"] == pytest.approx(np.mean(picked))
    assert best["weighted_vote"] == pytest.approx(np.mean(votes))
    assert best["majority"] == pytest.approx(np.mean(majority))
    assert best["pass_at_1"] == pytest.approx(np.mean([question.correct for question in questions]))
    assert best["oracle"] == pytest.approx(np.mean([any(question.correct) for question in questions]))
    assert (summary["num_questions"], summary["num_candidates"], summary["aggregate"]) == (12, 8, "product")
    steps = results_of(workdir)["steps"]
    held_out = evaluate.evaluation.step_benchmark.held_out_chains([q.examples[0].id for q in questions], 0.4)
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
    monkeypatch.setattr(evaluate, "load_model", lambda *a: pytest.fail("loaded for nothing"))
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


def test_its_scores_can_be_given_in_place_of_the_model(embedded, tmp_path):
    workdir, _, _ = embedded
    given = config(candidates__scores=str(workdir / "scores.jsonl"), evaluate__threshold=None, evaluate__held_out=0.4)
    run_evaluation(given, tmp_path)
    assert results_of(tmp_path) == results_of(workdir)
    assert not (tmp_path / "scores.jsonl").exists()


def test_a_benchmark_too_small_for_a_threshold_is_said_before_scoring(checkpoint, tmp_path, monkeypatch):
    no_scoring(monkeypatch)
    few = {"model__checkpoint": checkpoint, "evaluate__threshold": None, "noisy_steps__test_questions": 1}
    assert "give another share, or a threshold" in refused(tmp_path / "work", **few)
    assert not (tmp_path / "work").exists()


# --- A best-of-N file with images.

STEPS = ("Look. It is red", "Think. So blue", "so green")
CANDIDATES = [
    {"id": "x", "image_path": "a.png", "true_false": [True, False, False, True], "answers": ["1", "2", "2", None],
     "candidates": [STEPS[0], "\n\n".join(STEPS), STEPS[1], "\n\n".join(STEPS[:2])]},
    {"id": "y", "image_path": "b.png", "true_false": [False, True], "answers": ["1", "2"], "candidates": STEPS[1:]},
    {"id": "z", "image_path": None, "true_false": [True, True, False], "answers": ["3", "3", "4"],
     "candidates": ["\n\n".join(STEPS[1:]), STEPS[0], STEPS[1]]},
]  # fmt: skip


@pytest.fixture
def best_of_n(tmp_path):
    """Questions of 2 to 4 candidates, two pictures, one question without."""
    return write_candidates(tmp_path, CANDIDATES)


def write_candidates(folder, rows):
    for name, size in (("a.png", (28, 28)), ("b.png", (56, 28))):
        Image.new("RGB", size, (9, 99, 199)).save(folder / name)
    return write_lines(folder / "candidates.jsonl", [{"question": "Which is it?", **row} for row in rows])


def test_a_best_of_n_file_with_a_model_and_with_its_scores(best_of_n, checkpoint, tmp_path):
    summary = run_evaluation(config(candidates__path=best_of_n, model__checkpoint=checkpoint), tmp_path / "model")
    scores = str(tmp_path / "model" / "scores.jsonl")
    again = config(candidates__path=best_of_n, candidates__scores=scores, candidates__images=str(tmp_path))
    run_evaluation(again, tmp_path / "scores")
    assert results_of(tmp_path / "scores") == results_of(tmp_path / "model")
    for name in ("results.md", "report.html"):
        texts = [(tmp_path / work / name).read_text().partition("<h2>Config</h2>")[0] for work in ("model", "scores")]
        assert texts[0] == texts[1]  # pictures too
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


def score_lines(counts, value=0.5, **fields):
    return [{"step_scores": [value] * count, "step_scores_two_token": [value] * count, **fields} for count in counts]


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

CHAINS = [
    ("Which is it?", ["Look. red", "so blue"], [1, -1], "MMMU", "a.png"),
    ("Which is it?", ["Look. red", "so green"], [1, 1], "MMMU", "a.png"),
    ("Which is it? blue", ["Think.", "so", "so red"], [-1, 0, -1], "MathVision", "b.png"),
    ("Which is it? green", ["Think.", "So"], [1, 1], "MathVision", "b.png"),
]


def write_chains(folder):
    rows = [
        {"image": [image], "question": question,
         "response": {"steps": steps, "process_correctness": marks}, "data_source": source}
        for question, steps, marks, source, image in CHAINS
    ]  # fmt: skip
    write_candidates(folder, [])
    return write_lines(folder / "chains.jsonl", rows)


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
    assert {name: round(value, 4) for name, value in summary["best_of_n"].items()} == {
        "pass_at_1": 0.4691, "majority": 0.5310, "oracle": 0.7364,
    }  # fmt: skip
    assert len(read_lines(tmp_path / "disagreements.jsonl")) == summary["num_disagreements"] == 94
    assert sum(row["num_questions"] for row in found["groups"]["discipline"].values()) == 1730
    assert "disagree on 94 responses, listed in disagreements.jsonl" in (tmp_path / "results.md").read_text()


def test_the_published_meta_set(shared, tmp_path):
    cfg = config(candidates__path=str(shared / "mmmu/meta_MMMU_Pro.json"), evaluate__questions_shown=0)
    summary = run_evaluation(cfg, tmp_path)
    assert summary["best_of_n"]["oracle"] == pytest.approx(281 / 414)
    assert summary["num_disagreements"] == 0 and not (tmp_path / "disagreements.jsonl").exists()
    assert 'class="browser"' not in (tmp_path / "report.html").read_text()


# --- What cannot be used.


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
