"""A training run from its config to its report: cold start, weighted training, best-of-N, files."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from dreamprm_jax import bilevel, build, held_out, sharding, steps
from dreamprm_jax.checkpoint import Best, Checkpoints, Damaged, Snapshot
from dreamprm_jax.data.dataset import Dataset
from dreamprm_jax.errors import InputError
from dreamprm_jax.hypergradient import EXACT
from dreamprm_jax.inner import Problem
from dreamprm_jax.loading import load_model, save_model_card
from dreamprm_jax.metrics import MetricsWriter, Wandb, check_wandb
from dreamprm_jax.models import presets, trained
from dreamprm_jax.optimizers import derivative_vanishes, one_of_each
from dreamprm_jax.programs import is_out_of_memory
from dreamprm_jax.train import Cadence, Phase, run_phase, stop_signal
from dreamprm_jax.types import SUPERVISED, BilevelState, PyTree
from dreamprm_jax.weighting import Weighting
from dreamprm_jax.workdir import LOCK, claim_workdir, files_of_process, make_workdir, open_alone, record_forced

Part = Callable[[PyTree], tuple[PyTree, PyTree]]
"""Whole parameters -> (trained, frozen)."""


def run_training(cfg: Any, workdir: Path) -> dict[str, Any]:
    """`task=train`: runs, resumes, or reports a finished run; returns the summary.

    All rows are read and checked before the workdir is touched and before anything is compiled. A checkpoint that is
    damaged is set aside, and the run goes on from the one before it.

    Raises:
      InputError: a user's mistake, see the rooms that read; or another run is at work in the workdir.
      Stopped: a signal asked for it; the run is saved.
    """
    if watched(cfg):
        check_wandb()
    with files_of_process(workdir, first=sharding.is_first()) as (own, _), ExitStack() as held:
        sharding.meet("files")  # before the first process changes what the others copy
        lock = cache(lambda: held.enter_context(open_alone(own / LOCK)))
        if (own / LOCK).is_file():
            lock()  # at once, since the model may not fit beside the other run's
        while True:
            try:
                return _run_training(cfg, own, workdir, lock)
            except Damaged as error:
                print(f"{error}; going on from the one before", file=sys.stderr)
            except jax.errors.JaxRuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                advice = steps.relief(cfg, "bilevel" if cfg.num_steps else SUPERVISED[-1], None)
                raise InputError(
                    f"{workdir}: the device's memory does not suffice outside the steps ({str(error)[:200]}); {advice}"
                ) from error


def _run_training(cfg: Any, workdir: Path, shared: Path, lock: Callable[[], Any]) -> dict[str, Any]:
    """`workdir` is for the files of this process, `shared` for the checkpoints, which all processes write together;
    `lock` keeps other runs out of it."""
    mesh = sharding.make_mesh(cfg.mesh)
    steps.check_rows(cfg, mesh)
    model = load_model(cfg.model, cfg.seed, steps.needs_forward_mode(cfg), mesh)
    data = build.training_data(cfg, model)
    weighting, levels = build.instance_weighting(cfg, data.train, model), steps.levels(cfg)
    problem_of = partial(build.prm_problem, cfg, model, weighting.apply, levels.inner_tx)
    part = parting(cfg)
    params, frozen = part(model.params)
    weighted = cfg.num_steps and cfg.weighting.name != "uniform"
    estimator = resolve(cfg, problem_of(), model.config, params, frozen) if weighted else None
    run = phases(cfg, data, weighting, levels, problem_of, estimator, mesh)
    make_workdir(workdir)
    lock()
    differences = claim_workdir(workdir, build.record(cfg), force=cfg.resume == "force")
    summary_path = workdir / "summary.json"
    if summary_path.is_file() and not differences:
        print(f"{workdir} is finished; its summary:")
        return json.loads(summary_path.read_text(encoding="utf-8"))
    for name in ("train", "meta", "held_out") if cfg.num_steps else ("cold_start",):
        if getattr(data, name) is not None:
            print(f"{name}: {getattr(data, name).describe()}", file=sys.stderr)
    save_model_card(workdir, model.config, model.tokenizer)
    looks_at_rows = cfg.weighting.name == "net"  # at more of them than their number: a weight is known when they come
    num_remembered = sharding.table_length(len(data.train)) if looks_at_rows else 0
    if is_whole(run[0][0]):
        params, frozen = model.params, {}
    state = bilevel.init_state(levels.inner_tx, levels.meta_tx, weighting, params, num_remembered, frozen)

    def begun() -> None:
        """The checkpoint fits the config: what was forced is put down, and the summary of the run as it was goes."""
        if differences:
            record_forced(workdir, build.record(cfg), differences)
            summary_path.unlink(missing_ok=True)

    snapshot = train(cfg, workdir, shared, run, sharding.place(mesh, state), part, begun)
    params, best = scored(cfg, shared, run, snapshot.state)
    model = model._replace(params=params)
    from dreamprm_jax.results import finish  # plots and statistics: nothing that the first step should wait for

    return finish(cfg, workdir, model, data, snapshot, weighting, estimator, best)


def scored(
    cfg: Any, shared: Path, run: list[tuple[Phase, Any]], state: BilevelState
) -> tuple[PyTree, dict[str, float]]:
    """The whole parameters that score, and what the summary says of them: the best checkpoint's, where rows are held
    out, else those of `state`, the run's last.

    Raises:
      Damaged: the best one cannot be read.
    """
    phase, best = run[-1][0], None
    if phase.held_out:
        with closing(Checkpoints(shared, cfg.checkpoints_to_keep, measured=True)) as checkpoints:
            best = checkpoints.best()
            told = "none has a finite one: the last" if best is None else f"the best, {best.held_out_loss:.6g} at step "
            told += "" if best is None else str(best.step)
            print(f"held-out loss of {phase.held_out.num_rows} meta rows: {told} scores", file=sys.stderr)
            if best and not best.is_latest:
                return checkpoints.read_params(best.step, phase.mesh), _of_summary(best)
    return trained.whole(bilevel.scoring_params(state), state.frozen), _of_summary(best) if best else {}


def _of_summary(best: Best) -> dict[str, float]:
    return {"best_step": best.step, "held_out_loss": best.held_out_loss}


def watched(cfg: Any) -> bool:
    """Whether this process is to tell Weights & Biases of the run: the first one is."""
    return cfg.wandb.project is not None and sharding.is_first()


def parting(cfg: Any) -> Part:
    """How `model.trained` parts a model; adapters are begun from the run's seed."""
    choice = trained.Choice(cfg.model.trained, cfg.model.lora_rank, cfg.model.lora_alpha)
    return partial(
        trained.part, choice=choice, compute_dtype=cfg.model.compute_dtype, key=jax.random.key(cfg.seed, impl="rbg")
    )


