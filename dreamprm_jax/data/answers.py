"""The answer in a response, and whether it is right, by the rules of MMMU and MMMU-Pro.

The rules are those of MMMU's `eval_utils.py` and MMMU-Pro's `evaluate.py`, with these differences:

- A response without a recognisable answer has none, and is wrong. There a random letter is drawn for it, which is
  right once in so many options, and is another one in the next run.
- A letter counts where it stands alone. There any capital counts: the "B" of "Answer: Benzene", the article of "A
  patient", the pronoun of "I cannot tell" where there are nine options.
- Markup is seen through (`**Answer**: B`, `\\boxed{B}`), and a choice that is stated ("the answer is B", "B. 0.4 kW" on
  a line of its own) goes before letters that stand in the text.
- An open question is judged by the last `Answer: ...` line alone, where there is one. There the end of every sentence
  with an "is" counts, those of the reasoning too.

All of it takes time linear in the response's length.
"""

import re
from collections.abc import Hashable, Sequence
from string import ascii_uppercase

NO_RESPONSE = "(no response)"
"""Stands for a candidate without text, so that every question has its N; it is wrong and has one step."""

_MARKUP = r"(?:[\s*_$\"'`:#>(\[{]|\\[(\[]|\\(?:boxed|text|textbf|mathrm|mathbf)\b)*+"
_AFTER = (
    r"(?=[.):*_}\]$\\\"]|[ \t]*+(?:$|[(\u2013\u2014=-]))"  # after a letter that is an answer, not a word of a sentence
)
_ANSWER_LINE = re.compile(r"\banswer[*_ \"]{0,3}:", re.IGNORECASE)  # "Answer: ", "**Answer**: ", "**Answer:**"
_LEADING = re.compile(rf"{_MARKUP}([A-Z])\d?{_AFTER}", re.MULTILINE)
# "the answer is B", "option B"; "B. 0.4 kW" or "**B**" on a line of its own; "\boxed{B}"
_STATED = re.compile(
    r"(?:\b(?:[Aa]nswer|[Oo]ption|[Cc]hoice|ANSWER|OPTION)\b(?: is\b| would be\b)?"
    rf"{_MARKUP}(?!I[ '\u2019][a-z])([A-Z])(?![^\W_]|[ ,]*[A-Z]\b)"
    rf"|^[ \t*_$>#-]*+([A-Z])(?!:){_AFTER}|\\boxed\{{(?:\\text\w*\{{)?\(?([A-Z])\b)",
    re.MULTILINE,
)
_BRACKETED = re.compile(r"\(([A-Z])\)")
# No part of a word or a formula; neither the article "A" nor the pronoun "I"
_ALONE = re.compile(r"(?<![^\W_])(?<![-'\u2019+=^{\\])(?:([B-HJ-Z])|([AI])(?! [a-z]))(?![^\W_]|['\u2019+=^]|-\w)")
_EDGES = " \t\n*_$`'\"().,;:!?"
_OPEN_EDGES = _EDGES.replace("(", "").replace(")", "")  # f(x) keeps its brackets

# What MMMU takes numbers to be: 1,234,567; 1.5e-3; 12, 1.5 and .5. Each begins where a run of digits does.
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?(?<!\d)\d++(?:\.\d++)?[eE][+-]?\d++"),
    re.compile(r"-?(?:(?<!\d)\d++\.\d++|\.\d++|(?<!\d)\d++\b)(?![eE][+-]?\d)(?![,\d])"),
)
_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")


def extract_answer(response: str, options: Sequence[str]) -> str | None:
    """The answer that a response ends with.

    Args:
      response: the whole response, final answer included.
      options: the texts of (A), (B), ..., 26 at most; empty for an open question.

    Returns:
      With options a letter, else the text of the final answer; None where none is recognised, and for NO_RESPONSE.
    """
    if response == NO_RESPONSE:
        return None
    if options:
        return _choice(response, dict(zip(ascii_uppercase, options, strict=False)))
    lines = _answer_lines(response)
    text = lines[-1] if lines else _key_phrases(response)[-1]
    return text.strip(_OPEN_EDGES) or None


