"""A checked data set: every row's lengths are known, and each can be had as tokens and tiles at any time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from dreamprm_jax.data import shapes
from dreamprm_jax.data.bad_rows import RAISE, OnError, settle
from dreamprm_jax.data.example import Encoded, Example, ImageSource
from dreamprm_jax.data.fields import field_error
from dreamprm_jax.data.images import count_tiles, image_size, open_image, tile_image
from dreamprm_jax.data.tokens import PRMTokenizer, check_length, encode, encode_many
from dreamprm_jax.errors import InputError

KEPT_BYTES = 256 * 2**20
"""Data sets in memory whose tiles take no more than this are decoded once."""

_NO_ROWS = "the data set has no rows: give a file with at least one"
_CHUNK = 256  # rows checked at once: what waits stays small however long the data set is
_PART = 8  # rows that a thread takes at once: a small picture is decoded in less time than it is handed over


class ImageSpec(NamedTuple):
    """How images become tiles and tokens."""

    max_tiles: int  # of an image, without the thumbnail
    tile_size: int  # pixels
    tokens_per_tile: int  # I
    tile_budget: int | None = None  # of a row, thumbnails included; None: none

    def max_tiles_of(self, example: Example) -> int:
        """`max_tiles` of each of the row's images, which share the budget alike.

        Raises:
          InputError: more images than the budget has tiles.
        """
        if self.tile_budget is None or not example.images:
            return self.max_tiles
        share = self.tile_budget // len(example.images)
        if not share:
            raise InputError(
                f'{example.place}: "image" names {len(example.images)} images, but images.tile_budget is '
                f"{self.tile_budget}; raise it to one tile an image at least",
                kind="image",
            )
        return max(1, min(self.max_tiles, share - 1))  # more than one tile come with a thumbnail


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Rows that can be used, their lengths, and the shapes that their batches are padded to.

    Rows in memory keep their tokens, and their tiles where they are few (`KEPT_BYTES`); rows on disk are read,
    tokenised and tiled again when a batch is built.
    """

    examples: Sequence[Example | InputError]  # [N] by row; those that are not in `rows` are not to be touched
    tokenizer: PRMTokenizer
    images: ImageSpec
    rows: np.ndarray  # the usable ones, ascending
    num_tokens: np.ndarray  # [N], 0 for a skipped row; so the two below
    num_tiles: np.ndarray
    num_labels: np.ndarray
    ids: tuple[str | int | None, ...]  # [N] the file's own
    domains: tuple[str | None, ...]  # [N]
    skipped: dict[str, int]  # rows by kind
    padded: shapes.Shapes
    encoded: tuple[Encoded | None, ...] | None  # [N]; None: rows on disk
    tiles: tuple[np.ndarray | None, ...] | None  # [N] each uint8 [P, height, width, 3]
    soft_labels: bool = False  # batches carry them
    outcome_targets: bool = False  # "+" is the target at every step of a right answer, "-" of a wrong one

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def max_steps(self) -> int:
        """S of every batch: the longest chain."""
        return int(self.num_labels.max())

    @property
    def shape_of(self) -> np.ndarray:
        """Index into `padded.shapes` of each row's shape, [N]; meaningless for a skipped row."""
        return shapes.assign(self.padded.shapes, self.num_tokens, self.num_tiles)

    def describe(self) -> str:
        """Rows, shapes and padding, for the log."""
        skipped = f", {sum(self.skipped.values())} skipped" if self.skipped else ""
        return (
            f"{len(self.rows)} rows{skipped}, {self.num_tokens[self.rows].mean():.0f} tokens and "
            f"{self.num_tiles[self.rows].mean():.1f} tiles each, {len(self.padded.shapes)} padded shape(s): "
            f"{self.padded.padding:.1%} of the tokens are padding, {self.padded.tile_padding:.1%} of the tiles"
        )

    def load(self, row: int) -> tuple[Encoded, np.ndarray]:
        """A row's tokens, and its tiles: uint8 [P, height, width, 3].

        Raises:
          InputError: an image that is not the one that was checked.
        """
        example = self.examples[row]
        encoded = self._encode(example, row)
        if self.outcome_targets:
            target = self.tokenizer.plus_id if example.true_false else self.tokenizer.minus_id
            encoded = encoded._replace(labels=np.full_like(encoded.labels, target))
        return encoded, self._read_tiles(example, row)

    def load_tokens(self, row: int) -> tuple[Encoded, tuple[ImageSource, ...]]:
        """A row's tokens and images as they stand, no image decoded."""
        example = self.examples[row]
        return self._encode(example, row), example.images

    def load_tiles(self, row: int) -> np.ndarray:
        """A row's tiles alone; errors as those of `load`."""
        return self._read_tiles(self.examples[row], row)

    def _encode(self, example: Example, row: int) -> Encoded:
        if self.encoded is not None:
            return self.encoded[row]
        num_tiles = tiles_of_images(example, self.images)
        return encode(self.tokenizer, example, num_tiles, self.images.tokens_per_tile)

    def _read_tiles(self, example: Example, row: int) -> np.ndarray:
        tiles = read_tiles(example, self.images) if self.tiles is None else self.tiles[row]
        if len(tiles) != self.num_tiles[row]:
            raise InputError(f'{example.place}: "image" changed on disk since the run began; start again')
        return tiles


