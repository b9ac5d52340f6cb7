"""Prepared sets of real rows, whole: the published meta set, GPT-4o's answers to MMMU-Pro, VisualProcessBench's sample.

Texts, answers and outcomes are real. Of the images only a few are at hand; the others are single-coloured stand-ins
under the names that the rows use.
"""

import collections
import json
import re

import pytest
from PIL import Image

from configs import prepare as prepare_config
from dreamprm_jax.data.example import GPT, HUMAN
from dreamprm_jax.data.prepared import PreparedExamples, PreparedQuestions
from dreamprm_jax.data.splitting import split_steps
from dreamprm_jax.prepare import run_prepare

RUNS = tuple(f"gpt-4o_{run}" for run in ("standard_10_options__cot", "standard_10_options__direct", "vision_cot",
                                         "vision_direct"))  # fmt: skip


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_responses(path, rows, outcome):
    write_lines(path, [{name: row[name] for name in ("id", "response", outcome)} for row in rows])


def stand_in(path, number):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (number % 256, number // 256, 77)).save(path)


def prepared(folder, builder, recipe="", **options):
    cfg = prepare_config.get_config(builder + recipe)
    cfg.prepare.output, cfg.prepare.processes, cfg.data.on_error = str(folder / f"data{recipe[1:]}"), 1, "raise"
    for name, value in options.items():
        cfg.prepare[name] = str(value)
    return run_prepare(cfg, folder)


def number_images(row, folder, number):
    """The row with an image field for each image that its text or options name, and those images."""
    for image in sorted(set(re.findall(r"<image (\d)>", row["question"] + row["options"]))) or ["1"]:
        row = {**row, f"image_{image}": f"{row['id']}_{image}.png"}
        stand_in(folder / row[f"image_{image}"], number)
    return row


@pytest.fixture(scope="module")
def questions(shared, tmp_path_factory):
    """A folder with MMMU-Pro's 1,730 questions as a question file, with stand-ins for their images."""
    folder = tmp_path_factory.mktemp("mmmu_pro")
    rows = read_lines(shared / f"mmmu/gpt4o/{RUNS[0]}.jsonl")
    fields = ("id", "question", "options", "answer", "subject", "topic_difficulty", "img_type")
    kept = [{name: row[name] for name in fields} for row in rows]
    write_lines(folder / "questions.jsonl", [number_images(row, folder, n) for n, row in enumerate(kept)])
    return folder


def test_gpt4os_answers_become_meta_rows(shared, questions):
    """Four runs of 1,730 answers; what is wrong in the record of each run is as wrong here."""
    given = [row for run in RUNS for row in read_lines(shared / f"mmmu/gpt4o/{run}.jsonl")]
    write_responses(questions / "responses.jsonl", given, "if_right")
    options = {"source": questions / "questions.jsonl", "responses": questions / "responses.jsonl", "images": questions}
    summary = prepared(questions, "mmmu_pro", **options)
    found = list(PreparedExamples(summary["directory"]))
    assert summary["read"] == summary["kept"] == len(found) == 6920
    for row, example in zip(given, found, strict=True):
        steps = tuple(turn.text for turn in example.turns if turn.role == HUMAN)[1:]
        assert (example.id, steps) == (row["id"], split_steps(row["response"], "whole_numbers"))
        assert example.true_false == row["if_right"]


def test_mmmus_validation_questions_keep_their_candidates_and_stay_out_of_the_meta_set(shared, questions):
    validation = [row for row in read_lines(questions / "questions.jsonl") if row["id"].startswith("validation_")]
    write_lines(questions / "validation.jsonl", validation)
    given = [row for run in RUNS for row in read_lines(shared / f"mmmu/gpt4o/{run}.jsonl")]
    right = collections.Counter(row["id"] for row in given if row["if_right"])
    write_responses(questions / "answers.jsonl", given, "if_right")
    options = {"responses": questions / "answers.jsonl", "images": questions}
    summary = prepared(questions, "mmmu", source=questions / "validation.jsonl", **options)
    test_set = list(PreparedQuestions(summary["directory"]))
    assert len(test_set) == len(validation) == 577
    assert all(len(question.candidates) == 4 for question in test_set)
    assert [sum(question.true_false) for question in test_set] == [right[question.id] for question in test_set]
    cfg = {"exclude": summary["directory"], "output": questions / "meta"}
    meta = prepared(questions, "mmmu_pro", source=questions / "questions.jsonl", **options, **cfg)
    rows = [example.id for example in PreparedExamples(meta["directory"])]
    assert rows
    assert not any(name.startswith("validation_") for name in rows)
    excluded = sum(count for kind, count in meta["dropped"].items() if kind.startswith("excluded"))
    assert excluded >= 4 * 577
    assert meta["kept"] + sum(meta["dropped"].values()) == 6920


def test_the_published_meta_rows_come_back(shared, tmp_path):
    """The published splitter gives the stored steps of all 1,656 from their responses."""
    rows = json.loads((shared / "mmmu/meta_MMMU_Pro.json").read_text())
    asked = {row["id"]: {"id": row["id"], "question": "<image 1> Which?", "options": "['a', 'b', 'c', 'd', 'e']",
                         "answer": "A"} for row in rows}  # fmt: skip
    write_lines(tmp_path / "questions.jsonl", [number_images(row, tmp_path, n) for n, row in enumerate(asked.values())])
    write_responses(tmp_path / "responses.jsonl", rows, "true_false")
    options = {"source": tmp_path / "questions.jsonl", "responses": tmp_path / "responses.jsonl", "images": tmp_path}
    summary = prepared(tmp_path, "mmmu_pro", ",published", **options)
    assert summary["kept"] == 1656
    for row, example in zip(rows, PreparedExamples(summary["directory"]), strict=True):
        steps = [turn["value"] for turn in row["conversations"] if turn["from"] == "human"][1:]
        assert [turn.text for turn in example.turns if turn.role == HUMAN][1:] == steps
        assert (example.id, example.true_false) == (row["id"], row["true_false"])


def test_visualprocessbenchs_sample_keeps_the_truth_of_its_steps(shared, tmp_path):
    rows = read_lines(shared / "mmmu/visualprocessbench_sample.jsonl")
    for number, row in enumerate(rows):
        for name in row["image"]:
            stand_in(tmp_path / name, number)
    source = shared / "mmmu/visualprocessbench_sample.jsonl"
    summary = prepared(tmp_path, "visualprocessbench", source=source, images=tmp_path)
    found = list(PreparedExamples(summary["directory"]))
    assert [example.step_truth for example in found] == [tuple(row["response"]["process_correctness"]) for row in rows]
    assert [example.dataset for example in found] == [row["data_source"] for row in rows]
    truth = collections.Counter(step for example in found for step in example.step_truth)
    assert truth == {1: 49, -1: 17, 0: 9}
    assert all(turn.text == "+" for example in found for turn in example.turns if turn.role == GPT)
