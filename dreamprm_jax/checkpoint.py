"""Orbax checkpoints of a whole run.

A checkpoint holds the state of both levels and the number of the next step, of which every batch is a function: what
a killed run needs to go on bit for bit. What is frozen is in every one: less than the moments that a whole model would
have, and a checkpoint suffices by itself. It also holds a sum over each array's bits, by which what is read is known to
be what was saved.
"""

from __future__ import annotations

import functools
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from orbax.checkpoint import checkpoint_managers

from dreamprm_jax import sharding
from dreamprm_jax.errors import InputError, is_full
from dreamprm_jax.held_out import LOSS
from dreamprm_jax.models import trained
from dreamprm_jax.programs import is_out_of_memory
from dreamprm_jax.types import BilevelState, PyTree

CHECKPOINTS, DAMAGED = "checkpoints", "damaged"
_SHOWN = 200  # characters of what a library says of a damaged file


class Snapshot(NamedTuple):
    """What is saved: everything but the config."""

    state: BilevelState
    progress: dict[str, Any]  # JSON: the phase, its next step, seconds so far, what was measured on held-out rows


class Best(NamedTuple):
    """The checkpoint of the lowest held-out loss."""

    step: int
    held_out_loss: float
    is_latest: bool


class Damaged(Exception):
    """A checkpoint is not what was saved; it has been set aside, so that the run can go on from the one before."""


