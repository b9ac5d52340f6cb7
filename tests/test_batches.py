"""Padding, the order of a run, and reading ahead: every batch is a function of its number."""

import io
import json
import multiprocessing
import os
import signal
import threading
import time
from itertools import chain

import numpy as np
import pytest
from absl import flags
from PIL import Image

from dreamprm_jax.data import batches, noisy_steps
from dreamprm_jax.data.bad_rows import OnError
from dreamprm_jax.data.dataset import ImageSpec, encode_all
from dreamprm_jax.data.tokens import wrap
from dreamprm_jax.errors import InputError
from dreamprm_jax.types import Batch, Share

TOKENIZER = wrap(noisy_steps.tokenizer())
SPEC = ImageSpec(max_tiles=2, tile_size=28, tokens_per_tile=4)
ROWS = noisy_steps.make(0, noisy_steps.Sizes(test_questions=1, meta_questions=20, cold_start=1, pretrain=1))


def png(width, height, value):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (value,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


def text_only(row):
    question = row.turns[0]._replace(text=row.turns[0].text.replace("<image>", ""))
    return row._replace(images=(), turns=(question, *row.turns[1:]))


def encode(rows, **options):
    return encode_all(rows, TOKENIZER, SPEC, context=200, **options)


@pytest.fixture(scope="module")
def dataset():
    """Rows with 1 image (1 tile), 1 wide image (2 tiles and a thumbnail), two images, and none."""
    rows = [row._replace(row=index) for index, row in enumerate(ROWS.train[:4])]
    rows[1] = rows[1]._replace(images=(png(56, 28, 7),))
    rows[2] = rows[2]._replace(images=(png(28, 28, 8), png(28, 28, 9)), turns=(
        rows[2].turns[0]._replace(text="<image>" + rows[2].turns[0].text), *rows[2].turns[1:]))  # fmt: skip
    rows[3] = text_only(rows[3])
    return encode(rows, max_shapes=4)


@pytest.fixture(scope="module")
def uneven():
    """60 rows of two shapes, in turn: with a tile, and without."""
    rows = [text_only(row) if index % 2 else row for index, row in enumerate(ROWS.train[:60])]
    return encode(rows, max_shapes=2)


def test_a_batch_holds_every_row_as_encoded(dataset):
    batch = batches.collate(dataset, [2, 0, 3, 1], batch_size=5)
    assert batch.tokens.shape[0] == 5
    assert batch.tiles.shape == (5, 3, 28, 28, 3)
    np.testing.assert_array_equal(batch.example_id, [2, 0, 3, 1, 0])
    np.testing.assert_array_equal(batch.example_mask, [True] * 4 + [False])
    for slot, row in enumerate([2, 0, 3, 1]):
        encoded, _ = dataset.load(row)
        length, steps = len(encoded.tokens), len(encoded.labels)
        np.testing.assert_array_equal(batch.tokens[slot, :length], encoded.tokens)
        assert np.all(batch.tokens[slot, length:] == TOKENIZER.pad_id)
        assert batch.image_mask[slot].sum() == 4 * encoded.num_tiles
        np.testing.assert_array_equal(batch.step_mask[slot], np.arange(batch.labels.shape[1]) < steps)
        scored = batch.tokens[slot, batch.step_positions[slot, :steps] + 1]
        np.testing.assert_array_equal(scored, batch.labels[slot, :steps])
    assert not batch.step_mask[4].any()
    assert not batch.image_mask[4].any()
    assert batch.soft_labels is None


def test_tiles_of_several_images_stand_in_order_and_padding_is_zero(dataset):
    batch = batches.collate(dataset, [2, 1, 3])
    assert batch.tiles[0, 0].max() == batch.tiles[0, 0].min() == 8
    assert batch.tiles[0, 1].max() == batch.tiles[0, 1].min() == 9
    assert np.all(batch.tiles[1] == 7)  # two tiles and a thumbnail
    assert not batch.tiles[0, 2:].any()
    assert not batch.tiles[2].any()


def test_text_only_batches_have_no_tiles(dataset):
    assert batches.collate(encode([dataset.examples[3]]), [0]).tiles.shape == (1, 0, 28, 28, 3)


def test_soft_labels_travel_with_their_steps():
    rows = [row._replace(soft_labels=(0.25, 1.0)) for row in ROWS.train[:2]]
    batch = batches.collate(encode(rows, soft_labels=True), [0, 1], batch_size=3)
    np.testing.assert_array_equal(batch.soft_labels, [[0.25, 1.0], [0.25, 1.0], [0, 0]])
    assert batch.soft_labels.dtype == np.float32


def stream_of(dataset, count, first=0, reading=batches.READING, **kwargs):
    plan = batches.make_plan(dataset, num_batches=count, **kwargs)
    return batches.training_batches(dataset, plan, first, reading=reading)


def drain(dataset, count, **kwargs):
    return [batch.example_id.tolist() for batch in stream_of(dataset, count, **kwargs)]


def test_every_row_comes_once_in_an_epoch_and_epochs_differ():
    dataset = encode(ROWS.train[:8])
    drawn = drain(dataset, 8, batch_size=2, seed=3)
    first, second = list(chain(*drawn[:4])), list(chain(*drawn[4:]))
    assert sorted(first) == sorted(second) == list(range(8))
    assert first != second
    assert drawn == drain(dataset, 8, batch_size=2, seed=3)
    assert drawn != drain(dataset, 8, batch_size=2, seed=4)


def test_batches_run_on_across_epochs_of_any_length():
    dataset = encode(ROWS.train[:3])
    drawn = list(chain(*drain(dataset, 6, batch_size=2, seed=0)))
    assert all(sorted(drawn[start : start + 3]) == [0, 1, 2] for start in range(0, 12, 3))


def test_rows_of_one_shape_share_a_batch_and_none_is_lost(uneven, monkeypatch):
    """Of each window's batches at most one is mixed; the draws are those of an order without shapes."""
    monkeypatch.setattr(batches, "WINDOW", 8)
    count = 2 * batches.WINDOW + 6
    plan = batches.make_plan(uneven, batch_size=6, num_batches=count, seed=0)
    kinds = [len({row % 2 for row in plan[number]}) for number in range(count)]
    assert sum(kind > 1 for kind in kinds) <= 3
    one_shape = batches.make_plan(encode(uneven.examples, max_shapes=1), batch_size=6, num_batches=count, seed=0)
    for start in range(0, count, batches.WINDOW):
        window = range(start, min(start + batches.WINDOW, count))
        drawn = [np.sort(np.concatenate([each[number] for number in window])) for each in (plan, one_shape)]
        np.testing.assert_array_equal(*drawn)
    assert np.ptp(np.bincount(np.concatenate([plan[n] for n in range(count)]))) <= 1


def test_when_a_batch_comes_says_nothing_of_its_length(uneven):
    plan = batches.make_plan(uneven, batch_size=6, num_batches=400, seed=0)
    firsts = [plan[n][0] % 2 for n in range(0, 400, 10)]  # of each window
    assert 0.2 < np.mean(firsts) < 0.8


def test_batches_of_one_and_given_orders_stay_as_drawn(uneven):
    assert batches.make_plan(uneven, batch_size=1, num_batches=4, seed=0).shape_of is None
    order = np.array([3, 2, 1, 0])
    assert drain(uneven, 3, batch_size=2, seed=0, order=order) == [[3, 2], [1, 0], [3, 2]]


def test_an_order_is_replayed_exactly(dataset):
    assert drain(dataset, 4, batch_size=2, seed=0, order=np.array([3, 1, 1, 0])) == [[3, 1], [1, 0], [3, 1], [1, 0]]


def assert_same(one, other):
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("first", [0, 4, 8])
def test_a_stream_begins_anywhere(uneven, first):
    expected = list(stream_of(uneven, 9, batch_size=4, seed=1))
    resumed = list(stream_of(uneven, 9, first, batch_size=4, seed=1))
    assert len(resumed) == 9 - first
    for one, other in zip(expected[first:], resumed, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("num_inner_steps", [1, 2])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_processes_share_a_batch_out_and_together_have_it(uneven, count, num_inner_steps):
    by_shape = uneven.rows[np.argsort(uneven.shape_of[uneven.rows], kind="stable")]
    order = np.array([*by_shape[:2], *by_shape[-2:]])  # of a batch, short rows in one process and long ones in another
    assert len(set(uneven.shape_of[order])) > 1
    plan = batches.make_plan(uneven, batch_size=4 * num_inner_steps, num_batches=3, seed=1, order=order)

    def read(*own, count=count):
        return batches.training_batches(uneven, plan, 1, num_inner_steps=num_inner_steps, share=Share(own, count))

    axis = int(num_inner_steps > 1)  # of the rows
    for whole, *parts in zip(read(0, count=1), *[read(index) for index in range(count)], strict=True):
        joined = Batch(
            *[None if leaves[0] is None else np.concatenate(leaves, axis) for leaves in zip(*parts, strict=True)]
        )
        assert_same(joined, whole)  # padded as all of them are, whatever the own rows need
        assert whole.example_id.shape == ((4,) if num_inner_steps == 1 else (2, 4))
    with pytest.raises(ValueError, match="4 rows cannot be divided into 3 equal parts"):
        read(0, count=3)


def test_a_process_may_have_parts_that_are_no_neighbours(uneven):
    plan = batches.make_plan(uneven, batch_size=4, num_batches=1, seed=1)
    (whole,) = batches.training_batches(uneven, plan)
    (part,) = batches.training_batches(uneven, plan, share=Share((0, 3), 4))
    np.testing.assert_array_equal(part.example_id, whole.example_id[[0, 3]])
    np.testing.assert_array_equal(part.tokens, whole.tokens[[0, 3]])


@pytest.fixture
def worker_flags():
    """Grain's processes are told flags, which pytest does not parse."""
    flags.FLAGS.mark_as_parsed()


def test_worker_processes_change_nothing(uneven, worker_flags):
    """Nor does their number when a run goes on: state is the number of the batch."""
    expected = list(stream_of(uneven, 7, batch_size=4, seed=1))
    for workers, first in ((2, 0), (3, 2)):
        stream = stream_of(uneven, 7, first, batches.Reading(workers=workers, ahead=2), batch_size=4, seed=1)
        for one, other in zip(expected[first:], stream, strict=True):
            assert_same(one, other)


def test_a_worker_that_dies_is_an_error_and_no_hang(uneven, worker_flags):
    stream = stream_of(uneven, 2000, reading=batches.Reading(workers=1, ahead=2), batch_size=4, seed=1)
    next(stream)
    alarm = threading.Timer(60, os.kill, (os.getpid(), signal.SIGALRM))  # a hang would end the test run, loudly
    alarm.start()
    workers = multiprocessing.active_children()
    assert workers
    for worker in workers:
        worker.kill()
    with pytest.raises(RuntimeError, match="(?i)worker process"):
        list(stream)
    alarm.cancel()


def test_visits_are_those_of_the_stream(uneven):
    plan = batches.make_plan(uneven, batch_size=3, num_batches=70, seed=1)
    drawn = chain(*drain(uneven, 70, batch_size=3, seed=1))
    np.testing.assert_array_equal(batches.count_visits(plan, 60), np.bincount(list(drawn), minlength=60))


def test_scoring_brings_rows_of_a_shape_together(uneven):
    shapes = [batch.tokens.shape[1] for batch in batches.ordered_batches(uneven, 6)]
    assert shapes == sorted(shapes, reverse=True)
    assert len(set(shapes)) == 2


def test_an_epoch_has_every_row_though_shapes_share_batches(uneven):
    """60 rows in batches of 6: a window is an epoch."""
    plan = batches.make_plan(uneven, batch_size=6, num_batches=100, seed=0)
    for first in range(0, 100, 10):
        assert sorted(np.concatenate([plan[n] for n in range(first, first + 10)])) == list(range(60))


def test_text_only_batches_of_several_inner_steps():
    dataset = encode([text_only(row) for row in ROWS.train[:4]])
    plan = batches.make_plan(dataset, batch_size=4, num_batches=1, seed=0)
    (batch,) = batches.training_batches(dataset, plan, num_inner_steps=2)
    assert batch.tiles.shape == (2, 2, 0, 28, 28, 3)


def test_scoring_order_covers_every_row_once(dataset):
    rows = []
    for batch in batches.ordered_batches(dataset, 3):
        assert len(batch.tokens) == 3
        rows += batch.example_id[batch.example_mask].tolist()
    assert sorted(rows) == [0, 1, 2, 3]


def test_an_order_that_cannot_be_used_is_named(tmp_path):
    rows = [*ROWS.train[:4], InputError("x.json row 4: bad"), ROWS.train[5]]
    dataset = encode(rows, on_error=OnError("skip", 0.5))
    order = tmp_path / "order.json"
    cases = {"[0, 9]": "entry 1: 9 is not a row number from 0 to 5", "[true]": "entry 0: True", "{}": "JSON list"}
    cases |= {"[": "JSON list", "[0, 4]": "entry 1: row 4 is skipped as a bad row"}
    for content, message in cases.items():
        order.write_text(content)
        with pytest.raises(InputError, match=message):
            batches.read_order(str(order), dataset)
    order.write_text(json.dumps([5, 0, 5]))
    np.testing.assert_array_equal(batches.read_order(str(order), dataset), [5, 0, 5])


def test_reading_is_ahead(uneven, monkeypatch):
    """While a step takes its time, the next batches are made."""
    built = []
    original = batches.collate
    monkeypatch.setattr(batches, "collate", lambda *args, **how: built.append(args) or original(*args, **how))
    stream = stream_of(uneven, 50, batch_size=4, seed=1)
    next(stream)
    deadline = time.monotonic() + 10
    while len(built) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert 4 <= len(built) < 20


@pytest.mark.parametrize("batch_sizes", [(1, 1), (6, 2), (6, 1)])
@pytest.mark.parametrize("first", [0, 7, 13])
def test_the_shapes_that_meet_are_known_before_they_do(dataset, uneven, batch_sizes, first):
    """One row a batch, and rows of one shape brought together, in windows of 10 batches; from the midst of one too."""
    sizes = dict(zip("ab", batch_sizes, strict=True))
    streams = [
        (data, batches.make_plan(data, batch_size=sizes[name], num_batches=24, seed=3))
        for name, data in (("a", uneven), ("b", dataset))
    ]
    met = []
    readers = [batches.training_batches(data, plan, first) for data, plan in streams]
    for pair in zip(*readers, strict=True):
        shapes = tuple((batch.tokens.shape[1], batch.tiles.shape[1]) for batch in pair)
        met += [shapes] if shapes not in met else []
    for reader in readers:
        reader.close()
    assert list(batches.shapes_met(streams, first)) == met
    assert len(met) > 1


def test_looking_for_shapes_ends_with_the_last_possible_one(dataset):
    plan = batches.make_plan(dataset, batch_size=1, num_batches=10**9, seed=0)
    assert len(list(batches.shapes_met([(dataset, plan)], 5))) == len(dataset.padded.shapes)
