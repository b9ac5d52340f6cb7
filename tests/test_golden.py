"""The published code's recorded figures, from real rows, images and tokens."""

import json

import numpy as np
import pytest

from configs import score, table
from dreamprm_jax.experiment import run_training
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
