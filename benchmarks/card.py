"""The figures that take an accelerator and the bars that they are held to, in one command.

    python -m benchmarks.card                    # a GPU of 80 GB, torch and transformers beside: ten minutes, estimated
    python -m benchmarks.card --parts steps      # without PyTorch

Steps are those of `benchmarks.step`, in a loop over layers and written out, where the settings are the best that are
known (docs/performance.md). Peers are those of `benchmarks.hypergradient`, ours in a loop, in a process of their own,
with which their memory ends. What is done is written at once: a run that is cut off leaves what came before, and where
one part fails the others go on.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import jax

from benchmarks import hypergradient, roofline, step, workload

PARTS = ("peers", "steps")
# What is held to be good enough: this project's own bars, and what the published code takes.
SHARE = 0.45  # of the measured matrix rate at B = 8
TIMES_PUBLISHED = 5.0  # as fast as the published code in PyTorch
PAPER_GB = 40.0  # 10^9 bytes at the paper's setting, B = 1
PUBLISHED_HOURS = 72.0  # of its 100,000 iterations (arXiv 2509.05542)

MEMORY = "XLA_CLIENT_MEM_FRACTION"  # what JAX takes of a card
FORMER_MEMORY = "XLA_PYTHON_CLIENT_MEM_FRACTION"  # its earlier name, beside which the other one is refused
BESIDE_TORCH, ALONE = "0.45", "0.95"


class Line(NamedTuple):
    """A step and how its program is made."""

    program: str
    batch_size: int
    remat: str = "none"
    scan_unroll: int = 1
    micro_batch: int | None = None
    meta_micro_batch: int | None = None


# By group: compiled side by side, run in turn. The second takes longest to compile.
GROUPS = {
    "in a loop over layers": (
        Line("scoring", 1),
        Line("scoring", 8),
        Line("training", 1, "dots"),
        Line("bilevel", 1, "dots", meta_micro_batch=1),
        Line("training", 8, "dots"),
        Line("bilevel", 8, "dots", micro_batch=4, meta_micro_batch=4),
    ),
    "written out": (
        Line("training", 1, "none", 24),
        Line("bilevel", 1, "none", 24, meta_micro_batch=1),
        Line("training", 8, "dots", 24),
        Line("bilevel", 8, "dots", 24, micro_batch=8, meta_micro_batch=4),
        Line("bilevel", 8, "dots", 24, micro_batch=4, meta_micro_batch=4),
    ),
}


def steps(lines: tuple[Line, ...], size: str, num_tiles: int, rate: float, rounds: int) -> list[dict[str, Any]]:
    """A row of `step.measure` for each line."""
    config = step.computed_here(workload.SIZES[size])
    cases = [
        step.Case(
            step.Setting(line.program, line.batch_size, num_tiles, 1),
            dataclasses.replace(config, remat=line.remat, scan_unroll=line.scan_unroll),
            step.Options(micro_batch=line.micro_batch, meta_micro_batch=line.meta_micro_batch),
        )
        for line in lines
    ]
    return step.measure(cases, rate, rounds)


def peers(size: str) -> list[dict[str, Any]]:
    """Ours beside PyTorch's on the recorded shapes, one round; together they need most of the card."""
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    return hypergradient.peers(dataclasses.replace(step.computed_here(workload.SIZES[size]), remat="dots"), 1, device)


def peers_apart(size: str) -> list[dict[str, Any]]:
    """`peers` in a process that begins and ends with it; to be called before this one has taken the card."""
    os.environ[MEMORY] = BESIDE_TORCH
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(peers, size).result()
    finally:
        os.environ[MEMORY] = ALONE


def bars(found_steps: list[dict[str, Any]], found_peers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was found of what has a bar, of steps the fastest line; nothing of what was not measured."""
    found = []

    def hold(what: str, value: float, at_least: float | None = None, at_most: float | None = None) -> None:
        reached = (at_least is None or value >= at_least) and (at_most is None or value <= at_most)
        found.append({"what": what, "found": value, "at least": at_least, "at most": at_most, "reached": reached})

    def fastest(program: str, batch_size: int) -> dict[str, Any] | None:
        rows = [row for row in found_steps if row["program"].startswith(program) and row["B"] == batch_size]
        return min((row for row in rows if row["ms"] is not None), key=lambda row: row["ms"], default=None)

    for program in ("training", "bilevel"):
        if row := fastest(program, 8):
            hold(f"{program}, B = 8: share of the matrix rate", row["share of matrix rate"], at_least=SHARE)
    if row := fastest("bilevel", 1):
        hours = roofline.PAPER_ITERATIONS * row["ms"] / 3.6e6
        hold(f"bilevel, B = 1: hours of {roofline.PAPER_ITERATIONS:,} iterations", hours, at_most=PUBLISHED_HOURS)
        gigabytes = (row["state GiB"] + row["temporary GiB"]) * 2**30 / 1e9
        hold("bilevel, B = 1: GB of state and temporary memory", gigabytes, at_most=PAPER_GB)
    for row in found_peers:
        if row["program"] == "torch, as published":
            hold("bilevel, B = 1: times as fast as the published code", row["ratio"], at_least=TIMES_PUBLISHED)
    return found


def parsed() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(workload.SIZES), default="internvl3_1b")
    parser.add_argument("--tiles", type=int, default=7, help="of a row, thumbnail included")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated")
    parser.add_argument("--rounds", type=int, default=4, help="of the steps; peers have one")
    parser.add_argument("--json", type=Path, default=Path("card.json"), help="where the figures go; .md beside it")
    args = parser.parse_args()
    if not set(args.parts.split(",")) <= set(PARTS):
        parser.error(f"--parts={args.parts}: choose from {', '.join(PARTS)}")
    return args


def main() -> None:
    """Measures the parts asked for, peers first, and reports after each; status 1 where one failed."""
    args = parsed()
    os.environ.pop(FORMER_MEMORY, None)
    os.environ[MEMORY] = ALONE  # before anything asks which card this is, and so takes it
    parts, found, numbers, failed = args.parts.split(","), {"peers": [], "steps": []}, {}, False

    def take(name: str, what: str, measure: Callable[[], list[dict[str, Any]]]) -> None:
        nonlocal failed
        try:
            found[name] += measure()
        except (ImportError, RuntimeError) as error:  # no torch, no memory, a process that died
            print(f"error: {what}: {error}", file=sys.stderr)
            failed = True
        config, held = step.computed_here(workload.SIZES[args.size]), bars(found["steps"], found["peers"])
        taken = vars(args) | {"attention": config.attention, "dtype": config.compute_dtype}
        tables = {name: rows for name, rows in {**found, "bars": held}.items() if rows}
        workload.report(args.json, taken, numbers | tables)

    if "peers" in parts:
        take("peers", "peers", lambda: peers_apart(args.size))
    if "steps" in parts:
        rate = step.matrix_rate(step.computed_here(workload.SIZES[args.size]).compute_dtype)
        numbers["matrix TFLOP/s"] = rate / 1e12
        for name, lines in GROUPS.items():
            take("steps", name, lambda lines=lines: steps(lines, args.size, args.tiles, rate, args.rounds))
    sys.exit(failed)


if __name__ == "__main__":
    main()
