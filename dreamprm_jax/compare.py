"""The comparison of methods on the embedded benchmark: its parts side by side, resumable, then tables and plots.

A part is one training run in a folder of its own: WORKDIR/seedK/METHOD, in a sweep WORKDIR/SETTING/seedK/METHOD. The
cold start of a seed, WORKDIR/seedK/cold_start, comes before its methods, and serves every setting.
"""

from __future__ import annotations

import contextlib
import copy
import json
import multiprocessing
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import logging
from tqdm import tqdm

from dreamprm_jax import build, sweeps
from dreamprm_jax.comparison import COLD_START, compare, read_part
from dreamprm_jax.comparison_report import Workdirs, write_reports
from dreamprm_jax.data.noisy_steps import SOURCES, Sizes
from dreamprm_jax.errors import InputError, Stopped
from dreamprm_jax.experiment import run_training
from dreamprm_jax.metrics import check_wandb, write_text
from dreamprm_jax.workdir import claim_workdir
from dreamprm_jax.workers import InThisProcess, ended, live_with_parent

LOG = "log.txt"


class Job(NamedTuple):
    """One part to be run."""

    workdir: Path
    cfg: Any
    after: Path | None  # the part that it starts from


def run_comparison(cfg: Any, workdir: Path, configs: Mapping[str, Any]) -> dict[str, Any]:
    """`task=compare`: runs what is not finished, then writes results.json, results.md, report.html and plots/.

    Args:
      cfg: the comparison's config.
      workdir: of the comparison.
      configs: by method, and the cold start's: complete but for seed, setting and checkpoint.

    Raises:
      InputError: another comparison's workdir, a setting that cannot be, or parts that failed; the others have
        finished then.
    """
    if cfg.wandb.project is not None:
        check_wandb()
    settings = sweeps.settings(cfg.compare.sweep, Sizes(**cfg.noisy_steps))
    methods = cfg.compare.methods if cfg.compare.sweep == "none" else cfg.compare.sweep_methods
    workdirs = {setting.name: _workdirs(cfg, workdir, setting, methods) for setting in settings}
    jobs = plan(workdirs, settings, cfg.compare.seeds, configs)
    claim_workdir(workdir, _record(cfg))
    todo = [job for job in jobs if not is_finished(job)]
    width = _width(cfg.compare.jobs, len(todo))
    with tqdm(total=len(jobs), initial=len(jobs) - len(todo), unit="part", dynamic_ncols=True, file=sys.stderr) as bar:

        def report(job: Job, outcome: str) -> None:
            bar.write(f"{job.workdir.relative_to(workdir)}: {outcome}", file=sys.stderr)
            bar.update()

        if todo:
            with _workers(width) as executor:
                run_jobs(todo, executor, width, report)
    results = {"sweep": cfg.compare.sweep, "seeds": list(cfg.compare.seeds), "aggregate": cfg.aggregate}
    results |= summarize(workdirs, settings, cfg.aggregate)
    write_text(workdir / "results.json", json.dumps(results, indent=2))
    write_reports(workdir, results, workdirs, cfg.to_json_best_effort(indent=2))
    return {
        "report": str(workdir / "report.html"),
        "best_of_n": {
            name: {method: figures["prm"]["mean"] for method, figures in found["methods"].items()}
            for name, found in results["settings"].items()
        },
    }


def _record(cfg: Any) -> dict[str, Any]:
    """What the workdir is held to; seeds, methods and jobs may change between calls: each part has its own record."""
    record = copy.deepcopy(build.record(cfg))
    for field in ("seeds", "methods", "sweep_methods", "jobs"):
        del record["config"]["compare"][field]
    return record


def _workdirs(cfg: Any, workdir: Path, setting: sweeps.Setting, methods: Sequence[str]) -> dict[str, list[Path]]:
    folder = workdir if cfg.compare.sweep == "none" else workdir / setting.name
    seeds = [f"seed{seed}" for seed in cfg.compare.seeds]
    found = {COLD_START: [workdir / seed / COLD_START for seed in seeds]}
    return found | {method: [folder / seed / method for seed in seeds] for method in methods}


def plan(
    workdirs: Workdirs, settings: Sequence[sweeps.Setting], seeds: Sequence[int], configs: Mapping[str, Any]
) -> list[Job]:
    """All parts, seed by seed, a cold start before what starts from it."""
    jobs = []
    for position, seed in enumerate(seeds):
        cold_start = workdirs[settings[0].name][COLD_START][position]
        jobs.append(Job(cold_start, part_config(configs[COLD_START], seed), None))
        for setting in settings:
            for method, folders in workdirs[setting.name].items():
                if method != COLD_START:
                    cfg = part_config(configs[method], seed, setting.changes, cold_start)
                    jobs.append(Job(folders[position], cfg, cold_start))
    return jobs


def part_config(cfg: Any, seed: int, changes: Mapping[str, Any] | None = None, cold_start: Path | None = None) -> Any:
    """A method's config for one seed and one setting, from the seed's cold start."""
    cfg = copy.deepcopy(cfg)
    cfg.seed = seed
    cfg.noisy_steps.update(changes or {})
    if cold_start is not None:
        cfg.model.checkpoint = str(cold_start)
    return cfg


