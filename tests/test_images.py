"""Tiles of small made-up images, broken files, and the recorded tiles of 30 real images."""

import hashlib
import io
import json
import zlib

import numpy as np
import pytest
from PIL import Image

from dreamprm_jax.data.images import (
    count_tiles,
    image_size,
    normalise,
    open_image,
    tile_grid,
    tile_image,
)
from dreamprm_jax.errors import InputError


def encoded(image, kind="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def noise(width, height):
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values)


@pytest.mark.parametrize(
    ("size", "max_tiles", "grid"),
    [
        ((10, 10), 1, (1, 1)),
        ((1000, 10), 6, (6, 1)),
        ((10, 1000), 6, (1, 6)),
        ((20, 10), 6, (2, 1)),
        ((14, 14), 4, (1, 1)),  # 196 pixels: not more than half of 2 x 2 tiles of 10
        ((15, 15), 4, (2, 2)),  # 225: more
        ((20, 10), 8, (2, 1)),
        ((30, 15), 8, (4, 2)),
    ],
)
def test_grid(size, max_tiles, grid):
    assert tile_grid(*size, max_tiles=max_tiles, tile_size=10) == grid
    tiles = tile_image(noise(*size), max_tiles=max_tiles, tile_size=10)
    cells = grid[0] * grid[1]
    assert len(tiles) == count_tiles(*size, max_tiles=max_tiles, tile_size=10) == cells + (cells > 1)
    assert tiles.shape[1:] == (10, 10, 3) and tiles.dtype == np.uint8


def test_tiles_are_cut_row_by_row_and_the_thumbnail_is_last():
    image = noise(30, 20)  # already 3 x 2 tiles of 10: the resizing changes nothing
    pixels = np.asarray(image)
    tiles = tile_image(image, max_tiles=6, tile_size=10)
    expected = [pixels[row : row + 10, column : column + 10] for row in (0, 10) for column in (0, 10, 20)]
    np.testing.assert_array_equal(tiles[:6], expected)
    np.testing.assert_array_equal(tiles[6], image.resize((10, 10), Image.Resampling.BICUBIC))


def test_one_tile_has_no_thumbnail():
    assert tile_image(noise(7, 9), max_tiles=1, tile_size=10).shape == (1, 10, 10, 3)


def test_normalise():
    tiles = np.array([[[[0, 0, 0], [255, 255, 255]]]], np.uint8)
    values = normalise(tiles)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(values[0, 0], [-mean / std, (1 - mean) / std], rtol=1e-6)
    assert values.dtype == np.float32 and tiles.max() == 255


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "L", "1", "P", "I;16"])
def test_every_mode_becomes_rgb(mode, tmp_path):
    content = encoded(Image.new(mode, (5, 3)))
    (tmp_path / "x.png").write_bytes(content)
    for source in (content, tmp_path / "x.png"):
        image = open_image(source, "here")
        assert (image.mode, image.size) == ("RGB", (5, 3)) and image_size(source, "here") == (5, 3)


def test_transparency_is_dropped_not_blended():
    image = open_image(encoded(Image.new("RGBA", (2, 2), (10, 20, 30, 0))), "here")
    assert image.getpixel((0, 0)) == (10, 20, 30)


def test_palette_with_transparency_gives_no_warning():
    image = Image.new("P", (2, 2))
    image.putpalette([1, 2, 3, 4, 5, 6])
    image.info["transparency"] = b"\x00\x80"
    assert open_image(encoded(image), "here").getpixel((0, 0)) == (1, 2, 3)


def broken_files():
    png, jpeg = encoded(noise(64, 64)), encoded(noise(64, 64), "JPEG")
    return {
        "empty": b"",
        "text": b"not an image",
        "truncated png": png[: len(png) // 2],
        "truncated jpeg": jpeg[: len(jpeg) // 2],
        "flipped bytes": png[:60] + bytes(255 - byte for byte in png[60:400]) + png[400:],
    }


@pytest.mark.parametrize("kind", broken_files())
def test_a_broken_image_is_named(kind, tmp_path):
    content = broken_files()[kind]
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r'^meta\.json row 17: "image" ".*broken\.png" cannot be read as an image'):
        open_image(path, "meta.json row 17")
    with pytest.raises(InputError, match=rf'^meta\.json row 17: "image" {len(content)} bytes cannot be read'):
        open_image(content, "meta.json row 17")


def test_formats_that_start_other_programs_are_refused():
    content = encoded(noise(8, 8), "EPS")  # Pillow hands it to Ghostscript
    for read in (open_image, image_size):
        with pytest.raises(InputError, match=r"replace it with a whole file \(PNG, JPEG"):
            read(content, "x.json row 3")


def test_a_file_that_is_not_there_is_named(tmp_path):
    for read in (open_image, image_size):
        for path in (tmp_path / "none.png", tmp_path):
            with pytest.raises(InputError, match=r'row 3: "image" ".*" cannot be read as an image'):
                read(path, "x.json row 3")


@pytest.mark.parametrize("side", [9_460, 14_000, 60_000])
def test_an_enormous_image_is_refused_before_it_is_decoded(side):
    content = bytearray(encoded(Image.new("1", (8, 8))))
    content[16:24] = side.to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    for read in (open_image, image_size):
        with pytest.raises(InputError, match=r'x\.json row 3: "image" \d+ bytes is too large .* the limit is 89478485'):
            read(bytes(content), "x.json row 3")


def test_recorded_grids(shared):
    recorded = json.loads((shared / "golden/closest_ratio.json").read_text())
    assert recorded
    for key, grid in recorded.items():
        size, max_tiles = key.split("@")
        assert tile_grid(*map(int, size.split("x")), max_tiles=int(max_tiles)) == tuple(grid), key


def test_tiles_of_the_real_images_are_the_recorded_ones(shared):
    recorded = json.loads((shared / "golden/image_tiles.json").read_text())["images"]
    assert len(recorded) == 30
    for name, expected in recorded.items():
        path = shared / "mmmu/images" / name
        assert list(image_size(path, name)) == expected["size"]
        image = open_image(path, name)
        for max_tiles in (5, 6, 12):
            figures = expected[f"max{max_tiles}"]
            tiles = tile_image(image, max_tiles=max_tiles)
            assert len(tiles) == count_tiles(*image.size, max_tiles=max_tiles) == figures["tiles"], (
                name,
                max_tiles,
            )
            assert hashlib.sha256(tiles).hexdigest() == figures["uint8_sha256"], (name, max_tiles)
            values = np.ascontiguousarray(normalise(tiles).transpose(0, 3, 1, 2))
            assert hashlib.sha256(values).hexdigest() == figures["float32_sha256"], (name, max_tiles)
