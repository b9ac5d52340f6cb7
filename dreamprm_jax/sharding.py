"""Where arrays live on a mesh of devices: one table from a parameter's path to its axes, and the mesh itself.

The mesh has three axes. XLA puts in the communication that the placement calls for; nothing here sends anything.

    data    the batch's rows are divided; parameters are the same everywhere
    fsdp    rows are divided here too, and so is every large parameter with its gradient and moments: each device keeps
            its part and gathers a layer's weights when it needs them (ZeRO-3)
    tensor  heads and hidden widths are divided: several devices work on one row
"""

from __future__ import annotations

import hashlib
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from dreamprm_jax.errors import InputError
from dreamprm_jax.types import WHOLE, PyTree, Share

AXES = ("data", "fsdp", "tensor")

ROWS = ("data", "fsdp")
"""The axes that divide the rows of a batch."""

APART = "rows apart"
"""The name of an axis of rows that are taken side by side (`inner.side_by_side`) and divided: what is inside is of one
row, and is not divided by rows again, however many tiles it has."""

PARAMETERS: dict[str, PartitionSpec] = {
    # [V, D]
    "embedding|lm_head": PartitionSpec("tensor", "fsdp"),
    # [L, D, N, H] and their biases [L, N, H]; the K key-value heads as far as they go round
    "layers/(q|k|v)/kernel": PartitionSpec(None, "fsdp", "tensor"),
    "layers/(q|k|v)/bias": PartitionSpec(None, "tensor"),
    # [L, D, 3, N, H]
    "layers/qkv/kernel": PartitionSpec(None, "fsdp", None, "tensor"),
    "layers/qkv/bias": PartitionSpec(None, None, "tensor"),
    # [L, N, H, D]
    "layers/out/kernel": PartitionSpec(None, "tensor", None, "fsdp"),
    # [L, D, F]
    "layers/(gate|up|fc1)/kernel": PartitionSpec(None, "fsdp", "tensor"),
    "layers/fc1/bias": PartitionSpec(None, "tensor"),
    # [L, F, D]
    "layers/(down|fc2)/kernel": PartitionSpec(None, "tensor", "fsdp"),
    # [shuffled D, D], [D, D]
    "projector/fc1/kernel": PartitionSpec("fsdp", "tensor"),
    "projector/fc1/bias": PartitionSpec("tensor"),
    "projector/fc2/kernel": PartitionSpec("tensor", "fsdp"),
    # an entry for each training row, where there are many (`place`)
    "table|rows": PartitionSpec(ROWS),
}
"""The end of an array's path -> the mesh axes of its own axes; what is not here, norms and other biases, is whole
everywhere. Moments and averages have their parameter's path at the end of theirs."""

LARGE = 2**20
"""Entries from which on a table of training rows is divided: below, it takes less than 12 MB with its moments."""


def join(coordinator: str, num_processes: int | None, process_id: int | None) -> None:
    """Makes this process one of several that share the work; before anything else of JAX is used.

    Args:
      coordinator: "auto": SLURM, Open MPI, Kubernetes or a TPU pod says all of it; else HOST:PORT of process 0.
      num_processes, process_id: with HOST:PORT.

    Raises:
      InputError: they do not find each other.
    """
    address = None if coordinator == "auto" else coordinator
    try:
        jax.distributed.initialize(address, num_processes, process_id)
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(
            f"--config.distributed.coordinator={coordinator}: the processes do not find each other ({error}); "
            "docs/distributed.md has the commands"
        ) from error


def check_same(text: str) -> None:
    """What all processes must have alike, such as their config; all of them must call it.

    Raises:
      InputError: another process has something else.
    """
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.int32)
    everyone = multihost_utils.process_allgather(digest)  # [processes, 8]
    others = np.flatnonzero((everyone != digest[None]).any(axis=1)).tolist()
    if others:
        raise InputError(
            f"process {jax.process_index()} has another config than {', '.join(map(str, others))}: start all with the "
            "same command, but for --config.distributed.process_id"
        )


def is_first() -> bool:
    """Whether this is the process that writes the run's files."""
    return jax.process_index() == 0