class Checkpoints:
    """The checkpoints of one workdir, by the run's step (cold start included): the last `keep`, and the best.

    The best is that of the lowest held-out loss, of equal ones the first; `measured` says whether any will have one.

    They are written in the background, and have their name once they are whole: a kill at any moment leaves those that
    were there. Errors of a background write are raised by the next call.
    """

    def __init__(self, workdir: Path, keep: int, measured: bool = False):
        _hush_readers()
        self._workdir, self._folder = workdir, (workdir / CHECKPOINTS).absolute()
        found = _damaged_metrics(self._folder)
        sharding.meet("metrics are read")
        if found is not None:
            self._set_aside(*found)
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=_options(keep, measured),
            item_handlers={"arrays": ocp.StandardCheckpointHandler(), "progress": ocp.JsonCheckpointHandler()},
        )

    def save(self, step: int, snapshot: Snapshot) -> None:
        """Copies a snapshot to the host, and writes it from there; saving a step again is a no-op.

        Raises:
          InputError: the disk has no room for it, or had none for the one before.
        """
        with self._told_when_full():
            if step == self._manager.latest_step():
                return
            self.check_room(snapshot.state)
            progress = {
                **snapshot.progress,
                "averaged": bool(snapshot.state.ema),  # which parameters score
                "sums": bit_sums(snapshot.state),
            }
            arrays = ocp.args.StandardSave(snapshot.state)
            items = ocp.args.Composite(arrays=arrays, progress=ocp.args.JsonSave(progress))
            metrics = {LOSS: progress[LOSS], "step": step} if LOSS in progress else {}
            self._manager.save(step, args=items, metrics=metrics)

    def check_room(self, state: BilevelState) -> None:
        """Whether the disk has room for one more checkpoint.

        Raises:
          InputError: it does not; says how much is missing.
        """
        self._manager.wait_until_finished()  # an earlier one may still be growing, or about to go
        needed, free = sum(leaf.nbytes for leaf in jax.tree.leaves(state)), shutil.disk_usage(self._workdir).free
        if free < needed:
            raise InputError(
                f"{self._folder}: a checkpoint takes {_size(needed)} and the disk has {_size(free)} left; "
                + self._goes_on()
            )

    def latest(self) -> Path | None:
        """The newest one's folder."""
        self._manager.wait_until_finished()
        step = self._manager.latest_step()
        return None if step is None else self._folder / str(step)

    def latest_progress(self) -> dict[str, Any] | None:
        """The progress of the newest snapshot; None where there is none.

        Raises:
          Damaged: it cannot be read.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        with self._set_aside_if_damaged(step):
            arguments = ocp.args.Composite(progress=ocp.args.JsonRestore())
            progress = self._manager.restore(step, args=arguments)["progress"]
            found = {name: progress[name] for name in ("phase", "next_step", "seconds", "sums")}
            return {**found, "held_out_rows": progress.get("held_out_rows")}

    def restore_latest(self, template: BilevelState, sums: dict[str, int]) -> BilevelState:
        """The newest snapshot's state, shaped and placed as `template` says, arrays or shapes.

        Raises:
          Damaged: it cannot be read, or its arrays do not add up to `sums`, those of its progress.
          InputError: it is whole, and its arrays have other names or shapes: of a run with another config.
        """
        step = self._manager.latest_step()
        with self._set_aside_if_damaged(step):
            _check_shapes(self._folder / str(step), self._manager.item_metadata(step)["arrays"].tree, template)
            arrays = ocp.args.StandardRestore(template)
            state = self._manager.restore(step, args=ocp.args.Composite(arrays=arrays))["arrays"]
            check_sums(state, sums)
            return state

    def best(self) -> Best | None:
        """The best one; None where none was measured."""
        self._manager.wait_until_finished()
        step = _best_step(self._manager)
        if step is None:
            return None
        return Best(step, self._manager.metrics(step)[LOSS], step == self._manager.latest_step())

    def read_params(self, step: int, mesh: Mesh | None) -> PyTree:
        """The whole parameters that score of a checkpoint.

        Raises:
          Damaged: it cannot be read.
        """
        with self._set_aside_if_damaged(step), _reader(self._workdir) as manager:
            return scoring_params(manager, step, mesh)

    def close(self) -> None:
        """Waits for what is being written.

        Raises:
          InputError: the disk had no room for it.
        """
        with self._told_when_full():
            self._manager.close()

    @contextmanager
    def _set_aside_if_damaged(self, step: int) -> Iterator[None]:
        try:
            yield
        except (InputError, MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # whatever a reader makes of bytes that nobody wrote
            if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
                raise  # the disk's own trouble, which says nothing of the bytes
            self._set_aside(step, error)

    def _set_aside(self, step: int, error: Exception) -> NoReturn:
        damaged, kept = self._folder / str(step), self._workdir / DAMAGED / str(step)
        if sharding.is_first():
            kept.parent.mkdir(exist_ok=True)
            shutil.rmtree(kept, ignore_errors=True)
            damaged.rename(kept)
        sharding.meet(f"damaged {step}")
        if not any(path.name.isdecimal() for path in self._folder.iterdir()):
            raise InputError(
                f"{damaged}: is damaged ({_line_of(error)}), was the only one, and is now in {kept}; the same command "
                "begins the run anew"
            ) from error
        raise Damaged(f"{damaged}: is damaged ({_line_of(error)}), and now in {kept}") from error

    @contextmanager
    def _told_when_full(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not is_full(error):
                raise
            raise InputError(f"{self._folder}: the disk is full; {self._goes_on()}") from error

    def _goes_on(self) -> str:
        step = self._manager.latest_step()
        return "free some space, and the same command goes on from " + (
            "the beginning" if step is None else f"step {step}, the last one saved"
        )


def _options(num_latest: int | None, measured: bool) -> ocp.CheckpointManagerOptions:
    """Which ones Orbax keeps: the last so many (None: all) and the best. `measured`: those saved have metrics."""
    best = checkpoint_managers.BestN(get_metric_fn=_rank, reverse=True, n=1, keep_checkpoints_without_metrics=False)
    policy = checkpoint_managers.AnyPreservationPolicy([checkpoint_managers.LatestN(num_latest), best])
    return ocp.CheckpointManagerOptions(
        preservation_policy=policy,
        best_fn=_rank if measured else None,
        best_mode="min",
        cleanup_tmp_directories=num_latest is not None,  # what a kill cut short, where nobody else writes
    )


def _rank(metrics: dict[str, float]) -> tuple[float, float]:
    """The lowest is best: Orbax takes the last of equal ones, and the step makes none equal."""
    return metrics.get(LOSS, math.inf), metrics.get("step", math.inf)


def _best_step(manager: ocp.CheckpointManager) -> int | None:
    step = manager.best_step()
    return step if step is not None and manager.metrics(step) else None


def _damaged_metrics(folder: Path) -> tuple[int, Exception] | None:
    """A checkpoint whose metrics are not those of its progress, and why: Orbax reads them when it opens the folder."""
    for path in sorted(folder.glob("*/metrics/metrics")):
        if path.parts[-3].isdigit():
            try:
                metrics, progress = (
                    json.loads(item.read_bytes()) for item in (path, path.parents[1] / "progress/metadata")
                )
                if metrics.get(LOSS) != progress.get(LOSS):
                    raise ValueError(f"{LOSS} is {metrics.get(LOSS)} in metrics, {progress.get(LOSS)} in progress")
            except (ValueError, AttributeError, FileNotFoundError) as error:
                return int(path.parts[-3]), error
    return None


def bit_sums(tree: PyTree) -> dict[str, int]:
    """The sum of each leaf's bits, by its path, in 32 bits: no matter how the leaf is divided among devices.

    Each entry counts by its place, so that two that have changed places are told, and by an odd number, so that no
    change of a single one goes unseen.
    """
    leaves = {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    return {name: int(total) for name, total in jax.device_get(_sums_of(leaves)).items()}


@jax.jit
def _sums_of(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    def total(leaf: jax.Array) -> jax.Array:
        width = min(leaf.dtype.itemsize, 4)
        bits = jax.lax.bitcast_convert_type(leaf, f"uint{8 * width}").astype(jnp.uint32)
        place = jnp.zeros(bits.shape, jnp.uint32)
        for axis, size in enumerate(bits.shape):
            place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)

    return jax.tree.map(total, leaves)


def check_sums(tree: PyTree, sums: dict[str, int]) -> None:
    """Whether all leaves are those that `sums` is of.

    Raises:
      ValueError: names the first that is not.
    """
    wrong = [name for name, found in bit_sums(tree).items() if sums.get(name) != found]
    if wrong:
        raise ValueError(f"{wrong[0]} is not what was saved, {len(wrong)} of {len(sums)} arrays are not")


def _check_shapes(folder: Path, saved: PyTree, template: PyTree) -> None:
    found, wanted = (
        {name_of(path): (tuple(leaf.shape), str(jnp.dtype(leaf.dtype))) for path, leaf in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (saved, template))
    )
    for name in sorted({*found, *wanted}):
        if found.get(name) != wanted.get(name):
            raise InputError(
                f"{folder}: {name} is {found.get(name, 'missing')} there, by the config {wanted.get(name, 'missing')}: "
                "what is trained, averaged or counted cannot change within a run; give another --workdir"
            )


def name_of(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


@functools.cache
def _hush_readers() -> None:
    """Keeps quiet, from now on, what is left of a failed read.

    Where one array cannot be read, Orbax closes the loop under the readers of the others, and each would print a
    traceback when TensorStore's threads or the garbage collection come to it.
    """
    usual = sys.unraisablehook

    def hook(unraisable) -> None:
        error = unraisable.exc_value
        cause = getattr(error, "__cause__", None)
        if not (isinstance(cause, GeneratorExit) or str(error) == "Event loop is closed"):
            usual(unraisable)

    sys.unraisablehook = hook


def _line_of(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:_SHOWN]}"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**28 else f"{num_bytes / 2**20:.1f} MiB"


@contextmanager
def reading(workdir: Path) -> Iterator[tuple[ocp.CheckpointManager, int]]:
    """The checkpoints of a run that is over or elsewhere, and the one that scores: the best, or else the newest.

    Raises:
      InputError: there is none, or the one that is taken is damaged.
    """
    folder = workdir / CHECKPOINTS
    found = _damaged_metrics(folder)
    if found is not None:
        raise _is_damaged(folder / str(found[0]), found[1])
    try:
        with _reader(workdir) as manager:
            best = _best_step(manager)
            step = manager.latest_step() if best is None else best
            if step is None:
                raise InputError(f"{folder}: holds no finished checkpoint; let the run reach its first save")
            folder = folder / str(step)
            yield manager, step
    except InputError:
        raise
    except Exception as error:  # Orbax and TensorStore raise errors of many types on damaged files
        if is_out_of_memory(error):
            raise
        raise _is_damaged(folder, error) from error


def _is_damaged(folder: Path, error: Exception) -> InputError:
    return InputError(
        f"{folder}: is damaged ({_line_of(error)}); the command of its run sets it aside and goes on from the one "
        "before"
    )


def _reader(workdir: Path) -> ocp.CheckpointManager:
    """What reads a part of a checkpoint's arrays, and knows the best one."""
    _hush_readers()
    handlers = {"arrays": ocp.PyTreeCheckpointHandler(), "progress": ocp.JsonCheckpointHandler()}
    folder = (workdir / CHECKPOINTS).absolute()
    return ocp.CheckpointManager(folder, options=_options(None, measured=True), item_handlers=handlers)


