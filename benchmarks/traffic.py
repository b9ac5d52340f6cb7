"""What the kernels of a step read and write on an H100 that is not at hand: the programs compiled for it, not run.

    python -m benchmarks.traffic        # InternVL3-1B, 7 tiles and 2,232 tokens; half a minute a program on two cores
    python -m benchmarks.traffic --programs training,bilevel --batch-sizes 8 --micro-batch 4 --meta-micro-batch 4

XLA compiles ahead of time for a card that is described to it. It takes jax's CUDA plugin, but no driver and none of
NVIDIA's libraries: `pip install --no-deps jax-cuda12-pjrt==X jax-cuda12-plugin==X`, X being the version of jax. Where
there is a GPU, `benchmarks.step` measures.

Counted are the kernels of the optimised program, a loop's as often as it turns: the bytes of what each reads and of
what it writes. Of an array that is sliced or gathered from, the slice counts; of one that is updated in place, the
update. Caches are left out, so that what one kernel writes and the next one reads counts twice, whatever its size.
Scratch memory of libraries is left out too. Kinds go by what XLA calls a kernel:

- products: cuBLAS; fused attention: cuDNN;
- XLA's remat: what XLA itself computes again, to save memory;
- pads; copies and transposes, with what is fused into them;
- zeros: broadcasts, which the stacks that loops fill and the sums begin with;
- stacks: what loops write into them, with what is computed on the way there;
- other: everything else, such as norms, activations, sums, reading out of stacks, Adam.

On a card XLA times some of its choices (autotuning). Nothing can be timed here, so that it is told not to, and to make
its products by cuBLAS alone (`XLA_OPTIONS`): the program that runs on a card may differ.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
from jax._src import hardware_utils, xla_bridge
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from benchmarks import roofline, step, workload
from dreamprm_jax.models import presets, trained

DTYPE = "bfloat16"
PLUGIN = ("jax-cuda12-pjrt", "jax-cuda12-plugin")
XLA_OPTIONS = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0}

# XLA's description of the card (GpuTargetConfigProto), as in jax's issue 28376, with newer cuDNN and CUDA.
CARD = "NVIDIA H100 80GB HBM3"
CUDNN = (9, 10)
TARGET = f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84929347584
  shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: {CUDNN[0]} minor: {CUDNN[1]} }}
runtime_version {{ major: 12 minor: 8 }}
device_description_str: "{CARD}"
"""

KINDS = (
    "products",
    "fused attention",
    "XLA's remat",
    "pads",
    "copies and transposes",
    "zeros",
    "stacks",
    "other",
)
LIBRARIES = KINDS[:2]

ITEM_BYTES = {
    **dict.fromkeys(("pred", "s8", "u8"), 1),
    **dict.fromkeys(("bf16", "f16", "s16", "u16"), 2),
    **dict.fromkeys(("f32", "s32", "u32"), 4),
    **dict.fromkeys(("f64", "s64", "u64"), 8),
    "token": 0,
}
VIEWS = ("bitcast", "reshape")  # the same bytes under another shape
NO_KERNEL = (*VIEWS, "parameter", "constant", "tuple", "get-tuple-element", "after-all", "async-done")
SLICES = ("slice", "dynamic-slice", "gather")
IN_PLACE = {"dynamic-update-slice": 1, "scatter": 2}  # which operand is the update of operand 0


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    shape: str  # as XLA writes it: f32[2,3]{1,0}, or several in parentheses
    opcode: str
    operands: tuple[str, ...]  # names
    is_root: bool
    calls: str | None  # the computation of a fusion, a call or a loop's body
    turns: int | None  # of a loop, where XLA knows them
    target: str  # of a custom call


Computations = dict[str, list[Instruction]]


class Kernel(NamedTuple):
    """What one kernel moves each time it runs, in bytes."""

    name: str
    kind: str  # of KINDS
    times: int
    read: int
    written: int

    @property
    def moved(self) -> int:
        """Bytes, of all the times."""
        return self.times * (self.read + self.written)


