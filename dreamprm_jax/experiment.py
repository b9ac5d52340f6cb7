"""A training run from its config to its report: cold start, weighted training, best-of-N, files."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from sklearn.metrics import roc_auc_score

from dreamprm_jax import bilevel, build
from dreamprm_jax.checkpoint import Checkpoints, Model, Snapshot, claim_workdir, load_model, save_model_card
from dreamprm_jax.data import batches
from dreamprm_jax.evaluate import Candidates, best_of_n
from dreamprm_jax.metrics import MetricsWriter, write_json_lines, write_text
from dreamprm_jax.report import write_report
from dreamprm_jax.scoring import score_dataset
from dreamprm_jax.train import Cadence, Phase, run_phase
from dreamprm_jax.weighting import Weighting


def run_training(cfg: Any, workdir: Path) -> dict[str, Any]:
    """`task=train`: runs, resumes, or reports a finished run; returns the summary.

    All rows are read and checked before the workdir is touched and before anything is compiled.

    Raises:
      InputError: a user's mistake, see the rooms that read.
    """
    model = load_model(cfg.model, cfg.seed)
    data = build.training_data(cfg, model)
    weighting = build.instance_weighting(cfg, len(data.train))
    run = phases(cfg, model, data, weighting)
    claim_workdir(workdir, build.record(cfg))
    summary_path = workdir / "summary.json"
    if summary_path.is_file():
        print(f"{workdir} is finished; its summary:")
        return json.loads(summary_path.read_text(encoding="utf-8"))
    save_model_card(workdir, model.config, model.tokenizer)
    snapshot = train(cfg, workdir, model, run, weighting)
    model = model._replace(params=snapshot.state.train.params)
    return finish(cfg, workdir, model, data, snapshot)


def phases(cfg: Any, model: Model, data: build.TrainingData, weighting: Weighting) -> list[tuple[Phase, Any]]:
    """The run's phases, in order, each with the optimizer of its inner level."""
    levels = build.levels(cfg)
    found = []
    if cfg.cold_start.num_steps:
        problem = build.prm_problem(cfg, model, _unit_weights, levels.cold_tx)
        step = build.plain_step(problem, levels.cold_rate, cfg.inner.clip_norm)
        rows = build.rows_of(cfg, "cold_start", data.cold_start)
        stream = iter(batches.training_batches(data.cold_start, rows))
        found.append((Phase("cold_start", 0, cfg.cold_start.num_steps, step, (stream,)), levels.cold_tx))
    if cfg.num_steps:
        problem = build.prm_problem(cfg, model, weighting.apply, levels.inner_tx)
        streams = [iter(batches.training_batches(data.train, build.rows_of(cfg, "train", data.train)))]
        if cfg.weighting.name == "uniform":
            name, step = "uniform", build.plain_step(problem, levels.inner_rate, cfg.inner.clip_norm)
        else:
            name, step = "bilevel", build.weighted_step(cfg, problem, levels, weighting)
            streams.append(iter(batches.training_batches(data.meta, build.rows_of(cfg, "meta", data.meta))))
        found.append((Phase(name, cfg.cold_start.num_steps, cfg.num_steps, step, tuple(streams)), levels.inner_tx))
    return found


def _unit_weights(meta_params: Any, batch: Any, outputs: Any) -> float:
    return 1.0


def train(cfg: Any, workdir: Path, model: Model, run: list[tuple[Phase, Any]], weighting: Weighting) -> Snapshot:
    """Runs all phases, from the newest checkpoint where there is one.

    1. No checkpoint: start the first phase.
    2. A checkpoint inside a phase: go on there, each data stream where it stood.
    3. A checkpoint at a phase's end: start the next phase from its parameters, inner optimizer fresh.
    """
    levels = build.levels(cfg)
    state = bilevel.init_state(levels.inner_tx, levels.meta_tx, weighting, model.params)
    with closing(Checkpoints(workdir, cfg.checkpoints_to_keep)) as checkpoints:
        fresh = Snapshot(state, {"phase": None, "seconds": 0.0})
        snapshot = checkpoints.restore_latest(fresh) or fresh
        reached = [phase.name for phase, _ in run].index(snapshot.progress["phase"]) if snapshot is not fresh else -1
        first_step = run[reached][0].first_step + snapshot.progress["next_step"] if reached >= 0 else 0
        num_steps = sum(phase.num_steps for phase, _ in run)
        with closing(MetricsWriter(workdir, first_step, num_steps)) as writer:
            for position, (phase, inner_tx) in enumerate(run):
                if position > reached:
                    snapshot = _begin(phase, inner_tx, snapshot)
                if position >= reached:
                    cadence = Cadence(cfg.log_every, cfg.checkpoint_every)
                    snapshot = run_phase(phase, snapshot, writer, checkpoints, cadence)
    return snapshot


