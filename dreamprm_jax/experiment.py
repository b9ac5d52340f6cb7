"""A training run from its config to its report: cold start, weighted training, best-of-N, files."""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from sklearn.metrics import roc_auc_score

from dreamprm_jax import bilevel, build, steps
from dreamprm_jax.checkpoint import Checkpoints, Model, Snapshot, claim_workdir, load_model, save_model_card
from dreamprm_jax.data import batches
from dreamprm_jax.evaluate import Candidates, best_of_n
from dreamprm_jax.hypergradient import EXACT
from dreamprm_jax.inner import Problem
from dreamprm_jax.metrics import MetricsWriter, read_metrics, write_json_lines, write_text
from dreamprm_jax.optimizers import derivative_vanishes
from dreamprm_jax.report import write_report
from dreamprm_jax.scoring import score_dataset
from dreamprm_jax.train import Cadence, Phase, run_phase
from dreamprm_jax.types import Batch, BilevelState
from dreamprm_jax.weighting import Weighting, uniform


def run_training(cfg: Any, workdir: Path) -> dict[str, Any]:
    """`task=train`: runs, resumes, or reports a finished run; returns the summary.

    All rows are read and checked before the workdir is touched and before anything is compiled.

    Raises:
      InputError: a user's mistake, see the rooms that read.
    """
    model = load_model(cfg.model, cfg.seed)
    data = build.training_data(cfg, model)
    weighting, levels = build.instance_weighting(cfg, data.train, model), steps.levels(cfg)
    problem = build.prm_problem(cfg, model, weighting.apply, levels.inner_tx)
    estimator = resolve(cfg, problem, model) if cfg.num_steps and cfg.weighting.name != "uniform" else None
    run = phases(cfg, model, data, weighting, levels, problem, estimator)
    claim_workdir(workdir, build.record(cfg))
    summary_path = workdir / "summary.json"
    if summary_path.is_file():
        print(f"{workdir} is finished; its summary:")
        return json.loads(summary_path.read_text(encoding="utf-8"))
    save_model_card(workdir, model.config, model.tokenizer)
    num_remembered = len(data.train) if cfg.weighting.name == "net" else 0
    state = bilevel.init_state(levels.inner_tx, levels.meta_tx, weighting, model.params, num_remembered)
    snapshot = train(cfg, workdir, run, state)
    model = model._replace(params=bilevel.scoring_params(snapshot.state))
    return finish(cfg, workdir, model, data, snapshot, weighting, estimator)


def resolve(cfg: Any, problem: Problem, model: Model) -> str:
    """The estimator of the run, told on stderr; warns where its optimizer hides the weights from the meta loss."""
    estimator = steps.resolve_estimator(cfg, problem, forward_mode=model.config.attention == "xla")
    print(f"meta-gradient: {estimator} (--config.hypergradient={cfg.hypergradient})", file=sys.stderr)
    if (
        cfg.inner.lr
        and estimator in EXACT
        and derivative_vanishes(problem.inner_tx, model.params, min(4, cfg.num_steps))
    ):
        warnings.warn(
            "the inner optimizer's step does not depend on its gradient in every step: the exact meta-gradient is 0 "
            "there (sign-type and accumulating optimizers)",
            stacklevel=2,
        )
    return estimator


def phases(
    cfg: Any,
    model: Model,
    data: build.TrainingData,
    weighting: Weighting,
    levels: steps.Levels,
    problem: Problem,
    estimator: str | None,
) -> list[tuple[Phase, Any]]:
    """The run's phases, in order, each with the optimizer of its inner level."""
    found = []
    if cfg.cold_start.num_steps:
        plain = problem._replace(
            weights=uniform().apply,
            inner_tx=levels.cold_tx,
            num_inner_steps=1,
            detached=True,
            example_clip_norm=None,
        )
        step = steps.plain_step(plain, levels.cold_rate, cfg.cold_start.clip_norm, cfg.ema_decay)
        rows = build.rows_of(cfg, "cold_start", data.cold_start)
        stream = iter(batches.training_batches(data.cold_start, rows))
        found.append((Phase("cold_start", 0, cfg.cold_start.num_steps, step, (stream,)), levels.cold_tx))
    if cfg.num_steps:
        rows = build.rows_of(cfg, "train", data.train)
        streams = [iter(batches.training_batches(data.train, rows, cfg.num_inner_steps))]
        if estimator is None:
            clip_norm = steps.clip_of_weighted(cfg)
            name, step = "uniform", steps.plain_step(problem, levels.inner_rate, clip_norm, cfg.ema_decay)
        else:
            name, step = "bilevel", steps.weighted_step(cfg, problem, estimator, levels, weighting)
            streams.append(iter(batches.training_batches(data.meta, build.rows_of(cfg, "meta", data.meta))))
        found.append((Phase(name, cfg.cold_start.num_steps, cfg.num_steps, step, tuple(streams)), levels.inner_tx))
    return found