def is_finished(job: Job) -> bool:
    """Whether nothing is left to do.

    Raises:
      InputError: the folder holds a run of another config.
    """
    if (job.workdir / "config.json").is_file():
        claim_workdir(job.workdir, build.record(job.cfg))
    return (job.workdir / "summary.json").is_file()


# Running.


def run_jobs(jobs: Sequence[Job], executor: Executor, width: int, report: Callable[[Job, str], None]) -> None:
    """Runs `jobs`, `width` at a time, in their order as far as what they start from is there.

    Args:
      jobs: those left to do; what one starts `after` is among them or finished.
      executor: where they run.
      width: no more than this many are handed over at once, so that an earlier one is never behind a later one.
      report: told each finished job and its outcome, in words.

    Raises:
      InputError: some failed; all others that could run have.
    """
    waiting, running, failed = list(jobs), {}, {}
    unfinished = {job.workdir for job in jobs}
    while True:
        for job in [job for job in waiting if job.after not in unfinished][: width - len(running)]:
            waiting.remove(job)
            running[executor.submit(run_part, job)] = job
        if not running:
            break
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            try:
                outcome, error = future.result()
            except BrokenProcessPool as broken:
                names = ", ".join(str(job.workdir) for job in running.values())
                raise InputError(
                    f"a worker process was killed while these ran: {names}; where memory ran out, lower "
                    "--config.compare.jobs. The same command goes on"
                ) from broken
            job = running.pop(future)
            report(job, outcome)
            if error:
                failed[job.workdir] = outcome
            else:
                unfinished.discard(job.workdir)
    if failed:
        texts = "; ".join(f"{folder}: {outcome} ({folder / LOG})" for folder, outcome in failed.items())
        left = f"; {len(waiting)} parts that start from them were not run" if waiting else ""
        raise InputError(f"{len(failed)} of {len(jobs)} parts failed: {texts}{left}. The same command tries them again")


def run_part(job: Job) -> tuple[str, bool]:
    """Runs one part, what it prints into its log; returns its outcome in words, and whether it failed."""
    job.workdir.mkdir(parents=True, exist_ok=True)
    with (
        (job.workdir / LOG).open("a", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        try:
            return _in_words(run_training(job.cfg, job.workdir)), False
        except Stopped as stopped:
            if multiprocessing.parent_process() is None:
                raise  # the comparison's own process was asked to end, and is not to begin the next part
            return str(stopped), True
        except Exception as error:  # told in words: not every exception survives the way to another process
            traceback.print_exc()
            return str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}", True
        finally:
            jax.clear_caches()  # the next part compiles functions of its own


def _in_words(summary: dict[str, Any]) -> str:
    found = summary["best_of_n"]
    auroc = f", AUROC {summary['auroc']:.3f}" if "auroc" in summary else ""
    return f"best of {found['num_candidates']} {found['prm']:.3f}{auroc}, {summary['seconds']:.0f} s"


def _cores() -> list[int] | None:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def _width(jobs: int, num_parts: int) -> int:
    if jax.default_backend() != "cpu":
        return 1
    return max(1, min(jobs or len(_cores() or range(os.cpu_count() or 1)), num_parts))


@contextlib.contextmanager
def _workers(width: int) -> Iterator[Executor]:
    """Processes of one core each: XLA's sums depend on the number of threads, so a part's result must not depend on
    what runs beside it. None of them outlives this block, or this process."""
    if jax.default_backend() != "cpu":
        yield InThisProcess()
        return
    context = multiprocessing.get_context("spawn")
    cores, queue = _cores(), context.SimpleQueue()
    for worker in range(width):
        queue.put(cores[worker % len(cores)] if cores else None)
    settings = {
        name: getattr(jax.config, name) for name in ("jax_compilation_cache_dir", "jax_default_matmul_precision")
    }
    with ended([ProcessPoolExecutor(width, context, _begin_worker, (queue, settings))]) as (executor,):
        yield executor


def _begin_worker(cores: Any, settings: dict[str, Any]) -> None:
    core = cores.get()
    if core is not None:
        os.sched_setaffinity(0, {core})
    live_with_parent()
    tqdm.set_lock(threading.RLock())  # its own is for several processes, and leaks where one of them is ended
    logging.set_verbosity(logging.WARNING)  # Orbax tells every save in eight lines
    for name, value in settings.items():
        jax.config.update(name, value)


def summarize(workdirs: Workdirs, settings: Sequence[sweeps.Setting], aggregate: str) -> dict[str, Any]:
    """The comparison of each setting, from the files of its parts."""
    found = {}
    for setting in settings:
        parts = {
            method: [read_part(folder, aggregate) for folder in folders]
            for method, folders in workdirs[setting.name].items()
        }
        if set(setting.changes) & set(SOURCES):  # the cold start's losses are of other training rows
            for part in parts[COLD_START]:
                part.figures.pop("loss_auroc", None)
                del part.figures["corrupted_share"]
        found[setting.name] = {"value": setting.value, **compare(parts)}
    test = json.loads((next(iter(workdirs[settings[0].name].values()))[0] / "summary.json").read_text(encoding="utf-8"))
    sizes = {name: test["best_of_n"][name] for name in ("num_candidates", "num_questions")}
    return {**sizes, "settings": found}
