"""What a bilevel iteration takes in memory, by what is trained, the type of the moments and what is computed again.

    python -m benchmarks.memory                       # InternVL3-1B, compiled for this machine: minutes a program
    python -m benchmarks.memory --trained adapters --moment-dtypes bfloat16 --remat full
    python -m benchmarks.memory --computed            # every size of the family, by its shapes alone: seconds

Nothing is allocated: programs are compiled from shapes. State is exact. Temporary memory is what this machine's
compiler plans; on a CPU it says how settings differ, not what an accelerator takes (`benchmarks.step` measures that).
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax

from benchmarks import step, workload
from dreamprm_jax.models import internvl, presets, trained

GIB = 2**30
CARD = 80e9 / GIB  # GiB of a card of 80 GB


def gib(tree: Any) -> float:
    """Size of a tree of shapes, in GiB."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)) / GIB


def state_of(config: presets.InternVLConfig, options: step.Options) -> Any:
    """Both levels as shapes."""
    return jax.eval_shape(partial(step.begun, config, options))


def compiled(
    config: presets.InternVLConfig, whats: list[str], moment_dtypes: list[str], remats: list[str], num_tiles: int
) -> Iterator[dict[str, Any]]:
    """A line for each setting of an iteration at B = 1, `dot`."""
    for remat, what, moment_dtype in itertools.product(remats, whats, moment_dtypes):
        config = dataclasses.replace(config, remat=remat)
        options = step.Options("dot", meta_micro_batch=1, trained=what, moment_dtype=moment_dtype)
        state, began = state_of(config, options), time.perf_counter()
        traced, _ = step.traced_step(config, step.Setting("bilevel", 1, num_tiles, 1), options, state)
        memory = traced.lower().compile().memory_analysis()
        yield {
            "trained": what,
            "moments": moment_dtype,
            "remat": remat,
            "tokens": step.tokens_of_row(config, num_tiles),
            "trained parameters, M": sum(leaf.size for leaf in jax.tree.leaves(state.train.params)) / 1e6,
            "state GiB": gib(state),
            "arguments GiB": memory.argument_size_in_bytes / GIB,
            "not in place GiB": (memory.output_size_in_bytes - memory.alias_size_in_bytes) / GIB,
            "temporary GiB": memory.temp_size_in_bytes / GIB,
            "compile s": time.perf_counter() - began,
        }


def computed(sizes: list[str], whats: list[str], moment_dtypes: list[str]) -> Iterator[dict[str, Any]]:
    """A line for each size and setting: what an iteration of `dot` at B = 1 holds beside activations."""
    for size, what, moment_dtype in itertools.product(sizes, whats, moment_dtypes):
        config = dataclasses.replace(presets.PRESETS[size], compute_dtype="bfloat16")
        state = state_of(config, step.Options(trained=what, moment_dtype=moment_dtype))
        parameters = gib(state.train.params)
        parts = {
            "parameters": parameters,
            "moments": gib(state.train.opt_state),
            "gradient": gib(jax.eval_shape(partial(internvl.cast_to_compute, config), state.train.params)),  # the row's
            "u": parameters,
            "frozen": gib(state.frozen),
        }
        total = sum(parts.values())
        yield {
            "size": size,
            "trained": what,
            "moments in": moment_dtype,
            **parts,
            "sum": total,
            "left of 80 GB": CARD - total if total < CARD else "does not fit",
        }


def main() -> None:
    """Parses, compiles or computes, prints each line as it is known, writes JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--computed", action="store_true", help="shapes alone, of every size in --sizes")
    parser.add_argument("--sizes", default="internvl3_1b,internvl3_2b,internvl3_8b,internvl3_14b")
    parser.add_argument("--size", choices=tuple(workload.SIZES), default="internvl3_1b", help="what is compiled")
    parser.add_argument("--tiles", type=int, default=7, help="of a row, thumbnail included")
    parser.add_argument("--trained", default=",".join(trained.TRAINED), help="comma-separated")
    parser.add_argument("--moment-dtypes", default="float32,bfloat16")
    parser.add_argument("--remat", default="dots,full")
    parser.add_argument("--json", type=Path, default=Path("memory.json"), help="where the figures go; .md beside it")
    args = parser.parse_args()
    whats, moment_dtypes = args.trained.split(","), args.moment_dtypes.split(",")
    if args.computed:
        lines = computed(args.sizes.split(","), whats, moment_dtypes)
    else:
        config = dataclasses.replace(workload.SIZES[args.size], compute_dtype="bfloat16")
        lines = compiled(config, whats, moment_dtypes, args.remat.split(","), args.tiles)
    rows = []
    for line in lines:
        rows.append(line)
        print(workload.markdown([line]), flush=True)
    workload.report(args.json, vars(args), {"rows": rows})


if __name__ == "__main__":
    main()
