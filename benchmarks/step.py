"""What a step takes: training, a bilevel iteration, scoring; one table and one JSON file a run.

    python -m benchmarks.step                                                   # two cores: a small model
    python -m benchmarks.step --size internvl3_1b --batch-sizes 1,8 --remat dots    # an accelerator
    python -m benchmarks.step --size internvl3_1b --tiles 1,3,7,13 --programs training

Rows are random, of the shapes given; no data are read. All programs of a run are compiled first, side by side, then run
in turn, round after round, in one process; figures are medians over the rounds. Model flops are those of the products
that the mathematics needs: three forward passes for a gradient, one gradient for a training step, two for a bilevel
iteration, whatever an estimator or remat computes again. The machine's rate is that of a large matrix product in the
compute type, measured before.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxlib

from benchmarks import workload
from dreamprm_jax import losses
from dreamprm_jax.hypergradient import ESTIMATORS, REVERSE_ONLY
from dreamprm_jax.models import internvl, presets
from dreamprm_jax.models.layers import choose_attention
from dreamprm_jax.types import Batch, BilevelState

PROGRAMS = ("training", "bilevel", "scoring")
TEXT_TOKENS = 440  # of a row beside its image tokens: with 7 tiles the 2,232 of the longest recorded rows


class Setting(NamedTuple):
    """One line of the table."""

    program: str
    batch_size: int
    num_tiles: int
    num_inner_steps: int


def forward_flops(config: presets.InternVLConfig, num_tiles: int, num_tokens: int) -> float:
    """Flops of one row's forward pass: products alone, attention as much of it as is not masked."""
    vision, language = config.vision, config.language
    patches, width = vision.grid**2, vision.width
    n = 1 + patches
    block = 2 * n * width * (4 * width + 2 * vision.mlp_width) + 4 * n**2 * width
    projected = config.image_tokens_per_tile * language.width
    projector = 2 * projected * (config.shuffle_factor**2 * width + language.width)
    tile = vision.num_layers * block + 2 * patches * 3 * vision.patch_size**2 * width + projector
    head_width = language.width // language.num_heads
    weights = 2 * language.width * head_width * (language.num_heads + language.num_kv_heads)
    weights += 3 * language.width * language.mlp_width
    layer = 2 * num_tokens * weights + 2 * num_tokens**2 * language.width
    head = 2 * workload.NUM_STEPS * language.width * language.vocab_size
    return float(num_tiles * tile + language.num_layers * layer + head)


def model_flops(config: presets.InternVLConfig, setting: Setting, num_tokens: int) -> float:
    """Flops of one step: K training batches and, for a bilevel iteration, one meta batch."""
    forward = forward_flops(config, setting.num_tiles, num_tokens) * setting.batch_size
    if setting.program == "scoring":
        return forward
    return 3 * forward * (setting.num_inner_steps + (setting.program == "bilevel"))


def matrix_rate(dtype: str) -> float:
    """Flops per second of a large matrix product of random numbers, the best of 5."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    matrix = jax.random.normal(jax.random.key(0), (size, size), dtype) * size**-0.5
    product = jax.jit(lambda a, b: a @ b)
    product(matrix, matrix).block_until_ready()
    best, turns = float("inf"), 20
    for _ in range(5):
        began, result = time.perf_counter(), matrix
        for _ in range(turns):
            result = product(matrix, result)
        result.block_until_ready()
        best = min(best, (time.perf_counter() - began) / turns)
    return 2 * size**3 / best


def lowered_step(
    config: presets.InternVLConfig, setting: Setting, estimator: str, micro_batch: int | None, state: Any
) -> tuple[Any, tuple[Batch, Batch], int]:
    """(program, batches, tokens of a row); the program is lowered, (state, batch, meta_batch) -> (state, number)."""
    num_tokens = setting.num_tiles * config.image_tokens_per_tile + TEXT_TOKENS
    bucket = (setting.num_tiles, num_tokens)
    one, meta = (workload.random_batch(config, [bucket] * setting.batch_size, bucket, seed) for seed in range(2))
    batch = workload.stacked(one, setting.num_inner_steps)
    if setting.program == "scoring":
        step = jax.jit(partial(_score, config), donate_argnums=0)
    else:
        problem = workload.prm_problem(config, workload.TABLE, setting.num_inner_steps, micro_batch)
        step = workload.jitted(problem, workload.TABLE, "plain" if setting.program == "training" else estimator)
    return step.lower(state, batch, meta), (batch, meta), num_tokens


def _score(
    config: presets.InternVLConfig, state: BilevelState, batch: Batch, meta_batch: Batch
) -> tuple[BilevelState, jax.Array]:
    """P of every step's label, summed up; the state goes through."""
    logits = internvl.apply(config, state.train.params, batch)
    return state, jnp.sum(jnp.exp(losses.label_log_probs(logits, batch.labels)))


