"""The browser of questions: each question of an evaluation with its candidates side by side, a part of a page."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dreamprm_jax import page

PRM, MAJORITY = "PRM", "majority"
"""Rules of `Candidate.chosen_by` that the page knows; others are shown by their names."""

_FORMATS = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg"}
# What would end the element around it, or a line of JavaScript; JSON reads them back as they were.
_ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}


class Step(NamedTuple):
    """One step of a candidate."""

    text: str
    score: float | None = None  # P("+"), 0..1; None: not scored
    truth: int | None = None  # 1 right, -1 wrong, 0 neutral; None: not known


class Candidate(NamedTuple):
    """One candidate response, S steps."""

    answer: str | None  # None where none is recognised
    correct: bool
    steps: Sequence[Step]  # [S]
    score: float | None = None  # the response score; None: not scored
    chosen_by: Sequence[str] = ()  # rules that choose it: PRM; MAJORITY chooses an answer, so all that give it


class Question(NamedTuple):
    """One question with its C candidates, and what selection makes of them."""

    id: str
    text: str
    candidates: Sequence[Candidate]  # [C]
    majority_correct: float  # share of the credit: answers tied for the lead share it
    oracle: bool  # is any candidate right?
    prm_correct: float | None = None  # share of the credit; None: not scored
    options: Sequence[str] = ()  # (A), (B), ... in order
    answer: str | None = None  # a letter where there are options; None where it is not known
    images: Sequence[bytes] = ()  # PNG or JPEG; they go into the page as they are, so they should be small
    facets: Mapping[str, str | None] = {}  # what one can filter by: {"subject": "History"}; any may be missing


def section(questions: Sequence[Question], *, title: str = "Questions", note: str = "") -> page.Section:
    """The browser as a part of `page.render`.

    Any text may be hostile: it travels as JSON without "<", and the script only ever makes text nodes of it.

    Raises:
      ValueError: an image is neither PNG nor JPEG.
    """
    html = (
        page.environment()
        .get_template("browser.html")
        .render(
            data=script_json(packed(questions)),
            title=title,
            note=note,
            num_questions=len(questions),
            num_candidates=sum(len(question.candidates) for question in questions),
        )
    )
    style, script = ((page.TEMPLATES / f"browser.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    return page.Section(html, style, script)


def script_json(value: Any) -> str:
    """JSON for a script element of data: ASCII alone, and nothing that HTML could take for markup."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.translate(str.maketrans(_ESCAPES))


def packed(questions: Sequence[Question]) -> dict[str, Any]:
    """What the page's script reads; a picture that several questions show is in it once."""
    places: dict[bytes, int] = {}
    rows = [
        {
            "id": question.id,
            "text": question.text,
            "options": list(question.options),
            "answer": question.answer,
            "images": [places.setdefault(image, len(places)) for image in question.images],
            "facets": {name: value for name, value in question.facets.items() if value is not None},
            "prm": _number(question.prm_correct),
            "majority": _number(question.majority_correct),
            "oracle": bool(question.oracle),
            "candidates": [_candidate(candidate) for candidate in question.candidates],
        }
        for question in questions
    ]
    return {"images": [_data_uri(image) for image in places], "questions": rows}


def _candidate(candidate: Candidate) -> dict[str, Any]:
    return {
        "answer": candidate.answer,
        "correct": bool(candidate.correct),
        "score": _number(candidate.score),
        "chosen": list(candidate.chosen_by),
        "steps": [
            [step.text, _number(step.score), None if step.truth is None else int(step.truth)]
            for step in candidate.steps
        ],
    }


def _number(value: float | None) -> float | None:
    # Five digits are more than the page shows, and products of many steps keep their order. JSON has no NaN: none.
    return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")


def _data_uri(image: bytes) -> str:
    kind = next((name for mark, name in _FORMATS.items() if image.startswith(mark)), None)
    if kind is None:
        raise ValueError(f"an image of {len(image)} bytes that begin with {image[:8]!r}: neither PNG nor JPEG")
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