def meet(where: str) -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


class Layout(NamedTuple):
    """How many devices each axis of the mesh has; `data` = 0: as many as are left."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1


def sizes_of(layout: Any, num_devices: int) -> Layout:
    """What a layout comes to on so many devices; it may be more or fewer than there are."""
    data = layout.data or max(1, num_devices // (layout.fsdp * layout.tensor))
    return Layout(data, layout.fsdp, layout.tensor)


def make_mesh(layout: Any) -> Mesh | None:
    """The mesh of that layout over the first devices there are; None for a single device, which needs none.

    Args:
      layout: a `Layout`, or what has its fields (the config's `mesh`).

    Raises:
      InputError: the devices there are do not make it up.
    """
    found = jax.device_count()
    sizes = sizes_of(layout, found)
    wanted = math.prod(sizes)
    asked = " ".join(f"--config.mesh.{axis}={getattr(layout, axis)}" for axis in AXES)
    if wanted > found:
        raise InputError(f"{asked}: needs {wanted} devices, and there are {found}")
    if jax.process_count() > 1 and wanted != found:
        raise InputError(f"{asked}: takes {wanted} of {found} devices; several processes must use all of theirs")
    if wanted == 1:
        return None
    devices = jax.devices()[:wanted]
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def num_row_shards(mesh: Mesh | None) -> int:
    """Parts that the rows of a batch are divided into."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in ROWS)


def table_length(num_rows: int) -> int:
    """Entries of a table of that many training rows: a large one is rounded up, so that it can be divided; those past
    the rows stay as they begin. No matter what mesh there is, so that a checkpoint fits any."""
    return num_rows if num_rows < LARGE else -(-num_rows // 1024) * 1024


def partition(mesh: Mesh, path: str, shape: tuple[int, ...]) -> PartitionSpec:
    """The axes of the array at `path` (`a/b/c`); an axis that cannot be divided evenly is left whole."""
    for pattern, spec in PARAMETERS.items():
        if re.search(f"(^|/)({pattern})$", path) and len(spec) <= len(shape):
            if pattern == "table|rows" and shape[0] < LARGE:
                break
            sizes = zip(spec, shape, strict=False)  # the spec may say nothing of the last axes
            return PartitionSpec(*(_if_divisible(mesh, axes, size) for axes, size in sizes))
    return PartitionSpec()


def _if_divisible(mesh: Mesh, axes: str | tuple[str, ...] | None, size: int) -> str | tuple[str, ...] | None:
    names = (axes,) if isinstance(axes, str) else axes or ()
    return None if size % math.prod(mesh.shape[name] for name in names) else axes


def shardings(mesh: Mesh, tree: PyTree) -> PyTree:
    """A `NamedSharding` for each leaf (an array or a shape) of parameters, or of a state that has them inside."""

    def of(path: tuple, leaf: jax.Array) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, partition(mesh, name, leaf.shape))

    return jax.tree_util.tree_map_with_path(of, tree)


def place(mesh: Mesh | None, tree: PyTree) -> PyTree:
    """Parameters or a state, the same in every process, onto the mesh: each device gets its part alone."""
    if mesh is None:
        return jax.tree.map(jnp.asarray, tree)

    def put(leaf: jax.Array | np.ndarray, sharding: NamedSharding) -> jax.Array:
        if isinstance(leaf, jax.Array) and leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
            return leaf
        host = np.asarray(leaf)  # not by device_put, which sends all of it around to compare it across processes
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree, shardings(mesh, tree))


def shapes(mesh: Mesh | None, tree: PyTree) -> PyTree:
    """Shapes or arrays as shapes that say where `place` puts them."""
    here = SingleDeviceSharding(jax.local_devices()[0])
    wanted = jax.tree.map(lambda _: here, tree) if mesh is None else shardings(mesh, tree)
    return jax.tree.map(lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree, wanted)