def arrays(shape: str) -> list[tuple[str, int]]:
    """(type, bytes) of every array of a shape.

    Raises:
      ValueError: a type whose width is not known here.
    """
    found = []
    for dtype, sides in re.findall(r"(\w+)\[([\d,]*)\]", shape):
        if dtype not in ITEM_BYTES:
            raise ValueError(f"{shape}: how wide is {dtype}?")
        found.append((dtype, ITEM_BYTES[dtype] * math.prod(int(side) for side in sides.split(",") if side)))
    return found


def num_bytes(shape: str) -> int:
    """Of all arrays of a shape."""
    return sum(size for _, size in arrays(shape))


def computations_of(text: str) -> tuple[Computations, str]:
    """The computations of a program as XLA prints it, and the name of the one that it begins with."""
    computations: Computations = {}
    name = entry = ""
    for line in text.splitlines():
        if begun := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$", line):
            name = begun[2]
            computations[name] = []
            entry = name if begun[1] else entry
        elif found := re.match(r"\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$", line):
            computations[name].append(_instruction(*found.groups()))
    return computations, entry


def _instruction(root: str | None, name: str, shape: str, opcode: str, rest: str) -> Instruction:
    """Of the parts of a line; `rest` is what follows the parenthesis that opens the operands."""

    def attribute(pattern: str) -> str | None:
        found = re.search(pattern, rest)
        return found[1] if found else None

    depth, end = 1, 0
    while depth and end < len(rest):
        depth += (rest[end] == "(") - (rest[end] == ")")
        end += 1
    turns = attribute(r'"known_trip_count":\{"n":"(\d+)"')
    return Instruction(
        name=name,
        shape=shape,
        opcode=opcode,
        operands=tuple(re.findall(r"%([\w.\-]+)", rest[:end])),
        is_root=bool(root),
        calls=attribute(r"\b(?:calls|body|to_apply)=%?([\w.\-]+)"),
        turns=None if turns is None else int(turns),
        target=attribute(r'custom_call_target="([^"]*)"') or "",
    )


def moved_by_fusion(computation: list[Instruction]) -> tuple[int, int]:
    """Bytes that a fusion reads and writes: slices of what it slices, updates of what it updates in place."""
    named = {each.name: each for each in computation}
    users = defaultdict(list)
    for each in computation:
        for operand in each.operands:
            users[operand].append(each)

    def uses(source: Instruction) -> Iterator[int]:
        """Bytes that each use of an array reads of it, through views."""
        for user in users[source.name]:
            if user.opcode in VIEWS:
                yield from uses(user)
            elif user.opcode in SLICES and source.name == user.operands[0]:
                yield num_bytes(user.shape)
            elif user.opcode in IN_PLACE and source.name == user.operands[0]:
                # A scatter adds to what is there, an update replaces it.
                update = named[user.operands[IN_PLACE[user.opcode]]]
                yield num_bytes(update.shape) if user.opcode == "scatter" else 0
            else:
                yield num_bytes(source.shape)

    def written(output: Instruction) -> int:
        while output.opcode in VIEWS:
            output = named[output.operands[0]]
        update = IN_PLACE.get(output.opcode)
        return num_bytes((output if update is None else named[output.operands[update]]).shape)

    root = next(each for each in computation if each.is_root)
    outputs = [named[name] for name in root.operands] if root.opcode == "tuple" else [root]
    parameters = [each for each in computation if each.opcode == "parameter"]
    # An array that is read whole is read once, however many use it.
    read = sum(min(sum(uses(each)), num_bytes(each.shape)) for each in parameters)
    return read, sum(map(written, outputs))


