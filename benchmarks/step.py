"""What a step takes: training, a bilevel iteration, scoring; a run writes one table, as JSON and as Markdown.

    python -m benchmarks.step                                                   # two cores: a small model
    python -m benchmarks.step --size internvl3_1b --batch-sizes 1,8 --remat dots    # an accelerator
    python -m benchmarks.step --size internvl3_1b --tiles 1,3,7,13 --programs training
    python -m benchmarks.step --size internvl3_1b --remat full --inner-steps 1,2,4 --estimator mixed

Rows are random, of the shapes given; no data are read. All programs of a run are compiled first, side by side, then run
in turn, round after round, in one process; figures are medians over the rounds. Model flops are those of the products
that the mathematics needs: three forward passes for a gradient (less where a part is frozen), one gradient for a
training step, two for a bilevel iteration, whatever an estimator or remat computes again. The machine's rate is that of
a large matrix product in the compute type, measured before. State and temporary memory are the compiler's figures.
Where the backend counts it, a line also has the device's peak up to its program's first run, which includes the
programs before it and all batches.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import workload
from dreamprm_jax import losses
from dreamprm_jax.hypergradient import ESTIMATORS, REVERSE_ONLY, check_estimator
from dreamprm_jax.models import internvl, presets, trained
from dreamprm_jax.models.layers import choose_attention
from dreamprm_jax.types import Batch, BilevelState

PROGRAMS = ("training", "bilevel", "scoring")
TEXT_TOKENS = 440  # of a row beside its image tokens: with 7 tiles the 2,232 of the longest recorded rows


class Setting(NamedTuple):
    """What one line of the table runs."""

    program: str
    batch_size: int
    num_tiles: int
    num_inner_steps: int


class Options(NamedTuple):
    """How a program is made."""

    estimator: str = "dot"
    micro_batch: int | None = None  # training rows at a time
    meta_micro_batch: int | None = None
    trained: str = "all"  # of `trained.TRAINED`
    moment_dtype: str | None = None


class Case(NamedTuple):
    """One line of the table, and how its program is made."""

    setting: Setting
    config: presets.InternVLConfig
    options: Options


def forward_flops(config: presets.InternVLConfig, num_tiles: int, num_tokens: int) -> float:
    """Flops of one row's forward pass: products alone, attention as much of it as is not masked."""
    vision, language = config.vision, config.language
    patches, width = vision.grid**2, vision.width
    block = 2 * (1 + patches) * width * (4 * width + 2 * vision.mlp_width)
    projected = config.image_tokens_per_tile * language.width
    projector = 2 * projected * (config.shuffle_factor**2 * width + language.width)
    tile = vision.num_layers * block + 2 * patches * 3 * vision.patch_size**2 * width + projector
    head_width = language.width // language.num_heads
    weights = 2 * language.width * head_width * (language.num_heads + language.num_kv_heads)
    weights += 3 * language.width * language.mlp_width
    layer = 2 * num_tokens * weights
    head = 2 * workload.NUM_STEPS * language.width * language.vocab_size
    return num_tiles * tile + language.num_layers * layer + head + attention_flops(config, num_tiles, num_tokens)


def attention_flops(config: presets.InternVLConfig, num_tiles: int, num_tokens: int) -> float:
    """The part of `forward_flops` that is logits and mixtures of values."""
    vision, language = config.vision, config.language
    tile = vision.num_layers * 4 * (1 + vision.grid**2) ** 2 * vision.width
    return float(num_tiles * tile + language.num_layers * 2 * num_tokens**2 * language.width)


def model_flops(config: presets.InternVLConfig, setting: Setting, num_tokens: int, what: str = "all") -> float:
    """Flops of one step: K training batches and, for a bilevel iteration, one meta batch.

    A gradient takes a forward pass, one more for the inputs' part and one more for the kernels' part, where there are
    any: nothing goes back into a frozen tower, and beside adapters (`what`, as `model.trained`; their own products are
    not counted) kernels have no part.
    """
    forward = forward_flops(config, setting.num_tiles, num_tokens) * setting.batch_size
    if setting.program == "scoring":
        return forward
    language = forward_flops(config, 0, num_tokens) * setting.batch_size
    gradient = {"all": 3 * forward, "language": forward + 2 * language, "adapters": forward + language}[what]
    return gradient * (setting.num_inner_steps + (setting.program == "bilevel"))


def computed_here(config: presets.InternVLConfig, forward_mode: bool = False) -> presets.InternVLConfig:
    """A model as this machine computes it: on an accelerator in bfloat16, with fused attention where that serves."""
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return dataclasses.replace(config, compute_dtype=dtype, attention=choose_attention(dtype, forward_mode))


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


def tokens_of_row(config: presets.InternVLConfig, num_tiles: int) -> int:
    """Image tokens and text."""
    return num_tiles * config.image_tokens_per_tile + TEXT_TOKENS


