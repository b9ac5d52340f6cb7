"""The embedded benchmark: reproducible, labelled by the picture, and not answerable from the text."""

import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from dreamprm_jax.data import noisy_steps, pictures
from dreamprm_jax.data.example import GPT, HUMAN, MINUS, PLUS
from dreamprm_jax.data.noisy_steps import CELLS, Sizes, make
from dreamprm_jax.data.tokens import encode, wrap
from dreamprm_jax.errors import InputError

SMALL = Sizes(
    pretrain=60,
    cold_start=20,
    clean=100,
    flipped=100,
    always_plus=100,
    trivial=20,
    shifted=60,
    meta_questions=20,
    test_questions=150,
)


@pytest.fixture(scope="module")
def splits():
    return make(7, SMALL)


def ink_of(png: bytes) -> np.ndarray:
    """Where the picture differs from its ground, the commoner of its two colours: bool [4, 14, 14], cell by cell."""
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), int)
    colours, place, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_inverse=True, return_counts=True)
    assert len(colours) == 2
    ink = (place.reshape(28, 28) == counts.argmin()).reshape(2, 14, 2, 14)
    return ink.transpose(0, 2, 1, 3).reshape(4, 14, 14)


def cut(ink: np.ndarray) -> np.ndarray:
    """The smallest rectangle that holds all ink."""
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def read_clock(ink: np.ndarray) -> int:
    """Quarters past twelve: which side of the dial is heavier."""
    dial = cut(ink)
    half = dial.shape[0] // 2
    sides = (dial[:, -half:], dial[-half:], dial[:, :half], dial[:half])  # right, bottom, left, top
    return 1 + int(np.argmax([side.sum() for side in sides]))


