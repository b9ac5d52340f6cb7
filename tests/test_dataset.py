"""Encoding and checking of whole data sets, in memory and on disk, and what happens to bad rows."""

import tracemalloc

import numpy as np
import pytest

from dreamprm_jax.data import batches, dataset
from dreamprm_jax.data.bad_rows import RAISE, OnError, settle
from dreamprm_jax.data.dataset import encode_all, first_rows, with_shapes
from dreamprm_jax.errors import InputError
from tests.test_batches import ROWS, SPEC, TOKENIZER, assert_same, encode, png, text_only


class OnDisk:
    """Rows that are made anew each time, as a prepared data set reads them."""

    def __init__(self, rows, length=None):
        self.rows, self.length = rows, length or len(rows)

    def __len__(self):
        return self.length

    def __getitem__(self, row):
        return self.rows[row % len(self.rows)]._replace(row=row)


def test_kept_tiles_are_the_ones_on_file(monkeypatch):
    kept = encode(ROWS.train[:4])
    monkeypatch.setattr(dataset, "KEPT_BYTES", 0)
    unkept = encode(ROWS.train[:4])
    assert unkept.tiles is None
    assert_same(batches.collate(unkept, [0, 1, 2, 3]), batches.collate(kept, [0, 1, 2, 3]))


def test_a_cut_image_is_found_before_the_run(monkeypatch):
    monkeypatch.setattr(dataset, "KEPT_BYTES", 0)
    whole = png(56, 28, 7)
    with pytest.raises(InputError, match='train row 0: "image"'):
        encode([ROWS.train[0]._replace(images=(whole[:-30],))])


def test_an_image_that_changes_during_the_run_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(dataset, "KEPT_BYTES", 0)
    path = tmp_path / "a.png"
    path.write_bytes(png(56, 28, 7))
    found = encode([ROWS.train[0]._replace(images=(path,))])
    path.write_bytes(png(28, 28, 7))
    with pytest.raises(InputError, match='train row 0: "image" changed on disk'):
        batches.collate(found, [0])


def test_rows_on_disk_give_the_batches_of_rows_in_memory():
    rows = [text_only(row) if index % 2 else row for index, row in enumerate(ROWS.train[:6])]
    rows = [row._replace(dataset=f"source {index % 2}") for index, row in enumerate(rows)]
    on_disk, in_memory = encode(OnDisk(rows), max_shapes=2), encode(rows, max_shapes=2)
    assert on_disk.encoded is on_disk.tiles is None
    assert on_disk.padded == in_memory.padded
    assert (on_disk.ids, on_disk.domains) == (in_memory.ids, in_memory.domains)
    assert on_disk.domains == ("source 0", "source 1") * 3
    assert_same(batches.collate(on_disk, [3, 0, 5]), batches.collate(in_memory, [3, 0, 5]))


def test_memory_does_not_grow_with_rows_on_disk():
    """Beyond their lengths and ids, where a row takes kilobytes. Bad rows leave their message alone."""
    peaks = []
    good = ROWS.train[0]
    rows = [good, good._replace(images=(), soft_labels=(0.5,) * 50_000)]
    for length in (1000, 4000):
        tracemalloc.start()
        encode(OnDisk(rows, length), on_error=OnError("skip", 0.5))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (peaks[1] - peaks[0]) / 3000 < 1500


def test_outcome_targets_change_the_labels_and_not_the_text():
    plain, targets = encode(ROWS.meta), encode(ROWS.meta, outcome_targets=True)
    outcomes = set()
    for row, example in enumerate(ROWS.meta):
        (before, _), (after, _) = plain.load(row), targets.load(row)
        target = TOKENIZER.plus_id if example.true_false else TOKENIZER.minus_id
        assert np.all(after.labels == target)
        np.testing.assert_array_equal(before.tokens, after.tokens)
        outcomes.add(example.true_false)
    assert outcomes == {True, False}
    with pytest.raises(InputError, match='train row 0: "true_false" is missing'):
        encode([ROWS.train[0]._replace(true_false=None)], outcome_targets=True)


def test_what_cannot_be_used_is_named():
    row = ROWS.train[5]
    with pytest.raises(InputError, match="train row 5.* tokens"):
        encode_all([row], TOKENIZER, SPEC, context=10)
    with pytest.raises(InputError, match='train row 5: "image"'):
        encode([row._replace(images=(b"no image",))])
    with pytest.raises(InputError, match="no rows"):
        encode([])
    for soft_labels in (None, (0.5,)):
        with pytest.raises(InputError, match='train row 5: "soft_labels" has . values for 2 steps'):
            encode([row._replace(soft_labels=soft_labels)], soft_labels=True)


