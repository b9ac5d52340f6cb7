"""What theory says is sent between devices: bytes that each device puts on the wire in one iteration, rings everywhere.

A pass takes a batch's rows forward and back once. Training has one; `dot` has one that keeps each row's gradient and
one for the meta batch; the others add a pass to these (`PASSES`). Shapes alone are looked at: nothing is allocated.

    data    the gradients of a level are added up: one all-reduce
    fsdp    each layer's weights are gathered forward and once more backward, the head and the projector once, the
            embedding never (rows of it travel); gradients are added up and handed out in parts: a reduce-scatter, for
            which XLA's CPU compiler writes an all-reduce and a slice
    tensor  two all-reduces of the residual stream in every layer, forward and backward
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import jax
from jax.sharding import AbstractMesh

from benchmarks.collectives import ring_bytes
from dreamprm_jax.models import internvl, presets
from dreamprm_jax.sharding import AXES, Layout, partition
from dreamprm_jax.types import PyTree

WIDE = 4  # bytes of a float32: masters, moments, gradients of parameters, u


class Passes(NamedTuple):
    """How often a program does what has to be communicated."""

    forward: int
    backward: int
    tangents: int  # of the passes forward, those that push u along
    ends: int  # sets of weights that they look at: the head and the projector of each are gathered once
    apart: int  # of these, passes that take rows apart: each row's gradient is whole on the row's device
    gradients: int  # gradients that are summed over the devices as they come
    apart_gradients: int  # weighted sums of the gradients of rows taken apart
    directions: int  # u gathered whole, beside that of tangents


PASSES = {
    "scoring": Passes(1, 0, 0, 1, 0, 0, 0, 0),
    "training": Passes(1, 1, 0, 1, 0, 1, 0, 0),
    "dot": Passes(2, 2, 0, 2, 1, 1, 1, 1),
    "recompute": Passes(3, 3, 0, 2, 1, 2, 0, 1),
    "tangent_recomputed": Passes(3, 2, 1, 2, 0, 2, 0, 0),
}


class Work(NamedTuple):
    """What one iteration is about."""

    config: presets.InternVLConfig
    layout: Layout
    num_rows: int  # B, and as many meta rows
    num_tiles: int
    num_tokens: int
    num_steps: int

    @property
    def num_turns(self) -> int:
        """How often an estimator that takes rows apart goes through the weights: a row on each device at a time."""
        return max(1, self.num_rows // (self.layout.data * self.layout.fsdp))


class Leaf(NamedTuple):
    """A parameter and who has which part of it."""

    path: str
    size: int  # numbers
    fsdp: bool  # divided by that axis
    tensor: bool


def leaves(config: presets.InternVLConfig, layout: Layout) -> list[Leaf]:
    """Every parameter of the model."""
    mesh = AbstractMesh(tuple(layout), AXES)
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes(config)):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        axes = partition(mesh, name, leaf.shape)
        found.append(Leaf(name, math.prod(leaf.shape), "fsdp" in axes, "tensor" in axes))
    return found


@cache
def shapes(config: presets.InternVLConfig) -> PyTree:
    """The parameters' shapes."""
    return jax.eval_shape(lambda: internvl.init(config, jax.random.key(0)))


def state_bytes(config: presets.InternVLConfig, layout: Layout) -> float:
    """On one device: float32 parameters and both moments."""

    def share(leaf: Leaf) -> float:
        return leaf.size / (layout.fsdp if leaf.fsdp else 1) / (layout.tensor if leaf.tensor else 1)

    return 3 * WIDE * sum(map(share, leaves(config, layout)))


def gradient_bytes(work: Work, scattered: bool, apart: bool) -> float:
    """The sum of one gradient over the rows' devices.

    What fsdp divides is summed over fsdp, then a device's part of it over data. `scattered`: by a reduce-scatter, else
    by an all-reduce of which the part is cut out. Rows of the embedding travel, so that over fsdp its gradient needs no
    sum, but where rows are taken `apart`.
    """
    layout, total = work.layout, 0.0
    for leaf in leaves(work.config, layout):
        num_bytes = WIDE * leaf.size / (layout.tensor if leaf.tensor else 1)
        part = num_bytes / layout.fsdp
        if leaf.fsdp and leaf.path.endswith("embedding") and not apart:
            total += ring_bytes("all-reduce", part, layout.data)
        elif leaf.fsdp:
            over_fsdp = ("reduce-scatter", part) if scattered else ("all-reduce", num_bytes)
            total += ring_bytes(*over_fsdp, layout.fsdp) + ring_bytes("all-reduce", part, layout.data)
        else:
            total += ring_bytes("all-reduce", num_bytes, layout.data * layout.fsdp)
    return total


