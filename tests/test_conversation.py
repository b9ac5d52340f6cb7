"""The chat template, character by character."""

import json

import pytest

from dreamprm_jax.data.conversation import CONTROL_TOKENS, find_control_token, render
from dreamprm_jax.data.example import GPT, HUMAN, SYSTEM, Example, Turn
from dreamprm_jax.errors import InputError

CHAIN = (Turn(HUMAN, "Q"), Turn(HUMAN, "step 1\n"), Turn(GPT, "+"), Turn(HUMAN, "step 2"), Turn(GPT, "-"))
BLOCK = "<img><IMG_CONTEXT></img>"


def example(*turns, images=0):
    return Example(row=0, id=0, turns=turns, images=(b"",) * images, place="x.json row 0")


def test_the_whole_text():
    rendered = render(example(Turn(SYSTEM, "S"), *CHAIN, images=1))
    assert rendered.text == (
        "<|im_start|>system\nS<|im_end|>\n"
        "<|im_start|>user\n<img><IMG_CONTEXT></img>Q<|im_end|>\n"
        "<|im_start|>user\nstep 1\n<|im_end|>\n"
        "<|im_start|>assistant\n+<|im_end|>\n"
        "<|im_start|>user\nstep 2<|im_end|>\n"
        "<|im_start|>assistant\n-<|im_end|>\n"
    )
    assert rendered.num_image_markers == 1


def test_no_system_block_is_invented():
    assert render(example(*CHAIN)).text.startswith("<|im_start|>user\nQ<|im_end|>\n")


def test_label_spans_cut_out_the_labels():
    rendered = render(example(Turn(SYSTEM, "- or +"), *CHAIN, images=2))
    assert [rendered.text[start:end] for start, end in rendered.label_spans] == ["+", "-"]
    before = [rendered.text[start - len("assistant\n") : start] for start, _ in rendered.label_spans]
    assert before == ["assistant\n", "assistant\n"]


def test_images_without_markers_come_first_and_only_once():
    text = render(example(*CHAIN, images=3)).text
    assert text.startswith(f"<|im_start|>user\n{BLOCK * 3}Q")
    assert text.count(BLOCK) == 3


def test_markers_stay_where_they_are():
    turns = (Turn(HUMAN, "Q\n<image>\nR"), Turn(HUMAN, "see <image>"), Turn(GPT, "+"))
    text = render(example(*turns, images=2)).text
    assert f"user\nQ\n{BLOCK}\nR<|im_end|>" in text and f"user\nsee {BLOCK}<|im_end|>" in text
    assert "<image>" not in text


@pytest.mark.parametrize("images", [0, 1, 3])
def test_markers_and_images_must_match(images):
    turns = (Turn(HUMAN, "<image><image>"), Turn(GPT, "+"))
    with pytest.raises(InputError, match=r"x\.json row 0: .* has 2 <image> marker.* names " + str(images)):
        render(example(*turns, images=images))


def test_control_tokens_are_found():
    assert [find_control_token(f"a{token}b") for token in CONTROL_TOKENS] == list(CONTROL_TOKENS)
    for text in ("", "<image>", "<image 1>", "<|im_start", "a < b > c", "img"):
        assert find_control_token(text) is None


def test_control_tokens_are_those_of_the_real_tokenizer(shared):
    added = json.loads((shared / "tokenizer/tokenizer.json").read_text())["added_tokens"]
    assert sorted(CONTROL_TOKENS) == sorted(token["content"] for token in added)
