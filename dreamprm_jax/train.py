"""The loop, and nothing but the loop: draw batches, step, log late, save, so that a killed run can go on."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from dreamprm_jax.bilevel import Step
from dreamprm_jax.checkpoint import Checkpoints, Snapshot
from dreamprm_jax.data.shapes import Shape
from dreamprm_jax.errors import InputError
from dreamprm_jax.metrics import MetricsWriter
from dreamprm_jax.programs import Programs
from dreamprm_jax.sharding import place_rows
from dreamprm_jax.types import Batch

OpenStream = Callable[[int], grain.DatasetIterator]
"""Number of a step -> the batches from there on."""

AHEAD = 2
"""Steps that are dispatched before one is waited for: a device always has the next one, also while the host writes."""

_LOSSES = ("inner_loss", "meta_loss")
_ROWS = ("example_id", "example_mask")


class Phase(NamedTuple):
    """A stretch of the run with one step function."""

    name: str
    first_step: int  # of the run, where this phase begins
    num_steps: int
    step: Step  # (state, *batches) -> (state, metrics), jitted, pure
    streams: tuple[OpenStream, ...]  # one batch of each goes into every step
    shapes_from: Callable[[int], Iterator[tuple[Shape, ...]]]  # number of a step -> what those batches are padded to
    mesh: Mesh | None = None  # of the step's devices; None: one


class Cadence(NamedTuple):
    """How often things happen, in steps."""

    log_every: int
    checkpoint_every: int


class _Pending(NamedTuple):
    """A step that was dispatched but not yet waited for."""

    step: int
    metrics: dict[str, jax.Array]  # what will be read of them


def run_phase(
    phase: Phase, snapshot: Snapshot, writer: MetricsWriter, checkpoints: Checkpoints, cadence: Cadence
) -> Snapshot:
    """Runs a phase from where `snapshot.progress` stands to its end, and saves the end.

    Raises:
      InputError: the loss is no longer finite; nothing of that step is saved.
    """
    start, state = snapshot.progress["next_step"], snapshot.state
    began = time.perf_counter() - snapshot.progress["seconds"]
    logger = _Logger(phase, writer, cadence.log_every)
    programs = Programs(phase.name, phase.step, phase.shapes_from(start))
    with closing(programs), closing(_placed_batches(phase, start)) as upcoming:
        for step in range(start, phase.num_steps):
            state, metrics = programs(state, *next(upcoming))
            logger.push(step, metrics)
            done = step + 1
            if done % cadence.checkpoint_every == 0 or done == phase.num_steps:
                logger.flush()  # every line up to a checkpoint is on disk before it, and its loss is finite
                seconds = time.perf_counter() - began  # of the whole run, over all its restarts
                snapshot = Snapshot(state, {"phase": phase.name, "next_step": done, "seconds": seconds})
                checkpoints.save(phase.first_step + done, snapshot)
    return snapshot


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
    """Writes each step's line once `AHEAD` later steps are on their way."""

    def __init__(self, phase: Phase, writer: MetricsWriter, log_every: int):
        self._phase, self._writer, self._log_every = phase, writer, log_every
        self._pending: deque[_Pending] = deque()
        self._clock = time.perf_counter()

    def push(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes up a step that was dispatched: its figures begin their way to the host as soon as they are known."""
        logged = step % self._log_every == 0
        wanted = metrics if logged else {name: metrics[name] for name in (*_LOSSES, *_ROWS) if name in metrics}
        for leaf in jax.tree.leaves(wanted):
            leaf.copy_to_host_async()
        self._pending.append(_Pending(step, wanted))
        if len(self._pending) > AHEAD:
            self._fetch()

    def flush(self) -> None:
        """Waits for every step."""
        while self._pending:
            self._fetch()

    def _fetch(self) -> None:
        step, metrics = self._pending.popleft()
        metrics = jax.device_get(metrics)
        losses = {name: float(metrics[name]) for name in _LOSSES if name in metrics}
        self._check_finite(step, losses, metrics)
        seconds, self._clock = time.perf_counter() - self._clock, time.perf_counter()
        self._writer.advance(self._phase.name, losses)
        if step % self._log_every == 0:
            line = _line(self._phase, step, metrics)
            self._writer.write({**line, "examples_per_second": round(len(line["example_ids"]) / seconds, 3)})

    def _check_finite(self, step: int, losses: dict[str, float], metrics: dict[str, Any]) -> None:
        if not all(np.isfinite(list(losses.values()))):
            rows = metrics["example_id"][metrics["example_mask"]].tolist()
            raise InputError(
                f"step {step} of {self._phase.name}: the loss is {losses} on rows {rows}; lower inner.lr (or "
                "cold_start.lr) or set inner.clip_norm. Checkpoints and metrics up to the last save are kept"
            )


def _line(phase: Phase, step: int, metrics: dict[str, Any]) -> dict[str, Any]:
    """One line of metrics.jsonl; `step` counts over the whole run."""
    real = metrics.pop("example_mask")
    example_ids = metrics.pop("example_id")[real].tolist()
    line = {"step": phase.first_step + step, "phase": phase.name, "example_ids": example_ids, **metrics}
    if "instance_weights" in line:
        line["instance_weights"] = line["instance_weights"][real]
    if isinstance(line.get("meta_grad"), np.ndarray):  # of a table: by row; a net's is a dict by parameter
        line["meta_grad"] = dict(zip(map(str, example_ids), line["meta_grad"][real].tolist(), strict=True))
    if "identity_cosine" in line and np.isnan(line["identity_cosine"]):
        del line["identity_cosine"]  # taken every so many steps
    return line
