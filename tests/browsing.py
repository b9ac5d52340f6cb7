"""What the tests of the browser share: questions of every outcome, and texts that would like to be markup."""

import io

from PIL import Image

from dreamprm_jax import browser

HOSTILE = (
    "</script><img src=x onerror=alert(1)>",
    "<!--<script>alert(2)</script>",
    "\"'` onmouseover=alert(3) ${alert(4)} {{ 7 * 7 }} {% raw %}",
    "\u202eright to left\u202c \u2066isolated\u2069 عربى",
    "line\u2028and\u2029paragraph separators",
    "W" * 3000,
    "many words, " * 500,
    "👩‍👩‍👧‍👦 é 漢字 𝕏",  # noqa: RUF001
    "control \x00\x07\x1b\x7f signs",
    "half a pair \ud83d",
    "&lt;b&gt;&amp;amp;",
)


def picture(colour: str = "teal", kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(buffer, kind)
    return buffer.getvalue()


def question(number: int, correct: str, prm: int | None, majority: float, **fields) -> browser.Question:
    """`correct`: "+" or "-" for each candidate; `prm`: the one that is chosen; right ones answer B, wrong ones A."""
    candidates = [
        browser.Candidate(
            answer="B" if sign == "+" else "A",
            correct=sign == "+",
            steps=[
                browser.Step(f"step one of {number}", None if prm is None else 0.05 + 0.1 * position, 1),
                browser.Step(f"step two of {number}", None if prm is None else 0.95 - 0.1 * position, -1),
            ],
            score=None if prm is None else (0.9 if position == prm else 0.1),
            chosen_by=[
                *(["PRM"] if position == prm else []),
                *(["majority"] if (sign == "+") == (majority > 0) else []),
            ],
        )
        for position, sign in enumerate(correct)
    ]
    known = {
        "text": f"What is <image 1> number {number}?",
        "options": ["apple", "pear", "plum"],
        "answer": "B",
        "images": [picture()],
        "facets": {"subject": "History" if number % 2 else "Music", "difficulty": "Easy" if number < 3 else None},
    }
    prm_correct = None if prm is None else float(correct[prm] == "+")
    return browser.Question(
        id=f"q{number}", candidates=candidates, majority_correct=majority, oracle="+" in correct,
        prm_correct=prm_correct, **{**known, **fields},
    )  # fmt: skip


def every_outcome() -> list[browser.Question]:
    """Seven questions: one or two of each filter."""
    return [
        question(0, "++-", 2, 1.0),  # PRM wrong, majority right
        question(1, "--+", 2, 0.0),  # PRM right, majority wrong
        question(2, "--+", 0, 0.0),  # both wrong, a right one exists
        question(3, "---", 1, 0.0),  # all wrong
        question(4, "+++", 0, 1.0),  # all right
        question(5, "+-", 1, 0.5),  # PRM wrong, half of a tie
        question(6, "+-", 0, 0.5),  # PRM right, half of a tie
    ]


def hostile() -> list[browser.Question]:
    """One question for each hostile text, which is everywhere in it."""
    return [
        browser.Question(
            id=text, text=text, options=[text, text], answer=text, images=[picture(kind="JPEG")],
            facets={"subject": text}, majority_correct=0.0, oracle=False, prm_correct=0.0,
            candidates=[browser.Candidate(text, False, [browser.Step(text, 0.5, 0)], 0.5, [text, "PRM"])],
        )
        for text in HOSTILE
    ]  # fmt: skip
