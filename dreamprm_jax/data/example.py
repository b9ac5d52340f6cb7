"""One training, meta or test row, as every later room sees it: formats end here."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

SYSTEM, HUMAN, GPT = "system", "human", "gpt"
PLUS, MINUS = "+", "-"

ImageSource = Path | bytes
"""An image file, or the bytes of one."""


class Turn(NamedTuple):
    """One turn of a conversation; a `gpt` turn is the label of the step before it."""

    role: str  # SYSTEM | HUMAN | GPT
    text: str


class Example(NamedTuple):
    """A step-labelled reasoning chain about images.

    `row` is the 0-based position in its file. The instance table is indexed by it, never by the file's
    own `id`, which need not be unique (every row of VisualPRM-400K says -1).
    """

    row: int
    id: str | int
    turns: tuple[Turn, ...]
    images: tuple[ImageSource, ...] = ()
    true_false: bool | None = None  # is the final answer right? (meta and test rows)
    dataset: str | None = None  # the domain, for the domain table
    corrupted: bool | None = None  # does some step label differ from the truth? (noisy_steps)
    soft_labels: tuple[float, ...] | None = None  # [S] probability of "+", where it is known (rollouts)
    step_truth: tuple[int, ...] | None = None  # [S] 1 right, -1 wrong, 0 neutral (step benchmarks)
    place: str = ""  # "meta.json row 17", for messages

    @property
    def num_steps(self) -> int:
        """Number of labelled steps S."""
        return sum(turn.role == GPT for turn in self.turns)


class Question(NamedTuple):
    """A question with a known answer and, where they are at hand, the candidate responses to choose from (C)."""

    row: int
    id: str
    text: str  # as asked, with `<image n>` where image n (from 1) belongs
    answer: str  # a letter where there are options, else the text of the answer; "" where it is not known
    options: tuple[str, ...] = ()  # (A), (B), ... in order; () for an open question
    images: tuple[ImageSource, ...] = ()
    candidates: tuple[str, ...] = ()  # [C] whole responses
    true_false: tuple[bool, ...] = ()  # [C]
    subject: str | None = None
    image_type: str | None = None
    difficulty: str | None = None
    place: str = ""


class Encoded(NamedTuple):
    """An `Example` as token ids, before padding. T tokens, S steps, P tiles."""

    tokens: np.ndarray  # int32 [T]
    image_mask: np.ndarray  # bool [T]: this token is replaced by an image feature
    step_positions: np.ndarray  # int32 [S]: its next token is the label
    labels: np.ndarray  # int32 [S]: token id of the label
    num_tiles: int  # P, over all images
    soft_labels: np.ndarray | None = None  # float32 [S]