def traced_step(
    config: presets.InternVLConfig, setting: Setting, options: Options, state: Any
) -> tuple[Any, tuple[Batch, Batch]]:
    """(program, batches); the program is a `jax.stages.Traced`, (state, batch, meta_batch) -> (state, number)."""
    bucket = (setting.num_tiles, tokens_of_row(config, setting.num_tiles))
    one, meta = (workload.random_batch(config, [bucket] * setting.batch_size, bucket, seed) for seed in range(2))
    batch = workload.stacked(one, setting.num_inner_steps)
    if setting.program == "scoring":
        step = jax.jit(partial(_score, config), donate_argnums=0)
    else:
        problem_of = partial(
            workload.prm_problem,
            config,
            workload.TABLE,
            num_inner_steps=setting.num_inner_steps,
            micro_batch=options.micro_batch,
            meta_micro_batch=options.meta_micro_batch,
            moment_dtype=options.moment_dtype,
        )
        name = "plain" if setting.program == "training" else options.estimator
        step = workload.jitted(problem_of, workload.TABLE, name)
    return step.trace(state, batch, meta), (batch, meta)


def _score(
    config: presets.InternVLConfig, state: BilevelState, batch: Batch, meta_batch: Batch
) -> tuple[BilevelState, jax.Array]:
    """P of every step's label, summed up; the state goes through."""
    logits = internvl.apply(config, trained.merge(state.train.params, state.frozen), batch)
    return state, jnp.sum(jnp.exp(losses.label_log_probs(logits, batch.labels)))


def device_peak() -> float | None:
    """GiB that were in use at most since the process began; None where the backend does not count."""
    counted = jax.devices()[0].memory_stats() or {}
    return counted["peak_bytes_in_use"] / 2**30 if "peak_bytes_in_use" in counted else None


def device_memory() -> float:
    """Bytes that programs may take; without end where the backend does not say."""
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit", float("inf"))


def begun(config: presets.InternVLConfig, options: Options) -> BilevelState:
    """Both levels at random parameters; free of memory under `jax.eval_shape`."""
    key = jax.random.key(0, impl="rbg")
    choice = trained.Choice(options.trained)
    moved, frozen = trained.part(internvl.init(config, key), choice, config.compute_dtype, key)
    problem = workload.prm_problem(config, workload.TABLE, moment_dtype=options.moment_dtype)
    return workload.fresh_state(problem, workload.TABLE, moved, frozen)