def weight_bytes(work: Work, passes: Passes, itemsize: int) -> float:
    """Weights gathered over fsdp, `itemsize` bytes a number; rows that are taken apart gather them in every turn."""
    layout, total = work.layout, 0.0
    apart = passes.apart * (work.num_turns - 1)
    for leaf in leaves(work.config, layout):
        if not leaf.fsdp or leaf.path.endswith("embedding"):
            continue
        times = passes.ends + apart
        if "layers" in leaf.path:
            times = passes.forward + passes.backward + 2 * apart
        whole = itemsize * leaf.size / (layout.tensor if leaf.tensor else 1)
        total += times * ring_bytes("all-gather", whole, layout.fsdp)
    return total


def direction_bytes(work: Work, pushed: bool, itemsize: int) -> float:
    """u gathered over fsdp once; where it is `pushed` forward, the embedding's part travels by rows."""
    layout = work.layout
    divided = [leaf for leaf in leaves(work.config, layout) if leaf.fsdp]
    divided = [leaf for leaf in divided if not pushed or not leaf.path.endswith("embedding")]
    numbers = sum(leaf.size / (layout.tensor if leaf.tensor else 1) for leaf in divided)
    return ring_bytes("all-gather", itemsize * numbers, layout.fsdp)


def activation_bytes(work: Work, passes: Passes, itemsize: int, added_first: bool) -> float:
    """All-reduces over tensor.

    In every layer one after attention and one after the MLP, of [rows, tokens, D]; backward as many, where the parts
    that meet at a norm are `added_first`: else queries, keys, values, gate and up bring five in a language layer, and
    the first three and the MLP four in one of the vision tower. The projector has one each way, the embedding one
    forward, the head one backward. A tangent's pass has as many again; or twice as many, but for the embedding, where
    its parts, by u and by the stream, are not `added_first`.
    """
    config, layout = work.config, work.layout
    vision, language = config.vision, config.language
    rows = work.num_rows / (layout.data * layout.fsdp)
    tiles, tokens = rows * work.num_tiles, rows * work.num_tokens
    found = {leaf.path: leaf.tensor for leaf in leaves(config, layout)}

    def numbers(backward: bool) -> Iterator[float]:
        joined = added_first or not backward
        patches = tiles * (1 + vision.grid**2) * vision.width * vision.num_layers
        yield patches * found["vision/layers/out/kernel"] * (1 if joined else 3)
        yield patches * found["vision/layers/fc1/kernel"]
        stream = tokens * language.width * language.num_layers
        heads = [found[f"language/layers/{name}/kernel"] for name in "qkv"]
        yield stream * (any(heads) if joined else sum(heads))
        yield stream * found["language/layers/down/kernel"] * (1 if joined else 2)
        image = tiles * config.image_tokens_per_tile * found["projector/fc1/kernel"]
        yield image * (config.shuffle_factor**2 * vision.width if backward else language.width)
        yield rows * work.num_steps * language.width * found["language/lm_head"] * backward

    embedded = tokens * language.width * found["language/embedding"]
    forward = passes.forward + passes.tangents * (1 if added_first else 2)
    total = forward * sum(numbers(False)) + passes.backward * sum(numbers(True))
    total += (passes.forward + passes.tangents) * embedded
    return ring_bytes("all-reduce", itemsize * total, layout.tensor)


def exchange_bytes(work: Work, passes: Passes, itemsize: int) -> float:
    """Rows of the embedding, from those who have their part of D to those who have the rows: all-to-alls over fsdp."""
    rows = work.num_rows / (work.layout.data * work.layout.fsdp)
    num_bytes = itemsize * rows * work.num_tokens * work.config.language.width
    times = passes.forward + passes.tangents + passes.backward - passes.apart
    return times * ring_bytes("all-to-all", num_bytes, work.layout.fsdp)


class Volume(NamedTuple):
    """Bytes that one device sends in an iteration."""

    gradients: float
    weights: float
    direction: float
    activations: float
    exchange: float


def volume(work: Work, program: str, itemsize: int, scattered: bool, added_first: bool) -> Volume:
    """One iteration of `program` (of `PASSES`); `itemsize` bytes of a gathered weight or an activation."""
    passes = PASSES[program]
    gradients = passes.gradients * gradient_bytes(work, scattered, apart=False)
    return Volume(
        gradients + passes.apart_gradients * gradient_bytes(work, scattered, apart=True),
        weight_bytes(work, passes, itemsize),
        passes.directions * direction_bytes(work, False, WIDE)
        + passes.tangents * direction_bytes(work, True, itemsize),
        activation_bytes(work, passes, itemsize, added_first),
        exchange_bytes(work, passes, itemsize),
    )
