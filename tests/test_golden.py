"""The published code's recorded figures, from real rows, images and tokens."""

import json

import numpy as np
import pytest

from configs import cold_start, score, table
from dreamprm_jax.experiment import run_training
from dreamprm_jax.loading import load_workdir
from dreamprm_jax.models import convert
from dreamprm_jax.scoring import run_scoring


def model_of(cfg, seed0_checkpoint, shared):
    cfg.model.checkpoint, cfg.model.tokenizer = str(seed0_checkpoint), str(shared / "tokenizer")
    cfg.images.max_tiles = 6


@pytest.mark.parametrize("batch_size", [1, 12])
def test_scores_are_the_recorded_ones(shared, seed0_checkpoint, tmp_path, batch_size):
    cfg = score.get_config()
    model_of(cfg, seed0_checkpoint, shared)
    cfg.input.path, cfg.input.images = str(shared / "golden/meta_rows.json"), str(shared / "mmmu/images")
    cfg.batch_size = batch_size
    run_scoring(cfg, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    recorded = json.loads((shared / "golden/scores.json").read_text())
    assert len(lines) == len(recorded) == 12
    for line, known in zip(lines, recorded, strict=True):
        assert (line["num_tiles"], line["num_tokens"]) == (known["n_tiles"], known["n_tokens"])
        assert line["true_false"] == known["true_false"]
        np.testing.assert_allclose(line["step_scores"], known["p_plus"], rtol=1e-4)
        odds = np.subtract(known["logit_plus"], known["logit_minus"])
        np.testing.assert_allclose(line["step_scores_two_token"], 1 / (1 + np.exp(-odds)), rtol=1e-4)
        np.testing.assert_allclose(line["score"], known["mean"], rtol=1e-4)
        plus, two_token = np.array(line["step_scores"]), np.array(line["step_scores_two_token"])
        minus = plus * (1 - two_token) / two_token
        np.testing.assert_allclose(minus, known["p_minus"], rtol=1e-4)
        outcome = plus if line["true_false"] else minus  # the meta loss's reading: "-" at every step of a wrong answer
        np.testing.assert_allclose(outcome.mean(), known["mean_negative"], rtol=1e-4)
        np.testing.assert_allclose(-np.log(plus).mean(), known["loss"], rtol=1e-4)  # every recorded label is "+"


def test_training_on_real_rows_replays_the_recorded_order_and_first_loss(shared, seed0_checkpoint, tmp_path):
    """The first loss is taken before any update, so every recipe must give the recorded one."""
    recorded = json.loads((shared / "golden/train_table.json").read_text())
    cfg = table.get_config()
    model_of(cfg, seed0_checkpoint, shared)
    for level in ("train", "meta"):
        order = tmp_path / f"{level}_order.json"
        order.write_text(json.dumps(recorded[f"{level}_order"]))
        cfg[level].path, cfg[level].images = str(shared / f"golden/{level}_rows.json"), str(shared / "mmmu/images")
        cfg[level].order = str(order)
    cfg.batch_size = cfg.meta_batch_size = 1
    cfg.cold_start.num_steps, cfg.num_steps = 0, 1
    summary = run_training(cfg, tmp_path / "work")
    (line,) = [json.loads(line) for line in (tmp_path / "work/metrics.jsonl").read_text().splitlines()]
    assert line["example_ids"] == recorded["train_order"][:1]
    np.testing.assert_allclose(line["inner_loss"], recorded["lower"][0]["loss"], rtol=1e-4)
    assert 0 < line["meta_grad_norm"] < np.inf
    assert summary["num_steps"] == 1
    lines = (tmp_path / "work/instance_weights.jsonl").read_text().splitlines()
    weights = [json.loads(line)["weight"] for line in lines]
    moved = recorded["train_order"][0]
    assert [row for row, weight in enumerate(weights) if weight != 1.0] == [moved]


# The published recipe against the published code, iteration by iteration: float32, lr 5e-4 (table 0.05), 12 iterations.


def published_run(get_config, recorded, seed0_checkpoint, shared, workdir):
    cfg = get_config("internvl3_1b,published")
    model_of(cfg, seed0_checkpoint, shared)
    cfg.model.compute_dtype = cfg.model.param_dtype = "float32"
    cfg.model.remat, cfg.model.matmul_precision = "none", "highest"
    for level in ("train", "meta"):
        cfg[level].path, cfg[level].images = str(shared / f"golden/{level}_rows.json"), str(shared / "mmmu/images")
        if recorded[f"{level}_order"]:
            order = workdir.parent / f"{workdir.name}_{level}_order.json"
            order.write_text(json.dumps(recorded[f"{level}_order"]))
            cfg[level].order = str(order)
    cfg.inner.lr = cfg.cold_start.lr = recorded["args"]["lr"]
    cfg.cold_start.weight_decay = recorded["args"]["weight_decay"]
    cfg.outer.lr, cfg.log_meta_grad = recorded["args"]["meta_lr"], True
    if get_config is table.get_config:
        cfg.num_steps = 12
    else:
        cfg.cold_start.num_steps = 12
    run_training(cfg, workdir)
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def assert_norms(workdir, recorded):
    config, params = load_workdir(workdir)
    tensors = convert.to_tensors(config, params, "original")
    assert set(tensors) == set(recorded["param_norms_after"])
    for name, (norm, _) in recorded["param_norms_after"].items():
        np.testing.assert_allclose(np.linalg.norm(np.asarray(tensors[name], np.float64)), norm, rtol=1e-4, err_msg=name)


def close(actual, recorded):
    np.testing.assert_allclose(actual, recorded, rtol=1e-4, atol=1e-5)


def test_the_published_cold_start_is_the_recorded_one(shared, seed0_checkpoint, tmp_path):
    recorded = json.loads((shared / "golden/train_cold_start.json").read_text())
    lines = published_run(cold_start.get_config, recorded, seed0_checkpoint, shared, tmp_path / "run")
    close([line["inner_loss"] for line in lines], [step["loss"] for step in recorded["lower"]])
    close([line["lr"] for line in lines], [step["lr"] for step in recorded["lower"]])
    np.testing.assert_allclose([line["grad_norm"] for line in lines], recorded["lower_grad_norm"], rtol=1e-4)
    assert_norms(tmp_path / "run", recorded)


def test_the_published_table_run_is_the_recorded_one(shared, seed0_checkpoint, tmp_path):
    recorded = json.loads((shared / "golden/train_table.json").read_text())
    lines = published_run(table.get_config, recorded, seed0_checkpoint, shared, tmp_path / "run")
    column = {int(row): position for row, position in recorded["index"].items()}  # ids sorted as strings
    steps = recorded["lower"][::3]  # the step itself, then the loss at +eps and -eps
    assert [line["example_ids"] for line in lines] == [[int(step["id"])] for step in steps]
    close([line["inner_loss"] for line in lines], [step["loss"] for step in steps])
    close([line["lr"] for line in lines], [step["lr"] for step in steps])
    np.testing.assert_allclose([line["grad_norm"] for line in lines], recorded["lower_grad_norm"], rtol=1e-4)
    for line, upper in zip(lines, recorded["upper"], strict=True):
        (row,) = line["example_ids"]
        close(line["meta_loss"], upper["loss"])
        close(line["meta_prediction"], upper["prediction"])
        close(line["meta_lr"], upper["lr"])
        close(line["instance_weights"], [upper["raw_weights_before"][column[row]]])
        meta_grad = np.zeros(12)
        meta_grad[column[row]] = line["meta_grad"][str(row)]
        (known,) = upper["meta_grad"]
        assert np.linalg.norm(meta_grad - known) <= 1e-3 * np.linalg.norm(known)
    weights = [
        json.loads(line)["weight"] for line in (tmp_path / "run/instance_weights.jsonl").read_text().splitlines()
    ]
    close([weights[row] for row in column], [recorded["raw_weights_after"][column[row]] for row in column])
    assert_norms(tmp_path / "run", recorded)
