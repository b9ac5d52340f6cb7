"""MMMU and MMMU-Pro: question rows -> Question; a response joined with its question -> Example in the meta set's form.

A question row, of a JSON file or of the Hub's Parquet files:

    {"id"?, "question", "options": list or its repr as text, "answer", "image_1"?, ..., "image_7"?: path | {"bytes",
     "path"} | null, "subject"?, "img_type"?, "topic_difficulty"?}

MMMU-Pro's vision rows have one "image", and the question stands in it: theirs is `VISION_QUESTION`. A row of responses:

    {"id", "response", "true_false" or "if_right"?: bool}

The published meta set is made of the questions of MMMU-Pro's four-option rows; the ten-option rows have the same text,
but other options in another order, which a response's letter belongs to. Its 414 questions all have options: how it
would write an open one is not known, and is chosen here.
"""

import ast
import re
import unicodedata
from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any

from dreamprm_jax.data.answers import is_right
from dreamprm_jax.data.conversation import check_image_markers
from dreamprm_jax.data.example import GPT, HUMAN, PLUS, SYSTEM, Example, ImageSource, Question, Turn
from dreamprm_jax.data.fields import (
    check_id,
    check_image,
    check_row,
    check_text,
    check_turn_text,
    field_error,
    optional_bool,
    optional_text,
    required,
    shown,
)
from dreamprm_jax.data.formats.prompts import DREAMPRM_CHOICES, DREAMPRM_QUESTION, DREAMPRM_SYSTEM, QUESTION_HEADING
from dreamprm_jax.data.formats.rules import Rules
from dreamprm_jax.data.splitting import split_steps

MAX_IMAGES = 7
"""Columns image_1, image_2, ... of a row."""

VISION_QUESTION = "<image 1>"
"""What stands for the text of a vision row."""

_MAX_LIST_TEXT = 100_000  # characters of a list written as text; the longest published one has 2,000
_MARKER = re.compile(r"<image\s*(\d{1,3})>")
_ANY_MARKER = re.compile(r"<image\s*\d{0,3}>")  # VisualPRM's have no number
_OPTION_LETTER = re.compile(r"\([a-z]\)|^[^\S\n]*[a-z][.)]\s", re.MULTILINE)
_SUBJECT = re.compile(r"(?:validation|dev|test)_(.+)_\d+")
_CHOICES = re.compile(r"\n+Options:\s*(?=\(A\)\s)")


def is_validation(question_id: str) -> bool:
    """Whether a question is one of MMMU's validation split, the test set here; MMMU-Pro has 577 of those."""
    return question_id.startswith("validation_")


