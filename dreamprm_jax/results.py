"""What a finished training run leaves: weights, diagnostics, test scores, the summary and the report."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from contextlib import closing
from itertools import groupby
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import save_file
from sklearn.metrics import roc_auc_score

from dreamprm_jax import build, report, sharding
from dreamprm_jax.checkpoint import Snapshot
from dreamprm_jax.data import batches
from dreamprm_jax.data.dataset import Dataset, encode_all
from dreamprm_jax.data.example import PLUS
from dreamprm_jax.loading import Model
from dreamprm_jax.metrics import read_metrics, write_json_lines, write_text
from dreamprm_jax.scoring import score_dataset, with_plus_history
from dreamprm_jax.selection import Field, best_of_n, field_of, packed
from dreamprm_jax.step_benchmark import label_accuracy
from dreamprm_jax.types import SUPERVISED, Batch, BilevelState, PyTree
from dreamprm_jax.weighting import Weighting, uniform


def instance_weights(
    cfg: Any, model: Model, data: build.TrainingData, weighting: Weighting, state: BilevelState
) -> list[dict[str, Any]]:
    """The lines of instance_weights.jsonl: every usable training row with its weight and how often it was drawn.

    The weight is the one that would be applied now; a net's is that of the row's last visit, null before the first.
    Where the truth is known, each line has it, and the row's loss under the trained model beside it, null where that is
    not finite.
    """
    num_rows = len(data.train)
    if state.last_weights:
        found = sharding.fetch(model.config.mesh, state.last_weights["rows"])
    else:
        every = Batch(*[None] * 6, example_id=np.arange(num_rows), example_mask=np.ones(num_rows, bool))
        meta_params = sharding.fetch(model.config.mesh, state.meta_params)
        found = np.asarray(weighting.apply(jax.tree.map(jnp.asarray, meta_params), every, {}))
    plan = build.plan_of(cfg, "train", data.train) if cfg.num_steps else None  # a cold start draws none of them
    visits = np.zeros(num_rows, int) if plan is None else batches.count_visits(plan, num_rows)
    lines = []
    for row in data.train.rows.tolist():
        weight = None if np.isnan(found[row]) else found[row]
        lines.append({"example_id": row, "id": data.train.ids[row], "weight": weight, "visits": visits[row]})
    if data.test is None:
        return lines
    losses = training_losses(cfg, model, data.train)
    truth = [{"dataset": row.dataset, "corrupted": row.corrupted} for row in data.train.examples]
    known_losses = [loss if math.isfinite(loss) else None for loss in losses.tolist()]
    return [{**line, **known, "loss": loss} for line, known, loss in zip(lines, truth, known_losses, strict=True)]


def diagnostics(workdir: Path, weights: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What a researcher looks at first, over the logged steps of the weighted phase.

    Shares of steps with an active clip and of meta-gradients that are 0 (relative to |u| |g|), means of |v|, |u| and
    of the cosine to the identity formula where they were logged, and the effective sample size of the final weights,
    (sum w)^2 / sum w^2, as a share of the rows that have one.
    """
    rows = [row for row in read_metrics(workdir) if row["phase"] not in SUPERVISED]
    names = {
        "clip_active": "clip_active_share",
        "example_clip_share": "example_clip_share",
        "zero_share": "zero_share",
        "v_norm": "v_norm",
        "u_norm": "u_norm",
        "identity_cosine": "identity_cosine",
    }
    found = {}
    for name, title in names.items():
        values = [row[name] for row in rows if name in row]
        if values:
            found[title] = float(np.mean(values))
    known = np.array([row["weight"] for row in weights if row["weight"] is not None], np.float64)
    if known.any():
        found["effective_sample_share"] = float(known.sum() ** 2 / np.square(known).sum() / len(known))
    return found


def corruption_auroc(lines: Sequence[dict[str, Any]], field: str = "weight") -> float | None:
    """How well a field of the lines tells corrupted rows (lower) from clean ones (higher; "loss": the other way).

    None where the truth is unknown, or all rows are of one kind.
    """
    lines = [line for line in lines if line[field] is not None]
    truth = [line.get("corrupted") for line in lines]
    if None in truth or len(set(truth)) < 2:
        return None
    corrupted = np.array(truth)
    return float(roc_auc_score(corrupted if field == "loss" else ~corrupted, [line[field] for line in lines]))


def test_lines(cfg: Any, model: Model, data: build.TrainingData) -> list[dict[str, Any]]:
    """The lines of test_scores.jsonl: every candidate of the benchmark's test questions with its scores and the truth.

    `step_labels` and `correct` are the truth, by the picture.
    """
    scores = iter(score_dataset(model, data.test, batch_size=max(64, cfg.meta_batch_size), aggregate=cfg.aggregate))
    lines = []
    for number, question in enumerate(data.questions):
        for answer, correct, labels in zip(question.answers, question.correct, question.step_labels, strict=True):
            found = next(scores)
            lines.append(
                {
                    "question": number,
                    "answer": answer,
                    "correct": correct,
                    "step_labels": labels,
                    "step_scores": found.full,
                    "step_scores_two_token": found.two_token,
                    "score": found.response,
                }
            )
    return lines


