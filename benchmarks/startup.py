"""From the command line to the first line of metrics, with no compiled programs kept and with those of the run before.

    python -m benchmarks.startup
    python -m benchmarks.startup --rounds 1 --config=configs/net.py     # what is left over goes to run.py

Every run is a process of its own with a home directory of its own, which is where compiled programs are kept. Seconds
are of the wall clock, from the start of the process; a machine with other work has more of them, so CPU seconds, of
all threads, stand beside them. Then: what `--help` and mistakes on the command line take.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
MEASURED = (
    "import sys; from benchmarks.startup import run_to_first_line; run_to_first_line(float(sys.argv[1]), sys.argv[2:])"
)
ANSWERS = {
    "--help": ["--help"],
    "a wrong flag": ["--config=configs/table.py", "--wrokdir=x"],
    "a wrong value": ["--config=configs/table.py", "--config.batch_size=0"],
}


def run_to_first_line(began: float, argv: list[str]) -> None:
    """`run.py` in this process up to its first line of metrics; prints what took how long, and ends the process.

    Args:
      began: when this process was started, seconds since the epoch.
      argv: of run.py.
    """
    import run

    stages, compiled, clock = {}, Counter(), began

    def stage_ends(name: str) -> None:
        nonlocal clock
        stages[name], clock = time.time() - clock, time.time()

    def listen(event: str, seconds: float, **_) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.update({"programs": 1, "seconds": seconds})
        elif event == "/jax/compilation_cache/cache_retrieval_time_sec":
            compiled["from cache"] += 1

    def end(*_) -> None:
        stage_ends("first step")
        used = resource.getrusage(resource.RUSAGE_SELF)
        cpu = used.ru_utime + used.ru_stime
        print(json.dumps({"stages": stages, "compiled": compiled, "cpu": cpu, "MiB": used.ru_maxrss / 1024}))
        sys.stdout.flush()
        os._exit(0)

    def patched_find_task(cfg):
        task = find_task(cfg)
        stage_ends("interpreter and imports")
        import jax

        from dreamprm_jax import build, experiment, metrics

        jax.monitoring.register_event_duration_secs_listener(listen)
        experiment.load_model = _then(experiment.load_model, lambda: stage_ends("model"))
        build.training_data = _then(build.training_data, lambda: stage_ends("data"))
        experiment.Checkpoints = _then(experiment.Checkpoints, lambda: stage_ends("estimator and state"))
        metrics.MetricsWriter.write = _then(metrics.MetricsWriter.write, end)
        return task

    find_task, run.find_task = run.find_task, patched_find_task
    sys.exit(run.main(["run.py", *argv]))


def _then(function, after):
    def both(*args, **kwargs):
        result = function(*args, **kwargs)
        after()
        return result

    return both


def start(home: Path, argv: list[str]) -> dict[str, float]:
    """One start, as a row of the table."""
    workdir = ["--workdir", tempfile.mkdtemp(dir=home)]
    command = [sys.executable, "-c", MEASURED, str(time.time()), *argv, *workdir]
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment["HOME"] = str(home)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    found = json.loads(done.stdout.splitlines()[-1])
    return {
        **found["stages"],
        "first line": sum(found["stages"].values()),
        "compiling": found["compiled"]["seconds"],
        "programs": found["compiled"]["programs"],
        "read back": found["compiled"].get("from cache", 0),
        "CPU s": found["cpu"],
        "MiB": found["MiB"],
    }


def answer(argv: list[str]) -> dict[str, float]:
    """One command that ends at once."""
    before, began = os.times(), time.perf_counter()
    subprocess.run([sys.executable, "run.py", *argv], cwd=ROOT, capture_output=True)
    wall, after = time.perf_counter() - began, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"s": wall, "CPU s": cpu}


def medians(rows: list[dict[str, float]]) -> dict[str, float]:
    """Of each column."""
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def main() -> None:
    """Measures what the arguments ask for, and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="starts of each kind; medians are shown")
    parser.add_argument("--json", type=Path, default=Path("startup.json"), help="where the figures go; .md beside it")
    args, argv = parser.parse_known_args()
    argv = argv or ["--config=configs/table.py"]
    load, rounds = os.getloadavg()[0], {"none kept": [], "kept": []}
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as home:
            for kind in rounds:
                rounds[kind].append(start(Path(home), argv))
    starts = [{"programs of runs before": kind, **medians(rows)} for kind, rows in rounds.items()]
    answers = [
        {"command": name, **medians([answer(given) for _ in range(args.rounds)])} for name, given in ANSWERS.items()
    ]
    numbers = {"load before": load, "load after": os.getloadavg()[0]}
    each = [{"programs of runs before": kind, **row} for kind, rows in rounds.items() for row in rows]
    from benchmarks.workload import report  # loads jax, which must not stand in the way of what is measured

    options = vars(args) | {"run.py": " ".join(argv)}
    report(args.json, options, {**numbers, "starts": starts, "answers": answers, "rounds": each})


if __name__ == "__main__":
    main()
