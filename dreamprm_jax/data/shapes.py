"""The padded shapes of a data set's rows, chosen from the data: few, as each is a program to compile.

Rows are padded to the cheapest shape that holds them. A few shapes that follow the lengths leave little padding;
the merging that finds them starts from many and joins, time after time, the two that cost least to join.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

MULTIPLE = 8
"""Padded lengths are multiples of this many tokens."""

_TILE_COST = 128
"""What a padded tile counts beside a padded token. The vision tower of InternVL3-1B spends more on one (about 870
tokens of the language model's work); at that price a few shapes all go into exact tile counts, and text is padded by a
third. Tiles are padded little either way, since most tokens of a row are its tiles'."""

_FINEST = 16
"""Numbers of tiles told apart before the merging, and lengths for each of them."""


class Shape(NamedTuple):
    """What a row is padded to."""

    tokens: int  # T
    tiles: int  # P


class Shapes(NamedTuple):
    """The shapes of one data set, cheapest first."""

    shapes: tuple[Shape, ...]
    padding: float  # share of the padded tokens that stand for nothing
    tile_padding: float  # the same of the tiles


def choose(num_tokens: np.ndarray, num_tiles: np.ndarray, max_shapes: int) -> Shapes:
    """The shapes that pad rows of these lengths least, `max_shapes` at most; the last one holds every row.

    Args:
      num_tokens, num_tiles: of every row, [N].
      max_shapes: at least 1.
    """
    return _history(num_tokens, num_tiles, max_shapes)[-1]


def choose_together(lengths: Sequence[tuple[np.ndarray, np.ndarray]], max_shapes: int) -> list[Shapes]:
    """Shapes for several data sets, `max_shapes` in all: the one that is padded most gets the next.

    Args:
      lengths: (num_tokens, num_tiles) of each.
      max_shapes: at least one for each.
    """
    histories = [_history(*each, max_shapes) for each in lengths]
    counts = [0] * len(histories)  # index of the present choice
    spare = max_shapes - len(histories)
    while True:
        added = [  # by the next choice of each: more than one where a number of shapes is passed over
            len(history[count + 1].shapes) - len(history[count].shapes) if count + 1 < len(history) else spare + 1
            for history, count in zip(histories, counts, strict=True)
        ]
        growing = [i for i, more in enumerate(added) if more <= spare]
        if not growing:
            break
        worst = max(growing, key=lambda i: histories[i][counts[i]].padding)
        counts[worst] += 1
        spare -= added[worst]
    return [history[count] for history, count in zip(histories, counts, strict=True)]


def fitting(shapes: Sequence[Shape], num_tokens: int, num_tiles: int) -> Shape:
    """The cheapest shape that holds so many tokens and tiles."""
    return next(shape for shape in shapes if shape.tokens >= num_tokens and shape.tiles >= num_tiles)


def assign(shapes: Sequence[Shape], num_tokens: np.ndarray, num_tiles: np.ndarray) -> np.ndarray:
    """Index of the cheapest shape that holds each row, int [N]."""
    edges = np.array(shapes)  # [shapes, 2]
    fits = (edges[:, 0] >= num_tokens[:, None]) & (edges[:, 1] >= num_tiles[:, None])
    return np.argmax(fits, axis=1)


def _history(num_tokens: np.ndarray, num_tiles: np.ndarray, max_shapes: int) -> list[Shapes]:
    """The choices by their number of shapes, from one upwards."""
    cells = _cells(num_tokens, num_tiles)
    found = {}
    while True:
        if len(cells) <= max_shapes:
            chosen = _measured(cells, num_tokens, num_tiles)
            found[len(chosen.shapes)] = chosen
        if len(cells) == 1:
            return [found[count] for count in sorted(found) if count <= max_shapes]
        cells = _join_cheapest(cells)


def _cells(num_tokens: np.ndarray, num_tiles: np.ndarray) -> list[tuple[int, int, int]]:
    """(tokens, tiles, rows): for each number of tiles, or quantile of many, the quantiles of the lengths."""
    cells, tile_edges = [], np.unique(num_tiles)
    if len(tile_edges) > _FINEST:
        tile_edges = _quantiles(num_tiles, 1)
    tile_class = np.searchsorted(tile_edges, num_tiles)
    for number, tiles in enumerate(tile_edges):
        lengths = num_tokens[tile_class == number]
        if not len(lengths):
            continue
        edges = _quantiles(lengths, MULTIPLE)
        rows = np.bincount(np.searchsorted(edges, lengths), minlength=len(edges))
        cells += [(int(edge), int(tiles), int(count)) for edge, count in zip(edges, rows, strict=True) if count]
    return cells


def _quantiles(values: np.ndarray, multiple: int) -> np.ndarray:
    """Up to `_FINEST` edges, ascending, rounded up to a multiple; the last one holds every value."""
    found = np.quantile(values, np.linspace(0, 1, _FINEST + 1)[1:], method="lower").astype(int)
    return np.unique(-(-found // multiple) * multiple)


def _cost(tokens: np.ndarray | int, tiles: np.ndarray | int) -> np.ndarray | int:
    return tokens + _TILE_COST * tiles


def _join_cheapest(cells: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    tokens, tiles, rows = np.array(cells).T
    joined_tokens, joined_tiles = np.maximum.outer(tokens, tokens), np.maximum.outer(tiles, tiles)
    own = rows * _cost(tokens, tiles)
    added = _cost(joined_tokens, joined_tiles) * np.add.outer(rows, rows) - np.add.outer(own, own)
    added[np.tril_indices(len(cells))] = np.iinfo(added.dtype).max
    i, j = np.unravel_index(np.argmin(added), added.shape)
    rest = [cell for number, cell in enumerate(cells) if number not in (i, j)]
    return [*rest, (int(joined_tokens[i, j]), int(joined_tiles[i, j]), int(rows[i] + rows[j]))]


def _measured(cells: list[tuple[int, int, int]], num_tokens: np.ndarray, num_tiles: np.ndarray) -> Shapes:
    """The cells' shapes and one that holds every row, as rows of different shapes may have to share a batch."""
    everything = Shape(max(cell[0] for cell in cells), max(cell[1] for cell in cells))
    shapes = sorted({everything, *(Shape(*cell[:2]) for cell in cells)}, key=lambda shape: _cost(*shape))
    padded = np.array(shapes)[assign(shapes, num_tokens, num_tiles)].sum(axis=0)
    return Shapes(
        tuple(shapes),
        padding=1 - float(num_tokens.sum() / padded[0]),
        tile_padding=1 - float(num_tiles.sum() / padded[1]) if padded[1] else 0.0,
    )