def bytes_on_device(mesh: Mesh | None, tree: PyTree) -> int:
    """Of arrays or shapes, where `place` puts them: what each device keeps."""

    def size(leaf: jax.ShapeDtypeStruct) -> int:
        return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    return sum(map(size, jax.tree.leaves(shapes(mesh, tree))))


def settle(mesh: Mesh | None, state: PyTree, metrics: PyTree) -> tuple[PyTree, PyTree]:
    """At the end of a step, under jit: the state where `place` puts it, what is logged `everywhere`."""
    if mesh is None:
        return state, metrics
    return jax.lax.with_sharding_constraint(state, shardings(mesh, state)), everywhere(mesh, metrics)


def everywhere(mesh: Mesh | None, tree: PyTree) -> PyTree:
    """Under jit: small results whole on every device, so that every process can read them."""
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, whole(mesh))


def beside_rows(mesh: Mesh | None, params: PyTree) -> PyTree:
    """Under jit: u, shaped as the parameters, on every device that has rows: gathered once, before rows are taken in
    turn. What `tensor` divides stays divided."""
    if mesh is None:
        return params

    def gathered(sharding: NamedSharding) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*("tensor" if axes == "tensor" else None for axes in sharding.spec)))

    return jax.lax.with_sharding_constraint(params, jax.tree.map(gathered, shardings(mesh, params)))


def share_of_process(mesh: Mesh | None) -> Share:
    """The rows of every batch that this process has devices for."""
    if mesh is None:
        return WHOLE
    count = num_row_shards(mesh)
    slices = by_rows(mesh, count).addressable_devices_indices_map((count,)).values()
    return Share(tuple(sorted({rows[0].start or 0 for rows in slices})), count)


def place_rows(mesh: Mesh | None, tree: PyTree, axis: int = 0) -> PyTree:
    """Numpy arrays that hold this process's rows (`share_of_process`) on `axis`, as arrays of all rows, divided."""
    if mesh is None:
        return jax.device_put(tree)
    share = share_of_process(mesh)

    def put(leaf: np.ndarray) -> jax.Array:
        size = leaf.shape[axis] // len(share.own)  # rows of a part

        def part(index: tuple[slice, ...]) -> np.ndarray:
            start = share.own.index((index[axis].start or 0) // size) * size
            return leaf[(*[slice(None)] * axis, slice(start, start + size))]

        shape = (*leaf.shape[:axis], size * share.count, *leaf.shape[axis + 1 :])
        return jax.make_array_from_callback(shape, by_rows(mesh, size * share.count, axis), part)

    return jax.tree.map(put, tree)


def fetch(mesh: Mesh | None, tree: PyTree) -> PyTree:
    """Arrays wherever they lie as numpy arrays; in several processes all of them must call it."""
    if mesh is not None and jax.process_count() > 1:
        tree = jax.jit(lambda tree: tree, out_shardings=whole(mesh))(tree)
    return jax.device_get(tree)


def least(number: int) -> int:
    """Of the numbers that the processes have, the least: what all of them decide by. In several all must call it."""
    if jax.process_count() == 1:
        return number
    halves = np.array(divmod(number, 2**31), np.int32)  # without x64 a large one would be cut off on its way
    return min(high * 2**31 + low for high, low in multihost_utils.process_allgather(halves).tolist())


def by_rows(mesh: Mesh, num_rows: int, axis: int = 0) -> NamedSharding:
    """Rows, on that axis of an array, divided; whole where they do not go round, or are `APART`."""
    if _rows_are_apart():
        return whole(mesh)
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, _if_divisible(mesh, ROWS, num_rows)))


def by_width(mesh: Mesh, shape: tuple[int, int, int]) -> NamedSharding:
    """[B, T, D]: `data` divides the rows, `fsdp` the width, as an embedding's; whole where rows are `APART`."""
    if _rows_are_apart():
        return whole(mesh)
    return NamedSharding(
        mesh, PartitionSpec(_if_divisible(mesh, "data", shape[0]), None, _if_divisible(mesh, "fsdp", shape[2]))
    )


def _rows_are_apart() -> bool:
    try:
        jax.lax.axis_size(APART)
    except NameError:
        return False
    return True


def whole(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())
