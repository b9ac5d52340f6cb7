"""What a step costs at least on chips that are not at hand: counted in the programs of `benchmarks.step`, not run.

    python -m benchmarks.roofline       # InternVL3-1B, 7 tiles and 2,232 tokens; a few minutes on two cores

The programs are traced for abstract arrays, in bfloat16 and as an accelerator takes them, and compiled by the backend
at hand, which says what memory they take there. All else is arithmetic:

- Program flops: the products of the traced program, a loop's as often as it turns. XLA's own count takes a loop's body
  once, and there is a loop over the layers. Fused attention leaves out what is masked, and its gradient forms the
  logits again: 5 products where the forward pass has 2.
- Moved bytes: what is too large for a chip's caches and has to pass through its memory. Weights, each time a pass comes
  to them; gradients and what the estimator makes of them; parameters and moments; activations that are kept for the
  backward pass, written and read; logits. What passes between the operations of a layer would come on top.
- A chip without fused attention takes XLA's, with all the logits of a layer in memory: more flops, bytes and memory.
- Bound: the longer of flops by peak rate and bytes by bandwidth. No step is faster; real ones are slower.
- Memory: the state and the temporary memory of the program, as XLA plans it for an H100 (`benchmarks.traffic`),
  or else arrays of the parameters' size and kept activations added up.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import time
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from benchmarks import step, workload
from dreamprm_jax.inner import Problem
from dreamprm_jax.models import internvl, presets
from dreamprm_jax.models.layers import choose_attention
from dreamprm_jax.types import Batch

DTYPE, DTYPE_BYTES, FLOAT32 = "bfloat16", 2, 4
REMATS = ("dots", "full")  # "none" keeps the logits of XLA's attention: nothing to run at this size
ESTIMATOR = "dot"


class Chip(NamedTuple):
    """Published figures of one chip."""

    name: str
    peak: float  # flops per second of dense bfloat16 products
    bandwidth: float  # bytes per second of its memory
    memory: float  # bytes; the published GB as 10^9, the smaller reading
    fused: bool = True  # whether `models.layers` has fused attention for it


# NVIDIA's data sheets of the A100 (40 GB: that of 2020), H100 and H200 Tensor Core GPU, SXM, whose rates with sparsity
# are twice these; Google's page "Cloud TPU v5e".
H100 = Chip("H100", 989e12, 3.35e12, 80e9)
CHIPS = (
    Chip("A100 40 GB", 312e12, 1.555e12, 40e9),
    Chip("A100 80 GB", 312e12, 2.039e12, 80e9),
    H100,
    Chip("H200", 989e12, 4.8e12, 141e9),
    Chip("TPU v5e", 197e12, 0.819e12, 16e9, fused=False),
)

# (program, B, remat) -> ms of one H100, of an earlier version of the programs: docs/performance.md; 7 tiles, meta rows
# one at a time.
MEASURED = {
    ("training", 1, "dots"): 96.5,
    ("bilevel", 1, "dots"): 182.6,
    ("scoring", 1, None): 23.1,
    ("training", 8, "dots"): 522.9,
    ("bilevel", 8, "dots"): 1402.0,
    ("scoring", 8, None): 139.7,
}
# The same, as they are -> temporary GiB, as XLA plans it for an H100: benchmarks/traffic.py.
PLANNED = {
    ("training", 1, "dots"): 7.6,
    ("training", 1, "full"): 3.3,
    ("bilevel", 1, "dots"): 14.1,
    ("bilevel", 1, "full"): 6.5,
    ("scoring", 1, None): 0.7,
    ("training", 8, "dots"): 43.6,
    ("training", 8, "full"): 8.1,
    ("bilevel", 8, "dots"): 32.9,
    ("bilevel", 8, "full"): 29.1,
    ("scoring", 8, None): 1.6,
}
PAPER_ITERATIONS = 100_000


def products(jaxpr: Jaxpr) -> tuple[int, int]:
    """Flops (2 m n k) of a program's products without and with batch axes, loops counted as often as they turn.

    Those with batch axes are attention's: its heads.

    Raises:
      ValueError: a product in a loop that does not say how often it turns.
    """
    found = [0, 0]
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            (contracted, _), (batched, _) = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            size = math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
            found[bool(batched)] += 2 * size
        bodies = [products(inner) for value in equation.params.values() for inner in _programs(value)]
        if name == "while" and any(map(any, bodies)):
            raise ValueError("a product in a while loop: how often it turns is known when it runs")
        turns = equation.params["length"] if name == "scan" else 1
        for kind in range(2):
            counts = [body[kind] for body in bodies]
            found[kind] += turns * (max(counts) if name == "cond" else sum(counts))
    return found[0], found[1]


def _programs(value: Any) -> list[Jaxpr]:
    """The programs in a parameter of an equation: one, or those of a branch."""
    values = value if isinstance(value, tuple | list) else [value]
    inner = [each.jaxpr if isinstance(each, ClosedJaxpr) else each for each in values]
    return [each for each in inner if isinstance(each, Jaxpr)]


def as_an_accelerator() -> contextlib.AbstractContextManager:
    """While tracing: the attention of an accelerator, not the one in blocks that suits a CPU's cache."""
    if jax.default_backend() != "cpu":
        return contextlib.nullcontext()
    return mock.patch.object(jax, "default_backend", return_value="an accelerator")


