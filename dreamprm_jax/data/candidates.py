"""Questions with the candidates to choose from: what an evaluation reads."""

from __future__ import annotations

from typing import NamedTuple

from dreamprm_jax.data.example import Example, Question


class Candidate(NamedTuple):
    """One candidate response to a question."""

    text: str  # the whole response
    answer: str | None  # its final answer, for votes; None where none is recognised
    correct: bool  # what counts
    judged: bool | None  # what MMMU's rules say; None where they cannot be applied (no right answer at hand)
    example: Example  # the chain as it is scored, every label "+"


class Contest(NamedTuple):
    """A question and its C candidates."""

    question: Question
    candidates: tuple[Candidate, ...]  # [C]