class _Wanted(NamedTuple):
    """What rows are checked for: the arguments of `encode_all`."""

    tokenizer: PRMTokenizer
    images: ImageSpec
    context: int
    outcome_targets: bool
    soft_labels: bool
    in_memory: bool


class _Checked(NamedTuple):
    """What checking a row leaves; all empty for a row that is skipped."""

    num_tokens: int = 0
    num_tiles: int = 0
    num_labels: int = 0
    id: str | int | None = None
    domain: str | None = None
    encoded: Encoded | None = None  # of rows in memory


def encode_all(
    examples: Sequence[Example | InputError],
    tokenizer: PRMTokenizer,
    images: ImageSpec,
    context: int,
    *,
    outcome_targets: bool = False,
    soft_labels: bool = False,
    on_error: OnError = RAISE,
    max_shapes: int = 1,
) -> Dataset:
    """Reads, tokenises and checks every row.

    Args:
      examples: the rows, from `records` or a generator, with the error of each one that could not be read; or a
        prepared data set, which is read again whenever a row is needed. Images of rows in memory are decoded here, so
        that a broken one is found; those of a prepared set were, when it was written.
      tokenizer: the model's.
      images: tiling.
      context: the model's longest sequence, in tokens.
      outcome_targets: the meta set's reading of a chain: "+" is the target at every step of a right answer, "-" of a
        wrong one, so every row needs "true_false". The text, and with it the labels that the model sees as history,
        stays as it is (published code).
      soft_labels: whether batches are to carry them; every row then needs them.
      on_error: what to do about rows that cannot be used: not read, too long, an image that cannot be decoded.
      max_shapes: that batches may have.

    Raises:
      InputError: no rows; or the first bad row, as `on_error` says.
    """
    if not len(examples):
        raise InputError(_NO_ROWS)
    in_memory = isinstance(examples, list | tuple)
    wanted = _Wanted(tokenizer, images, context, outcome_targets, soft_labels, in_memory)
    with ThreadPoolExecutor() as pool:  # PIL releases the interpreter lock
        checked = list(_check_rows(pool, examples, wanted))
        errors = {row: found for row, found in enumerate(checked) if isinstance(found, InputError)}
        skipped = settle(errors, len(examples), on_error)
        facts = [_Checked() if row in errors else found for row, found in enumerate(checked)]
        tiles = _kept_tiles(pool, examples, facts, images) if in_memory else None
    rows = np.array([row for row in range(len(examples)) if row not in errors])
    num_tokens, num_tiles, num_labels = np.array([found[:3] for found in facts], np.int32).T
    return Dataset(
        examples=tuple(examples) if in_memory else examples,
        tokenizer=tokenizer,
        images=images,
        rows=rows,
        num_tokens=num_tokens,
        num_tiles=num_tiles,
        num_labels=num_labels,
        ids=tuple(found.id for found in facts),
        domains=tuple(found.domain for found in facts),
        skipped=skipped,
        padded=shapes.choose(num_tokens[rows], num_tiles[rows], max_shapes),
        encoded=tuple(found.encoded for found in facts) if in_memory else None,
        tiles=tiles,
        soft_labels=soft_labels,
        outcome_targets=outcome_targets,
    )


def _check_rows(
    pool: ThreadPoolExecutor, examples: Sequence[Example | InputError], wanted: _Wanted
) -> Iterator[_Checked | InputError]:
    """Each row's lengths, or what is wrong with it."""
    for start in range(0, len(examples), _CHUNK):
        rows = range(start, min(start + _CHUNK, len(examples)))
        opened = list(_in_parts(pool, lambda row: _open(examples, row, wanted), rows))
        good = [found for found in opened if not isinstance(found, InputError)]
        rows_good, tiles_good = [found[0] for found in good], [found[1] for found in good]
        encoded = iter(encode_many(wanted.tokenizer, rows_good, tiles_good, wanted.images.tokens_per_tile))
        for found in opened:
            yield found if isinstance(found, InputError) else _checked(found[0], next(encoded), wanted)


