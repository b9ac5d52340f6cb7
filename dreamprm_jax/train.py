"""The loop, and nothing but the loop: draw batches, step, log late, save, so that a killed run can go on."""

from __future__ import annotations

import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dreamprm_jax.bilevel import Step
from dreamprm_jax.checkpoint import Checkpoints, Snapshot
from dreamprm_jax.data.shapes import Shape
from dreamprm_jax.errors import InputError, Stopped
from dreamprm_jax.held_out import LOSS, HeldOut
from dreamprm_jax.metrics import MetricsWriter
from dreamprm_jax.programs import Programs, is_out_of_memory, needed_memory
from dreamprm_jax.sharding import place_rows
from dreamprm_jax.types import Batch

OpenStream = Callable[[int], grain.DatasetIterator]
"""Number of a step -> the batches from there on."""

AHEAD = 2
"""Steps that are dispatched before one is waited for: a device always has the next one, also while the host writes."""

_LOSSES = ("inner_loss", "meta_loss")
_FINITE = (*_LOSSES, "grad_norm", "meta_grad_norm")
"""What says whether a step was applied: a level whose loss or gradient is not finite moves nothing (`inner.advance`,
`bilevel.outer_step`)."""
_ROWS = ("example_id", "example_mask", "meta_example_id", "meta_example_mask")


class Phase(NamedTuple):
    """A stretch of the run with one step function."""

    name: str
    first_step: int  # of the run, where this phase begins
    num_steps: int
    step: Step  # (state, *batches) -> (state, metrics), jitted, pure
    streams: tuple[OpenStream, ...]  # one batch of each goes into every step
    shapes_from: Callable[[int], Iterator[tuple[Shape, ...]]]  # number of a step -> what those batches are padded to
    mesh: Mesh | None = None  # of the step's devices; None: one
    relief: str = ""  # the settings that make it take less of a device's memory
    held_out: HeldOut | None = None  # what its checkpoints are measured by; None: nothing


class Cadence(NamedTuple):
    """How often things happen, in steps."""

    log_every: int
    checkpoint_every: int
    max_skipped: int = 3  # steps in a row that were not applied: so many end the run


class _Pending(NamedTuple):
    """A step that was sent off but not yet waited for."""

    step: int
    metrics: dict[str, jax.Array]  # what will be read of them


def run_phase(
    phase: Phase,
    snapshot: Snapshot,
    writer: MetricsWriter,
    checkpoints: Checkpoints,
    cadence: Cadence,
    asked: Callable[[], int] = lambda: 0,
) -> Snapshot:
    """Runs a phase from where `snapshot.progress` stands to its end, and saves the end.

    `asked`: which signal has asked the run to end, 0 while none has (`stop_signal`).

    Raises:
      InputError: too many steps in a row had a loss or a gradient that is not finite; the device's memory or the disk
        does not suffice. What was saved stays.
      Stopped: a signal asked for it; the run is saved up to its last step.
    """
    start, state = snapshot.progress["next_step"], snapshot.state
    began = time.perf_counter() - snapshot.progress["seconds"]
    logger = _Logger(phase, writer, checkpoints, cadence)
    programs = Programs(phase.name, phase.step, phase.shapes_from(start))

    def save(done: int, state: Any, measured: dict[str, float]) -> Snapshot:
        seconds = time.perf_counter() - began  # of the whole run, over all its restarts
        held = {"held_out_rows": phase.held_out.rows_digest} if phase.held_out else {}
        snapshot = Snapshot(state, {"phase": phase.name, "next_step": done, "seconds": seconds, **held, **measured})
        checkpoints.save(phase.first_step + done, snapshot)
        return snapshot

    with closing(programs), closing(_placed_batches(phase, start)) as upcoming:
        for step in range(start, phase.num_steps):
            batches = _next_batches(upcoming, asked)
            while not (batches is None or asked() or programs.are_ready(state, batches, seconds=0.5)):
                pass  # a program may take minutes to compile, and a grace time is shorter
            if _stops(phase, step, asked):
                logger.flush()
                if step > start and not logger.num_skipped:
                    save(step, state, {})  # not measured: when a signal comes must not change which one is the best
                last = checkpoints.latest()  # waits until it is written
                told = f"the run is saved up to step {last.name}" if last else "there was nothing to save yet"
                raise Stopped(asked() or signal.SIGTERM, told)
            try:
                state, metrics = programs(state, *batches)
                logger.push(step, metrics)
                done = step + 1
                if done % cadence.checkpoint_every == 0 or done == phase.num_steps:
                    logger.flush()  # every line up to a checkpoint is on disk before it
                    # While steps are skipped the parameters are in doubt: they displace no checkpoint of good ones.
                    if not logger.num_skipped or done == phase.num_steps:
                        snapshot = save(done, state, _measure(phase, done, state, writer))
            except jax.errors.JaxRuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                raise InputError(
                    f"step {phase.first_step + step}: {needed_memory(error, phase.name, batches)}; "
                    f"{phase.relief}. The same command goes on from the last checkpoint"
                ) from error
    if asked():
        raise Stopped(asked(), f"the run is saved up to step {checkpoints.latest().name}")
    return snapshot


