"""How the cost of a step grows with the devices: what each one computes, keeps and sends, beside what theory says.

    python -m benchmarks.scaling                                    # compiled for 1, 2, 4, 8 forced host devices
    python -m benchmarks.scaling --size internvl3_1b --computed     # from shapes alone: 8 accelerators

Strong scaling: as many rows whatever the devices; weak: a row for each. Nothing is run, and no time is taken: forced
devices share the cores of one machine. Products and collectives are read off the compiled program, a loop's body as
often as it turns (`benchmarks/collectives.py`); theory is `benchmarks/communication.py`. A kernel's gradient counts
as an all-reduce over fsdp, as XLA's CPU compiler writes it; where reduce-scatters are written it is half of that.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import collectives, communication, workload
from benchmarks.communication import Volume, Work
from dreamprm_jax import bilevel, optimizers, sharding
from dreamprm_jax.hypergradient import ESTIMATORS
from dreamprm_jax.inner import inner_steps
from dreamprm_jax.models import internvl, presets
from dreamprm_jax.sharding import Layout
from dreamprm_jax.types import Batch, BilevelState

# All that may be divided can be divided by 8, and no two of the sizes that are told apart by are equal.
SMALL = presets.InternVLConfig(
    vision=presets.VisionConfig(width=64, num_layers=3, num_heads=8, mlp_width=320, image_size=112),
    language=presets.LanguageConfig(
        vocab_size=1792, width=192, num_layers=2, num_heads=8, num_kv_heads=8, mlp_width=448
    ),
)
SIZES = {"small": SMALL, **{name: presets.PRESETS[name] for name in ("internvl3_1b", "internvl3_8b", "internvl3_14b")}}
TEXT_TOKENS = 64  # of a row of SMALL, beside one tile
PROGRAMS = ("training", "dot", "tangent_recomputed", "scoring")
LAYOUTS = (Layout(8, 1, 1), Layout(1, 8, 1), Layout(4, 1, 2), Layout(2, 4, 1))  # of the computed table
LINKS = {"NVLink": 450e9, "network": 50e9}  # bytes/s that a device sends: NVLink 4 of an H100 SXM; 400 Gbit/s
COMPUTE_MS = 183  # of a bilevel iteration at one row a card, one H100: measured (docs/performance.md)

# The code for the machine is never run: the divided program is all that is looked at.
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


class Setting(NamedTuple):
    """One line of the table."""

    program: str  # of PROGRAMS
    layout: Layout
    num_rows: int


def work_of(config: presets.InternVLConfig, setting: Setting) -> Work:
    """What theory has to know of a setting of one tile a row."""
    num_tokens = config.image_tokens_per_tile + TEXT_TOKENS
    return Work(config, setting.layout, setting.num_rows, 1, num_tokens, workload.NUM_STEPS)


def compiled_step(config: presets.InternVLConfig, setting: Setting) -> Any:
    """The program of a setting, compiled from shapes."""
    mesh, num_rows = sharding.make_mesh(setting.layout), setting.num_rows
    config = dataclasses.replace(config, mesh=mesh)
    problem = workload.prm_problem(config, workload.TABLE)._replace(mesh=mesh)
    meta_tx = optimizers.per_entry_rmsprop(lambda count: 5e-3)

    def step(state: BilevelState, batch: Batch, meta_batch: Batch) -> tuple[BilevelState, jax.Array]:
        if setting.program == "scoring":
            return state, jnp.sum(internvl.apply(config, state.train.params, batch))
        if setting.program == "training":
            train, metrics = inner_steps(problem, state.train, state.meta_params, batch)
            state = state._replace(train=train)
        else:
            estimate = ESTIMATORS[setting.program]
            state, metrics = bilevel.bilevel_step(problem, estimate, meta_tx, workload.TABLE, state, batch, meta_batch)
        return sharding.settle(mesh, state, metrics["inner_loss"])

    state = jax.eval_shape(
        lambda: workload.fresh_state(problem, workload.TABLE, internvl.init(config, jax.random.key(0)))
    )
    bucket = (1, config.image_tokens_per_tile + TEXT_TOKENS)
    batch = jax.eval_shape(lambda: workload.random_batch(config, [bucket] * num_rows, bucket, 0))
    if mesh is not None:
        state = _placed(state, sharding.shardings(mesh, state))
        batch = _placed(batch, jax.tree.map(lambda _: sharding.by_rows(mesh, num_rows), batch))
    return jax.jit(step, donate_argnums=0).lower(state, batch, batch).compile(QUICKLY)


def _placed(shapes: Any, shardings: Any) -> Any:
    def place(leaf: Any, where: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree.map(place, shapes, shardings)


class Sent(NamedTuple):
    """Bytes that a device sends, by what they are."""

    gradients: float  # all-reduced, of a parameter's shape
    weights: float  # gathered, of a parameter's shape: weights and u
    activations: float  # all-reduced, of no parameter's shape
    exchange: float  # all-to-all
    rest: float


def sorted_out(found: list[collectives.Collective], work: Work) -> Sent:
    """What the collectives of a program are about, told by kind and shape."""
    shapes = _parameter_shapes(work)
    smallest = work.num_steps * work.config.language.width  # of one row, as turns have it
    sent = dict.fromkeys(Sent._fields, 0.0)
    for one in found:
        for array in one.arrays:
            num_bytes = one.runs * collectives.ring_bytes(one.kind, array.num_bytes, one.group)
            is_parameter = _size_key(array.shape) in shapes
            if one.kind == "all-to-all":
                sent["exchange"] += num_bytes
            elif one.kind == "all-gather" and is_parameter:
                sent["weights"] += num_bytes
            elif one.kind != "all-gather" and is_parameter:
                sent["gradients"] += num_bytes
            elif one.kind == "all-reduce" and array.num_bytes >= 4 * smallest:
                sent["activations"] += num_bytes
            else:
                sent["rest"] += num_bytes
    return Sent(**sent)


def _parameter_shapes(work: Work) -> set[tuple[int, ...]]:
    """Of every parameter, of one layer of it and of the matrix that its products take, as tensor divides them; divided
    by fsdp too, and whole in it."""
    mesh = jax.sharding.AbstractMesh(tuple(work.layout), sharding.AXES)
    found = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(communication.shapes(work.config)):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if work.layout.tensor > 1 and name.endswith("position_embedding"):
            continue  # the stream of one tile has its shape
        axes = [*sharding.partition(mesh, name, leaf.shape), *[None] * leaf.ndim][: leaf.ndim]
        for divided in ({"tensor": work.layout.tensor}, work.layout._asdict()):
            sizes = [size // divided.get(axis, 1) for size, axis in zip(leaf.shape, axes, strict=True)]
            layer = sizes[1:] if "layers" in name else sizes
            found |= {_size_key(sizes), _size_key(layer)}
            if name.endswith("kernel"):
                found |= _matrices(layer[:1] + layer[2:] if "qkv" in name else layer)  # q, k and v have one each
    return found


def _matrices(sizes: list[int]) -> set[tuple[int, ...]]:
    """What a kernel may be as a matrix: its first axes by its last."""
    return {_size_key((math.prod(sizes[:axis]), math.prod(sizes[axis:]))) for axis in range(1, len(sizes))}


def _size_key(shape: Any) -> tuple[int, ...]:
    return tuple(sorted(size for size in shape if size > 1))


def grouped(volume: Volume) -> Sent:
    """Theory's figures, sorted as a program's."""
    weights = volume.weights + volume.direction
    return Sent(volume.gradients, weights, volume.activations, volume.exchange, 0.0)


def count(config: presets.InternVLConfig, setting: Setting) -> dict[str, Any]:
    """One line of the table, and the collectives behind it."""
    program, work = compiled_step(config, setting), work_of(config, setting)
    found, memory = collectives.read(program.as_text()), program.memory_analysis()
    volume = communication.volume(work, setting.program, 4, scattered=False, added_first=False)
    sent, theory = sorted_out(found.collectives, work), grouped(volume)
    kib = {
        f"{name} KiB ({which})": getattr(figures, name) / 1024
        for name in ("gradients", "weights", "activations", "exchange")
        for which, figures in (("counted", sent), ("theory", theory))
    }
    kinds = {
        kind: {"runs": sum(one.runs for one in of_kind), "wire KiB": sum(one.wire_bytes for one in of_kind) / 1024}
        for kind in collectives.KINDS
        if (of_kind := [one for one in found.collectives if one.kind == kind])
    }
    return {
        "program": setting.program,
        "layout": "x".join(map(str, setting.layout)),
        "rows": setting.num_rows,
        "MFLOP": found.flops / 1e6,
        "arguments KiB": memory.argument_size_in_bytes / 1024,
        "temporary KiB": memory.temp_size_in_bytes / 1024,
        **kib,
        "rest KiB": sent.rest / 1024,
        "collectives": kinds,
    }


def settings_for(programs: list[str], devices: list[int]) -> list[Setting]:
    """Strong scaling along every axis, weak along the two that divide rows, and both axes of rows at once."""
    most = max(devices)
    found = []
    for program in programs:
        for axis in sharding.AXES:
            for size in devices:
                layout = Layout(**{axis: size})
                found.append(Setting(program, layout, most))
                if axis in sharding.ROWS:
                    found.append(Setting(program, layout, size))
        found += [Setting(program, layout, most) for layout in LAYOUTS if math.prod(layout) == most]
    return list(dict.fromkeys(found))


def computed(config: presets.InternVLConfig) -> list[dict[str, Any]]:
    """Communication of an iteration, B = 8 rows and as many meta rows, bfloat16 weights and activations on the wire."""
    rows = []
    for layout in LAYOUTS:
        work = Work(config, layout, 8, 7, 7 * config.image_tokens_per_tile + 440, workload.NUM_STEPS)
        for program in PROGRAMS:
            volume = communication.volume(work, program, 2, scattered=True, added_first=True)
            total = sum(volume)
            rows.append({
                "program": program,
                "layout": "x".join(map(str, layout)),
                **{f"{name} GB": size / 1e9 for name, size in volume._asdict().items()},
                "all GB": total / 1e9,
                **{f"ms, {link}": 1e3 * total / rate for link, rate in LINKS.items()},
            })  # fmt: skip
    return rows


def computed_states() -> list[dict[str, Any]]:
    """GB of state a device, computed."""
    return [
        {
            "size": name,
            **{"x".join(map(str, layout)): communication.state_bytes(config, layout) / 1e9 for layout in LAYOUTS},
        }
        for name, config in SIZES.items()
        if name != "small"
    ]


def main() -> None:
    """Counts or computes what the arguments ask for, and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(SIZES), default="small")
    parser.add_argument("--computed", action="store_true", help="from shapes alone, for 8 devices")
    parser.add_argument("--programs", default=",".join(PROGRAMS), help="comma-separated")
    parser.add_argument("--devices", default="1,2,4,8")
    parser.add_argument("--json", type=Path, default=Path("scaling.json"), help="where the figures go; .md beside it")
    args = parser.parse_args()
    devices, config = [int(size) for size in args.devices.split(",")], SIZES[args.size]
    if args.computed:
        tables = {"communication": computed(config), "state GB": computed_states()}
        numbers = {"figures": "computed, for 8 devices", "measured ms of a bilevel iteration, a row a card": COMPUTE_MS}
    else:
        if args.size != "small":
            parser.error(f"--size={args.size}: only with --computed, which compiles nothing")
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", max(devices))
        settings = settings_for(args.programs.split(","), devices)
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            tables = {"counted": list(pool.map(lambda setting: count(config, setting), settings))}
        numbers = {"figures": "counted in the program that is compiled for each forced host device"}
    workload.report(args.json, vars(args), {**numbers, **tables})


if __name__ == "__main__":
    main()
