"""The chat template: a row's turns as the one text that training and scoring both tokenise.

The form is InternVL 2.5's (`internvl2_5`) as the published code fills it in: each turn is

    <|im_start|>ROLE\\n TEXT <|im_end|>\\n

with ROLE one of system, user, assistant, and nothing stripped from TEXT. The label of a step is the whole
assistant turn after it. Each `<image>` marker becomes `<img>` + image tokens + `</img>` where it stands; in a
row without markers the images go right behind the first `<|im_start|>user\\n`, without a newline (several in
order). A row without a system turn gets no system block: no prompt is invented for it.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from dreamprm_jax.data.example import GPT, HUMAN, SYSTEM, Example, Turn
from dreamprm_jax.errors import InputError

IMAGE_MARKER = "<image>"
"""What stands for an image in a file's text. It is no token."""

TURN_START, TURN_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
IMAGE_START, IMAGE_CONTEXT, IMAGE_END = "<img>", "<IMG_CONTEXT>", "</img>"

SEPARATOR = TURN_END + "\n"
IMAGE_BLOCK = IMAGE_START + IMAGE_CONTEXT + IMAGE_END
HEADERS = {
    SYSTEM: f"{TURN_START}system\n",
    HUMAN: f"{TURN_START}user\n",
    GPT: f"{TURN_START}assistant\n",
}

CONTROL_TOKENS = (
    *(END_OF_TEXT, TURN_START, TURN_END, IMAGE_START, IMAGE_END, IMAGE_CONTEXT),
    *("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"),
    *("<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>"),
    *("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"),
    *("<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"),
)
"""Every added token of the InternVL3 tokenizer: text that would turn into a control token."""

_CONTROL_PATTERN = re.compile("|".join(map(re.escape, CONTROL_TOKENS)))


class Rendered(NamedTuple):
    """A row as text, with ONE `<IMG_CONTEXT>` for each image; `tokens.encode` repeats its id."""

    text: str
    label_spans: tuple[tuple[int, int], ...]  # [S] start and end of each label, in characters of `text`
    num_image_markers: int  # images in `text`


def find_control_token(text: str) -> str | None:
    """The first control token written out in `text`, or None."""
    match = _CONTROL_PATTERN.search(text)
    return match.group() if match else None


def unfit_markers(turns: Sequence[Turn], num_images: int) -> int:
    """The number of `<image>` markers in the human turns where it is not that of the images; 0 where it fits."""
    markers = sum(turn.text.count(IMAGE_MARKER) for turn in turns if turn.role == HUMAN)
    return markers if markers != num_images else 0


def check_image_markers(turns: Sequence[Turn], num_images: int, place: str) -> None:
    """Checks that the `<image>` markers of the human turns, where there are any, match the row's images.

    Raises:
      InputError: numbers that differ.
    """
    markers = unfit_markers(turns, num_images)
    if markers:
        raise InputError(
            f'{place}: "conversations" has {markers} {IMAGE_MARKER} marker(s) in human turns, but "image" '
            f"names {num_images} image(s); write one marker for each, or none to have the images put first",
            kind="conversations",
        )


def render(example: Example) -> Rendered:
    """Fills the template with an example's turns.

    Raises:
      InputError: the number of `<image>` markers is neither 0 nor the number of images.
    """
    check_image_markers(example.turns, len(example.images), example.place)
    has_markers = any(IMAGE_MARKER in turn.text for turn in example.turns if turn.role == HUMAN)
    unplaced = "" if has_markers else IMAGE_BLOCK * len(example.images)
    text, label_spans = "", []
    for turn in example.turns:
        text += HEADERS[turn.role]
        if turn.role == HUMAN:
            text += unplaced + turn.text.replace(IMAGE_MARKER, IMAGE_BLOCK)
            unplaced = ""
        else:
            if turn.role == GPT:
                label_spans.append((len(text), len(text) + len(turn.text)))
            text += turn.text
        text += SEPARATOR
    return Rendered(text, tuple(label_spans), len(example.images))
