"""The programs of a phase: one for each combination of padded shapes, compiled ahead of the loop; kept between runs."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from dreamprm_jax.bilevel import Step
from dreamprm_jax.data.shapes import Shape
from dreamprm_jax.types import Batch, PyTree

_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
NUM_THREADS = min(4, max(1, _CORES // 2))
"""Programs compiled side by side: XLA compiles one on several cores, and each takes gigabytes of the host's memory."""

CACHE_BYTES = 8 * 2**30
"""Of the programs that are kept between runs, in all; those that were not used for longest go first."""

_CACHE_SECONDS = 0.1  # what compiles quicker is as quick to compile again as to read


class Programs:
    """A jitted step, called as it is; its programs are compiled in the order in which the loop comes to need them.

    Nothing is compiled before the first call, whose arguments show how state and batches are placed. From then on every
    combination that `upcoming` names is compiled in threads; a call waits for the one program that it needs. Threads do
    not see what a `with` of JAX's sets for the thread that calls (`jax.enable_x64`, a mesh).

    Args:
      name: the phase's, for the progress bar and for errors.
      step: (state, *batches) -> (state, metrics). A batch is a `Batch` [B, ...] or [K, B, ...]. The state that it gives
        is placed as the one that it takes.
      upcoming: the shapes of the batches of the steps to come, each combination once, in order of its first meeting.
    """

    def __init__(self, name: str, step: Step, upcoming: Iterator[tuple[Shape, ...]]):
        self._name, self._step, self._upcoming = name, step, upcoming
        self._like: tuple[PyTree, ...] | None = None  # state and batches of the first call, abstract
        self._began = 0.0  # time of the first call
        # Processes that share a run tune kernels together, which has to be in one order.
        threads = NUM_THREADS if jax.process_count() == 1 else 1
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="compile")
        self._lock = threading.Lock()  # of all that follows
        self._programs: dict[tuple[Shape, ...], Future] = {}
        self._num_compiled = 0
        self._error: Exception | None = None  # of the first compilation that failed
        self._closed = False
        self._bar: tqdm | None = None

    def __call__(self, state: PyTree, *batches: Batch) -> tuple[PyTree, dict[str, jax.Array]]:
        """One step.

        Raises:
          Exception: what the compilation of this program, or of one that a later step needs, has raised; a note names
            the shapes.
        """
        program = self._program(state, batches)
        if self._error is not None:
            raise self._error
        return program.result()(state, *batches)

    def are_ready(self, state: PyTree, batches: Sequence[Batch], seconds: float) -> bool:
        """Whether a call would go ahead at once, or fail at once; waits for that so long at most."""
        program = self._program(state, batches)
        wait([program], timeout=0 if self._error is not None else seconds)
        return self._error is not None or program.done()

    def _program(self, state: PyTree, batches: Sequence[Batch]) -> Future:
        needed = tuple(map(shape_of, batches))
        if self._like is None:
            self._began = time.perf_counter()
            self._like = jax.tree.map(_placed_like, (state, *batches))
            self._submit(needed)
            threading.Thread(target=self._submit_upcoming, name="upcoming", daemon=True).start()
        return self._submit(needed)

    def close(self) -> None:
        """Lets go what nobody will need, and waits for nothing: a compilation that has begun goes on to its end."""
        with self._lock:
            self._closed = True
            self._pool.shutdown(wait=False, cancel_futures=True)
            if self._bar is not None:
                self._bar.close()

    def _submit_upcoming(self) -> None:
        for shapes in self._upcoming:
            if self._submit(shapes) is None:
                return

    def _submit(self, shapes: tuple[Shape, ...]) -> Future | None:
        """The program of these shapes, on its way or ready; None once all is closed."""
        with self._lock:
            if self._closed:
                return None
            if shapes not in self._programs:
                self._programs[shapes] = self._pool.submit(self._compile, shapes)
            return self._programs[shapes]

    def _compile(self, shapes: tuple[Shape, ...]) -> Any:
        state, *batches = self._like
        try:
            program = self._step.lower(state, *map(_resized, batches, shapes)).compile()
        except Exception as error:
            error.add_note(f"while {self._name} was compiled for batches of rows of {_told(shapes)}")
            self._error = self._error or error
            raise
        self._tell()
        return program

    def _tell(self) -> None:
        """Moves the bar on, where there is more than one program to wait for."""
        with self._lock:
            self._num_compiled += 1
            if self._closed or len(self._programs) == 1:
                return
            seconds = time.perf_counter() - self._began
            told = f"compiled {self._num_compiled} of {len(self._programs)} programs of {self._name}, {seconds:.0f} s"
            if self._bar is None:
                self._bar = tqdm(desc=told, bar_format="{desc}", dynamic_ncols=True, file=sys.stderr, leave=False)
            else:
                self._bar.set_description_str(told)