def is_whole(phase: Phase) -> bool:
    """Whether a phase trains everything, whatever `model.trained` says: pretraining, which a checkpoint has had."""
    return phase.name == "pretrain"


def resolve(cfg: Any, problem: Problem, config: presets.InternVLConfig, params: PyTree, frozen: PyTree) -> str:
    """The estimator of the run, told on stderr; warns where its optimizer hides the weights from the meta loss."""
    # Cards may differ in it, and processes that took different estimators would wait for each other.
    memory = sharding.least((jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0))
    fit = steps.gradients_that_fit(problem, params, frozen, config.mesh, memory)
    estimator = steps.resolve_estimator(cfg, problem, forward_mode=config.attention == "xla", fit=fit)
    print(
        f"meta-gradient: {estimator} (--config.hypergradient={cfg.hypergradient}); attention: {config.attention}",
        file=sys.stderr,
    )
    if (
        cfg.inner.lr
        and estimator in EXACT
        and derivative_vanishes(problem.inner_tx, one_of_each(params), min(4, cfg.num_steps))
    ):
        warnings.warn(
            "the inner optimizer's step does not depend on its gradient in every step: the exact meta-gradient is 0 "
            "there (sign-type and accumulating optimizers)",
            stacklevel=2,
        )
    return estimator


def phases(
    cfg: Any,
    data: build.TrainingData,
    weighting: Weighting,
    levels: steps.Levels,
    problem_of: steps.ProblemOf,
    estimator: str | None,
    mesh: Mesh | None,
) -> list[tuple[Phase, Any]]:
    """The run's phases, in order, each with the optimizer of its inner level."""
    found, first_step = [], 0
    share = sharding.share_of_process(mesh)

    def phase_of(name: str, num_steps: int, step: bilevel.Step, datasets: dict[str, Dataset]) -> Phase:
        streams = tuple(build.stream_of(cfg, stream, dataset, share) for stream, dataset in datasets.items())
        shapes, relief = build.shapes_met(cfg, datasets), steps.relief(cfg, name, mesh)
        return Phase(name, first_step, num_steps, step, streams, shapes, mesh, relief)

    for name in SUPERVISED:
        phase, dataset = cfg[name], getattr(data, name)
        if phase.num_steps and dataset is not None:  # files have nothing to pretrain on
            step, tx = steps.supervised(cfg, phase, problem_of, mesh)
            found.append((phase_of(name, phase.num_steps, step, {name: dataset}), tx))
            first_step += phase.num_steps
    if cfg.num_steps:
        datasets = {"train": data.train}
        if estimator is None:
            clip_norm = steps.clip_of_weighted(cfg)
            name, step = "uniform", steps.plain_step(problem_of, levels.inner_rate, clip_norm, cfg.ema_decay, mesh)
        else:
            name, step = "bilevel", steps.weighted_step(cfg, problem_of, estimator, levels, weighting, mesh)
            datasets["meta"] = data.meta
        phase = phase_of(name, cfg.num_steps, step, datasets)
        if data.held_out is not None:
            rows = (data.held_out, problem_of, cfg.meta_batch_size, build.reading(cfg), mesh)
            phase = phase._replace(held_out=held_out.measured_on(*rows))
        found.append((phase, levels.inner_tx))
    return found