def read_shape(ink: np.ndarray) -> int:
    """Disc, cross, triangle, square: by the middle and the corners."""
    shape = cut(ink)
    if not shape[shape.shape[0] // 2, shape.shape[1] // 2]:
        return 4
    if shape[0, 0]:
        return 2
    return 3 if shape[-1, 0] else 1


READERS = {
    "grid": lambda ink: 1 + 2 * int(ink.any(1).argmax() > 3) + int(ink.any(0).argmax() > 3),
    "dice": lambda ink: {16: 1, 18: 2, 34: 3, 36: 4}[int(ink.sum())],  # a middle pip of 4 x 4, outer ones of 3 x 3
    "bars": lambda ink: cut(ink).shape[0] // 3,
    "clock": read_clock,
    "shapes": read_shape,
    "table": lambda ink: 1 + int(cut(ink).all(1).argmax()) // 3,
}


def read_numbers(example) -> dict[str, str]:
    """The numbers as the picture shows them, read without the code that drew them."""
    notation = example.turns[0].text.removeprefix("<image>").split()[0].split(":")[0]
    return {cell: str(READERS[notation](ink)) for cell, ink in zip(CELLS, ink_of(example.images[0]), strict=True)}


def steps_of(example) -> list[str]:
    return [turn.text.split()[-1] for turn in example.turns if turn.role == HUMAN]


def labels_of(example) -> tuple[str, ...]:
    return tuple(turn.text for turn in example.turns if turn.role == GPT)


def truth_from_picture(example) -> tuple[str, ...]:
    numbers, right, labels = read_numbers(example), True, []
    for step in steps_of(example):
        cell, target = step.split(">")
        right = right and numbers[cell] == target
        labels.append(PLUS if right else MINUS)
    return tuple(labels)


def test_same_seed_same_bytes_other_seed_other_bytes():
    assert repr(make(3, SMALL)) == repr(make(3, SMALL))
    assert repr(make(3, SMALL)) != repr(make(4, SMALL))


def test_bytes_are_those_of_every_machine():
    """A change here changes every published figure of the benchmark: say so in the changelog."""
    written = repr(make(0, SMALL)).replace("soft_labels=None, step_truth=None, ", "")  # which it has nothing to say of
    digest = hashlib.sha256(written.encode()).hexdigest()
    assert digest == "a3cd988f6978839481fbbd91bb2ff7681d268cfef1768e64bc00d741a6163976"


def test_size_of_one_split_leaves_the_others_alone(splits):
    other = make(7, SMALL._replace(clean=5, pretrain=3))
    assert other.test == splits.test and other.meta == splits.meta and other.cold_start == splits.cold_start


def test_rows_count_from_zero_in_every_split(splits):
    test = [example for question in splits.test for example in question.examples]
    for rows in (splits.pretrain, splits.cold_start, splits.train, splits.meta, test):
        assert [example.row for example in rows] == list(range(len(rows)))


def test_corrupted_means_that_a_label_differs_from_the_picture(splits):
    rows = [example for example in splits.train if example.dataset != "trivial"]
    assert len(rows) == 360
    for example in rows:
        assert example.corrupted == (labels_of(example) != truth_from_picture(example)), example.place


def test_sources(splits):
    by_source = {name: [e for e in splits.train if e.dataset == name] for name in noisy_steps.SOURCES}
    assert [len(rows) for rows in by_source.values()] == [100, 100, 100, 20, 60]
    honest = by_source["clean"] + by_source["trivial"] + by_source["shifted"]
    assert not any(example.corrupted for example in honest)
    assert 0.65 < np.mean([example.corrupted for example in by_source["flipped"]]) < 0.95  # flip_rate 0.8
    assert all(MINUS not in labels_of(example) for example in by_source["always_plus"])
    assert all(example.corrupted == (MINUS in truth_from_picture(example)) for example in by_source["always_plus"])


def test_flip_rate_zero_is_clean():
    assert not any(e.corrupted for e in make(1, SMALL._replace(flip_rate=0.0)).train if e.dataset == "flipped")


def test_dropping_the_corrupted_rows_leaves_the_others_as_they_are(splits):
    kept = make(7, SMALL._replace(drop_corrupted=True)).train
    whole = [example for example in splits.train if not example.corrupted]
    assert 0 < len(kept) < len(splits.train) and [example.row for example in kept] == list(range(len(kept)))
    assert [example.images for example in kept] == [example.images for example in whole]
    assert [example.turns for example in kept] == [example.turns for example in whole]


def test_every_number_of_every_notation_can_be_read():
    rng = np.random.default_rng(0)
    for notation, reader in READERS.items():
        for dark in (False, True):
            for _ in range(20):
                values = rng.permutation(4)
                png = pictures.encode_png(pictures.draw(rng, notation, values, dark=dark))
                assert [reader(ink) for ink in ink_of(png)] == [value + 1 for value in values], notation
    assert list(READERS) == list(pictures.NOTATIONS)


def test_the_shifted_style_is_light_on_dark(splits):
    brightness = {True: [], False: []}
    for example in splits.train:
        brightness[example.dataset == "shifted"].append(np.asarray(Image.open(io.BytesIO(example.images[0]))).mean())
    assert max(brightness[True]) < min(brightness[False])


def test_candidates_are_judged_by_the_picture(splits):
    for question in splits.test:
        assert len({example.images[0] for example in question.examples}) == 1
        for example, answer, correct, truth in zip(*question, strict=True):
            assert truth == truth_from_picture(example)
            assert correct == (MINUS not in truth) == example.true_false
            assert labels_of(example) == (PLUS, PLUS)  # the history that a selector sees
            assert answer.split() == [step.split(">")[1] for step in steps_of(example)]


def test_wrong_chains_have_wrong_answers(splits):
    for question in splits.test:
        right = {a for a, c in zip(question.answers, question.correct, strict=True) if c}
        wrong = {a for a, c in zip(question.answers, question.correct, strict=True) if not c}
        assert len(right) <= 1 and not right & wrong


def test_a_chain_that_went_wrong_stays_wrong(splits):
    for question in splits.test:
        numbers = read_numbers(question.examples[0])
        for example, labels in zip(question.examples, question.step_labels, strict=True):
            claims = [step.split(">") for step in steps_of(example)]
            assert [numbers[cell] == target for cell, target in claims] == [label == PLUS for label in labels]


def test_meta_has_outcomes_only(splits):
    assert len(splits.meta) == 40
    assert all(example.corrupted is None and MINUS not in labels_of(example) for example in splits.meta)
    assert 0 < np.mean([example.true_false for example in splits.meta]) < 0.7


def test_candidates_are_of_mixed_quality(splits):
    correct = np.array([question.correct for question in splits.test])
    assert 0.25 < correct.mean() < 0.45
    assert correct.any(1).mean() > 0.85


def test_text_alone_does_not_give_the_verdict():
    """The best guess from a chain's text, learnt on half of the chains, tried on the rest."""
    rows = make(11, SMALL._replace(clean=4000, flipped=0, always_plus=0, trivial=0, shifted=0)).train
    text = np.array([CELLS.index(s.split(">")[i]) for e in rows for s in steps_of(e) for i in (0, 1)])
    code = text.reshape(len(rows), 4) @ np.array([64, 16, 4, 1])
    first = np.array([labels_of(example)[0] == PLUS for example in rows])
    half = len(rows) // 2
    plus, seen = np.bincount(code[:half], first[:half], 256), np.bincount(code[:half], minlength=256)
    guess = (plus + 1) / (seen + 2) > 0.5
    larger_class = max(first[half:].mean(), 1 - first[half:].mean())
    assert np.mean(guess[code[half:]] == first[half:]) < larger_class + 0.03


def test_pretraining_is_true_and_never_says_plus_or_minus(splits):
    for example in splits.pretrain:
        numbers = read_numbers(example)
        for question, answer in zip(steps_of(example), labels_of(example), strict=True):
            cell, claim = question.split(">")
            expected = ("yes" if numbers[cell] == claim else "no") if claim else numbers[cell]
            assert answer == expected, example.place


def test_pretraining_boards_are_its_own(splits):
    ids = {example.id for example in splits.pretrain}
    assert not ids & {example.id for example in splits.train}


def test_every_row_encodes(splits):
    tokenizer = wrap(noisy_steps.tokenizer())
    test = [example for question in splits.test for example in question.examples]
    for example in [*splits.pretrain, *splits.cold_start, *splits.train, *splits.meta, *test]:
        encoded = encode(tokenizer, example, [1], 1)
        assert len(encoded.tokens) <= 16 and len(encoded.labels) == 2
        assert encoded.image_mask.sum() == 1
    assert set(encoded.labels) <= {tokenizer.plus_id, tokenizer.minus_id}


def test_unknown_words_do_not_become_tokens():
    with pytest.raises(Exception, match="UNK"):
        noisy_steps.tokenizer().encode("somewhere")


@pytest.mark.parametrize(("field", "value"), [("flip_rate", 1.5), ("clean", -1), ("pretrain_turns", 5)])
def test_impossible_sizes_name_the_field(field, value):
    with pytest.raises(InputError, match=field):
        make(0, SMALL._replace(**{field: value}))


@pytest.mark.parametrize(
    "fields",
    [
        *(["pretrain", "cold_start"], list(noisy_steps.SOURCES)),
        *(["meta_questions"], ["meta_candidates"], ["test_questions"], ["candidates"]),
    ],
)
def test_sizes_that_leave_a_split_empty_name_the_fields(fields):
    with pytest.raises(InputError, match=rf"noisy_steps: {' . '.join(fields)} = 0"):
        make(0, SMALL._replace(**dict.fromkeys(fields, 0)))