def measure(cases: list[Case], rate: float, rounds: int) -> list[dict[str, Any]]:
    """One dict a case; the programs share one state in turn, so that a card need not hold one each.

    A program that by its compiler's figures does not fit the device is not run, and its line has no figures of a run.

    Raises:
      ValueError: cases that do not train the same, with moments of the same type.
    """
    if len({(case.options.trained, case.options.moment_dtype) for case in cases}) > 1:
        raise ValueError("programs that share a state train the same, with moments of the same type")
    holder = {"state": begun(cases[0].config, cases[0].options)}
    state = jax.eval_shape(lambda: holder["state"])

    def build(traced: Any) -> tuple[Any, float]:
        lowered, began = traced.lower(), time.perf_counter()
        return lowered.compile(), time.perf_counter() - began

    parts = [traced_step(case.config, case.setting, case.options, state) for case in cases]
    with ThreadPoolExecutor(max_workers=max(1, min(len(parts), (os.cpu_count() or 2) // 2))) as pool:
        built = list(pool.map(build, [traced for traced, _ in parts]))
    peaks: dict[Case, float | None] = {}

    def run(case: Case, program: Any, batches: tuple[Batch, Batch]) -> None:
        holder["state"], number = program(holder["state"], *batches)
        jax.block_until_ready(number)
        if case not in peaks:
            peaks[case] = device_peak()

    memory = device_memory()
    programs = {
        case: partial(run, case, program, jax.device_put(batches))
        for case, (program, _), (_, batches) in zip(cases, built, parts, strict=True)
        if sum(bytes_of(program)) <= memory
    }
    seconds = {case: statistics.median(found) for case, found in workload.interleave(programs, rounds).items()}
    return [
        {
            "program": name_of(case),
            **made_as(case),
            **speed(case, seconds.get(case), rate),
            "state GiB": bytes_of(program)[0] / 2**30,
            "temporary GiB": bytes_of(program)[1] / 2**30,
            "device peak GiB": peaks.get(case),
            "compile s": compile_seconds,
        }
        for case, (program, compile_seconds) in zip(cases, built, strict=True)
    ]


def bytes_of(program: Any) -> tuple[int, int]:
    """(arguments, temporary memory) of a compiled program, as its compiler says."""
    memory = program.memory_analysis()
    return memory.argument_size_in_bytes, memory.temp_size_in_bytes


def name_of(case: Case) -> str:
    """The program, a bilevel iteration with its estimator."""
    program = case.setting.program
    return f"{program} ({case.options.estimator})" if program == "bilevel" else program


def made_as(case: Case) -> dict[str, Any]:
    """The columns that say how a program is made."""
    (program, rows, *_), options = case.setting, case.options
    alone = {"training": rows, "bilevel": 1, "scoring": rows}[program]  # rows at a time unless told
    told = None if program == "scoring" else options.micro_batch
    return {
        "remat": None if program == "scoring" else case.config.remat,
        "scan_unroll": case.config.scan_unroll,
        "rows at a time": min(told or alone, rows),
        "meta rows at a time": min(options.meta_micro_batch or rows, rows) if program == "bilevel" else None,
    }


def speed(case: Case, median: float | None, rate: float) -> dict[str, Any]:
    """What a case's median seconds amount to, on a machine of that matrix rate; None: it was not run."""
    setting = case.setting
    rows, num_tokens = setting.batch_size * setting.num_inner_steps, tokens_of_row(case.config, setting.num_tiles)
    flops = model_flops(case.config, setting, num_tokens, case.options.trained)
    return {
        "B": setting.batch_size,
        "K": setting.num_inner_steps,
        "tiles": setting.num_tiles,
        "tokens": num_tokens,
        "ms": median and 1e3 * median,
        "examples/s": median and rows / median,
        "tokens/s": median and rows * num_tokens / median,
        "model TFLOP": flops / 1e12,
        "share of matrix rate": median and flops / median / rate,
    }


def parsed() -> argparse.Namespace:
    """The arguments, checked as far as they can be before anything is compiled."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(workload.SIZES), default="wide")
    parser.add_argument("--programs", default=",".join(PROGRAMS), help="comma-separated")
    parser.add_argument("--batch-sizes", default="1,4")
    parser.add_argument("--tiles", default=None, help="of a row, thumbnail included; default 7, wide: 1")
    parser.add_argument("--inner-steps", default="1", help="K of training and bilevel")
    parser.add_argument("--estimator", default="dot", choices=tuple(ESTIMATORS))
    parser.add_argument("--micro-batch", type=int, default=None, help="rows at a time; default: all, or one for dot")
    parser.add_argument("--meta-micro-batch", type=int, default=None, help="meta rows at a time; default: all")
    parser.add_argument("--attention", default="auto", choices=("auto", *presets.ATTENTIONS))
    parser.add_argument("--remat", default="none", choices=presets.REMAT_POLICIES)
    parser.add_argument("--trained", default="all", choices=trained.TRAINED)
    parser.add_argument("--moment-dtype", default=None, choices=("float32", "bfloat16"))
    parser.add_argument("--scan-unroll", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=Path("step.json"), help="where the figures go; .md beside it")
    args = parser.parse_args()
    programs = args.programs.split(",")
    if not set(programs) <= set(PROGRAMS):
        parser.error(f"--programs={args.programs}: choose from {', '.join(PROGRAMS)}")
    for num_inner_steps in map(int, args.inner_steps.split(",")) if "bilevel" in programs else ():
        try:
            problem = workload.prm_problem(workload.WIDE, workload.TABLE, num_inner_steps=num_inner_steps)
            check_estimator(problem, args.estimator)
        except ValueError as error:
            parser.error(f"--inner-steps={args.inner_steps} --estimator={args.estimator}: {error}")
    return args


def main() -> None:
    """Measures what the arguments ask for, and reports."""
    args = parsed()
    tiles = args.tiles or ("1" if args.size == "wide" else "7")
    config = computed_here(workload.SIZES[args.size], forward_mode=args.estimator not in REVERSE_ONLY)
    config = dataclasses.replace(config, remat=args.remat, scan_unroll=args.scan_unroll)
    if args.attention != "auto":
        config = dataclasses.replace(config, attention=args.attention)
    settings = [
        Setting(program, batch_size, num_tiles, 1 if program == "scoring" else num_inner_steps)
        for batch_size in map(int, args.batch_sizes.split(","))
        for num_tiles in map(int, tiles.split(","))
        for num_inner_steps in map(int, args.inner_steps.split(","))
        for program in args.programs.split(",")
    ]
    settings = list(dict.fromkeys(settings))
    rate = matrix_rate(config.compute_dtype)
    options = Options(args.estimator, args.micro_batch, args.meta_micro_batch, args.trained, args.moment_dtype)
    rows = measure([Case(setting, config, options) for setting in settings], rate, args.rounds)
    taken = vars(args) | {"attention": config.attention, "dtype": config.compute_dtype}
    workload.report(args.json, taken, {"matrix TFLOP/s": rate / 1e12, "rows": rows})


if __name__ == "__main__":
    main()