def _open(
    examples: Sequence[Example | InputError], row: int, wanted: _Wanted
) -> tuple[Example, list[int]] | InputError:
    """A row and the tiles of each of its images."""
    try:
        example = examples[row]
        if isinstance(example, InputError):
            return example
        if wanted.outcome_targets and example.true_false is None:
            raise field_error(example.place, "true_false", "is missing; a meta row needs true or false")
        if wanted.soft_labels:
            _check_soft_labels(example)
        size_of = _size_of_decoded if wanted.in_memory else image_size
        return example, tiles_of_images(example, wanted.images, size_of)
    except InputError as error:
        return InputError(str(error), kind=error.kind)  # without its frames, which hold the row's images


def _checked(example: Example, encoded: Encoded | InputError, wanted: _Wanted) -> _Checked | InputError:
    try:
        if isinstance(encoded, InputError):
            raise encoded
        check_length(encoded, wanted.context, example.place)
    except InputError as error:
        return InputError(str(error), kind=error.kind)
    lengths = (len(encoded.tokens), encoded.num_tiles, len(encoded.labels))
    return _Checked(*lengths, example.id, example.dataset, encoded if wanted.in_memory else None)


def _check_soft_labels(example: Example) -> None:
    if example.soft_labels is None or len(example.soft_labels) != example.num_steps:
        found = 0 if example.soft_labels is None else len(example.soft_labels)
        raise InputError(
            f'{example.place}: "soft_labels" has {found} values for {example.num_steps} steps; prepare the data with '
            "soft labels, or leave out --config.soft_labels",
            kind="soft_labels",
        )
    if not all(0 <= value <= 1 for value in example.soft_labels):
        raise InputError(f'{example.place}: "soft_labels" has a value outside 0 to 1; correct it', kind="soft_labels")


def _in_parts(pool: ThreadPoolExecutor, function: Callable[[int], Any], rows: range) -> Iterator[Any]:
    """`function` of every row, in order."""
    parts = [rows[start : start + _PART] for start in range(0, len(rows), _PART)]
    for found in pool.map(lambda part: list(map(function, part)), parts):
        yield from found


def _size_of_decoded(source: ImageSource, place: str) -> tuple[int, int]:
    """As `image_size`, of an image that is then known to be whole."""
    return open_image(source, place).size


def tiles_of_images(
    example: Example, images: ImageSpec, size_of: Callable[[ImageSource, str], tuple[int, int]] = image_size
) -> list[int]:
    """Tiles of each of the row's images, thumbnails included; errors as those of `size_of`."""
    sizes = [size_of(source, example.place) for source in example.images]
    max_tiles = images.max_tiles_of(example)
    return [count_tiles(*size, max_tiles=max_tiles, tile_size=images.tile_size) for size in sizes]


def _kept_tiles(
    pool: ThreadPoolExecutor, examples: Sequence[Example | InputError], facts: Sequence[_Checked], images: ImageSpec
) -> tuple[np.ndarray | None, ...] | None:
    """The tiles of all rows, None for those that are skipped; None where they take more than `KEPT_BYTES`."""
    if sum(found.num_tiles for found in facts) * images.tile_size**2 * 3 > KEPT_BYTES:
        return None
    read = lambda row: read_tiles(examples[row], images) if facts[row].encoded else None  # noqa: E731
    return tuple(_in_parts(pool, read, range(len(examples))))


def read_tiles(example: Example, images: ImageSpec) -> np.ndarray:
    """All tiles of the row's images, image by image: uint8 [P, height, width, 3]."""
    size, max_tiles = images.tile_size, images.max_tiles_of(example)
    parts = [
        tile_image(open_image(source, example.place), max_tiles=max_tiles, tile_size=size) for source in example.images
    ]
    return np.concatenate([np.zeros((0, size, size, 3), np.uint8), *parts])


def first_rows(dataset: Dataset, num_rows: int, max_shapes: int) -> Dataset:
    """A data set in memory of the first rows of another, as `encode_all` makes it of them, with shapes of its own.

    Raises:
      InputError: there are none.
    """
    rows = dataset.rows[dataset.rows < num_rows]
    if not len(rows):
        raise InputError(_NO_ROWS)
    fields = ("examples", "num_tokens", "num_tiles", "num_labels", "ids", "domains", "encoded")
    return dataclasses.replace(
        dataset,
        rows=rows,
        padded=shapes.choose(dataset.num_tokens[rows], dataset.num_tiles[rows], max_shapes),
        tiles=None if dataset.tiles is None else dataset.tiles[:num_rows],
        **{name: getattr(dataset, name)[:num_rows] for name in fields},
    )


def with_shapes(datasets: Sequence[Dataset], max_shapes: int) -> list[Dataset]:
    """The data sets that feed one program, with `max_shapes` padded shapes in all."""
    lengths = [(dataset.num_tokens[dataset.rows], dataset.num_tiles[dataset.rows]) for dataset in datasets]
    chosen = shapes.choose_together(lengths, max_shapes)
    return [dataclasses.replace(dataset, padded=padded) for dataset, padded in zip(datasets, chosen, strict=True)]