def train(
    cfg: Any,
    workdir: Path,
    shared: Path,
    run: list[tuple[Phase, Any]],
    state: BilevelState,
    part: Part,
    begun: Callable[[], None],
) -> Snapshot:
    """Runs all phases, from the newest checkpoint where there is one.

    1. No checkpoint: start the first phase at `state`.
    2. A checkpoint inside a phase: go on there, each data stream with that step's batch.
    3. A checkpoint at a phase's end: start the next phase from its parameters, inner optimizer fresh.
    """
    if cfg.ema_decay is not None:
        state = bilevel.with_ema(state)
    measured = run[-1][0].held_out is not None
    with closing(Checkpoints(shared, cfg.checkpoints_to_keep, measured)) as checkpoints, stop_signal() as asked:
        checkpoints.check_room(state)  # before hours of work
        progress, reached, first_step = checkpoints.latest_progress(), -1, 0
        if progress is None:
            snapshot = Snapshot(state, {"phase": None, "seconds": 0.0})
        else:
            reached = _reached(run, progress, checkpoints)
            first_step = run[reached][0].first_step + progress["next_step"]
            snapshot = _restored(checkpoints, run[reached], Snapshot(state, progress), part)
        begun()
        num_steps = sum(phase.num_steps for phase, _ in run)
        wandb = Wandb(cfg.wandb.project, cfg.wandb.mode, cfg.to_dict()) if watched(cfg) else None
        with closing(MetricsWriter(workdir, first_step, num_steps, wandb)) as writer:
            for position, (phase, inner_tx) in enumerate(run):
                if position > reached:
                    snapshot = _begin(phase, inner_tx, snapshot, part)
                if position >= reached:
                    cadence = Cadence(cfg.log_every, cfg.checkpoint_every, cfg.max_skipped)
                    snapshot = run_phase(phase, snapshot, writer, checkpoints, cadence, asked)
    return snapshot


def _reached(run: list[tuple[Phase, Any]], progress: dict[str, Any], checkpoints: Checkpoints) -> int:
    """Which phase the newest checkpoint is of.

    Raises:
      InputError: a run that was forced on with another config has no such place.
    """
    places = [phase.name for phase, _ in run]
    folder, name = checkpoints.latest(), progress["phase"]
    first = run[places.index(name)][0].first_step if name in places else None
    if first is None or first + progress["next_step"] != int(folder.name):
        raise InputError(
            f"{folder}: was saved at step {progress['next_step']} of {name}, which this config does not have there: "
            "the phases before it cannot change within a run; give another --workdir"
        )
    rows = run[places.index(name)][0].held_out
    if progress["held_out_rows"] != (rows and rows.rows_digest):
        raise InputError(
            f"{folder}: was saved while other meta rows were held out (meta.held_out, seed, the meta set): losses on "
            "these cannot be compared with it, and steps may have seen them; give another --workdir"
        )
    return places.index(name)


def _restored(checkpoints: Checkpoints, reached: tuple[Phase, Any], fresh: Snapshot, part: Part) -> Snapshot:
    """The newest snapshot; what `fresh` holds is freed before, since a device may have no room for both."""
    like = fresh.state
    if not (is_whole(reached[0]) or like.frozen):  # the phase may part the model otherwise than the run's beginning
        like = _begin(*reached, fresh, part).state
    template = sharding.shapes(reached[0].mesh, like)
    jax.tree.map(lambda leaf: leaf.delete(), (fresh.state, like))
    sums = fresh.progress.pop("sums")
    return Snapshot(checkpoints.restore_latest(template, sums), fresh.progress)


def _begin(phase: Phase, inner_tx: Any, snapshot: Snapshot, part: Part) -> Snapshot:
    state = snapshot.state
    params, frozen = state.train.params, state.frozen
    if not (is_whole(phase) or frozen):
        params, frozen = part(params)
    progress = {**snapshot.progress, "phase": phase.name, "next_step": 0}
    state = state._replace(train=bilevel.init_train_state(inner_tx, params), frozen=frozen)
    return Snapshot(sharding.place(phase.mesh, bilevel.with_ema(state) if state.ema else state), progress)
