"""Chains that begin alike, brought together, so that a model runs what they share once.

Of the candidate chains of a question this is the system prompt, the images and the question, often nine tenths of the
tokens. The chains of a group go on from there one after the other on one axis, without padding between them.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dreamprm_jax.data import shapes
from dreamprm_jax.data.example import Encoded, ImageSource
from dreamprm_jax.types import WHOLE, Continuations, Prefix, Share

if TYPE_CHECKING:
    from dreamprm_jax.data.dataset import Dataset

WINDOW = 1024
"""Rows among which chains that begin alike are looked for; the results of each window are handed out together."""

PART_TOKENS = 4096
"""Of a part, that is of the chains that go on together: what a pass over many of them takes stays small."""

_TILE_TOKENS = 870  # what a tile through the vision tower costs, in tokens of the language model (InternVL3-1B)


class Outline(NamedTuple):
    """What grouping needs to know of a chain."""

    row: int
    tokens: np.ndarray  # int32 [T]
    images: bytes  # the same for the same images
    num_tiles: int
    first_step: int  # index of the first token that is scored: what is shared ends before it


class Group(NamedTuple):
    """Chains of the same images that have their first `prefix` tokens in common."""

    rows: tuple[int, ...]
    prefix: int  # tokens
    num_tiles: int
    parts: tuple[tuple[int, ...], ...]  # the rows again, as they go on together
    lengths: tuple[int, ...]  # tokens of each part
    num_steps: tuple[int, ...]  # of each part


class BatchPlan(NamedTuple):
    """Groups that run side by side, and what they are padded to. Groups of a batch have equally many parts."""

    groups: tuple[Group, ...]
    size: int  # B, those that only fill up included
    prefix: shapes.Shape
    part_tokens: tuple[int, ...]  # of each part
    num_steps: int  # S of every part


class Window(NamedTuple):
    """What is to be run for one window of rows."""

    batches: list[BatchPlan]
    copies: dict[int, int]  # rows that repeat an earlier one, images and all, and that one: it is run alone


class SharedBatch(NamedTuple):
    """A batch as arrays: `parts[n]` are the chains that go on together as the n-th."""

    prefix: Prefix
    parts: tuple[Continuations, ...]
    rows: tuple[tuple[tuple[int, ...], ...], ...]  # [part][B] the data set's rows, in the order of their steps
    num_steps: tuple[tuple[tuple[int, ...], ...], ...]  # [part][B] steps of each of those rows


def outline(encoded: Encoded, images: Sequence[ImageSource], row: int) -> Outline:
    """A chain's outline; no image is decoded, two files of the same content are two images."""
    digest = hashlib.sha256()
    for source in images:
        content = source if isinstance(source, bytes) else os.fsencode(source)
        digest.update(len(content).to_bytes(8) + content)
    return Outline(row, encoded.tokens, digest.digest(), encoded.num_tiles, int(encoded.step_positions[0]))


def find_groups(chains: Sequence[Outline]) -> list[tuple[list[Outline], int]]:
    """Brings together chains of the same images so that most is saved: (chains, tokens in common).

    Sorted by images and tokens, those that begin alike are neighbours; of all ways to cut that order into groups the
    one is taken that saves most. A chain that joins others saves the tokens they share and the images' tiles.
    """
    ordered = sorted(chains, key=lambda chain: (chain.images, chain.tokens.astype(">i4").tobytes()))
    common = [_common(a, b) for a, b in itertools.pairwise(ordered)]
    best, first = [0], [0]  # of the first n chains: most that can be saved, where the last group then begins
    for last, chain in enumerate(ordered):
        tiles, shared = _TILE_TOKENS * chain.num_tiles, None
        saved, begin = best[last], last
        for start in range(last - 1, -1, -1):
            shared = common[start] if shared is None else min(shared, common[start])
            if not shared:
                break
            together = best[start] + (last - start) * (shared + tiles)
            if together >= saved:
                saved, begin = together, start
        best.append(saved)
        first.append(begin)
    groups, end = [], len(ordered)
    while end:
        start = first[end]
        shared = min(common[start : end - 1], default=ordered[start].first_step)
        groups.append((ordered[start:end], shared))
        end = start
    return groups[::-1]


def _common(a: Outline, b: Outline) -> int:
    """Tokens that two chains begin with alike, none of them scored; 0 for chains of different images."""
    if a.images != b.images:
        return 0
    length = min(a.first_step, b.first_step)
    differ = a.tokens[:length] != b.tokens[:length]
    return int(np.argmax(differ)) if differ.any() else length