def _next_batches(upcoming: Iterator[list[Batch]], asked: Callable[[], int]) -> list[Batch] | None:
    """The next step's batches; None where a signal to all processes of the run has ended those that read them."""
    try:
        return next(upcoming)
    except Exception:
        if not asked():
            raise
        return None


def _measure(phase: Phase, done: int, state: Any, writer: MetricsWriter) -> dict[str, float]:
    """The held-out loss for a checkpoint's progress, written before the checkpoint is; {} where it is not finite."""
    if phase.held_out is None:
        return {}
    loss = phase.held_out.loss(state)
    writer.write_held_out(phase.name, phase.first_step + done, loss, phase.held_out.num_rows)
    return {LOSS: loss} if np.isfinite(loss) else {}


@contextmanager
def stop_signal() -> Iterator[Callable[[], int]]:
    """What says which signal has asked the run to end; 0: none has.

    SIGTERM (a scheduler takes the machine back) and SIGINT let the step end and save; a second one acts at once. Where
    several processes share a run, JAX itself listens to SIGTERM (`_stops`).
    """
    found: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0  # handlers are the main thread's
        return

    def note(number: int, _: Any) -> None:
        found.append(number)
        signal.signal(number, before[number])

    heard = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()
    heard = [number for number in heard if signal.getsignal(number) is not signal.SIG_IGN]  # as nohup has it
    before = {number: signal.signal(number, note) for number in heard}
    try:
        yield lambda: found[0] if found else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stops(phase: Phase, step: int, asked: Callable[[], int]) -> bool:
    """Whether the run ends before this step; of several processes, all of them before the same one."""
    if jax.process_count() > 1:
        return multihost_utils.reached_preemption_sync_point(phase.first_step + step)
    return bool(asked())


def _placed_batches(phase: Phase, start: int) -> Iterator[list[Batch]]:
    """Of every step from `start` on the streams' batches, on the devices.

    The next step's are on their way while this one's are used.
    """
    with ExitStack() as stack:
        readers = [stack.enter_context(closing(open_at(start))) for open_at in phase.streams]
        ready: deque[list[Batch]] = deque()
        for batches in zip(*readers, strict=True):
            # [B], or [K, B] of several inner steps
            ready.append([place_rows(phase.mesh, batch, batch.example_id.ndim - 1) for batch in batches])
            if len(ready) > 1:
                yield ready.popleft()
        yield from ready