def scoring_params(
    manager: ocp.CheckpointManager, step: int, mesh: Mesh | None, check: Callable[[PyTree], None] = lambda shapes: None
) -> PyTree:
    """Of a checkpoint the parameters that score, whole: moments and table of a 1B run are three times their size.

    Args:
      manager: of `reading`.
      step: whose.
      mesh: devices that they go to; None: one.
      check: looks at the shapes, as (trained, frozen), before memory is taken for them.
    """
    progress = manager.restore(step, args=ocp.args.Composite(progress=ocp.args.JsonRestore()))["progress"]
    averaged, saved = progress["averaged"], manager.item_metadata(step)["arrays"].tree
    moved = {"ema": saved["ema"]} if averaged else {"train": {"params": saved["train"]["params"]}}
    wanted = sharding.shapes(mesh, {**moved, "frozen": saved["frozen"]})
    part = lambda tree: (tree["ema"] if averaged else tree["train"]["params"], tree["frozen"])  # noqa: E731
    check(part(wanted))
    arguments = ocp.checkpoint_utils.construct_restore_args(wanted)
    restore = ocp.args.PyTreeRestore(wanted, restore_args=arguments, partial_restore=True)
    arrays = manager.restore(step, args=ocp.args.Composite(arrays=restore))["arrays"]
    check_sums(arrays, progress["sums"])
    return trained.whole(*part(arrays))


def saved_progress(workdir: Path) -> dict[str, Any]:
    """What the checkpoint that scores says of itself: `step` of the run, its `phase`, `next_step` there, `averaged`.

    Raises:
      InputError: as `reading`.
    """
    with reading(workdir) as (manager, step):
        progress = manager.restore(step, args=ocp.args.Composite(progress=ocp.args.JsonRestore()))["progress"]
        return {name: progress[name] for name in ("phase", "next_step", "averaged")} | {"step": step}
