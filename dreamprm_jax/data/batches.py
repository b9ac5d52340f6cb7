"""From examples to padded batches: encode and check every row first, then bucket, pad and prefetch.

Batches keep the order of the rows, so a run can replay any given order; each batch is padded to the
smallest bucket that holds it, so the number of compiled shapes stays small.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np

from dreamprm_jax.data.example import Encoded, Example
from dreamprm_jax.data.images import count_tiles, open_image, tile_image
from dreamprm_jax.data.tokens import PRMTokenizer, check_length, encode
from dreamprm_jax.errors import InputError
from dreamprm_jax.types import Batch

KEPT_BYTES = 256 * 2**20
"""Data sets whose tiles take no more memory than this are decoded once."""


class ImageSpec(NamedTuple):
    """How images become tiles and tokens."""

    max_tiles: int  # without the thumbnail
    tile_size: int  # pixels
    tokens_per_tile: int  # I


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Encoded examples, checked row by row, and the shapes their batches are padded to.

    Pixels are read again when a batch is built, unless they are few enough to be kept (`KEPT_BYTES`);
    everything else that can be wrong with a row has been found by `encode_all`.
    """

    examples: tuple[Example, ...]
    encoded: tuple[Encoded, ...]
    images: ImageSpec
    pad_id: int
    token_buckets: tuple[int, ...]
    tile_buckets: tuple[int, ...]
    num_steps: int  # S of every batch: the longest chain
    tiles: tuple[np.ndarray, ...] | None  # each row's, uint8 [P, height, width, 3], where all of them are small

    def __len__(self) -> int:
        return len(self.examples)


def _num_tiles(example: Example, images: ImageSpec) -> list[int]:
    """Tiles of each of the row's images; opens and decodes every one, so a broken file is found here."""
    sizes = [open_image(source, example.place).size for source in example.images]
    return [count_tiles(*size, max_tiles=images.max_tiles, tile_size=images.tile_size) for size in sizes]


def encode_all(examples: Sequence[Example], tokenizer: PRMTokenizer, images: ImageSpec, context: int) -> Dataset:
    """Tokenises and checks every row; decodes every image once.

    Args:
      examples: the rows, from `records` or a generator.
      tokenizer: the model's.
      images: tiling.
      context: the model's longest sequence, in tokens.

    Raises:
      InputError: the first row that is too long, or whose image cannot be decoded.
    """
    if not examples:
        raise InputError("the data set has no rows: give a file with at least one")

    def encode_one(example: Example) -> Encoded:
        encoded = encode(tokenizer, example, _num_tiles(example, images), images.tokens_per_tile)
        check_length(encoded, context, example.place)
        return encoded

    with ThreadPoolExecutor() as pool:  # PIL and tokenizers both release the interpreter lock
        encoded = tuple(pool.map(encode_one, examples))
        total_bytes = sum(row.num_tiles for row in encoded) * images.tile_size**2 * 3
        kept = tuple(pool.map(partial(read_tiles, images=images), examples)) if total_bytes <= KEPT_BYTES else None
    return Dataset(
        examples=tuple(examples),
        encoded=encoded,
        images=images,
        pad_id=tokenizer.pad_id,
        token_buckets=buckets([len(row.tokens) for row in encoded], multiple=8),
        tile_buckets=buckets([row.num_tiles for row in encoded], multiple=1),
        num_steps=max(len(row.labels) for row in encoded),
        tiles=kept,
    )


def read_tiles(example: Example, images: ImageSpec) -> np.ndarray:
    """All tiles of the row's images, image by image: uint8 [P, height, width, 3]."""
    size = images.tile_size
    parts = [
        tile_image(open_image(source, example.place), max_tiles=images.max_tiles, tile_size=size)
        for source in example.images
    ]
    return np.concatenate([np.zeros((0, size, size, 3), np.uint8), *parts])