def moved_by(instruction: Instruction, shapes: dict[str, str], computations: Computations) -> tuple[int, int]:
    """Bytes that a kernel reads and writes; `shapes`: of all instructions beside it."""
    if instruction.opcode == "fusion":
        return moved_by_fusion(computations[instruction.calls])
    if instruction.opcode in SLICES:
        return num_bytes(instruction.shape), num_bytes(instruction.shape)
    if instruction.opcode == "dynamic-update-slice":
        update = num_bytes(shapes[instruction.operands[1]])
        return update, update
    read, outputs = sum(num_bytes(shapes[name]) for name in instruction.operands), arrays(instruction.shape)
    if instruction.opcode == "custom-call" and len(outputs) > 1 and outputs[-1][0] in ("s8", "u8"):
        outputs = outputs[:-1]  # a library's scratch memory, of which nobody says how much it uses
    return read, sum(size for _, size in outputs)


def kind_of(instruction: Instruction) -> str:
    """One of KINDS."""
    label = f"{instruction.opcode} {instruction.name}".replace("-", "_")  # XLA names a fusion by what it ends in
    if "cublas" in instruction.target:
        return "products"
    if "fmha" in instruction.target:
        return "fused attention"
    if ".remat" in label:
        return "XLA's remat"
    if label.startswith("pad ") or "pad_fusion" in label:
        return "pads"
    if "copy" in label or "transpose" in label:
        return "copies and transposes"
    # Alone: broadcast_select_fusion is Adam, with the choice whether to take its step.
    if label.startswith("broadcast ") or "broadcast_fusion" in label or "wrapped_broadcast" in label:
        return "zeros"
    return "stacks" if "dynamic_update_slice" in label else "other"


def kernels(text: str) -> list[Kernel]:
    """The kernels of an optimised program as XLA prints it.

    Raises:
      ValueError: a loop that does not say how often it turns, or a choice between computations.
    """
    computations, entry = computations_of(text)
    found = []

    def visit(name: str, times: int) -> None:
        shapes = {each.name: each.shape for each in computations[name]}
        for each in computations[name]:
            if each.opcode == "while" and each.turns is None:
                raise ValueError(f"{each.name}: how often the loop turns is known when it runs")
            if each.opcode == "conditional":
                raise ValueError(f"{each.name}: what is run is known when it runs")
            if each.opcode in ("while", "call", "async-start"):
                visit(each.calls, times * (each.turns or 1))
            elif each.opcode not in NO_KERNEL:
                found.append(Kernel(each.name, kind_of(each), times, *moved_by(each, shapes, computations)))

    visit(entry, 1)
    return found


@contextlib.contextmanager
def as_the_card() -> Iterator[None]:
    """While a program is traced and compiled: jax takes the card for the GPU at hand.

    Describing a card is enough for XLA, not for jax (its issues 23971 and 28376): lowering asks which GPUs there are
    to find out whose rules to take, and fused attention asks the card and cuDNN for their versions.
    """
    known = xla_bridge.canonicalize_platform
    attention = fused_attention_stablehlo
    with contextlib.ExitStack() as stack:
        for where, name, answer in (
            (xla_bridge, "canonicalize_platform", lambda name: "cuda" if name in ("gpu", "cuda") else known(name)),
            (attention, "check_cudnn_version", lambda: 10_000 * CUDNN[0] + 100 * CUDNN[1]),
            (attention, "check_compute_capability", lambda at_least: float(at_least) <= 9.0),
        ):
            stack.enter_context(mock.patch.object(where, name, answer))
        stack.enter_context(roofline.as_an_accelerator())
        yield


def compiled(config: presets.InternVLConfig, setting: step.Setting, options: step.Options) -> Any:
    """A program of `benchmarks.step`, compiled for the card; nothing is allocated."""
    jax.devices()  # has jax find its plugins
    card = topologies.get_topology_desc(platform="cuda", target_config=TARGET, topology="1x1x1").devices[0]
    place = SingleDeviceSharding(card)
    state = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        jax.eval_shape(lambda: step.begun(config, options)),
    )
    with as_the_card():
        traced, _ = step.traced_step(config, setting, options, state)
        return traced.lower(lowering_platforms=("cuda",)).compile(compiler_options=XLA_OPTIONS)