def measure(
    config: presets.InternVLConfig,
    settings: list[Setting],
    rate: float,
    estimator: str,
    micro_batch: int | None,
    rounds: int,
) -> list[dict[str, Any]]:
    """One dict a setting; the programs share one state in turn, so that a card need not hold one each."""
    problem = workload.prm_problem(config, workload.TABLE)
    params = internvl.init(config, jax.random.key(0, impl="rbg"))
    holder = {"state": workload.fresh_state(problem, workload.TABLE, params)}
    del params
    state = jax.eval_shape(lambda: holder["state"])

    def build(lowered: Any) -> tuple[Any, float]:
        began = time.perf_counter()
        return lowered.compile(), time.perf_counter() - began

    parts = [lowered_step(config, setting, estimator, micro_batch, state) for setting in settings]
    with ThreadPoolExecutor(max_workers=max(1, min(len(parts), (os.cpu_count() or 2) // 2))) as pool:
        built = list(pool.map(build, [lowered for lowered, _, _ in parts]))

    def run(program: Any, batches: tuple[Batch, Batch]) -> None:
        holder["state"], number = program(holder["state"], *batches)
        jax.block_until_ready(number)

    programs = {
        setting: partial(run, program, jax.device_put(batches))
        for setting, (program, _), (_, batches, _) in zip(settings, built, parts, strict=True)
    }
    seconds = workload.interleave(programs, rounds)
    found = []
    for setting, (program, compile_seconds), (_, _, num_tokens) in zip(settings, built, parts, strict=True):
        median, memory = statistics.median(seconds[setting]), program.memory_analysis()
        rows = setting.batch_size * setting.num_inner_steps
        flops = model_flops(config, setting, num_tokens)
        found.append({
            "program": setting.program + (f" ({estimator})" if setting.program == "bilevel" else ""),
            "B": setting.batch_size,
            "K": setting.num_inner_steps,
            "tiles": setting.num_tiles,
            "tokens": num_tokens,
            "ms": 1e3 * median,
            "examples/s": rows / median,
            "tokens/s": rows * num_tokens / median,
            "model TFLOP": flops / 1e12,
            "share of matrix rate": flops / median / rate,
            "state GiB": memory.argument_size_in_bytes / 2**30,
            "temporary GiB": memory.temp_size_in_bytes / 2**30,
            "compile s": compile_seconds,
        })  # fmt: skip
    return found


def main() -> None:
    """Parses, measures, prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(workload.SIZES), default="wide")
    parser.add_argument("--programs", default=",".join(PROGRAMS), help="comma-separated")
    parser.add_argument("--batch-sizes", default="1,4")
    parser.add_argument("--tiles", default=None, help="of a row, thumbnail included; default 7, wide: 1")
    parser.add_argument("--inner-steps", default="1", help="K of training and bilevel")
    parser.add_argument("--estimator", default="dot", choices=tuple(ESTIMATORS))
    parser.add_argument("--meta-micro-batch", type=int, default=None, help="meta rows at a time; default: all")
    parser.add_argument("--attention", default="auto", choices=("auto", *presets.ATTENTIONS))
    parser.add_argument("--remat", default="none", choices=presets.REMAT_POLICIES)
    parser.add_argument("--scan-unroll", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=Path("step.json"), help="where the figures go")
    args = parser.parse_args()
    programs = args.programs.split(",")
    if not set(programs) <= set(PROGRAMS):
        parser.error(f"--programs={args.programs}: choose from {', '.join(PROGRAMS)}")
    tiles = args.tiles or ("1" if args.size == "wide" else "7")
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    forward_mode = args.estimator not in REVERSE_ONLY
    attention = choose_attention(dtype, forward_mode) if args.attention == "auto" else args.attention
    config = dataclasses.replace(
        workload.SIZES[args.size],
        compute_dtype=dtype,
        attention=attention,
        remat=args.remat,
        scan_unroll=args.scan_unroll,
    )
    settings = [
        Setting(program, batch_size, num_tiles, 1 if program == "scoring" else num_inner_steps)
        for batch_size in map(int, args.batch_sizes.split(","))
        for num_tiles in map(int, tiles.split(","))
        for num_inner_steps in map(int, args.inner_steps.split(","))
        for program in programs
    ]
    settings = list(dict.fromkeys(settings))
    machine = {
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
    }
    rate = matrix_rate(dtype)
    rows = measure(config, settings, rate, args.estimator, args.meta_micro_batch, args.rounds)
    options = {name: str(value) for name, value in vars(args).items()} | {"attention": attention, "dtype": dtype}
    args.json.write_text(
        json.dumps({"machine": machine, "options": options, "matrix_rate": rate, "rows": rows}, indent=2) + "\n"
    )
    print(f"{machine['device']}, jax {machine['jax']}, {args.size}, {dtype}, attention {attention}, remat {args.remat}")
    print(f"matrix product {rate / 1e12:.3g} TFLOP/s, median of {args.rounds} round(s)\n")
    print(workload.markdown(rows))


if __name__ == "__main__":
    main()
