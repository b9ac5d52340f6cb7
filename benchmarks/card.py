"""The figures that take an accelerator and the bars that they are held to, in one command.

    python -m benchmarks.card                    # a GPU of 80 GB, torch and transformers beside: about ten minutes
    python -m benchmarks.card --parts steps      # without PyTorch

Steps are those of `benchmarks.step`, each at the setting that is best for it and as a loop over layers, peers those of
`benchmarks.hypergradient`, in a process of their own, with which their memory ends. Each part is written when it is
done: a run that is cut off leaves what came before. docs/performance.md says what the settings do.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import jax

from benchmarks import hypergradient, roofline, step, workload
from dreamprm_jax.models import presets
from dreamprm_jax.models.layers import choose_attention

PARTS = ("peers", "steps")
SHARE, TIMES_PEER, PAPER_GB, PUBLISHED_HOURS = 0.45, 5.0, 40.0, 72.0
MEMORY = "XLA_PYTHON_CLIENT_MEM_FRACTION"  # of the card, for JAX: beside PyTorch, and alone
BESIDE, ALONE = "0.45", "0.95"


class Line(NamedTuple):
    """A step and how its program is made."""

    program: str
    batch_size: int
    remat: str = "none"
    scan_unroll: int = 1
    micro_batch: int | None = None
    meta_micro_batch: int | None = None


LINES = (
    Line("training", 1, "none", 24),
    Line("bilevel", 1, "none", 24, meta_micro_batch=1),
    Line("training", 8, "dots", 24),
    Line("bilevel", 8, "dots", 24, micro_batch=8, meta_micro_batch=4),
    Line("bilevel", 8, "dots", 24, micro_batch=4, meta_micro_batch=4),
    Line("training", 1, "dots"),
    Line("bilevel", 1, "dots", meta_micro_batch=1),
    Line("training", 8, "dots"),
    Line("bilevel", 8, "dots", micro_batch=4, meta_micro_batch=4),
    Line("scoring", 1),
    Line("scoring", 8),
)


def config_of(size: str, remat: str, scan_unroll: int) -> presets.InternVLConfig:
    """A model as it is computed here: on an accelerator in bfloat16, with fused attention where there is any."""
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    attention = choose_attention(dtype, forward_mode=False)
    return dataclasses.replace(
        workload.SIZES[size], compute_dtype=dtype, attention=attention, remat=remat, scan_unroll=scan_unroll
    )


def steps(size: str, num_tiles: int, rate: float, rounds: int) -> list[dict[str, Any]]:
    """A row of `step.measure` for each of LINES."""
    cases = [
        step.Case(
            step.Setting(line.program, line.batch_size, num_tiles, 1),
            config_of(size, line.remat, line.scan_unroll),
            step.Options(micro_batch=line.micro_batch, meta_micro_batch=line.meta_micro_batch),
        )
        for line in LINES
    ]
    return step.measure(cases, rate, rounds)


def peers(size: str, rounds: int) -> list[dict[str, Any]]:
    """Ours beside PyTorch's on the recorded shapes; in a process of its own, which needs most of the card."""
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    return hypergradient.peers(config_of(size, "dots", 1), rounds, device)


def apart(size: str, rounds: int) -> list[dict[str, Any]]:
    """`peers` in a process that begins and ends with it; to be called before this one has taken the card."""
    os.environ[MEMORY] = BESIDE
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(peers, size, rounds).result()


def bars(found_steps: list[dict[str, Any]], found_peers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was found of what has a bar, each at its best setting; nothing of what was not measured."""
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
            hold("bilevel, B = 1: times as fast as the published code in PyTorch", row["ratio"], at_least=TIMES_PEER)
    return found


def parsed() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(workload.SIZES), default="internvl3_1b")
    parser.add_argument("--tiles", type=int, default=7, help="of a row, thumbnail included")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated")
    parser.add_argument("--rounds", type=int, default=4, help="of the steps; peers take one")
    parser.add_argument("--json", type=Path, default=Path("card.json"), help="where the figures go; .md beside it")
    args = parser.parse_args()
    if not set(args.parts.split(",")) <= set(PARTS):
        parser.error(f"--parts={args.parts}: choose from {', '.join(PARTS)}")
    return args


def main() -> None:
    """Measures the parts asked for, peers first, and reports after each."""
    args = parsed()
    parts, figures = args.parts.split(","), {}
    found_peers = apart(args.size, 1) if "peers" in parts else []
    os.environ[MEMORY] = ALONE

    def report() -> None:
        config = config_of(args.size, "dots", 1)
        taken = vars(args) | {"attention": config.attention, "dtype": config.compute_dtype}
        held = bars(figures.get("steps", []), found_peers)
        workload.report(args.json, taken, figures | ({"bars": held} if held else {}))

    if found_peers:
        figures["peers"] = found_peers
        report()
    if "steps" in parts:
        rate = step.matrix_rate("float32" if jax.default_backend() == "cpu" else "bfloat16")
        figures |= {"matrix TFLOP/s": rate / 1e12, "steps": steps(args.size, args.tiles, rate, args.rounds)}
        report()


if __name__ == "__main__":
    main()