def test_figures(lines: Sequence[dict[str, Any]], aggregate: str) -> dict[str, dict[str, float | int]]:
    """What summary.json says of the test: selection by the score, and how well steps are told apart.

    Args:
      lines: of test_scores.jsonl.
      aggregate: how their "score" was made.
    """
    field = field_of_lines(lines)
    scores = packed(field, [line["score"] for line in lines])
    return {"best_of_n": best_of_n(field, scores, aggregate), "steps": step_figures(lines)}


def step_figures(lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    """How well the step scores of test_scores.jsonl's lines tell right steps from wrong ones."""
    is_right = [label == PLUS for line in lines for label in line["step_labels"]]
    return label_accuracy(is_right, np.concatenate([line["step_scores_two_token"] for line in lines]))


def field_of_lines(lines: Sequence[dict[str, Any]]) -> Field:
    """The candidates of test_scores.jsonl's lines, which stand question by question."""
    grouped = [list(group) for _, group in groupby(lines, key=lambda line: line["question"])]
    answers, correct = ([[line[key] for line in group] for group in grouped] for key in ("answer", "correct"))
    return field_of(answers, correct)


def training_losses(cfg: Any, model: Model, train: Dataset) -> np.ndarray:
    """Each training row's loss under the model, [N] in nats."""
    problem = build.prm_problem(cfg, model, uniform().apply, optax.identity())
    mesh = model.config.mesh
    shards, share = sharding.num_row_shards(mesh), sharding.share_of_process(mesh)

    @jax.jit
    def losses_of(params: PyTree, batch: Batch) -> tuple[jax.Array, ...]:
        values = problem.losses(params, batch)[0]
        return sharding.everywhere(mesh, (values, batch.example_id, batch.example_mask))

    found = np.zeros(len(train))
    size = -(-max(64, cfg.batch_size) // shards) * shards
    with closing(batches.ordered_batches(train, size, build.reading(cfg), share)) as stream:
        for batch in stream:
            values, rows, real = jax.device_get(losses_of(model.params, sharding.place_rows(mesh, batch)))
            found[rows[real]] = values[real]
    return found


def pictured(
    cfg: Any, model: Model, train: Dataset, weights: Sequence[dict[str, Any]]
) -> tuple[list[report.Pictured], list[report.Pictured]]:
    """The training rows of highest and of lowest weight, their steps scored as at selection time."""
    highest, lowest = report.extremes(weights)
    rows = [*highest, *lowest]
    if not rows:
        return [], []
    examples = [with_plus_history(train.examples[row]) for row in rows]
    dataset = encode_all(examples, model.tokenizer, train.images, model.config.language.max_positions)
    scores = score_dataset(model, dataset, batch_size=max(64, cfg.meta_batch_size), aggregate=cfg.aggregate)
    found = [
        report.Pictured(train.examples[row], float(weights[row]["weight"]), score.full)
        for row, score in zip(rows, scores, strict=True)
    ]
    return found[: len(highest)], found[len(highest) :]


def finish(
    cfg: Any,
    workdir: Path,
    model: Model,
    data: build.TrainingData,
    snapshot: Snapshot,
    weighting: Weighting,
    estimator: str | None,
    best: dict[str, float],
) -> dict[str, Any]:
    """Evaluates the trained model and writes the run's results; summary.json last, as the mark of the end.

    `best`: what the summary says of the checkpoint that scores, where rows are held out; else {}.
    """
    began = time.perf_counter()
    summary: dict[str, Any] = {
        "recipe": cfg.recipe,
        "weighting": cfg.weighting.name,
        "hypergradient": estimator,
        "num_steps": cfg.num_steps,
        **best,
    }
    skipped = {name: found.skipped for name, found in (("train", data.train), ("meta", data.meta)) if found is not None}
    if any(skipped.values()):
        summary["skipped_rows"] = skipped
    weights, scored, extremes = [], [], ((), ())
    if cfg.num_steps or data.test is not None:
        weights = instance_weights(cfg, model, data, weighting, snapshot.state)
        write_json_lines(workdir / "instance_weights.jsonl", weights)
    if cfg.num_steps:
        fetched = build.trimmed(sharding.fetch(model.config.mesh, snapshot.state.meta_params), len(data.train))
        meta_params = {name: np.ascontiguousarray(leaf) for name, leaf in fetched.items()}
        save_file(meta_params, workdir / "meta_params.safetensors")
        auroc = corruption_auroc(weights) if estimator is not None else None
        summary |= {} if auroc is None else {"auroc": auroc}
        summary["diagnostics"] = diagnostics(workdir, weights)
    if data.test is not None:
        scored = test_lines(cfg, model, data)
        write_json_lines(workdir / "test_scores.jsonl", scored)
        summary |= test_figures(scored, cfg.aggregate)
        loss_auroc = corruption_auroc(weights, "loss")
        summary["steps"] |= {} if loss_auroc is None else {"loss_auroc": loss_auroc}
        extremes = pictured(cfg, model, data.train, weights)
    summary["seconds"] = snapshot.progress["seconds"] + time.perf_counter() - began
    domains = [data.train.domains[line["example_id"]] for line in weights]
    config = cfg.to_json_best_effort(indent=2)
    report.write_report(workdir, summary, weights, domains, config, scored=scored, pictured=extremes)
    write_text(workdir / "summary.json", json.dumps(summary, indent=2))
    return summary