def _grouped(chains: Sequence[Outline], num_steps: np.ndarray, max_chains: int) -> list[Group]:
    """`find_groups` with each group's parts: `max_chains` and `PART_TOKENS` at most, longest first."""
    found = []
    for members, prefix in find_groups(chains):
        rest = {chain.row: len(chain.tokens) - prefix for chain in members}
        parts: list[list[int]] = []
        free: list[int] = []  # tokens that still fit into each part
        for row in sorted(rest, key=lambda row: (-rest[row], row)):
            fits = [n for n, part in enumerate(parts) if len(part) < max_chains and free[n] >= rest[row]]
            if not fits:
                parts.append([])
                free.append(max(PART_TOKENS, rest[row]))
            part = fits[0] if fits else -1
            parts[part].append(row)
            free[part] -= rest[row]
        found.append(
            Group(
                rows=tuple(chain.row for chain in members),
                prefix=prefix,
                num_tiles=members[0].num_tiles,
                parts=tuple(map(tuple, parts)),
                lengths=tuple(sum(rest[row] for row in part) for part in parts),
                num_steps=tuple(int(num_steps[part].sum()) for part in parts),
            )
        )
    return found


class _Padding(NamedTuple):
    """What batches are padded to: chosen for all windows together, since each choice is a program to compile."""

    prefixes: tuple[shapes.Shape, ...]
    parts: tuple[shapes.Shape, ...]
    num_steps: dict[int, int]  # of a part, by its group's breadth
    num_groups: dict[tuple[int, int], int]  # of one `_kind` in a window, at most


def plan(dataset: Dataset, max_chains: int, max_shapes: int, num_shards: int = 1) -> list[Window]:
    """What is to be run for every usable row, window by window.

    Args:
      dataset: its rows are tokenised here, and where they lie on disk again when a batch is built.
      max_chains: at a time, and more where every shard would not have a group of them.
      max_shapes: of prefixes, >= 1; parts are padded to half as many lengths.
      num_shards: devices among which the groups of a batch are divided: their number is a multiple of it.
    """
    rows = dataset.rows.tolist()
    windows, copies = [], []
    for start in range(0, len(rows), WINDOW):
        chains = [outline(*dataset.load_tokens(row), row) for row in rows[start : start + WINDOW]]
        first = {}
        repeats = {chain.row: first.setdefault((chain.images, chain.tokens.tobytes()), chain.row) for chain in chains}
        copies.append({row: other for row, other in repeats.items() if row != other})
        own = [chain for chain in chains if chain.row not in copies[-1]]
        windows.append(_grouped(own, dataset.num_labels, max_chains))
    padding = _padding(windows, max_shapes)
    return [
        Window(list(_batches(window, max_chains, padding, num_shards)), repeated)
        for window, repeated in zip(windows, copies, strict=True)
    ]