def buckets(lengths: Sequence[int], multiple: int) -> tuple[int, ...]:
    """Padded lengths that cover `lengths`: the longest, then halves of it down to the shortest.

    Each is a multiple of `multiple`; a length that no row needs gets no bucket. Few, because each pair of a
    training and a meta shape is a program of its own to compile.
    """
    longest, shortest = max(lengths), min(lengths)
    edges, edge = {-(-longest // multiple) * multiple}, float(longest)
    while edge > max(shortest, 1):
        edge /= 2
        edges.add(-(-int(np.ceil(max(edge, shortest))) // multiple) * multiple)
    used = {min(e for e in edges if e >= length) for length in lengths}
    return tuple(sorted(used))


def _bucket(edges: Sequence[int], length: int) -> int:
    return min(edge for edge in edges if edge >= length)


def _padded_tiles(dataset: Dataset, index: int, num_tiles: int) -> np.ndarray:
    """uint8 [num_tiles, height, width, 3]: the row's own tiles, then zeros."""
    example = dataset.examples[index]
    tiles = read_tiles(example, dataset.images) if dataset.tiles is None else dataset.tiles[index]
    if len(tiles) != dataset.encoded[index].num_tiles:
        raise InputError(f'{example.place}: "image" changed on disk since the run began; start again')
    return np.concatenate([tiles, np.zeros((num_tiles - len(tiles), *tiles.shape[1:]), np.uint8)])


def _pad(row: np.ndarray, length: int, value: int | bool) -> np.ndarray:
    return np.pad(row, (0, length - len(row)), constant_values=value)


def collate(dataset: Dataset, indices: Sequence[int], batch_size: int | None = None) -> Batch:
    """The rows `indices` as one padded batch, in that order.

    Args:
      dataset: from `encode_all`.
      indices: B positions in it.
      batch_size: pads with masked rows up to it; None for B.
    """
    size = batch_size or len(indices)
    rows = [dataset.encoded[i] for i in indices]
    num_tokens = _bucket(dataset.token_buckets, max(len(row.tokens) for row in rows))
    num_tiles = _bucket(dataset.tile_buckets, max(row.num_tiles for row in rows))
    num_steps = dataset.num_steps

    def stack(field: str, length: int, fill: int | bool) -> np.ndarray:
        columns = [_pad(getattr(row, field), length, fill) for row in rows]
        return np.stack(columns + [np.full_like(columns[0], fill)] * (size - len(rows)))

    tiles = np.stack([_padded_tiles(dataset, i, num_tiles) for i in indices])
    real = np.arange(size) < len(rows)
    num_labels = np.array([len(row.labels) for row in rows] + [0] * (size - len(rows)))
    return Batch(
        tokens=stack("tokens", num_tokens, dataset.pad_id),
        image_mask=stack("image_mask", num_tokens, False),
        tiles=np.concatenate([tiles, np.zeros((size - len(rows), *tiles.shape[1:]), np.uint8)]),
        step_positions=stack("step_positions", num_steps, 0),
        labels=stack("labels", num_steps, 0),
        step_mask=np.arange(num_steps) < num_labels[:, None],
        example_id=np.pad(np.asarray(indices, np.int32), (0, size - len(rows))),
        example_mask=real,
    )


def read_order(path: str, num_rows: int) -> np.ndarray:
    """A JSON list of row numbers, to be replayed exactly.

    Raises:
      InputError: not a list of integers in [0, num_rows).
    """
    try:
        order = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as a JSON list of row numbers ({error})") from error
    if not isinstance(order, list) or not order:
        raise InputError(f"{path}: must be a JSON list of row numbers, with at least one")
    for position, row in enumerate(order):
        if type(row) is not int or not 0 <= row < num_rows:
            raise InputError(f"{path} entry {position}: {row!r} is not a row number from 0 to {num_rows - 1}")
    return np.asarray(order, np.int32)


def training_order(
    num_rows: int, *, batch_size: int, num_batches: int, seed: int, order: np.ndarray | None = None
) -> grain.MapDataset:
    """Which rows go into which batch: a seeded shuffle, new in every epoch, or `order` as it stands, over and over.

    Batches run on across the epochs' borders, so no row is left out.

    Returns:
      Element n holds the rows of batch n, int [batch_size].
    """
    rows = np.arange(num_rows) if order is None else order
    source = grain.MapDataset.source(rows).seed(seed)
    if order is None:
        source = source.shuffle()
    return source.repeat(-(-num_batches * batch_size // len(rows))).batch(batch_size)


def training_batches(dataset: Dataset, rows: grain.MapDataset, num_inner_steps: int = 1) -> grain.IterDataset:
    """The batches that `rows` (of `training_order`) names, read ahead by threads.

    With several inner steps the rows of one iteration become K batches of one shape: leaves [K, B, ...].
    The iterator's `get_state` and `set_state` resume it exactly.
    """

    def batch_of(indices: np.ndarray) -> Batch:
        batch = collate(dataset, indices)
        if num_inner_steps == 1:
            return batch
        return Batch(*[leaf.reshape(num_inner_steps, -1, *leaf.shape[1:]) for leaf in batch])

    batches = rows.map(batch_of)
    return batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))


def count_visits(rows: grain.MapDataset, num_batches: int, num_rows: int) -> np.ndarray:
    """How often each row is drawn by the first `num_batches` batches: int [num_rows]."""
    drawn = [rows[n] for n in range(num_batches)]
    return np.bincount(np.concatenate(drawn), minlength=num_rows)


def ordered_batches(dataset: Dataset, batch_size: int) -> Iterator[Batch]:
    """Every row once, longest first so that neighbours share a bucket; the last batch is filled up.

    `example_id` with `example_mask` tells which rows a batch holds.
    """
    by_length = sorted(
        range(len(dataset)), key=lambda i: (-dataset.encoded[i].num_tiles, -len(dataset.encoded[i].tokens))
    )
    for start in range(0, len(by_length), batch_size):
        yield collate(dataset, by_length[start : start + batch_size], batch_size)


def with_outcome_targets(dataset: Dataset, tokenizer: PRMTokenizer) -> Dataset:
    """The meta set's reading of a chain: "+" is the target at every step of a right answer, "-" of a wrong one.

    The text, and with it the labels that the model sees as history, stays as it is (published code).
    """

    def retarget(example: Example, encoded: Encoded) -> Encoded:
        target = tokenizer.plus_id if example.true_false else tokenizer.minus_id
        return encoded._replace(labels=np.full_like(encoded.labels, target))

    encoded = tuple(map(retarget, dataset.examples, dataset.encoded))
    return dataclasses.replace(dataset, encoded=encoded)
