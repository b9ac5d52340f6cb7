"""Work in several processes: named tasks, a progress bar by rows, no worker that outlives its parent."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

from tqdm import tqdm

from dreamprm_jax.errors import InputError


class Task(NamedTuple):
    """One call of a pass."""

    name: str  # "ai2d.jsonl rows 0 to 4095"
    rows: int
    arguments: tuple[Any, ...]


def run_tasks(workers: Sequence[Executor], title: str, function: Callable[..., None], tasks: list[Task]) -> None:
    """Runs `function` on the arguments of each task, one task a worker at a time.

    Raises:
      InputError: of a task; or a worker was killed: names what it was working on.
    """
    waiting, idle, running = tasks[::-1], list(workers), {}
    with tqdm(
        total=sum(task.rows for task in tasks), desc=title, unit="row", unit_scale=True, file=sys.stderr,
        mininterval=1.0 if sys.stderr.isatty() else 15.0, dynamic_ncols=True,
    ) as bar:  # fmt: skip
        while waiting or running:
            while waiting and idle:
                worker, task = idle.pop(), waiting.pop()
                with _killed(title, task):
                    running[worker.submit(function, *task.arguments)] = worker, task
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                worker, task = running.pop(future)
                with _killed(title, task):
                    future.result()
                idle.append(worker)
                bar.update(task.rows)


@contextlib.contextmanager
def _killed(title: str, task: Task) -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool as error:
        raise InputError(
            f"{title}, {task.name}: the process that worked on it was killed; where memory ran out, lower "
            "--config.prepare.processes. The same command goes on"
        ) from error


@contextlib.contextmanager
def open_workers(processes: int) -> Iterator[list[Executor]]:
    """Executors of one process each, so that it is known what a killed one was working on; none outlives the block.

    `processes`: 0 for as many as cores; one is this process itself.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if (processes or cores) == 1:
        yield [InThisProcess()]
        return
    context = multiprocessing.get_context("spawn")
    with ended([ProcessPoolExecutor(1, context, live_with_parent) for _ in range(processes or cores)]) as workers:
        yield workers


@contextlib.contextmanager
def ended(executors: list[ProcessPoolExecutor]) -> Iterator[list[ProcessPoolExecutor]]:
    """Fresh executors, whose processes end with the block: by themselves, or at once where it ends with an error."""
    others = multiprocessing.active_children()
    try:
        yield executors
    except BaseException:
        for process in multiprocessing.active_children():
            if process not in others:
                process.terminate()
        raise
    finally:
        for executor in executors:
            executor.shutdown(cancel_futures=True)


class InThisProcess(Executor):
    """One process needs no other."""

    def submit(self, function: Callable, /, *args: Any, **kwargs: Any) -> Future:
        """Runs it now."""
        future: Future = Future()
        future.set_result(function(*args, **kwargs))
        return future


def live_with_parent() -> None:
    """Begins a worker: its parent's end, however it comes, is its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # control-C goes to all: the parent ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would work on unseen, or wait for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)