def turns_of(setting: step.Setting, micro_batch: int) -> int:
    """How often a bilevel iteration goes through the layers for a gradient: `dot` takes training rows in turn."""
    return setting.batch_size + setting.batch_size // micro_batch


def attention_flops(config: presets.InternVLConfig, setting: step.Setting) -> float:
    """Flops of fused attention in one step, whatever is computed again included."""
    num_tokens = step.tokens_of_row(config, setting.num_tiles)
    forward = setting.batch_size * step.attention_flops(config, setting.num_tiles, num_tokens)
    if setting.program == "scoring":
        return forward
    gradient = (1 + 2.5 + (config.remat == "full")) * forward
    return gradient * (2 if setting.program == "bilevel" else 1)


def kept_bytes(config: presets.InternVLConfig, problem: Problem, params: Any, batch: Batch) -> int:
    """Bytes of the activations that a gradient of the batch's losses keeps for its way back; XLA's attention traced.

    `params`: in the compute type, since what is cast is counted by itself.
    """

    def way_back(params: Any, batch: Batch) -> Any:
        return jax.vjp(lambda params: problem.losses(params, batch)[0], params)[1]

    with as_an_accelerator():
        program = jax.make_jaxpr(way_back)(params, batch).jaxpr
    given = {id(variable) for variable in (*program.invars, *program.constvars)}
    kept = {id(variable): variable.aval for variable in program.outvars if not isinstance(variable, Literal)}
    size = sum(aval.size * aval.dtype.itemsize for name, aval in kept.items() if name not in given)
    if config.remat == "full":
        return size
    # Fused attention's output, and a float32 for each head and position, which XLA's attention forms again.
    vision, language = config.vision, config.language
    num_rows, num_tokens = batch.tokens.shape
    num_patches = num_rows * batch.tiles.shape[1] * (1 + vision.grid**2)
    size += vision.num_layers * num_patches * (DTYPE_BYTES * vision.width + FLOAT32 * vision.num_heads)
    return size + language.num_layers * num_rows * num_tokens * (
        DTYPE_BYTES * language.width + FLOAT32 * language.num_heads
    )


class Sizes(NamedTuple):
    """Bytes that several figures are made of."""

    params: int
    computed: int  # the parameters, and so a gradient, with those that stand in products in the compute type
    cast: int  # of these: what is a copy
    first: int  # of a gradient: what the way back comes to first, the language model's layers and a head of its own
    embedding: int  # of the parameters: a pass reads a few rows of it
    logits: int  # of a row
    kept: int  # at a time: activations for the way back
    heads: int  # at a time: the logits of all layers' attention
    heads_of_layer: int  # the most of them in one layer
    forward: int  # the largest arrays of a forward pass alone