def train(cfg: Any, workdir: Path, run: list[tuple[Phase, Any]], state: BilevelState) -> Snapshot:
    """Runs all phases, from the newest checkpoint where there is one.

    1. No checkpoint: start the first phase at `state`.
    2. A checkpoint inside a phase: go on there, each data stream where it stood.
    3. A checkpoint at a phase's end: start the next phase from its parameters, inner optimizer fresh.
    """
    if cfg.ema_decay is not None:
        state = bilevel.with_ema(state)
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
    state = snapshot.state._replace(train=train_state)
    return Snapshot(bilevel.with_ema(state) if state.ema else state, progress)


def instance_weights(
    cfg: Any, data: build.TrainingData, weighting: Weighting, state: BilevelState
) -> list[dict[str, Any]]:
    """The lines of instance_weights.jsonl: every training row with its weight and how often it was drawn.

    The weight is the one that would be applied now; a net's is that of the row's last visit, null before the first.
    """
    num_rows = len(data.train)
    if cfg.weighting.name == "net":
        found = np.asarray(state.last_weights["rows"])
    else:
        every = Batch(*[None] * 6, example_id=np.arange(num_rows), example_mask=np.ones(num_rows, bool))
        found = np.asarray(weighting.apply(state.meta_params, every, {}))
    visits = batches.count_visits(build.rows_of(cfg, "train", data.train), cfg.num_steps, num_rows)
    lines = []
    for row, example in enumerate(data.train.examples):
        weight = None if np.isnan(found[row]) else found[row]
        line = {"example_id": row, "id": example.id, "weight": weight, "visits": visits[row]}
        lines.append(line if example.corrupted is None else {**line, "corrupted": example.corrupted})
    return lines


def diagnostics(workdir: Path, weights: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What a researcher looks at first, over the logged steps of the weighted phase.

    Shares of steps with an active clip and of meta-gradients that are 0 (relative to |u| |g|), means of |v|, |u| and
    of the cosine to the identity formula where they were logged, and the effective sample size of the final weights,
    (sum w)^2 / sum w^2, as a share of the rows that have one.
    """
    rows = [row for row in read_metrics(workdir) if row["phase"] != "cold_start"]
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


def corruption_auroc(weights: Sequence[dict[str, Any]]) -> float | None:
    """How well the weights tell clean rows (higher) from corrupted ones; None where the truth is unknown."""
    weights = [row for row in weights if row["weight"] is not None]
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
    weighting: Weighting,
    estimator: str | None,
) -> dict[str, Any]:
    """Evaluates the trained model and writes the run's results; summary.json last, as the mark of the end."""
    began = time.perf_counter()
    summary: dict[str, Any] = {
        "recipe": cfg.recipe,
        "weighting": cfg.weighting.name,
        "hypergradient": estimator,
        "num_steps": cfg.num_steps,
    }
    weights = []
    if cfg.num_steps:
        weights = instance_weights(cfg, data, weighting, snapshot.state)
        write_json_lines(workdir / "instance_weights.jsonl", weights)
        meta_params = {name: np.ascontiguousarray(leaf) for name, leaf in snapshot.state.meta_params.items()}
        save_file(meta_params, workdir / "meta_params.safetensors")
        auroc = corruption_auroc(weights) if estimator is not None else None
        summary |= {} if auroc is None else {"auroc": auroc}
        summary["diagnostics"] = diagnostics(workdir, weights)
    if data.test is not None:
        summary["best_of_n"] = test_best_of_n(cfg, model, data)
    summary["seconds"] = snapshot.progress["seconds"] + time.perf_counter() - began
    domains = [example.dataset for example in data.train.examples] if weights else []
    write_report(workdir, summary, weights, domains, cfg.to_json_best_effort(indent=2))
    write_text(workdir / "summary.json", json.dumps(summary, indent=2))
    return summary
