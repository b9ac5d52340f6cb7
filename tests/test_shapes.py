"""Padded shapes: they hold every row, are few, and leave little padding on real lengths."""

import json

import numpy as np
import pytest

from dreamprm_jax.data import shapes, tokens
from dreamprm_jax.data.images import count_tiles, image_size


def lengths(seed, num_rows=500):
    """(num_tokens, num_tiles) of rows whose text and tiles vary independently; some have no image."""
    rng = np.random.default_rng(seed)
    tiles = rng.choice([0, 1, 3, 5, 7], num_rows)
    return (256 * tiles + rng.integers(20, 900, num_rows)).astype(np.int32), tiles.astype(np.int32)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("max_shapes", [1, 2, 3, 7, 11])
def test_every_row_fits_into_one_of_a_few_shapes(seed, max_shapes):
    num_tokens, num_tiles = lengths(seed)
    chosen = shapes.choose(num_tokens, num_tiles, max_shapes)
    assert 1 <= len(chosen.shapes) <= max_shapes
    edges = np.array(chosen.shapes)[shapes.assign(chosen.shapes, num_tokens, num_tiles)]
    assert np.all(edges[:, 0] >= num_tokens)
    assert np.all(edges[:, 1] >= num_tiles)
    assert np.all(edges[:, 0] % shapes.MULTIPLE == 0)
    assert chosen.padding == pytest.approx(1 - num_tokens.sum() / edges[:, 0].sum())
    assert chosen.tile_padding == pytest.approx(1 - num_tiles.sum() / edges[:, 1].sum())
    assert chosen.shapes[-1] == (max(edges[:, 0]), max(num_tiles))  # whatever rows meet in a batch


def test_each_row_gets_the_cheapest_shape_that_holds_it():
    found = (shapes.Shape(100, 1), shapes.Shape(300, 1), shapes.Shape(200, 3))
    assert shapes.assign(found, np.array([100, 101, 50]), np.array([1, 0, 2])).tolist() == [0, 1, 2]
    assert shapes.fitting(found, 150, 1) == (300, 1)
    assert shapes.fitting(found, 150, 2) == (200, 3)


def test_more_shapes_pad_less():
    padding = [shapes.choose(*lengths(0), count).padding for count in (1, 2, 4, 8, 11)]
    assert padding == sorted(padding, reverse=True)
    assert padding[0] > 0.4
    assert padding[-1] < 0.15


def test_rows_alike_have_one_shape():
    chosen = shapes.choose(np.full(9, 16), np.full(9, 1), 11)
    assert chosen == shapes.Shapes((shapes.Shape(16, 1),), 0.0, 0.0)
    assert shapes.choose(np.array([300, 20]), np.array([0, 0]), 11).shapes == ((24, 0), (304, 0))


def test_tiles_cost_too():
    """Joining rows of one tile count that differ by 100 tokens is cheaper than padding six tiles."""
    num_tokens, num_tiles = np.repeat([1000, 1008, 900], 100), np.repeat([1, 7, 1], 100)
    assert shapes.choose(num_tokens, num_tiles, 2).shapes == ((1000, 1), (1008, 7))


def test_many_tile_counts_are_told_apart_by_quantiles():
    rng = np.random.default_rng(0)
    num_tiles = rng.integers(1, 300, 3000)
    num_tokens = 256 * num_tiles + rng.integers(20, 900, 3000)
    chosen = shapes.choose(num_tokens, num_tiles, 11)
    assert chosen.padding < 0.15
    assert chosen.shapes[-1].tiles == num_tiles.max()


@pytest.mark.parametrize("seed", range(40))
def test_the_shapes_of_several_data_sets_are_no_more_than_asked_for(seed):
    """Small sets pass over some numbers of shapes: one that holds every row comes on top."""
    rng = np.random.default_rng(seed)
    sets = [(rng.integers(20, 400, 12), rng.choice([0, 1, 3], 12)) for _ in range(2)]
    for max_shapes in (2, 3, 7):
        found = shapes.choose_together(sets, max_shapes)
        assert sum(len(each.shapes) for each in found) <= max_shapes


def test_data_sets_share_the_shapes_by_need():
    uneven, alike = lengths(0), (np.full(9, 16), np.full(9, 1))
    first, second = shapes.choose_together([uneven, alike], 11)
    assert (len(first.shapes), len(second.shapes)) == (10, 1)
    first, second = shapes.choose_together([uneven, lengths(1)], 11)
    assert len(first.shapes) + len(second.shapes) == 11
    assert abs(first.padding - second.padding) < 0.05


def meta_lengths(shared):
    """(num_tokens, num_tiles) of the published meta set: its own text; of 30 real images, one by each question's id."""
    tokenizer = tokens.load_tokenizer(shared / "tokenizer").tokenizer
    rows = json.loads((shared / "mmmu/meta_MMMU_Pro.json").read_text())
    sizes = [image_size(path, path.name) for path in sorted((shared / "mmmu/images").glob("*_*.png"))[:30]]
    tiles = [count_tiles(*sizes[sum(row["id"].encode()) % len(sizes)], max_tiles=6) for row in rows]
    text = ["".join(f"<|im_start|>user\n{turn['value']}<|im_end|>\n" for turn in row["conversations"]) for row in rows]
    num_text = [len(encoding.ids) for encoding in tokenizer.encode_batch(text, add_special_tokens=False)]
    return np.array(num_text) + 256 * np.array(tiles) + 2, np.array(tiles)


def test_padding_on_the_real_meta_set(shared):
    """docs/data.md has the table."""
    found = meta_lengths(shared)
    alone = shapes.choose(*found, 11)
    assert len(alone.shapes) < 12
    assert alone.padding < 0.15
    assert alone.tile_padding < 0.05
    for chosen in shapes.choose_together([found, found], 11):
        assert chosen.padding < 0.15