def sizes(
    config: presets.InternVLConfig, setting: step.Setting, micro_batch: int, problem: Problem, params: Any
) -> Sizes:
    """The sizes for a setting; nothing is allocated."""
    language = config.language
    # Training takes its rows at once, an iteration a row or a part of the meta batch.
    at_once = micro_batch if setting.program == "bilevel" else setting.batch_size
    bucket = (setting.num_tiles, step.tokens_of_row(config, setting.num_tiles))
    batch = workload.random_batch(config, [bucket] * at_once, bucket, 0)
    embedding, vision, patches = language.vocab_size * language.width, config.vision, 1 + config.vision.grid**2
    tiles_heads = FLOAT32 * at_once * setting.num_tiles * vision.num_heads * patches**2
    text_heads = FLOAT32 * at_once * language.num_heads * bucket[1] ** 2
    computed = jax.eval_shape(problem.cast_to_compute, params)
    leaves, head = jax.tree.leaves(computed), 0 if language.tie_embeddings else embedding  # one of its own
    return Sizes(
        params=FLOAT32 * sum(leaf.size for leaf in leaves),
        computed=_num_bytes(leaves),
        cast=_copied(computed),
        first=_num_bytes(jax.tree.leaves(computed["language"]["layers"])) + FLOAT32 * head,  # as its product has it
        embedding=FLOAT32 * head,  # which is all that reads a tied one whole
        logits=FLOAT32 * workload.NUM_STEPS * language.vocab_size,
        kept=0 if setting.program == "scoring" else kept_bytes(config, problem, computed, batch),
        heads=vision.num_layers * tiles_heads + language.num_layers * text_heads,
        heads_of_layer=max(tiles_heads, text_heads),
        forward=max(
            # The layers' kernels in the compute type, before and after an activation, before and after a residual sum.
            _copied(computed[name]["layers"]) + 2 * DTYPE_BYTES * at_once * positions * (tower.mlp_width + tower.width)
            for name, tower, positions in (
                ("vision", vision, setting.num_tiles * patches),
                ("language", language, bucket[1]),
            )
        ),
    )


def _copied(computed: Any) -> int:
    """Bytes of what is cast, in a tree of the parameters as they are computed with."""
    return _num_bytes([leaf for leaf in jax.tree.leaves(computed) if leaf.dtype.itemsize < FLOAT32])


def _num_bytes(leaves: list[Any]) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def moved_bytes(
    config: presets.InternVLConfig, setting: step.Setting, micro_batch: int, size: Sizes
) -> dict[str, float]:
    """Bytes that a step moves at least, by what they are; "heads": only where attention is not fused."""
    passes = 2 + (config.remat == "full")  # of a gradient, through the weights
    weights, params, rows = size.computed - size.embedding, size.params, setting.batch_size
    casts = size.params - (size.computed - size.cast) + size.cast  # what is cast is read, and the copy written
    if setting.program == "scoring":
        moved = {"weights": casts + weights, "gradients": 0, "optimizer": 0, "kept": 0}
        moved |= {"logits": 2 * rows * size.logits, "heads": 2 * size.heads}
    elif setting.program == "training":
        # The gradient is written and read; parameters and both moments are read and written.
        moved = {"weights": casts + passes * weights, "gradients": 2 * size.computed, "optimizer": 6 * params}
        moved |= {"kept": 2 * size.kept, "logits": 4 * rows * size.logits}
        moved["heads"] = 3 * 2 * size.heads  # forward, again for the way back, and their gradient
    else:
        turns, meta_turns = turns_of(setting, micro_batch), rows // micro_batch
        gradients = 2 * rows * size.computed + params  # every row's: written, and read for their sum, which is written
        gradients += meta_turns * size.computed  # the meta gradient
        gradients += (meta_turns - 1) * (size.computed + 2 * params)  # added up in float32 where it comes in parts
        gradients += rows * (size.computed + params)  # slopes: every row's gradient and u
        # The step reads the sum, parameters and moments and writes the last two; its way back reads the sum, the new
        # moments and the meta gradient and writes u.
        moved = {"weights": 2 * casts + passes * turns * weights, "gradients": gradients, "optimizer": (7 + 5) * params}
        moved |= {"kept": 2 * turns * size.kept, "logits": 4 * 2 * rows * size.logits}
        moved["heads"] = 3 * 2 * turns * size.heads
    return {name: float(value) for name, value in moved.items()}


def temporary_bytes(setting: step.Setting, micro_batch: int, size: Sizes) -> float:
    """Bytes of temporary memory, from the arrays that have to be there at once."""
    if setting.program == "scoring":
        return float(size.forward)
    if setting.program == "training":  # when the way back begins: later, activations make room for the gradient
        return float(size.kept + size.cast + size.first)
    # Every row's gradient, their weighted sum, and the meta gradient: in float32, with a part, where it is added up.
    meta = 2 * size.params if setting.batch_size > micro_batch else size.computed
    return float(setting.batch_size * size.computed + size.params + meta + size.kept + size.cast)


