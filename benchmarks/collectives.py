"""What a compiled program sends between devices, read from its text: each collective, its bytes, how often it runs.

XLA's own cost analysis counts a loop's body once and knows nothing of what is sent; here bodies count as often as they
turn. Everything is of one device: a program divided by XLA is the same on each.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?(\S+) = (.*?) ([a-z][a-z0-9-]*)\(")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_MESH_AXES = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\S*)? \{([^}]*)\}")
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Array(NamedTuple):
    """What one operand of a collective becomes, on one device."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> float:
        """Of the array."""
        digits = re.search(r"\d+", self.dtype)
        bits = 8 if digits is None else int(digits[0])  # pred: a byte
        return math.prod(self.shape) * bits / 8


class Collective(NamedTuple):
    """One collective instruction."""

    kind: str  # of KINDS
    arrays: tuple[Array, ...]  # its results
    group: int  # devices that take part
    runs: int  # of one execution of the program
    source: str  # the operation that asked for it

    @property
    def num_bytes(self) -> float:
        """Of its results, once."""
        return sum(array.num_bytes for array in self.arrays)

    @property
    def wire_bytes(self) -> float:
        """That a device sends, all runs together, where the devices stand in a ring (`ring_bytes`)."""
        return self.runs * ring_bytes(self.kind, self.num_bytes, self.group)


def ring_bytes(kind: str, num_bytes: float, group: int) -> float:
    """Bytes that each of `group` devices sends for a collective whose result, on one device, has `num_bytes`."""
    share = (group - 1) / group
    factors = {
        "all-reduce": 2 * share,  # every part is added up on its way round, then handed round
        "all-gather": share,
        "reduce-scatter": group - 1,  # the result is a part of what is sent
        "all-to-all": share,
        "collective-permute": 1,
    }
    return factors[kind] * num_bytes


class Program(NamedTuple):
    """A compiled program's costs on one device."""

    collectives: list[Collective]
    flops: float  # of matrix products and convolutions


def read(text: str) -> Program:
    """The costs of `compiled.as_text()`.

    Raises:
      ValueError: a loop around a product or a collective does not say how often it turns.
    """
    computations, entry = _computations(text)
    found, flops = [], 0.0
    for lines, runs in _executed(computations, entry):
        shapes = {name: result for name, result, _, _ in lines}
        for _, result, operation, line in lines:
            kind = operation.removesuffix("-start")
            if kind in KINDS:
                source = re.search(r'op_name="([^"]*)"', line)
                arrays = _arrays(result)
                if operation != kind and kind in ("all-gather", "collective-permute"):
                    arrays = arrays[len(arrays) // 2 :]  # operands stand before the results
                found.append(Collective(kind, tuple(arrays), _group(line), runs, source[1] if source else ""))
            elif operation == "dot":
                flops += runs * _dot_flops(result, line, shapes)
    return Program(found, flops)


Line = tuple[str, str, str, str]
"""(name, type of the result, operation, the whole line)."""


def _computations(text: str) -> tuple[dict[str, list[Line]], str]:
    """Every computation's instructions, and the name of the one that is the program."""
    computations: dict[str, list[Line]] = {}
    entry = name = ""
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line)
        if header:
            name = header[2]
            entry = name if header[1] else entry
            computations[name] = []
        elif instruction := _INSTRUCTION.match(line):
            computations[name].append((*instruction.groups(), line))
    return computations, entry


def _executed(computations: dict[str, list[Line]], name: str, runs: int = 1) -> Iterator[tuple[list[Line], int]]:
    """Each computation that runs, with how often, once for every place that it is called from."""
    lines = computations[name]
    yield lines, runs
    for _, _, operation, line in lines:
        called = _CALLED.findall(line)
        for branches in _BRANCHES.findall(line):
            called += re.findall(r"[\w.-]+", branches)
        turns = 1
        if operation == "while":
            counted = _TURNS.search(line)
            turns = int(counted[1]) if counted else _limit(computations, line)
        for inner in called:
            yield from _executed(computations, inner, runs * turns)


def _limit(computations: dict[str, list[Line]], line: str) -> int:
    """How often a loop turns whose counter runs from 0 to the one whole number in its condition."""
    condition = re.search(r"condition=%?([\w.-]+)", line)
    numbers = []
    for lines, _ in _executed(computations, condition[1] if condition else ""):
        numbers += [re.search(r"constant\((\d+)\)", line) for _, _, operation, line in lines if operation == "constant"]
    limits = {int(number[1]) for number in numbers if number}
    if len(limits) != 1:
        raise ValueError(f"a loop that does not say how often it turns: {line.strip()[:200]}")
    return limits.pop()


def _arrays(result: str) -> list[Array]:
    return [Array(dtype, _shape(sizes)) for dtype, sizes in _ARRAY.findall(result)]


def _shape(sizes: str) -> tuple[int, ...]:
    return tuple(int(size) for size in sizes.split(",") if size)


def _group(line: str) -> int:
    """Devices of a group, from any of the forms that XLA writes groups in."""
    if axes := _MESH_AXES.search(line):  # some axes of a mesh, or parts of axes
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes[1])}
        named = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", axes[2])
        return math.prod(int(part) if part else sizes[name] for name, part in named)
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(counted[1])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(listed[1].split(","))
    return 2  # a permutation has pairs


def _dot_flops(result: str, line: str, shapes: dict[str, str]) -> float:
    """2 m n k."""
    left = re.search(r" dot\((?:[a-z]+\d*\[[\d,]*\]\S* )?%?([\w.-]+)", line)
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line)
    (operand,), (output,) = _arrays(shapes[left[1]]), _arrays(result)
    axes = _shape(contracted[1]) if contracted else ()
    return 2.0 * math.prod(output.shape) * math.prod(operand.shape[axis] for axis in axes)