def _begin(phase: Phase, inner_tx: Any, snapshot: Snapshot) -> Snapshot:
    train_state = bilevel.init_train_state(inner_tx, snapshot.state.train.params)
    streams = [stream.get_state() for stream in phase.streams]
    progress = {**snapshot.progress, "phase": phase.name, "next_step": 0, "streams": streams}
    return Snapshot(snapshot.state._replace(train=train_state), progress)


def instance_weights(cfg: Any, data: build.TrainingData, meta_params: Any) -> list[dict[str, Any]]:
    """The lines of instance_weights.jsonl: every training row with its weight and how often it was drawn."""
    table = np.asarray(meta_params["table"])
    visits = batches.count_visits(build.rows_of(cfg, "train", data.train), cfg.num_steps, len(data.train))
    lines = []
    for row, example in enumerate(data.train.examples):
        line = {"example_id": row, "id": example.id, "weight": table[row], "visits": visits[row]}
        lines.append(line if example.corrupted is None else {**line, "corrupted": example.corrupted})
    return lines


def corruption_auroc(weights: Sequence[dict[str, Any]]) -> float | None:
    """How well the weights tell clean rows (higher) from corrupted ones; None where the truth is unknown."""
    truth = [row.get("corrupted") for row in weights]
    if None in truth or len(set(truth)) < 2:
        return None
    return float(roc_auc_score(~np.array(truth), [row["weight"] for row in weights]))


def test_best_of_n(cfg: Any, model: Model, data: build.TrainingData) -> dict[str, float | int]:
    """Scores the benchmark's test candidates and selects by them."""
    scores = iter(score_dataset(model, data.test, batch_size=cfg.meta_batch_size, aggregate=cfg.aggregate))
    questions = [
        Candidates(question.answers, question.correct, tuple(next(scores).response for _ in question.examples))
        for question in data.questions
    ]
    return best_of_n(questions)


def finish(
    cfg: Any,
    workdir: Path,
    model: Model,
    data: build.TrainingData,
    snapshot: Snapshot,
) -> dict[str, Any]:
    """Evaluates the trained model and writes the run's results; summary.json last, as the mark of the end."""
    began = time.perf_counter()
    summary: dict[str, Any] = {
        "recipe": cfg.recipe,
        "weighting": cfg.weighting.name,
        "hypergradient": cfg.hypergradient,
        "num_steps": cfg.num_steps,
    }
    weights = []
    if cfg.weighting.name == "table" and cfg.num_steps:
        weights = instance_weights(cfg, data, snapshot.state.meta_params)
        write_json_lines(workdir / "instance_weights.jsonl", weights)
        meta_params = {name: np.ascontiguousarray(leaf) for name, leaf in snapshot.state.meta_params.items()}
        save_file(meta_params, workdir / "meta_params.safetensors")
        auroc = corruption_auroc(weights)
        summary |= {} if auroc is None else {"auroc": auroc}
    if data.test is not None:
        summary["best_of_n"] = test_best_of_n(cfg, model, data)
    summary["seconds"] = snapshot.progress["seconds"] + time.perf_counter() - began
    domains = [example.dataset for example in data.train.examples] if weights else []
    write_report(workdir, summary, weights, domains, cfg.to_json_best_effort(indent=2))
    write_text(workdir / "summary.json", json.dumps(summary, indent=2))
    return summary
