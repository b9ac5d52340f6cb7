"""From raw downloads to training without a script: prepare two sets, train on them."""

import json
import random

import jax
import numpy as np
import pytest
import tokenizers
from PIL import Image

from benchmarks.raw_rows import visualprm_raw_row
from configs import prepare as prepare_config
from configs import score, table
from dreamprm_jax import build
from dreamprm_jax.data.conversation import CONTROL_TOKENS
from dreamprm_jax.data.prepared import PreparedExamples
from dreamprm_jax.experiment import run_training
from dreamprm_jax.loading import load_model
from dreamprm_jax.models import convert, internvl, presets
from dreamprm_jax.prepare import run_prepare
from dreamprm_jax.scoring import run_scoring


def word_tokenizer():
    """Every word but the labels is one token: rows of real prompts stay short."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"word": 0, "+": 1, "-": 2}, unk_token="word"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(CONTROL_TOKENS))
    return tokenizer


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    """Raw files of both data sets as they are downloaded, and a checkpoint."""
    folder = tmp_path_factory.mktemp("downloads")
    rng = random.Random(0)
    for name in ("VisualPRM/images", "VisualPRM/annotations", "MMMU"):
        (folder / name).mkdir(parents=True)
    for number in range(4):
        Image.new("RGB", (30 + 20 * number, 28), (number, 9, 9)).save(folder / f"VisualPRM/images/{number}.png")
    Image.new("P", (40, 40), 3).save(folder / "MMMU/q.png")
    Image.new("RGB", (40, 40), (1, 2, 3)).save(folder / "MMMU/other.png")
    for name in ("ai2d_extracted", "geometry3k_extracted"):
        rows = [visualprm_raw_row(rng, f"images/{n % 4}.png") for n in range(12)]
        write_lines(folder / f"VisualPRM/annotations/{name}.jsonl", [*rows, {"image": None}])
    question = {"options": ["red", "blue"], "answer": "B", "image_1": "q.png", "question_type": "multiple-choice"}
    ids = ["test_Art_1", "test_Art_2", "validation_Art_3"]
    write_lines(folder / "MMMU/questions.jsonl", [
        {**question, "id": name, "question": f"<image 1> What colour is number {name}?"} for name in ids])  # fmt: skip
    answers = [f"[Reasoning]\n1. Look.\n2. It is so.\n\nAnswer: {letter}" for letter in "AB"]
    write_lines(folder / "MMMU/responses.jsonl", [{"id": name, "response": a} for name in ids for a in answers])
    write_lines(
        folder / "MMMU/validation.jsonl",
        [{**question, "id": ids[2], "image_1": "other.png", "question": "<image 1> Hm?"}],
    )
    tokenizer = word_tokenizer()
    config = presets.tiny(tokenizer.get_vocab_size())
    convert.save_checkpoint(config, internvl.init(config, jax.random.key(0, impl="rbg")), folder / "model", "original")
    tokenizer.save(str(folder / "model/tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def prepared(downloads):
    """The prepared sets' directories: training, meta."""
    found = []
    for builder, options in (
        ("visualprm400k", {"source": "VisualPRM/annotations", "images": "VisualPRM", "balance": "source",
                           "sample": 16}),
        ("mmmu_pro", {"source": "MMMU/questions.jsonl", "responses": "MMMU/responses.jsonl", "images": "MMMU",
                      "exclude": "MMMU/validation.jsonl"}),
    ):  # fmt: skip
        cfg = prepare_config.get_config(builder)
        cfg.data.max_bad_share, cfg.prepare.processes = 0.1, 1
        for name, value in options.items():
            cfg.prepare[name] = str(downloads / value) if isinstance(value, str) and name != "balance" else value
        cfg.prepare.output = str(downloads / "data")
        found.append(run_prepare(cfg, downloads / "work")["directory"])
    return found


def training_config(downloads, prepared):
    cfg = table.get_config("corrected")
    cfg.data.source, cfg.soft_labels = "files", True
    cfg.model.checkpoint = str(downloads / "model")
    cfg.train.path, cfg.meta.path = prepared
    cfg.pretrain.num_steps = cfg.cold_start.num_steps = 0
    cfg.num_steps, cfg.batch_size, cfg.meta_batch_size, cfg.data.max_shapes = 2, 2, 2, 2
    return cfg


def test_the_meta_set_has_the_judged_responses_of_questions_outside_the_test_set(prepared):
    rows = [PreparedExamples(prepared[1])[row] for row in range(4)]
    assert len(PreparedExamples(prepared[1])) == 4
    assert sorted(row.true_false for row in rows) == [False, False, True, True]
    assert {row.turns[-2].text for row in rows} == {"Answer: A", "Answer: B"}


def test_prepared_sets_train_a_model(downloads, prepared, capsys):
    summary = run_training(training_config(downloads, prepared), downloads / "run")
    assert summary["num_steps"] == 2
    lines = [json.loads(line) for line in (downloads / "run/instance_weights.jsonl").read_text().splitlines()]
    assert len(lines) == 16
    assert sum(line["visits"] for line in lines) == 4
    assert len({line["id"] for line in lines}) == 16
    record = json.loads((downloads / "run/config.json").read_text())
    assert set(record["data"]) == {*prepared, str(downloads / "model")}
    assert "train: 16 rows, " in capsys.readouterr().err


def test_soft_labels_reach_the_loss(downloads, prepared):
    """The loss of a step that half the rollouts get right is the mean of the losses of both labels."""
    cfg = training_config(downloads, prepared)
    model = load_model(cfg.model, 0)
    train = build.training_data(cfg, model).train
    batch = next(build.stream_of(cfg, "train", train)(0))
    for slot, row in enumerate(batch.example_id):
        labels = PreparedExamples(prepared[0])[int(row)].soft_labels
        np.testing.assert_allclose(batch.soft_labels[slot, : len(labels)], labels)
    losses = jax.jit(build.prm_problem(cfg, model, None, None).losses)

    def loss_at(label):
        return losses(model.params, batch._replace(soft_labels=np.full_like(batch.soft_labels, label)))[0]

    np.testing.assert_allclose(loss_at(0.5), (loss_at(0.0) + loss_at(1.0)) / 2, rtol=1e-5)
    plus = batch._replace(soft_labels=None, labels=np.full_like(batch.labels, model.tokenizer.plus_id))
    np.testing.assert_allclose(losses(model.params, plus)[0], loss_at(1.0), rtol=1e-5)


def test_a_prepared_set_is_scored(downloads, prepared):
    cfg = score.get_config()
    cfg.model.checkpoint, cfg.input.path = str(downloads / "model"), prepared[1]
    result = run_scoring(cfg, downloads / "scores")
    assert result["num_chains"] == 4
