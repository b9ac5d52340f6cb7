"""Ids, image tokens and step positions, on a small tokenizer and against the recorded ids of 12 real rows."""

import hashlib
import json
import pickle

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from dreamprm_jax.data.conversation import CONTROL_TOKENS
from dreamprm_jax.data.example import GPT, HUMAN, Example, Turn
from dreamprm_jax.data.images import count_tiles, image_size
from dreamprm_jax.data.records import read_examples
from dreamprm_jax.data.tokens import check_length, encode, encode_many, load_tokenizer, wrap
from dreamprm_jax.errors import InputError

WORDS = ("[UNK]", "\n", " ", "user", "assistant", "a", "b", "yes", "+", "-")
TURNS = (Turn(HUMAN, "a b"), Turn(HUMAN, "b"), Turn(GPT, "+"), Turn(HUMAN, "a"), Turn(GPT, "-"))


def small_tokenizer(words=WORDS, special=CONTROL_TOKENS):
    """One token a word, space or newline; control tokens come last."""
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n| |[^\n ]+"), "isolated")
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def example(*turns, images=0):
    return Example(row=0, id=0, turns=turns, images=(b"",) * images, place="x.json row 0")


@pytest.fixture
def small():
    return wrap(small_tokenizer())


def words_of(tokenizer, encoded):
    return [tokenizer.tokenizer.id_to_token(token) for token in encoded.tokens.tolist()]


def test_ids_are_looked_up_by_text(small):
    assert (small.plus_id, small.minus_id) == (WORDS.index("+"), WORDS.index("-"))
    assert small.tokenizer.id_to_token(small.image_context_id) == "<IMG_CONTEXT>"
    assert small.tokenizer.id_to_token(small.pad_id) == "<|endoftext|>"
    assert small.vocab_size == len(WORDS) + len(CONTROL_TOKENS)
    without_end_of_text = wrap(small_tokenizer(special=CONTROL_TOKENS[1:]))
    assert without_end_of_text.tokenizer.id_to_token(without_end_of_text.pad_id) == "<|im_end|>"


@pytest.mark.parametrize("missing", ["+", "-", "<IMG_CONTEXT>", "<img>", "</img>", "<|im_start|>", "<|im_end|>"])
def test_a_missing_token_is_an_error(missing):
    words = [word for word in WORDS if word != missing]
    special = [token for token in CONTROL_TOKENS if token != missing]
    with pytest.raises(InputError) as error:
        wrap(small_tokenizer(words, special), "here/tokenizer.json")
    assert f'here/tokenizer.json: "{missing}" must be one token' in str(error.value)


def test_a_label_in_the_vocabulary_that_text_never_reaches_is_an_error():
    tokenizer = small_tokenizer()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n| |[^\n +]+"), "removed", invert=True)
    with pytest.raises(InputError, match=r'"\+" must be one token, but gives \[\]'):
        wrap(tokenizer)


def test_truncation_and_padding_of_the_file_are_off():
    tokenizer = small_tokenizer()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=99)
    encoded = encode(wrap(tokenizer), example(*TURNS), [], tokens_per_tile=1)
    assert len(encoded.tokens) == len(encode(wrap(small_tokenizer()), example(*TURNS), [], 1).tokens) not in (4, 99)


def test_encode_without_images(small):
    encoded = encode(small, example(*TURNS), [], tokens_per_tile=4)
    start, end = ["<|im_start|>"], ["<|im_end|>", "\n"]
    assert words_of(small, encoded) == [
        *(*start, "user", "\n", "a", " ", "b", *end),
        *(*start, "user", "\n", "b", *end),
        *(*start, "assistant", "\n", "+", *end),
        *(*start, "user", "\n", "a", *end),
        *(*start, "assistant", "\n", "-", *end),
    ]
    assert encoded.labels.tolist() == [small.plus_id, small.minus_id]
    assert encoded.tokens[encoded.step_positions + 1].tolist() == [small.plus_id, small.minus_id]
    assert not encoded.image_mask.any() and encoded.num_tiles == 0
    assert {array.dtype for array in (encoded.tokens, encoded.step_positions, encoded.labels)} == {np.dtype("int32")}
    assert encoded.image_mask.dtype == bool


def test_each_image_gets_its_own_number_of_tokens(small):
    turns = (Turn(HUMAN, "<image> a <image>"), Turn(GPT, "+"), Turn(HUMAN, "b <image>"), Turn(GPT, "-"))
    encoded = encode(small, example(*turns, images=3), [2, 1, 3], tokens_per_tile=4)
    words = words_of(small, encoded)
    runs = " ".join(words).replace("\n", "").split("<img> ")[1:]
    assert [run.split("</img>")[0].split() for run in runs] == [["<IMG_CONTEXT>"] * n for n in (8, 4, 12)]
    assert encoded.image_mask.tolist() == [word == "<IMG_CONTEXT>" for word in words]
    assert encoded.num_tiles == 6
    assert [words[position + 1] for position in encoded.step_positions] == ["+", "-"]
    assert [words[position] for position in encoded.step_positions] == ["\n", "\n"]


def test_signs_in_the_text_are_not_labels(small):
    turns = (Turn(HUMAN, "+ - + assistant\n-"), Turn(GPT, "-"))
    encoded = encode(small, example(*turns), [], tokens_per_tile=4)
    assert encoded.labels.tolist() == [small.minus_id]
    assert encoded.step_positions.tolist() == [len(encoded.tokens) - 4]