def is_out_of_memory(error: jax.errors.JaxRuntimeError) -> bool:
    """Whether a program needs more memory than its device has."""
    return "RESOURCE_EXHAUSTED" in str(error)


def needed_memory(error: jax.errors.JaxRuntimeError, name: str, batches: Sequence[Batch]) -> str:
    """What of phase `name` did not fit: the shapes, and the device's own figures."""
    notes = getattr(error, "__notes__", None)  # of a compilation, which may have been of other shapes than these
    sizes = " and ".join(str(batch.tokens.shape[-2]) for batch in batches)
    where = notes[0] if notes else f"{name}, batches of {sizes} rows of {_told(tuple(map(shape_of, batches)))}"
    amount = re.search(r"allocate (\S+ ?\w*)", str(error))
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return f"{where}: the device's memory does not suffice" + (
        f" (asked for {amount[1].rstrip('.')}" + (f", it has {limit / 2**30:.1f} GiB)" if limit else ")")
        if amount
        else ""
    )


def _told(shapes: tuple[Shape, ...]) -> str:
    return ", ".join(f"{shape.tokens} tokens and {shape.tiles} tiles" for shape in shapes)


def shape_of(batch: Batch) -> Shape:
    """What the rows of a batch are padded to."""
    return Shape(batch.tokens.shape[-1], batch.tiles.shape[-4])


def _resized(batch: Batch, shape: Shape) -> Batch:
    """An abstract batch as it would be at another padded shape."""
    tokens, tiles = batch.tokens.shape[:-1], batch.tiles.shape
    return batch._replace(
        tokens=_abstract(batch.tokens, (*tokens, shape.tokens)),
        image_mask=_abstract(batch.image_mask, (*tokens, shape.tokens)),
        tiles=_abstract(batch.tiles, (*tiles[:-4], shape.tiles, *tiles[-3:])),
    )


def _placed_like(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    """The leaf without its values, placed as it is where it was placed on purpose."""
    sharding = leaf.sharding if leaf.committed else None
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding, weak_type=leaf.weak_type)


def _abstract(leaf: jax.ShapeDtypeStruct, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=leaf.sharding, weak_type=leaf.weak_type)


def keep_between_runs(folder: Path) -> None:
    """Lets JAX keep the programs of this process in `folder`, `CACHE_BYTES` at most, and take from it what is there.

    Where the user has set a cache of their own (JAX_COMPILATION_CACHE_DIR), that one is left as it is. Programs are
    filed by their text, the versions, the flags and the device; a CPU's instruction set is a part of the device. A
    folder that cannot be written is told as a warning, and the run goes without.
    """
    if jax.config.jax_compilation_cache_dir is not None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        for program in folder.glob("*-cache"):
            if not program.with_name(program.name.removesuffix("-cache") + "-atime").exists():
                program.unlink(missing_ok=True)  # of a run that was killed: JAX could not make room past it
    except OSError as error:
        warnings.warn(
            f"{folder}: cannot be written ({error}), so every run compiles anew; JAX_COMPILATION_CACHE_DIR names "
            "another place for compiled programs",
            stacklevel=2,
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _CACHE_SECONDS)