def three_bad_of_ten():
    rows = list(ROWS.train[:10])
    rows[2] = InputError('x.json row 2: "id" is missing', kind="id")
    rows[4] = rows[4]._replace(images=(b"no image",))
    rows[7] = rows[7]._replace(images=(b"",))
    return rows


def test_bad_rows_end_the_run_or_are_skipped_and_counted(capsys):
    with pytest.raises(InputError, match=r'^x.json row 2: "id" is missing \(and 2 more bad rows\)$'):
        encode(three_bad_of_ten())
    found = encode(three_bad_of_ten(), on_error=OnError("skip", 0.3))
    assert found.skipped == {"id": 1, "image": 2}
    assert len(found) == 10
    assert len(found.padded.shapes) == 1  # skipped rows, of no length, have none
    assert found.rows.tolist() == [0, 1, 3, 5, 6, 8, 9]
    told = capsys.readouterr().err
    assert 'skipped 1 bad row(s) of kind id, the first: x.json row 2: "id" is missing' in told
    assert 'skipped 2 bad row(s) of kind image, the first: train row 4: "image"' in told


def test_rows_keep_their_numbers_where_others_are_skipped():
    found = encode(three_bad_of_ten(), on_error=OnError("skip", 0.5))
    plan = batches.make_plan(found, batch_size=7, num_batches=3, seed=0)
    for number in range(3):
        assert sorted(plan[number]) == found.rows.tolist()
    batch = batches.collate(found, [9, 3])
    assert_same(batch._replace(example_id=0), batches.collate(encode(ROWS.train[:10]), [9, 3])._replace(example_id=0))
    assert batch.example_id.tolist() == [9, 3]


def test_too_many_bad_rows_end_the_run_all_the_same():
    message = r"3 of 10 rows are bad, more than data.max_bad_share=0.29; correct the file"
    with pytest.raises(InputError, match=message):
        encode(three_bad_of_ten(), on_error=OnError("skip", 0.29))
    bad = {row: InputError(f"row {row}") for row in range(28, -1, -1)}
    assert settle(bad, 100, OnError("skip", 0.29)) == {"row": 29}  # just as many as may be
    with pytest.raises(InputError, match=r"^row 0 \(and 28 more bad rows\)$"):
        settle(bad, 100, RAISE)
    with pytest.raises(InputError, match="1 of 1 rows are bad"):
        encode(three_bad_of_ten()[2:3], on_error=OnError("skip", 1.0))


def with_images(count):
    row = ROWS.train[0]
    question = row.turns[0]._replace(text=row.turns[0].text.replace("<image>", "<image>" * count))
    return row._replace(images=(png(56, 28, 7),) * count, turns=(question, *row.turns[1:]))


@pytest.mark.parametrize(
    ("budget", "num_images", "tiles"), [(None, 2, 6), (6, 2, 6), (5, 2, 2), (7, 2, 6), (3, 3, 3), (9, 3, 9), (2, 1, 1)]
)
def test_images_of_a_row_share_its_budget(budget, num_images, tiles):
    """The image takes 2 tiles and a thumbnail, or 1."""
    found = encode_all([with_images(num_images)], TOKENIZER, SPEC._replace(tile_budget=budget), context=400)
    encoded, pixels = found.load(0)
    assert len(pixels) == encoded.num_tiles == found.num_tiles[0] == tiles
    assert encoded.image_mask.sum() == tiles * SPEC.tokens_per_tile
    assert budget is None or tiles <= budget


def test_more_images_than_the_budget_has_tiles():
    with pytest.raises(InputError, match='"image" names 3 images, but images.tile_budget is 2'):
        encode_all([with_images(3)], TOKENIZER, SPEC._replace(tile_budget=2), context=400)


def test_data_sets_of_one_program_share_the_shapes():
    uneven = encode([text_only(row) if index % 2 else row for index, row in enumerate(ROWS.train[:6])])
    first, second = with_shapes([uneven, encode(ROWS.train[:4])], 3)
    assert (len(first.padded.shapes), len(second.padded.shapes)) == (2, 1)


def test_the_first_rows_alone_are_as_encoded_alone():
    rows = [text_only(row) if index % 2 else row for index, row in enumerate(ROWS.train[:6])]
    rows[4] = rows[4]._replace(images=(png(56, 28, 7),))  # a shape that the first two do not need
    expected = encode(rows[:2], max_shapes=2)
    found = first_rows(encode(rows, max_shapes=5), 2, max_shapes=2)
    for name in ("rows", "num_tokens", "num_tiles", "num_labels", "shape_of"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert found.padded == expected.padded
    assert (found.ids, found.domains, len(found)) == (expected.ids, expected.domains, 2)
    assert_same(batches.collate(found, [0, 1]), batches.collate(expected, [0, 1]))
    with pytest.raises(InputError, match="has no rows"):
        first_rows(expected, 0, max_shapes=2)