def compiled(traced: Any) -> dict[str, Any]:
    """What the backend at hand says of a program: memory, and its own count of flops (loops once)."""
    began = time.perf_counter()
    program = traced.lower().compile()
    seconds, memory = time.perf_counter() - began, program.memory_analysis()
    found = {
        f"{name} GiB": getattr(memory, f"{field}_size_in_bytes") / 2**30
        for name, field in (("argument", "argument"), ("output", "output"), ("alias", "alias"), ("temporary", "temp"))
    }
    cost = program.cost_analysis() or {}
    return found | {
        "TFLOP, loops once": cost.get("flops", math.nan) / 1e12,
        "GB accessed, loops once": cost.get("bytes accessed", math.nan) / 1e9,
        "compile s": seconds,
    }


class Program(NamedTuple):
    """What is known of one program before any chip is looked at; flops and bytes."""

    setting: step.Setting
    remat: str | None  # None: there is no way back
    model_flops: float
    fused_flops: float
    xla_flops: float  # with XLA's attention
    moved: dict[str, float]
    state: float  # parameters, and moments where they are needed
    temporary: float
    heads_of_layer: float  # logits and their gradient, on top of `temporary` where attention is not fused
    kept: float
    largest: float  # the largest parameter, which one chip of several has to gather
    measured_ms: float | None  # on an H100

    @property
    def name(self) -> dict[str, Any]:
        """The first columns of every table."""
        program = self.setting.program + (f" ({ESTIMATOR})" if self.setting.program == "bilevel" else "")
        return {"program": program, "B": self.setting.batch_size, "remat": self.remat}

    def moved_on(self, chip: Chip) -> float:
        """Bytes."""
        return sum(self.moved.values()) - (self.moved["heads"] if chip.fused else 0.0)

    def temporary_on(self, chip: Chip) -> float:
        """Bytes."""
        return self.temporary + (0.0 if chip.fused else self.heads_of_layer)


def analyse(size: str, config: presets.InternVLConfig, setting: step.Setting) -> tuple[Program, dict[str, Any]]:
    """A program's figures, and the line that says what was traced and compiled."""
    micro_batch = 1
    problem = workload.prm_problem(config, workload.TABLE, meta_micro_batch=micro_batch)
    params = jax.eval_shape(lambda: internvl.init(config, jax.random.key(0)))
    state = jax.eval_shape(lambda params: workload.fresh_state(problem, workload.TABLE, params), params)
    attention = choose_attention(DTYPE, forward_mode=False)
    with as_an_accelerator():
        options = step.Options(ESTIMATOR, meta_micro_batch=micro_batch)
        counted, _ = step.traced_step(config, setting, options, state)
        taken = dataclasses.replace(config, attention=attention)
        to_compile, _ = step.traced_step(taken, setting, options, state)
    plain, batched = products(counted.jaxpr.jaxpr)
    found = sizes(config, setting, micro_batch, problem, params)
    remat = None if setting.program == "scoring" else config.remat
    known = (*setting[:2], remat) if size == "internvl3_1b" and setting.num_tiles == 7 else None
    ms, gib = MEASURED.get(known), PLANNED.get(known)
    computed = temporary_bytes(setting, micro_batch, found)
    program = Program(
        setting=setting,
        remat=remat,
        model_flops=step.model_flops(config, setting, step.tokens_of_row(config, setting.num_tiles)),
        fused_flops=plain + attention_flops(config, setting),
        xla_flops=float(plain + batched),
        moved=moved_bytes(config, setting, micro_batch, found),
        state=found.params * (1.0 if setting.program == "scoring" else 3.0),
        temporary=computed if gib is None else gib * 2**30,
        heads_of_layer=found.heads_of_layer * (1.0 if setting.program == "scoring" else 2.0),
        kept=found.kept,
        largest=FLOAT32 * max(leaf.size for leaf in jax.tree.leaves(params)),
        measured_ms=ms,
    )
    line = program.name | {
        "model TFLOP": program.model_flops / 1e12,
        "fused TFLOP": program.fused_flops / 1e12,
        "XLA attention TFLOP": program.xla_flops / 1e12,
        "temporary GiB, computed": computed / 2**30,
        "temporary GiB, planned for an H100": gib,
        **compiled(to_compile),
    }
    return program, line


