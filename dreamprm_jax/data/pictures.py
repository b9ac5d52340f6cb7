"""The pictures of the embedded benchmark: four cells, each showing a number from 1 to 4 in one notation. numpy alone.

Integer arithmetic throughout, and a PNG of one stored block: a seed gives the same bytes on every machine.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable

import numpy as np

GLYPH_SIZE = 12  # px
CELL_SIZE = 14  # px: the glyph, and a border that it is shifted about in
IMAGE_SIZE = 2 * CELL_SIZE  # px
MAX_SHIFT = 1  # px, down and to the right
NUM_VALUES = 4  # also the number of cells

_y, _x = np.mgrid[:GLYPH_SIZE, :GLYPH_SIZE]
_down, _across = 2 * _y - 11, 2 * _x - 11  # half pixels from the middle
_radius = _down**2 + _across**2


def _grid(value: int) -> np.ndarray:
    """A square whose value-th quarter is filled, in reading order."""
    return (_y // 6 == value // 2) & (_x // 6 == value % 2)


def _dice(value: int) -> np.ndarray:
    """Pips as on a die."""
    outer = lambda at: (at < 3) | (at > 8)  # noqa: E731
    middle = (np.abs(_down) <= 3) & (np.abs(_across) <= 3)
    corners = outer(_y) & outer(_x)
    diagonal = corners & ((_y < 6) == (_x < 6))
    return (middle, diagonal, diagonal | middle, corners)[value]


def _bars(value: int) -> np.ndarray:
    """A column of a bar chart; its height is the value."""
    return (_y >= GLYPH_SIZE - 3 * (value + 1)) & (_x >= 3) & (_x < 9)


def _clock(value: int) -> np.ndarray:
    """A dial with its hand so many quarters past twelve."""
    hand = (np.abs(_across) <= 2) & (_down <= 2)
    dial = (_radius > 8**2) & (_radius <= 11**2)
    return dial | ((_radius <= 9**2) & np.rot90(hand, -(value + 1)))


def _shapes(value: int) -> np.ndarray:
    """Disc, cross, triangle, square."""
    disc = _radius <= 10**2
    cross = np.minimum(np.abs(_down - _across), np.abs(_down + _across)) <= 3
    triangle = 2 * np.abs(_across) <= _down + 11
    square = np.maximum(np.abs(_down), np.abs(_across)) >= 8
    return (disc, cross, triangle, square)[value]


def _table(value: int) -> np.ndarray:
    """A table of four rows with the value-th marked."""
    rules = (_y % 3 == 0) & (_x % 2 == 0)
    return (_y // 3 == value) | rules


NOTATIONS: dict[str, Callable[[int], np.ndarray]] = {
    "grid": _grid,
    "dice": _dice,
    "bars": _bars,
    "clock": _clock,
    "shapes": _shapes,
    "table": _table,
}
"""value 0..3 -> bool [GLYPH_SIZE, GLYPH_SIZE], true where there is ink."""


def draw(rng: np.random.Generator, notation: str, values: np.ndarray, *, dark: bool) -> np.ndarray:
    """Four values 0..3, in reading order of the cells -> uint8 [IMAGE_SIZE, IMAGE_SIZE, 3].

    Colours and the place of each glyph in its cell are drawn from `rng`. `dark`: light ink on a dark ground.
    """
    ground, ink = rng.integers(200, 256, size=3), rng.integers(0, 80, size=3)
    if dark:
        ground, ink = ink, ground
    shifts = rng.integers(0, MAX_SHIFT + 1, size=(NUM_VALUES, 2))
    inked = np.zeros((IMAGE_SIZE, IMAGE_SIZE), bool)
    for cell, (value, shift) in enumerate(zip(values, shifts, strict=True)):
        top, left = CELL_SIZE * np.array(divmod(cell, 2)) + shift
        inked[top : top + GLYPH_SIZE, left : left + GLYPH_SIZE] = NOTATIONS[notation](int(value))
    return np.where(inked[..., None], ink, ground).astype(np.uint8)


def encode_png(pixels: np.ndarray) -> bytes:
    """An RGB PNG of uint8 [height, width, 3] with one stored block: no compressor whose bytes depend on its version."""
    height, width, _ = pixels.shape
    rows = np.pad(pixels.reshape(height, -1), ((0, 0), (1, 0))).tobytes()
    size = len(rows)
    stream = b"\x78\x01\x01" + struct.pack("<HH", size, size ^ 0xFFFF) + rows + struct.pack(">I", zlib.adler32(rows))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", stream), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