def _padding(windows: Sequence[Sequence[Group]], max_shapes: int) -> _Padding:
    everything = [group for window in windows for group in window]
    prefixes = shapes.choose(*_column(everything, "prefix", "num_tiles"), max_shapes).shapes
    lengths = np.concatenate([group.lengths for group in everything])
    parts = shapes.choose(lengths, np.zeros_like(lengths), -(-max_shapes // 2)).shapes
    num_steps: dict[int, int] = {}
    for group in everything:
        breadth, _ = _kind(group)
        num_steps[breadth] = max(num_steps.get(breadth, 0), *group.num_steps)
    num_groups: Counter[tuple[int, int]] = Counter()
    for window in windows:
        num_groups |= Counter(map(_kind, window))
    return _Padding(prefixes, parts, num_steps, num_groups)


def _column(groups: Iterable[Group], *names: str) -> list[np.ndarray]:
    return [np.array([getattr(group, name) for group in groups]) for name in names]


def _kind(group: Group) -> tuple[int, int]:
    """(breadth, number of parts) of the groups that may share a batch; the breadth is that of the widest part."""
    return power_of_two(max(map(len, group.parts))), len(group.parts)


def power_of_two(count: int) -> int:
    """The next one up: each padded size is a program to compile."""
    return 1 << (count - 1).bit_length()


def _batches(window: Sequence[Group], max_chains: int, padding: _Padding, num_shards: int) -> Iterator[BatchPlan]:
    def by_size(group: Group) -> tuple[int, ...]:
        return (*_kind(group), group.num_tiles, group.prefix, max(group.lengths), group.rows[0])

    for kind, same in itertools.groupby(sorted(window, key=by_size, reverse=True), key=_kind):
        breadth, num_parts = kind
        # No more rows than any window fills: a question alone is not run beside seven rows of padding.
        size = min(max(1, max_chains // breadth), power_of_two(padding.num_groups[kind]))
        size = -(-size // num_shards) * num_shards
        for chunk in _chunks(same, size):
            tokens = [max(group.lengths[part] for group in chunk) for part in range(num_parts)]
            yield BatchPlan(
                groups=tuple(chunk),
                size=size,
                prefix=shapes.fitting(
                    padding.prefixes, max(group.prefix for group in chunk), max(group.num_tiles for group in chunk)
                ),
                part_tokens=tuple(shapes.fitting(padding.parts, count, 0).tokens for count in tokens),
                num_steps=padding.num_steps[breadth],
            )


def _chunks(groups: Iterable[Group], size: int) -> Iterator[tuple[Group, ...]]:
    groups = iter(groups)
    while chunk := tuple(itertools.islice(groups, size)):
        yield chunk


def collate(dataset: Dataset, batch: BatchPlan, share: Share = WHOLE) -> SharedBatch:
    """The arrays of a batch, of the groups in this process's share; rows and steps are told of all.

    Raises:
      InputError: an image that is not the one that was checked.
    """
    slots = share.of(range(batch.size))
    groups, size = [batch.groups[slot] for slot in slots if slot < len(batch.groups)], len(slots)
    loaded = {row: dataset.load_tokens(row)[0] for group in groups for row in group.rows}
    tiles = [dataset.load_tiles(group.rows[0]) for group in groups]
    side = dataset.images.tile_size
    prefix = Prefix(
        tokens=np.full((size, batch.prefix.tokens), dataset.tokenizer.pad_id, np.int32),
        image_index=np.full((size, batch.prefix.tokens), -1, np.int32),
        tiles=np.zeros((size, batch.prefix.tiles, side, side, 3), np.uint8),
        length=np.zeros(size, np.int32),
    )
    for slot, group in enumerate(groups):
        encoded, count = loaded[group.rows[0]], group.prefix
        prefix.tokens[slot, :count] = encoded.tokens[:count]
        prefix.image_index[slot, :count] = image_index(encoded)[:count]
        prefix.tiles[slot, : len(tiles[slot])] = tiles[slot]
        prefix.length[slot] = count
    parts, rows, num_steps = [], [], []
    for number, num_tokens in enumerate(batch.part_tokens):
        rows.append(tuple(group.parts[number] for group in batch.groups))
        num_steps.append(tuple(tuple(dataset.num_labels[list(part)].tolist()) for part in rows[-1]))
        chains = [[(loaded[row], group.prefix) for row in group.parts[number]] for group in groups]
        parts.append(pack(chains, size, num_tokens, batch.num_steps, dataset.tokenizer.pad_id))
    return SharedBatch(prefix, tuple(parts), tuple(rows), tuple(num_steps))


def image_index(encoded: Encoded) -> np.ndarray:
    """Which image feature stands at each token, int32 [T]; -1 where there is none."""
    return np.where(encoded.image_mask, np.cumsum(encoded.image_mask) - 1, -1).astype(np.int32)


def pack(
    rows: Sequence[Sequence[tuple[Encoded, int]]], size: int, num_tokens: int, num_steps: int, pad_id: int
) -> Continuations:
    """What comes after the prefix of each row's chains, one chain after the other.

    Args:
      rows: each chain with the length of its prefix.
      size: B, at least the number of rows.
      num_tokens, num_steps: T and S, at least those of the longest row.
      pad_id: stands at the end.
    """
    packed = Continuations(
        tokens=np.full((size, num_tokens), pad_id, np.int32),
        image_index=np.full((size, num_tokens), -1, np.int32),
        chain=np.full((size, num_tokens), -1, np.int32),
        positions=np.zeros((size, num_tokens), np.int32),
        step_positions=np.zeros((size, num_steps), np.int32),
    )
    for slot, chains in enumerate(rows):
        start, step = 0, 0
        for number, (encoded, prefix) in enumerate(chains):
            count, steps = len(encoded.tokens) - prefix, len(encoded.step_positions)
            packed.tokens[slot, start : start + count] = encoded.tokens[prefix:]
            packed.image_index[slot, start : start + count] = image_index(encoded)[prefix:]
            packed.chain[slot, start : start + count] = number
            packed.positions[slot, start : start + count] = np.arange(prefix, prefix + count)
            packed.step_positions[slot, step : step + steps] = encoded.step_positions - prefix + start
            start, step = start + count, step + steps
    return packed
