"""From a data set to padded batches: which rows go into which batch, and the reading ahead.

The whole order of a run is a function of its config, and a batch a function of its number: to resume is to begin at
that number, whatever the processes, threads or workers that read.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np

from dreamprm_jax.data import shapes, sharing
from dreamprm_jax.data.dataset import Dataset
from dreamprm_jax.data.shapes import Shape
from dreamprm_jax.data.sharing import BatchPlan, SharedBatch
from dreamprm_jax.errors import InputError
from dreamprm_jax.types import WHOLE, Batch, Share

WINDOW = 256
"""Batches among which rows of one shape are brought together; fewer where an epoch has no more."""

_PLANNING = threading.Lock()  # of the threads that read, one computes a window and the others wait for it


class Reading(NamedTuple):
    """How batches are read ahead. None of it changes a batch."""

    threads: int = 2
    workers: int = 0  # processes, each with its threads; 0: threads of this one alone
    ahead: int = 4  # batches ready, for each worker


READING = Reading()


def collate(
    dataset: Dataset,
    rows: Sequence[int],
    batch_size: int | None = None,
    *,
    share: Share = WHOLE,
    shape: Shape | None = None,
) -> Batch:
    """The rows as one padded batch, in that order.

    Args:
      dataset: from `encode_all`.
      rows: B of its usable rows.
      batch_size: pads with masked rows up to it; None for B.
      share: of them, what is read.
      shape: what they are padded to; None for the least of the data set's that all of them fit.
    """
    shape = shape or shape_of_rows(dataset, rows)
    slots = share.of(range(batch_size or len(rows)))
    own = [rows[slot] for slot in slots if slot < len(rows)]
    size, count, num_steps = len(slots), len(own), dataset.max_steps
    rows = own or rows[:1]  # something to pad, where all of them are masked
    encoded, tiles = zip(*map(dataset.load, rows), strict=True)

    def stack(field: str, length: int, fill: float | bool) -> np.ndarray:
        first = getattr(encoded[0], field)
        stacked = np.full((size, length), fill, first.dtype)
        for slot, row in enumerate(encoded):
            stacked[slot, : len(getattr(row, field))] = getattr(row, field)
        return stacked

    padded_tiles = np.zeros((size, shape.tiles, *tiles[0].shape[1:]), np.uint8)
    for slot, row_tiles in enumerate(tiles):
        padded_tiles[slot, : len(row_tiles)] = row_tiles
    num_labels = np.pad(dataset.num_labels[rows], (0, size - len(rows)))
    return Batch(
        tokens=stack("tokens", shape.tokens, dataset.tokenizer.pad_id),
        image_mask=stack("image_mask", shape.tokens, False),
        tiles=padded_tiles,
        step_positions=stack("step_positions", num_steps, 0),
        labels=stack("labels", num_steps, 0),
        step_mask=np.arange(num_steps) < num_labels[:, None],
        example_id=np.pad(np.asarray(rows, np.int32), (0, size - len(rows))),
        example_mask=np.arange(size) < count,
        soft_labels=stack("soft_labels", num_steps, 0.0) if dataset.soft_labels else None,
    )


def shape_of_rows(dataset: Dataset, rows: Sequence[int]) -> Shape:
    """What the rows are padded to as one batch."""
    return shapes.fitting(dataset.padded.shapes, dataset.num_tokens[rows].max(), dataset.num_tiles[rows].max())


def read_order(path: str, dataset: Dataset) -> np.ndarray:
    """A JSON list of row numbers, to be replayed exactly.

    Args:
      path: the file.
      dataset: whose rows they are.

    Raises:
      InputError: not a list of usable rows.
    """
    try:
        order = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as a JSON list of row numbers ({error})") from error
    if not isinstance(order, list) or not order:
        raise InputError(f"{path}: must be a JSON list of row numbers, with at least one")
    usable = set(dataset.rows.tolist())
    for position, row in enumerate(order):
        if type(row) is not int or not 0 <= row < len(dataset):
            raise InputError(f"{path} entry {position}: {row!r} is not a row number from 0 to {len(dataset) - 1}")
        if row not in usable:
            raise InputError(f"{path} entry {position}: row {row} is skipped as a bad row; take it out")
    return np.asarray(order, np.int32)


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Which rows go into which batch of a run: `plan[n]` are the rows of batch n, int [batch_size].

    Where batches have several rows and rows several shapes, the batches of a window take rows of one shape together
    and then stand in a seeded order of their own, so that a batch has little padding and its length tells nothing of
    when it comes. The draws are the same either way.
    """

    draws: grain.MapDataset  # rows, one after the other
    batch_size: int
    num_batches: int
    seed: int
    shape_of: np.ndarray | None  # [N] the shape of each row; None: batches take the draws as they come
    window_size: int = WINDOW  # batches

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, number: int) -> np.ndarray:
        if self.shape_of is None:
            return self._drawn(number, 1)
        with _PLANNING:
            window = _window(self, number // self.window_size)
        return window[number % self.window_size]

    def rows_from(self, first: int) -> Iterator[np.ndarray]:
        """`plan[n]` for every n from `first` on; a walk through all of them leaves the windows of others in place."""
        if self.shape_of is None:
            yield from (self._drawn(number, 1) for number in range(first, self.num_batches))
            return
        for start in range(first // self.window_size * self.window_size, self.num_batches, self.window_size):
            yield from self.window(start // self.window_size)[max(0, first - start) :]

    def _drawn(self, number: int, count: int) -> np.ndarray:
        start = number * self.batch_size
        return np.array([self.draws[i] for i in range(start, start + count * self.batch_size)], np.int32)

    def window(self, number: int) -> np.ndarray:
        """The rows of the batches of one window, int [window_size or what is left, batch_size]."""
        first = number * self.window_size
        count = min(self.window_size, self.num_batches - first)
        drawn = self._drawn(first, count)
        alike = drawn[np.argsort(self.shape_of[drawn], kind="stable")].reshape(count, self.batch_size)
        return np.random.default_rng((self.seed, number)).permutation(alike)


@functools.lru_cache(maxsize=8)
def _window(plan: Plan, number: int) -> np.ndarray:
    return plan.window(number)


def make_plan(
    dataset: Dataset, *, batch_size: int, num_batches: int, seed: int, order: np.ndarray | None = None
) -> Plan:
    """A seeded shuffle of the usable rows, new in every epoch, or `order` as it stands, over and over.

    Batches run on across the epochs' borders, so no row is left out. Where rows of one shape are brought together, an
    epoch's last and the next one's first batches may change places within a window.
    """
    rows = dataset.rows if order is None else order
    source = grain.MapDataset.source(rows).seed(seed)
    if order is None:
        source = source.shuffle()
    together = order is None and batch_size > 1 and len(dataset.padded.shapes) > 1
    return Plan(
        draws=source.repeat(-(-num_batches * batch_size // len(rows))),
        batch_size=batch_size,
        num_batches=num_batches,
        seed=seed,
        shape_of=dataset.shape_of if together else None,
        window_size=min(WINDOW, max(1, len(rows) // batch_size)),
    )


def training_batches(
    dataset: Dataset,
    plan: Plan,
    first: int = 0,
    *,
    num_inner_steps: int = 1,
    reading: Reading = READING,
    share: Share = WHOLE,
) -> grain.DatasetIterator:
    """The plan's batches from number `first` on, read ahead; `close()` ends the reading.

    Args:
      dataset: what the plan's rows are of.
      plan: from `make_plan`.
      first: where to begin: a resumed run goes on where it stood.
      num_inner_steps: K > 1 makes the rows of one batch K batches of one shape: leaves [K, B, ...].
      reading: threads and processes.
      share: of every batch, what this process reads for its devices.

    Raises:
      ValueError: a batch cannot be shared out so.
    """
    share.of(range(plan.batch_size // num_inner_steps))

    def batch_of(rows: np.ndarray) -> Batch:
        if num_inner_steps == 1:
            return collate(dataset, rows, share=share)
        shape = shape_of_rows(dataset, rows)
        steps = [collate(dataset, step, share=share, shape=shape) for step in np.split(rows, num_inner_steps)]
        return Batch(*[None if leaves[0] is None else np.stack(leaves) for leaves in zip(*steps, strict=True)])

    numbers = grain.MapDataset.source(range(first, len(plan)))
    batches = numbers.map(lambda number: batch_of(plan[number]))
    return read_ahead(batches, reading)


def read_ahead(batches: grain.MapDataset, reading: Reading) -> grain.DatasetIterator:
    """The elements in order, some of them ready before they are asked for; `close()` ends it."""
    options = grain.ReadOptions(num_threads=reading.threads, prefetch_buffer_size=reading.ahead)
    stream = batches.to_iter_dataset(options)
    if reading.workers:
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(reading.workers, reading.ahead))
    return iter(stream)


def count_visits(plan: Plan, num_rows: int) -> np.ndarray:
    """How often each row is drawn by the whole plan: int [num_rows]."""
    return np.bincount(np.concatenate([plan[n] for n in range(len(plan))]), minlength=num_rows)


def shapes_met(streams: Sequence[tuple[Dataset, Plan]], first: int) -> Iterator[tuple[Shape, ...]]:
    """The padded shapes that come together in a step, from number `first` on: each combination where it is first met.

    Args:
      streams: that give a batch to every step, in order.
      first: number of the step.
    """
    num_possible = math.prod(len(dataset.padded.shapes) for dataset, _ in streams)
    found: set[tuple[Shape, ...]] = set()
    for rows in zip(*(plan.rows_from(first) for _, plan in streams), strict=True):
        met = tuple(shape_of_rows(dataset, own) for (dataset, _), own in zip(streams, rows, strict=True))
        if met not in found:
            found.add(met)
            yield met
        if len(found) == num_possible:
            return


def shared_batches(
    dataset: Dataset, plans: Sequence[BatchPlan], reading: Reading = READING, share: Share = WHOLE
) -> Iterator[SharedBatch]:
    """The batches of a scoring plan in order, read ahead; `close()` ends the reading."""
    return read_ahead(grain.MapDataset.source(plans).map(lambda plan: sharing.collate(dataset, plan, share)), reading)


def ordered_batches(
    dataset: Dataset, batch_size: int, reading: Reading = READING, share: Share = WHOLE
) -> Iterator[Batch]:
    """Every usable row once, longest first so that neighbours share a shape; the last batch is filled up.

    `example_id` with `example_mask` tells which rows a batch holds.
    """
    by_length = sorted(dataset.rows.tolist(), key=lambda row: (-dataset.num_tiles[row], -dataset.num_tokens[row]))
    starts = grain.MapDataset.source(range(0, len(by_length), batch_size))
    batches = starts.map(lambda start: collate(dataset, by_length[start : start + batch_size], batch_size, share=share))
    return read_ahead(batches, reading)