class _Logger:
    """Writes each step's line once `AHEAD` later steps are on their way; counts the steps that were not applied."""

    def __init__(self, phase: Phase, writer: MetricsWriter, checkpoints: Checkpoints, cadence: Cadence):
        self._phase, self._writer, self._checkpoints, self._cadence = phase, writer, checkpoints, cadence
        self._pending: deque[_Pending] = deque()
        self.num_skipped = 0  # in a row, up to now
        self._clock = time.perf_counter()

    def push(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes up a step that was sent off: its figures begin their way to the host as soon as they are known."""
        logged = step % self._cadence.log_every == 0
        wanted = metrics if logged else {name: metrics[name] for name in (*_FINITE, *_ROWS) if name in metrics}
        for leaf in jax.tree.leaves(wanted):
            leaf.copy_to_host_async()
        self._pending.append(_Pending(step, wanted))
        if len(self._pending) > AHEAD:
            self._fetch()

    def flush(self) -> None:
        """Waits for every step, and for the disk to have its line."""
        while self._pending:
            self._fetch()
        self._writer.sync()

    def _fetch(self) -> None:
        step, metrics = self._pending.popleft()
        metrics = jax.device_get(metrics)
        told = {name: float(metrics[name]) for name in _FINITE if name in metrics}
        is_applied = all(np.isfinite(list(told.values())))
        seconds, self._clock = time.perf_counter() - self._clock, time.perf_counter()
        self._writer.advance(self._phase.name, {name: told[name] for name in _LOSSES if name in told})
        skipped = None if is_applied else self._skipped(step, told, metrics)
        if step % self._cadence.log_every == 0:
            line = {**_line(self._phase, step, metrics), **({} if is_applied else {"applied": False})}
            self._writer.write({**line, "examples_per_second": round(len(line["example_ids"]) / seconds, 3)})
        self.num_skipped = 0 if is_applied else self.num_skipped + 1
        if skipped is not None:
            self._writer.write_skipped(skipped)
        if self.num_skipped >= self._cadence.max_skipped:
            last = self._checkpoints.latest()
            raise InputError(
                f"{self._writer.skipped_path}: steps up to {skipped['step']} ({self._phase.name}) had a loss or a "
                f"gradient that is not finite, {self.num_skipped} in a row, and were not applied; the last is "
                f"{skipped}. Lower inner.lr (or cold_start.lr), set inner.clip_norm, or look at those rows; "
                + (f"the last good checkpoint is {last}" if last else "there is no checkpoint yet")
            )

    def _skipped(self, step: int, told: dict[str, float], metrics: dict[str, Any]) -> dict[str, Any]:
        """A line of skipped_steps.jsonl: which figures are not finite, and the rows of both batches."""
        rows = {
            name.replace("example_id", "example_ids"): metrics[name][metrics[name.replace("_id", "_mask")]].tolist()
            for name in ("example_id", "meta_example_id")
            if name in metrics
        }
        figures = {name: str(value) for name, value in told.items() if not np.isfinite(value)}
        return {"step": self._phase.first_step + step, "phase": self._phase.name, "figures": figures, **rows}


def _line(phase: Phase, step: int, metrics: dict[str, Any]) -> dict[str, Any]:
    """One line of metrics.jsonl; `step` counts over the whole run."""
    real = metrics.pop("example_mask")
    metrics = {name: value for name, value in metrics.items() if name not in _ROWS or name == "example_id"}
    example_ids = metrics.pop("example_id")[real].tolist()
    line = {"step": phase.first_step + step, "phase": phase.name, "example_ids": example_ids, **metrics}
    if "instance_weights" in line:
        line["instance_weights"] = line["instance_weights"][real]
    if isinstance(line.get("meta_grad"), np.ndarray):  # of a table: by row; a net's is a dict by parameter
        line["meta_grad"] = dict(zip(map(str, example_ids), line["meta_grad"][real].tolist(), strict=True))
    if "identity_cosine" in line and np.isnan(line["identity_cosine"]):
        del line["identity_cosine"]  # taken every so many steps
    return line
