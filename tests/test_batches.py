"""Encoding, buckets, padding and order of the batches."""

import io
import json
from itertools import chain

import numpy as np
import pytest
from PIL import Image

from dreamprm_jax.data import batches, noisy_steps
from dreamprm_jax.data.example import Example
from dreamprm_jax.data.tokens import wrap
from dreamprm_jax.errors import InputError

TOKENIZER = wrap(noisy_steps.tokenizer())
SPEC = batches.ImageSpec(max_tiles=2, tile_size=28, tokens_per_tile=4)
ROWS = noisy_steps.make(0, noisy_steps.Sizes(test_questions=1, meta_questions=20, cold_start=1, pretrain=1))


def png(width, height, value):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (value,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def dataset():
    """Rows with 1 image (1 tile), 1 wide image (2 tiles and a thumbnail), two images, and none."""
    rows = [row._replace(row=index) for index, row in enumerate(ROWS.train[:4])]
    question = rows[3].turns[0]._replace(text=rows[3].turns[0].text.replace("<image>", ""))
    rows[1] = rows[1]._replace(images=(png(56, 28, 7),))
    rows[2] = rows[2]._replace(images=(png(28, 28, 8), png(28, 28, 9)), turns=(
        rows[2].turns[0]._replace(text="<image>" + rows[2].turns[0].text), *rows[2].turns[1:]))  # fmt: skip
    rows[3] = rows[3]._replace(images=(), turns=(question, *rows[3].turns[1:]))
    return batches.encode_all(rows, TOKENIZER, SPEC, context=200)


def test_a_batch_holds_every_row_as_encoded(dataset):
    batch = batches.collate(dataset, [2, 0, 3, 1], batch_size=5)
    assert batch.tokens.shape[0] == 5
    assert batch.tiles.shape == (5, 3, 28, 28, 3)
    np.testing.assert_array_equal(batch.example_id, [2, 0, 3, 1, 0])
    np.testing.assert_array_equal(batch.example_mask, [True] * 4 + [False])
    for slot, row in enumerate([2, 0, 3, 1]):
        encoded = dataset.encoded[row]
        length, steps = len(encoded.tokens), len(encoded.labels)
        np.testing.assert_array_equal(batch.tokens[slot, :length], encoded.tokens)
        assert np.all(batch.tokens[slot, length:] == TOKENIZER.pad_id)
        assert batch.image_mask[slot].sum() == 4 * encoded.num_tiles
        np.testing.assert_array_equal(batch.step_mask[slot], np.arange(batch.labels.shape[1]) < steps)
        scored = batch.tokens[slot, batch.step_positions[slot, :steps] + 1]
        np.testing.assert_array_equal(scored, batch.labels[slot, :steps])
    assert not batch.step_mask[4].any()


def test_tiles_of_several_images_stand_in_order_and_padding_is_zero(dataset):
    batch = batches.collate(dataset, [2, 1, 3])
    assert batch.tiles[0, 0].max() == batch.tiles[0, 0].min() == 8
    assert batch.tiles[0, 1].max() == batch.tiles[0, 1].min() == 9
    assert np.all(batch.tiles[1] == 7)  # two tiles and a thumbnail
    assert not batch.tiles[0, 2:].any()
    assert not batch.tiles[2].any()


def test_kept_tiles_are_the_ones_on_file(dataset, monkeypatch):
    monkeypatch.setattr(batches, "KEPT_BYTES", 0)
    unkept = batches.encode_all(dataset.examples, TOKENIZER, SPEC, context=200)
    assert unkept.tiles is None
    for one, other in zip(batches.collate(unkept, [0, 1, 2, 3]), batches.collate(dataset, [0, 1, 2, 3]), strict=True):
        np.testing.assert_array_equal(one, other)


def test_text_only_batches_have_no_tiles(dataset):
    only = batches.encode_all([dataset.examples[3]], TOKENIZER, SPEC, context=200)
    assert batches.collate(only, [0]).tiles.shape == (1, 0, 28, 28, 3)


@pytest.mark.parametrize("lengths", [[1], [5, 7, 100], [700, 745, 2069, 2231], [0, 1, 7, 13]])
def test_buckets_cover_all_lengths_and_waste_at_most_half(lengths):
    edges = batches.buckets(lengths, multiple=1)
    assert max(edges) == max(lengths)
    for length in lengths:
        padded = min(edge for edge in edges if edge >= length)
        assert padded <= max(2 * length, 1)
    assert len(edges) <= len(set(lengths))


def stream_of(dataset, count, **kwargs):
    return iter(batches.training_batches(dataset, batches.training_order(len(dataset), num_batches=count, **kwargs)))


def drain(dataset, count, **kwargs):
    stream = stream_of(dataset, count, **kwargs)
    return [next(stream).example_id.tolist() for _ in range(count)]


def test_every_row_comes_once_in_an_epoch_and_epochs_differ():
    dataset = batches.encode_all(ROWS.train[:8], TOKENIZER, SPEC, context=200)
    drawn = drain(dataset, 8, batch_size=2, seed=3)
    first, second = list(chain(*drawn[:4])), list(chain(*drawn[4:]))
    assert sorted(first) == sorted(second) == list(range(8))
    assert first != second
    assert drawn == drain(dataset, 8, batch_size=2, seed=3)
    assert drawn != drain(dataset, 8, batch_size=2, seed=4)


def test_batches_run_on_across_epochs_of_any_length():
    dataset = batches.encode_all(ROWS.train[:3], TOKENIZER, SPEC, context=200)
    drawn = list(chain(*drain(dataset, 6, batch_size=2, seed=0)))
    assert all(sorted(drawn[start : start + 3]) == [0, 1, 2] for start in range(0, 12, 3))


def test_an_order_is_replayed_exactly(dataset):
    assert drain(dataset, 4, batch_size=2, seed=0, order=np.array([3, 1, 1, 0])) == [[3, 1], [1, 0], [3, 1], [1, 0]]


def test_a_stream_goes_on_where_its_state_says(dataset):
    whole, part, resumed = (stream_of(dataset, 9, batch_size=2, seed=1) for _ in range(3))
    expected = [next(whole) for _ in range(9)]
    for _ in range(4):
        next(part)
    resumed.set_state(json.loads(json.dumps(part.get_state())))
    for batch in expected[4:]:
        for one, other in zip(batch, next(resumed), strict=True):
            np.testing.assert_array_equal(one, other)


def test_visits_are_those_of_the_stream(dataset):
    rows = batches.training_order(4, batch_size=3, num_batches=5, seed=1)
    drawn = chain(*drain(dataset, 5, batch_size=3, seed=1))
    np.testing.assert_array_equal(batches.count_visits(rows, 5, 4), np.bincount(list(drawn), minlength=4))


def test_scoring_order_covers_every_row_once(dataset):
    rows = []
    for batch in batches.ordered_batches(dataset, 3):
        assert len(batch.tokens) == 3
        rows += batch.example_id[batch.example_mask].tolist()
    assert sorted(rows) == [0, 1, 2, 3]


def test_outcome_targets_change_the_labels_and_not_the_text():
    dataset = batches.encode_all(ROWS.meta, TOKENIZER, SPEC, context=200)
    retargeted = batches.with_outcome_targets(dataset, TOKENIZER)
    outcomes = set()
    for example, before, after in zip(ROWS.meta, dataset.encoded, retargeted.encoded, strict=True):
        target = TOKENIZER.plus_id if example.true_false else TOKENIZER.minus_id
        assert np.all(after.labels == target)
        np.testing.assert_array_equal(before.tokens, after.tokens)
        outcomes.add(example.true_false)
    assert outcomes == {True, False}


def test_what_cannot_be_used_is_named(tmp_path):
    row: Example = ROWS.train[5]
    with pytest.raises(InputError, match="train row 5.* tokens"):
        batches.encode_all([row], TOKENIZER, SPEC, context=10)
    with pytest.raises(InputError, match='train row 5: "image"'):
        batches.encode_all([row._replace(images=(b"no image",))], TOKENIZER, SPEC, context=200)
    with pytest.raises(InputError, match="no rows"):
        batches.encode_all([], TOKENIZER, SPEC, context=200)
    order = tmp_path / "order.json"
    cases = {"[0, 9]": "entry 1: 9", "[true]": "entry 0: True", "{}": "JSON list", "[": "JSON list"}
    for content, message in cases.items():
        order.write_text(content)
        with pytest.raises(InputError, match=message):
            batches.read_order(str(order), 9)