def is_right(response: str, answer: str | Sequence[str], options: Sequence[str]) -> bool:
    """Whether a response's answer is right.

    With options: the letters are equal. Open: one of the right answers stands in the text of the final answer, or is
    equal to a number in it, both rounded to two decimals (MMMU's own tolerance, coarse for small numbers). A response
    without a recognisable answer is wrong.

    Args:
      response, options: as for `extract_answer`.
      answer: the right answer, or several of which each is right.
    """
    if response == NO_RESPONSE:
        return False  # whose "no" is not the answer "no"
    answers = [answer] if isinstance(answer, str) else list(answer)
    if options:
        return extract_answer(response, options) in answers
    lines = _answer_lines(response)
    phrases = [lines[-1].lower()] if lines else _key_phrases(response)
    found = [value for phrase in phrases for value in _readings(phrase)]
    return any(_agree(right, value) for text in answers for right in _normal(text) for value in found)


def vote_key(answer: str | None, options: Sequence[str]) -> Hashable | None:
    """What an answer votes for: answers of one key are one vote.

    With options the letter, read as in an `Answer: ...` line ("B", "(B)", "B. a pear", the text of an option). Open: a
    number to two decimals, or the text in lower case.

    Args:
      answer: from `extract_answer`, or as a file gives it.
      options: as for `extract_answer`.

    Returns:
      None where there is no vote: no answer, or one that no option has.
    """
    text = (answer or "").strip(_OPEN_EDGES)
    if not text:
        return None
    if options:
        return extract_answer(f"Answer: {answer}", options)
    value = _normal(text)[0]
    return value if value == value else text.lower()  # "nan" is a text, not a number that differs from itself


def _answer_lines(response: str) -> list[str]:
    """What follows each `Answer:`: the first line that is not empty."""
    pieces = _ANSWER_LINE.split(response)[1:]
    return [line for piece in pieces if (line := piece.strip(" \t\n*_").partition("\n")[0].strip())]


def _choice(response: str, options: dict[str, str]) -> str | None:
    for line in reversed(_answer_lines(response)):
        leading = _LEADING.match(line)
        if leading:
            return leading[1] if leading[1] in options else None  # a letter that no option has is wrong, not absent
        letter = _named(line, options)
        if letter:
            return letter
    for pattern in (_STATED, _BRACKETED, _ALONE):
        letters = _letters(pattern, response, options)
        if letters:
            return letters[-1]
    return _by_content(response, options) if len(response.split()) > 5 else None


def _letters(pattern: re.Pattern, text: str, options: dict[str, str]) -> list[str]:
    return [letter for match in pattern.finditer(text) if (letter := match[match.lastindex]) in options]


def _named(line: str, options: dict[str, str]) -> str | None:
    """The option whose whole text an answer line is, else whose letter is the last in it, else whose text is."""
    bare = line.strip(_EDGES).lower()
    same = [letter for letter, text in options.items() if bare and text.strip(_EDGES).lower() == bare]
    letters = same if len(same) == 1 else _letters(_ALONE, line, options)
    return letters[-1] if letters else _by_content(line, options)


def _by_content(text: str, options: dict[str, str]) -> str | None:
    """The option whose text stands last; of two that end alike, the longer one."""
    text = text.lower()
    places = []
    for letter, content in options.items():
        content = content.strip().lower()
        ends = [match.end() for match in re.finditer(rf"(?<!\w){re.escape(content)}(?!\w)", text)] if content else []
        if ends:
            places.append((ends[-1], len(content), letter))
    return max(places)[2] if places else None


def _key_phrases(response: str) -> list[str]:
    """Lower-case ends of the lines that may hold an open answer; the whole response where no line does.

    MMMU means to split at the ends of sentences too, but does so after lower-casing, where no sentence begins.
    """
    text = response.strip().strip(".").lower()
    lines = text.split("\n")
    phrases = []
    for number, line in enumerate(lines):
        keys = (*_KEYS, "=") if number == len(lines) - 1 else _KEYS
        ends = [line.rpartition(key)[2].strip() for key in keys if key in line]
        shortest = min(filter(None, ends), key=len, default="")
        if shortest and shortest not in set(",.!?;:'"):
            phrases.append(shortest)
    return phrases or [text]


def _readings(phrase: str) -> list[str | float]:
    """A phrase and every number in it, normalised."""
    numbers = [number for pattern in _NUMBERS for number in pattern.findall(phrase)]
    return [value for text in (phrase, *numbers) for value in _normal(text)]


def _normal(text: str) -> list[str | float]:
    """A number as a float of two decimals, else the text in lower case; a single letter with the space beside it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def _agree(right: str | float, found: str | float) -> bool:
    if isinstance(right, str) and isinstance(found, str):
        return right != "" and right in found
    return right == found