def test_any_single_token_can_be_a_label(small):
    encoded = encode(small, example(Turn(HUMAN, "a"), Turn(GPT, "yes")), [], tokens_per_tile=4)
    assert encoded.labels.tolist() == [WORDS.index("yes")]
    for label in ("yes a", ""):
        with pytest.raises(InputError, match="row 0: .* a label that is not one token"):
            encode(small, example(Turn(HUMAN, "a"), Turn(GPT, label)), [], tokens_per_tile=4)


def test_image_tokens_must_match_the_images(small):
    for turns, images, tiles in (
        ((Turn(HUMAN, "a <IMG_CONTEXT> b"), Turn(GPT, "+")), 1, [1]),
        ((Turn(HUMAN, "a <IMG_CONTEXT> b"), Turn(GPT, "+")), 0, []),
        (TURNS, 1, [1, 1]),
        (TURNS, 1, []),
    ):
        with pytest.raises(InputError, match=r"x\.json row 0: .* take <IMG_CONTEXT> out"):
            encode(small, example(*turns, images=images), tiles, tokens_per_tile=4)


def test_many_rows_at_once_are_those_one_by_one(small):
    rows = [example(Turn(HUMAN, "<image> a"), Turn(GPT, label), images=1) for label in ("+", "yes a", "-")]
    marked = example(Turn(HUMAN, "<image> <image> a"), Turn(GPT, "+"), images=1)  # its markers do not match
    for given in (rows, [*rows, marked]):
        found = encode_many(small, given, [[2]] * len(given), 4)
        for row, encoded in zip(given, found, strict=True):
            try:
                expected = encode(small, row, [2], tokens_per_tile=4)
            except InputError as error:
                assert str(encoded) == str(error)
                assert encoded.kind == "conversations"
                continue
            for one, other in zip(encoded, expected, strict=True):
                np.testing.assert_array_equal(one, other)
        assert isinstance(found[1], InputError) and not isinstance(found[0], InputError)


def test_length_is_checked_against_the_context(small):
    encoded = encode(small, example(*TURNS, images=1), [2], tokens_per_tile=4)
    length = len(encoded.tokens)
    check_length(encoded, length, "x.json row 0")
    with pytest.raises(InputError, match=f"x.json row 0: .* gives {length} tokens, 8 for images; .* {length - 1}:"):
        check_length(encoded, length - 1, "x.json row 0")


def test_a_tokenizer_travels_to_other_processes(small):
    copied = pickle.loads(pickle.dumps(small))
    assert copied[1:] == small[1:]
    row = example(*TURNS, images=1)
    assert encode(copied, row, [2], 4).tokens.tolist() == encode(small, row, [2], 4).tokens.tolist()


def test_files_that_hold_no_tokenizer(tmp_path):
    with pytest.raises(InputError, match="tokenizer.json: no such file"):
        load_tokenizer(tmp_path)
    for content in ("", "{}", "[1]", "\x00"):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(InputError, match="tokenizer.json: not a readable tokenizer.json"):
            load_tokenizer(tmp_path)
    small_tokenizer().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match=r'"pre_tokenizer" splits by .*, not by Qwen2'):
        load_tokenizer(tmp_path)
    tokenizer = small_tokenizer()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).plus_id == WORDS.index("+")


@pytest.fixture(scope="module")
def real(shared):
    return load_tokenizer(shared / "tokenizer")


def test_real_ids(real):
    assert real[1:] == (10, 12, 151667, 151643, 151674)


def test_real_tokenizer_gives_the_recorded_pairs(real, shared):
    pairs = json.loads((shared / "tokenizer/qwen2_vectors.json").read_text())
    assert len(pairs) == 43
    for pair in pairs:
        assert real.tokenizer.encode(pair["text"], add_special_tokens=False).ids == pair["ids"], pair["text"]


def test_ids_of_the_real_rows_are_the_recorded_ones(real, shared):
    golden = shared / "golden"
    rows = read_examples(golden / "meta_rows.json", shared / "mmmu/images", outcome_required=True)
    recorded = json.loads((golden / "tokens.json").read_text())
    scores = json.loads((golden / "scores.json").read_text())
    assert len(rows) == len(recorded) == len(scores) == 12
    for row, expected, score in zip(rows, recorded, scores, strict=True):
        tiles = [count_tiles(*image_size(image, row.place), max_tiles=6) for image in row.images]
        encoded = encode(real, row, tiles, tokens_per_tile=256)
        ids = encoded.tokens.tolist()
        assert hashlib.sha256(json.dumps(ids).encode()).hexdigest() == expected["ids_sha256"], row.place
        assert hashlib.sha256(encoded.tokens.astype("<i4").tobytes()).hexdigest() == score["ids_sha"], row.place
        assert encoded.tokens[~encoded.image_mask].tolist() == expected["ids_without_img_context"]
        assert int(encoded.image_mask.sum()) == expected["n_img_context"]
        assert encoded.num_tiles == expected["num_tiles"] == score["n_tiles"]
        assert encoded.step_positions.tolist() == expected["target_positions"] == score["step_pos"]
        assert encoded.labels.tolist() == expected["target_ids"]