def line(config: presets.InternVLConfig, setting: step.Setting, options: step.Options) -> dict[str, Any]:
    """One line of the table: GiB of memory, GB (10^9 bytes) moved."""
    program = compiled(config, setting, options)
    moved = Counter(dict.fromkeys(KINDS, 0))
    for kernel in kernels(program.as_text()):
        moved[kernel.kind] += kernel.moved
    state, temporary = step.bytes_of(program)
    case = step.Case(setting, config, options)
    return {
        "program": step.name_of(case),
        "B": setting.batch_size,
        "trained": options.trained,
        "moments": options.moment_dtype or "float32",
        **step.made_as(case),
        "state GiB": state / 2**30,
        "temporary GiB": temporary / 2**30,
        **{f"{kind} GB": moved[kind] / 1e9 for kind in KINDS},
        "sum without products and attention GB": sum(moved[kind] for kind in KINDS if kind not in LIBRARIES) / 1e9,
        "figures": "computed",
    }


def refusal() -> str | None:
    """Why nothing can be compiled here; None where it can."""
    if hardware_utils.has_visible_nvidia_gpu():
        return "this is for machines without a GPU, and here is one: benchmarks.step measures"
    try:
        versions = {metadata.version(name) for name in PLUGIN}
    except metadata.PackageNotFoundError:
        versions = set()
    if versions == {jax.__version__}:
        return None
    wanted = " ".join(f"{name}=={jax.__version__}" for name in PLUGIN)
    return f"jax's CUDA plugin of this jax is not installed: pip install --no-deps {wanted}"


def parsed() -> argparse.Namespace:
    """The arguments, checked before anything is compiled."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(workload.SIZES), default="internvl3_1b")
    parser.add_argument("--programs", default="training,bilevel", help="comma-separated")
    parser.add_argument("--batch-sizes", default="1,8")
    parser.add_argument("--tiles", type=int, default=7, help="of a row, thumbnail included")
    parser.add_argument("--micro-batch", type=int, default=None, help="rows at a time; default: all, or one for dot")
    parser.add_argument("--meta-micro-batch", type=int, default=None, help="meta rows at a time; default: all")
    parser.add_argument("--remat", default="dots", choices=presets.REMAT_POLICIES)
    parser.add_argument("--scan-unroll", type=int, default=1)
    parser.add_argument("--trained", default="all", choices=trained.TRAINED)
    parser.add_argument("--moment-dtype", default=None, choices=("float32", "bfloat16"))
    parser.add_argument("--json", type=Path, default=Path("traffic.json"), help="where the figures go; .md beside it")
    args = parser.parse_args()
    if not set(args.programs.split(",")) <= set(step.PROGRAMS):
        parser.error(f"--programs={args.programs}: choose from {', '.join(step.PROGRAMS)}")
    if reason := refusal():
        parser.exit(2, f"error: {reason}\n")
    return args


def main() -> None:
    """Compiles and counts what the arguments ask for, and reports."""
    args = parsed()
    jax.config.update("jax_platforms", "cpu")  # the plugin is for the compiler: it finds no driver to start
    config = dataclasses.replace(
        workload.SIZES[args.size],
        compute_dtype=DTYPE,
        attention="cudnn",
        remat=args.remat,
        scan_unroll=args.scan_unroll,
    )
    options = step.Options(
        micro_batch=args.micro_batch,
        meta_micro_batch=args.meta_micro_batch,
        trained=args.trained,
        moment_dtype=args.moment_dtype,
    )
    rows = [
        line(config, step.Setting(program, batch_size, args.tiles, 1), options)
        for batch_size in map(int, args.batch_sizes.split(","))
        for program in args.programs.split(",")
    ]
    taken = vars(args) | {"dtype": DTYPE, "attention": "cudnn", "cudnn": ".".join(map(str, CUDNN))} | XLA_OPTIONS
    taken |= {name: metadata.version(name) for name in PLUGIN}
    numbers = {"compiled for": f"{CARD}, on a machine without one: computed, not measured"}
    workload.report(args.json, taken, {**numbers, "Bytes that kernels read and write": rows})


if __name__ == "__main__":
    main()
