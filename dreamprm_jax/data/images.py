"""InternVL's dynamic preprocessing: an image becomes up to `max_tiles` square tiles and a thumbnail.

The whole image is resized (bicubic) to the grid whose shape is closest to its own, then cut row by row; a
grid of more than one tile is followed by the whole image at one tile's size. Equal to the published
preprocessing to the bit.
"""

import functools
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from dreamprm_jax.data.example import ImageSource
from dreamprm_jax.errors import InputError

TILE_SIZE = 448
"""Side of a tile of InternVL3, in pixels."""

MAX_PIXELS = 89_478_485
"""Larger images are refused: 256 MiB as RGB, Pillow's own limit for a decompression bomb."""

MAX_SIDE, MAX_BYTES = 65_535, 512 * 2**20
"""Of an image, in pixels, as JPEG has it; of its file: twice what the largest image takes uncompressed in RGB."""

IMAGE_MEAN = np.array((0.485, 0.456, 0.406), np.float32)
IMAGE_STD = np.array((0.229, 0.224, 0.225), np.float32)
"""Of ImageNet, as InternVL was trained; red, green, blue in [0, 1]."""

# Odd palettes and broken EXIF: the pixels are what they are. Said once, here, because a filter that is set and
# reset around each image is shared by all threads.
warnings.filterwarnings("ignore", module=r"PIL\.")

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # no format that starts another program (EPS)


def tile_grid(width: int, height: int, *, max_tiles: int, tile_size: int = TILE_SIZE) -> tuple[int, int]:
    """The grid (columns, rows) of at most `max_tiles` tiles whose shape is closest to width / height.

    Of grids with the same shape, such as 1 x 1 and 2 x 2, a larger one is taken where the image has more than
    half of its pixels. Sizes in pixels.
    """
    shape, area = width / height, width * height
    best, best_difference = (1, 1), float("inf")
    for columns, rows in _grids(max_tiles):
        difference = abs(shape - columns / rows)
        if difference < best_difference:
            best, best_difference = (columns, rows), difference
        elif difference == best_difference and area > 0.5 * tile_size * tile_size * columns * rows:
            best = (columns, rows)
    return best


@functools.cache
def _grids(max_tiles: int) -> tuple[tuple[int, int], ...]:
    """All grids of at most `max_tiles` tiles, smaller ones first."""
    sides = range(1, max_tiles + 1)
    grids = ((columns, rows) for columns in sides for rows in sides if columns * rows <= max_tiles)
    return tuple(sorted(grids, key=lambda grid: (grid[0] * grid[1], grid)))


def count_tiles(width: int, height: int, *, max_tiles: int, tile_size: int = TILE_SIZE) -> int:
    """Number of tiles P of an image of this size, the thumbnail included."""
    columns, rows = tile_grid(width, height, max_tiles=max_tiles, tile_size=tile_size)
    return columns * rows + (columns * rows > 1)


def tile_image(image: Image.Image, *, max_tiles: int, tile_size: int = TILE_SIZE) -> np.ndarray:
    """Cuts an RGB image into tiles, row by row, the thumbnail last: uint8 [P, tile_size, tile_size, 3]."""
    columns, rows = tile_grid(*image.size, max_tiles=max_tiles, tile_size=tile_size)
    num_cells = columns * rows
    tiles = np.empty((num_cells + (num_cells > 1), tile_size, tile_size, 3), np.uint8)
    whole = np.asarray(_resize(image, columns * tile_size, rows * tile_size))  # [height, width, 3]
    cells = whole.reshape(rows, tile_size, columns, tile_size, 3).swapaxes(1, 2)
    tiles[:num_cells].reshape(cells.shape)[...] = cells
    if num_cells > 1:
        tiles[-1] = _resize(image, tile_size, tile_size)
    return tiles


def _resize(image: Image.Image, width: int, height: int) -> Image.Image:
    return image.resize((width, height), Image.Resampling.BICUBIC)


def normalise(tiles: np.ndarray) -> np.ndarray:
    """uint8 tiles [..., 3] as the model sees them: (value / 255 - mean) / std, float32 [..., 3]."""
    values = tiles.astype(np.float32)
    values /= np.float32(255)
    values -= IMAGE_MEAN
    values /= IMAGE_STD
    return values


def image_format(source: ImageSource, place: str) -> str:
    """Pillow's name of an image's format ("PNG"); errors as those of `image_size`."""
    with _opened(source, place) as image:
        return image.format or ""


def image_size(source: ImageSource, place: str) -> tuple[int, int]:
    """(width, height) in pixels, from the header alone.

    Raises:
      InputError: no image, or one too large; `place` ("meta.json row 17") begins the message.
    """
    with _opened(source, place) as image:
        return image.size


def open_image(source: ImageSource, place: str) -> Image.Image:
    """The decoded image in RGB: transparency dropped, orientation tags not applied, as in the published code.

    Raises:
      InputError: no image, a broken or truncated one, or one too large; `place` begins the message.
    """
    with _opened(source, place) as image:
        return image.convert("RGB")


@contextmanager
def _opened(source: ImageSource, place: str) -> Iterator[Image.Image]:
    """An open, not yet decoded image; whatever goes wrong with it inside the block is the image's fault."""
    name = f"{len(source)} bytes" if isinstance(source, bytes) else f'"{source}"'
    bomb = Image.DecompressionBombWarning
    try:
        if (len(source) if isinstance(source, bytes) else source.stat().st_size) > MAX_BYTES:
            raise bomb(f"more than {MAX_BYTES} bytes")
        file = io.BytesIO(source) if isinstance(source, bytes) else Path(source)
        with Image.open(file, formats=_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS or max(image.size) > MAX_SIDE:
                raise bomb(f"{image.width} x {image.height} pixels")
            yield image
    except (bomb, Image.DecompressionBombError) as error:
        raise InputError(
            f'{place}: "image" {name} is too large ({error}); the limit is {MAX_PIXELS} pixels, {MAX_SIDE} on a side: '
            "scale it down",
            kind="image",
        ) from error
    except Exception as error:  # Pillow's decoders raise nearly any type on damaged files
        raise InputError(
            f'{place}: "image" {name} cannot be read as an image ({type(error).__name__}: {error}); '
            f"replace it with a whole file ({', '.join(_FORMATS)}) or take the row out",
            kind="image",
        ) from error