def question_key(text: str) -> str:
    """A question's text without what two copies of it may differ in: case, white space, image markers, option letters.

    Different questions can share a key, "" even, where it is the image that asks: the 414 of the published meta set
    have 406. One key is a reason to compare the images, not yet the same question.

    >>> question_key("Which  is <image 1> shown?\\n(A) Red (B) blue") == question_key("which is shown? red BLUE")
    True
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    return "".join(_OPTION_LETTER.sub(" ", _ANY_MARKER.sub(" ", text)).split())


def parse_question(row: Any, index: int, place: str, rules: Rules) -> Question:
    """A question row, checked.

    Args:
      row: as parsed from JSON or Parquet.
      index: its 0-based position, which is also the id of a row that has none.
      place: begins messages ("questions.jsonl row 17").
      rules: where images named by a path lie. With no image root, a row without any image field is taken without
        images: rows of responses repeat the question alone.

    Returns:
      Question; `images[n - 1]` is image n, up to the last that text or options name, all where they name none.

    Raises:
      InputError: a row that is not as it must be, an image that is named but missing among them.
    """
    row = check_row(row, place, '"question", "options", "answer"')
    question_id = str(check_id(row, place)) if "id" in row else str(index)
    vision = "image" in row and "question" not in row
    text = VISION_QUESTION if vision else check_turn_text(required(row, "question", place), place, "question")
    options = check_options(required(row, "options", place, "; write [] for an open question"), place)
    return Question(
        row=index,
        id=question_id,
        text=text,
        answer=check_answer(required(row, "answer", place), options, place),
        options=options,
        images=_images(row, (text, *options), place, rules),
        subject=optional_text(row, "subject", place) or subject_of(question_id),
        image_type=_image_type(row, place),
        difficulty=optional_text(row, "topic_difficulty", place),
        place=place,
    )


def parse_response(row: Any, index: int, place: str, questions: Mapping[str, Question], rules: Rules) -> Example:
    """A response, joined with its question, as the published meta set has it; every label is "+".

    Args:
      row: as parsed from JSON.
      index: its 0-based position.
      place: begins messages ("responses.jsonl row 17").
      questions: by id; the options must be those that the response chose from.
      rules: `splitter` cuts the response into steps.

    Returns:
      Example; `true_false` is the row's own ("true_false", else "if_right"), else judged by `answers.is_right`.

    Raises:
      InputError: a row that is not as it must be, or whose question is not there.
    """
    row = check_row(row, place, '"id", "response"')
    question_id = check_id(row, place)
    question = questions.get(str(question_id))
    if question is None:
        raise field_error(place, "id", f"is {shown(question_id)}, but no question has that id; add it or take it out")
    response = check_turn_text(required(row, "response", place), place, "response")
    steps = split_steps(response, rules.splitter)
    if not steps:
        raise field_error(place, "response", f"is {shown(response)}; it has no step but only marks")
    turns = conversation(question_turn(question), steps)
    check_image_markers(turns, len(question.images), place)
    outcome = optional_bool(row, "true_false", place)
    if outcome is None:
        outcome = optional_bool(row, "if_right", place)
    if outcome is None:
        outcome = is_right(response, right_answers(question), question.options)
    return Example(
        row=index,
        id=question_id,
        turns=turns,
        images=question.images,
        true_false=outcome,
        dataset=question.subject or rules.dataset,
        place=place,
    )


def conversation(turn: str, steps: Sequence[str]) -> tuple[Turn, ...]:
    """The turns of the published meta set: system prompt, question turn, and each step with the label "+"."""
    labelled = (turn for step in steps for turn in (Turn(HUMAN, step), Turn(GPT, PLUS)))
    return (Turn(SYSTEM, DREAMPRM_SYSTEM), Turn(HUMAN, turn), *labelled)


def question_turn(question: Question) -> str:
    """A question as the published meta set writes it, with `(A) ... (B) ...` where it has options; nothing is stripped
    but the end."""
    choices = " ".join(f"({letter}) {text}" for letter, text in zip(ascii_uppercase, question.options, strict=False))
    turn = DREAMPRM_QUESTION.format(question=question.text)
    return (turn + DREAMPRM_CHOICES.format(options=choices) if choices else turn).rstrip()


def split_question_turn(turn: str) -> tuple[str, tuple[str, ...]]:
    """Text and options of a question turn, with or without its heading: what `question_turn` joined.

    An option that has the next one's mark in it, " (C) ", is cut there; no published one has.

    >>> split_question_turn("Question: Which is it?\\n\\nOptions: (A) red (B) light blue")
    ('Which is it?', ('red', 'light blue'))
    """
    body = turn.removeprefix(QUESTION_HEADING).removeprefix("Question: ")
    starts = list(_CHOICES.finditer(body))
    if not starts:
        return body, ()
    options = [body[starts[-1].end() + 3 :]]
    for letter in ascii_uppercase[1:]:
        option, *others = re.split(rf"\s\({letter}\)(?=\s|$)", options[-1], maxsplit=1)
        if not others:
            break
        options[-1:] = [option, *others]
    return body[: starts[-1].start()], tuple(option[1:] for option in options)  # without the blank behind its letter


def subject_of(question_id: str) -> str | None:
    """ "Clinical_Medicine" of "test_Clinical_Medicine_69"; None where an id has no subject."""
    match = _SUBJECT.fullmatch(question_id)
    return match[1] if match else None


def right_answers(question: Question) -> tuple[str, ...]:
    """The answers that count as right: one, or the several of an open question (`"['24/7', '3.429']"`)."""
    several = [] if question.options else _literal_list(question.answer) or []
    is_text = all(isinstance(answer, str) for answer in several)  # not so: the answer is an interval, "[0, 1]"
    return tuple(several) if several and is_text else (question.answer,)


def parse_answers(content: Any, place: str) -> dict[str, str]:
    """MMMU's answer file, `answer_dict_val.json`: {question id: what a row's "answer" would be}.

    Args:
      content: the parsed JSON, `{id: {"question_type", "ground_truth": str | list of str}}`.
      place: begins messages (the file's name).

    Raises:
      InputError: not of this form.
    """
    answers = {}
    for question_id, entry in check_row(content, place, "question ids").items():
        field = f"{question_id}.ground_truth"
        if not isinstance(entry, dict):
            raise field_error(place, question_id, f'is {shown(entry)}; it must be an object with "ground_truth"')
        truth = entry.get("ground_truth")
        if isinstance(truth, list) and truth:
            answers[question_id] = repr([check_text(text, place, field) for text in truth])
        else:
            answers[question_id] = check_text(truth, place, field)
    return answers


def check_options(value: Any, place: str) -> tuple[str, ...]:
    """The options of a row's "options": a list of texts, or its spelling.

    Raises:
      InputError: something else, or more than there are letters.
    """
    options = _literal_list(value) if isinstance(value, str) else value
    if isinstance(options, list) and len(options) == 1 and isinstance(options[0], list):
        options = options[0]  # one published row says [['A', 'B', 'Not enough information']]
    if not isinstance(options, list) or len(options) > len(ascii_uppercase):
        problem = f"is {shown(value)}; it must be a list of up to {len(ascii_uppercase)} texts, or such a list as text"
        raise field_error(place, "options", problem)
    return tuple(check_turn_text(text, place, f"options[{number}]") for number, text in enumerate(options))


def _literal_list(text: str) -> list | None:
    """The list that a text is the Python spelling of; None where it is none."""
    if len(text) > _MAX_LIST_TEXT or not text.lstrip().startswith("["):
        return None
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None
    return value if isinstance(value, list) else None


def check_answer(value: Any, options: tuple[str, ...], place: str) -> str:
    """A letter of the options; for an open question a text, or a list of texts, which is kept as its spelling.

    Raises:
      InputError: something else.
    """
    if isinstance(value, list) and value and not options:
        return repr([check_text(text, place, "answer") for text in value])
    answer = check_text(value, place, "answer")
    letters = ascii_uppercase[: len(options)]
    if options and (len(answer) != 1 or answer not in letters):
        problem = f"is {shown(answer)}; it must be a letter from A to {letters[-1]} (a hidden answer cannot be judged)"
        raise field_error(place, "answer", problem)
    return answer


def _images(row: dict, texts: tuple[str, ...], place: str, rules: Rules) -> tuple[ImageSource, ...]:
    fields = ["image"] if "image" in row else [f"image_{number}" for number in range(1, MAX_IMAGES + 1)]
    if (rules.image_root is None or not rules.images_needed) and not any(field in row for field in fields):
        return ()
    named = {int(number) for text in texts for number in _MARKER.findall(text)}
    given = [number for number, field in enumerate(fields, start=1) if row.get(field) is not None]
    last = max(named or given, default=0)
    missing = sorted((named | set(range(1, last + 1))) - set(given))
    if missing:
        field = "image" if "image" in row else f"image_{missing[0]}"
        raise field_error(place, field, f"is missing, but the row names <image {last}> or has image {last}; add it")
    return tuple(_image(row[field], place, field, rules) for field in fields[:last])


def _image(value: Any, place: str, field: str, rules: Rules) -> ImageSource:
    """A path, the bytes of a file, or the Hub's {"bytes", "path"}, of which either may be null."""
    if isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, bytes) and value:
        return value
    return check_image(value, place, field, rules.find_image, rules.image_root)


def _image_type(row: dict, place: str) -> str | None:
    """ "Diagrams, Tables" of "['Diagrams', 'Tables']"."""
    value = optional_text(row, "img_type", place)
    types = _literal_list(value) if value else None
    return value if types is None else ", ".join(map(str, types)) or None
