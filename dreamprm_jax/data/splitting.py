"""A whole response -> its steps, by one of two rules.

`published` is the splitter of the published code, fault included: it takes any number with a dot or bracket behind it
for an enumeration mark, wherever it stands in a line, and deletes it. `whole_numbers` cuts at the same places but for
this. Of the 1,656 responses of the published meta set the two differ in 96. Read one by one, every difference is of
one of these kinds:

- a number ends a sentence, a formula or a clause (59 responses): "N = 2. So" -> "N =", "So"; "bulbs 1 or 2. Thus".
- a number stands last in brackets (47, of which 10 have both): "378 / (378 + 2) = 0.995" -> "378 / (378 +", "= 0.995";
  "the Chinese Exclusion Act of 1882) that".

In long calculations there is one more: a line that begins with a number, such as "29.43 m", counts as marked, so that
blank lines no longer open steps, and loses it.

In these texts and in GPT-4o's 6,920 on MMMU-Pro a step's mark begins its line. Two lines of theirs list things inside a
sentence, "1) ... 2) ... 3) ...": a step keeps them. Headings ("### Step 4: ...") keep their numbers too.
"""

import re
from collections.abc import Sequence

RULES = ("whole_numbers", "published")

HEADER, ANSWER = "[Reasoning]", "Answer:"
"""What a response is asked to begin its reasoning and its answer with."""

_ANY_MARK = r"(?:(?:Step|步骤)\s*\d+\s*[:.]?|\d+[.、)]|[①-⑳])"
_LINE_MARK = re.compile(rf"\s*{_ANY_MARK}\s*")
_INLINE_MARK = re.compile(rf"(?:(?<=\s)|^){_ANY_MARK}(?=\s)\s*")
_BLANK_LINES = re.compile(r"\n\s*\n")

# At most three digits: a longer number is a year or a quantity. "Step 2 shows" is a sentence, "Step 2:" a mark; so is
# "Step 2" before a dash.
_TRUE_MARK = re.compile(
    r"\s*(?:(?:Step|步骤)\s*(?P<step>\d{1,3})\s*(?:[:.]|(?=[-\u2013\u2014]))"
    r"|(?P<list>\d{1,3})(?:[.)](?=\s)|、)|(?P<circled>[①-⑳]))"
)


def split_steps(response: str, rule: str) -> tuple[str, ...]:
    """Splits a response into steps, none of them blank; () where it is blank itself.

    Both rules: where at least two lines begin with a mark (`1.`, `2)`, `Step 3:`, `④`), marks open the steps, else
    blank lines do. Marks are taken out. The answer, `Answer: ...`, is a step of its own. Takes time in proportion to
    the length.

    Args:
      response: the text a model wrote.
      rule: "whole_numbers" keeps every word and number but the marks; "published" is the published code's, which also
        drops what stands before the reasoning or after the answer's line, and says an answer twice where there is no
        `[Reasoning]` before it.

    Raises:
      ValueError: another rule.
    """
    if rule not in RULES:
        raise ValueError(f"rule={rule!r}: must be one of {', '.join(RULES)}")
    pieces = _published(response) if rule == "published" else _whole_numbers(response)
    stripped = (piece.strip() for piece in pieces)
    return tuple(piece for piece in stripped if piece)


def _whole_numbers(response: str) -> list[str]:
    header, rest = response.partition(HEADER)[1:]
    if header and ANSWER in rest:
        response = response.replace(HEADER, "\n\n", 1)
    lines = response.split("\n")
    marks = _true_marks(lines)
    pieces: list[list[str]] = [[]]
    for number, line in enumerate(lines):
        if number in marks:
            pieces.append([line[marks[number] :]])
        elif line.startswith(ANSWER):
            pieces.append([line])
        elif not line.strip() and len(marks) < 2:
            pieces.append([])
        else:
            pieces[-1].append(line)
    return [_spaced_answer("\n".join(piece)) for piece in pieces]


def _spaced_answer(piece: str) -> str:
    """One blank behind "Answer:", where there may be a line break or none."""
    return f"{ANSWER} {piece.removeprefix(ANSWER).strip()}" if piece.startswith(ANSWER) else piece


def _true_marks(lines: Sequence[str]) -> dict[int, int]:
    """{line: where its mark ends}, for the marks that begin a line and count on from another one.

    A 1 begins a list where it opens a block or a 2 comes later; any other number needs the one before it.
    """
    found = {number: match for number, line in enumerate(lines) if (match := _TRUE_MARK.match(line))}
    values = {number: _value(match) for number, match in found.items()}
    last = {value: number for number, value in values.items()}  # the last line with a value
    seen, marks = set(), {}
    for number, value in values.items():
        opens_block = number == 0 or not lines[number - 1].strip()
        if value - 1 in seen or (value == 1 and (opens_block or last.get(2, -1) > number)):
            seen.add(value)
            marks[number] = found[number].end()
    return marks


def _value(mark: re.Match) -> int:
    circled = mark["circled"]
    return ord(circled) - ord("①") + 1 if circled else int(mark["step"] or mark["list"])


def _published(response: str) -> list[str]:
    reasoning = response.partition(HEADER)[2]
    body = (reasoning.partition(ANSWER)[0] if ANSWER in reasoning else response).strip()
    pieces = [cut for piece in _published_blocks(body) for cut in _INLINE_MARK.split(piece.strip())]
    found, answer = response.partition(ANSWER)[1:]
    return [*pieces, f"{ANSWER} {answer.lstrip().partition(chr(10))[0]}"] if found else pieces


def _published_blocks(body: str) -> list[str]:
    lines = body.split("\n")
    marks = [_LINE_MARK.match(line) for line in lines]
    if sum(mark is not None for mark in marks) < 2:
        return _BLANK_LINES.split(body)
    blocks: list[list[str]] = [[]]
    for number, (line, mark) in enumerate(zip(lines, marks, strict=True)):
        if mark and (number == 0 or not lines[number - 1].strip()):
            blocks.append([line[mark.end() :]])
        else:
            blocks[-1].append(line)
    return ["\n".join(block) for block in blocks]