def chips_needed(program: Program, chip: Chip) -> int | None:
    """How many chips hold the program if FSDP divides what is as large as the parameters; None: activations alone fail.

    A step's rows are divided too where they are taken at once; where they are taken in turn, every chip holds one row's
    activations. Where there are several chips, each gathers the largest parameter.
    """
    needed = program.state + program.temporary_on(chip)
    if needed <= chip.memory:
        return 1
    # Of a forward pass all temporary memory is activations; of a gradient, those kept and the logits of a layer.
    whole = program.temporary_on(chip)
    if program.setting.program != "scoring":
        whole += program.kept - program.temporary
    divided = needed - whole
    rows_at_once = 1 if program.setting.program == "bilevel" else program.setting.batch_size
    for count in range(2, 1025):
        share = -(-rows_at_once // count) / rows_at_once
        if divided / count + whole * share + program.largest <= chip.memory:
            return count
    return None


def bound(program: Program, chip: Chip) -> dict[str, Any]:
    """One line: what the chip's peak and bandwidth allow, and whether its memory suffices."""
    by_compute = (program.fused_flops if chip.fused else program.xla_flops) / chip.peak
    by_memory = program.moved_on(chip) / chip.bandwidth
    seconds = max(by_compute, by_memory)
    needed = program.state + program.temporary_on(chip)
    return {
        "chip": chip.name,
        **program.name,
        "compute ms": 1e3 * by_compute,
        "memory ms": 1e3 * by_memory,
        "bound by": "compute" if by_compute >= by_memory else "memory",
        "share of peak, at most": program.model_flops / seconds / chip.peak,
        "rows/s, at most": program.setting.batch_size / seconds,
        "GiB": needed / 2**30,
        "fits": "yes" if needed <= chip.memory else "no",
        "chips": chips_needed(program, chip),
        "figures": "computed",
    }


def paper(program: Program, chip: Chip) -> dict[str, Any]:
    """One line: 100,000 iterations at the bound, and at the share of the peak that an H100 was measured at."""
    line = bound(program, chip)
    hours = PAPER_ITERATIONS / 3600
    measured = None
    if program.measured_ms is not None:
        share = program.model_flops / (program.measured_ms / 1e3) / H100.peak
        measured = program.model_flops / (share * chip.peak) * hours
    return {
        "chip": chip.name,
        "remat": program.remat,
        "hours at the bound": max(line["compute ms"], line["memory ms"]) / 1e3 * hours,
        "hours at the H100's share of peak": measured,
        **{name: line[name] for name in ("GiB", "fits", "chips", "figures")},
    }


def main() -> None:
    """Analyses what the arguments ask for, and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(workload.SIZES), default="internvl3_1b")
    parser.add_argument("--batch-sizes", default="1,8")
    parser.add_argument("--tiles", type=int, default=7, help="of a row, thumbnail included")
    parser.add_argument("--remat", default=",".join(REMATS), help="comma-separated")
    parser.add_argument("--json", type=Path, default=Path("roofline.json"), help="where the figures go; .md beside it")
    args = parser.parse_args()
    remats, batch_sizes = args.remat.split(","), list(map(int, args.batch_sizes.split(",")))
    if not set(remats) <= set(REMATS):
        parser.error(f"--remat={args.remat}: choose from {', '.join(REMATS)}")
    config = dataclasses.replace(workload.SIZES[args.size], compute_dtype=DTYPE, attention="xla")
    found = [
        analyse(args.size, dataclasses.replace(config, remat=remat), step.Setting(name, batch_size, args.tiles, 1))
        for remat in remats
        for batch_size in batch_sizes
        for name in step.PROGRAMS
        if name != "scoring" or remat == remats[0]  # its program has no way back, and so no remat
    ]
    programs = [program for program, _ in found]
    moved = [
        program.name | {f"{what} GB": value / 1e9 for what, value in program.moved.items()}
        | {"figures": "computed"}
        for program in programs
    ]  # fmt: skip
    iterations = [each for each in programs if each.setting[:2] == ("bilevel", 1)]
    tables = {
        f"Programs, compiled for {jax.default_backend()}": [line for _, line in found],
        "Bytes moved at least": moved,
        "Bounds": [bound(program, chip) for chip in CHIPS for program in programs],
        f"{PAPER_ITERATIONS:,} iterations, B = 1": [paper(each, chip) for chip in CHIPS for each in iterations],
    }
    workload.report(args.json, vars(args) | {"dtype": DTYPE}, tables)


if __name__ == "__main__":
    main()
