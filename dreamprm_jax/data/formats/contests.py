"""Rows that hold a question with candidate responses to it, in whichever form -> Question and Response.

A best-of-N row has all candidates of its question:

    {"question", "image_path": path | list of paths | null, "candidates": list of texts, "true_false"?: list of bool,
     "id"?, "options"?, "answer"?, "answers"?: list of text | null, "subject"?, "image_type"?, "difficulty"?}

"question" is the question turn without its heading, `### Question:`. Where the options are not in "options", they are
read off its end, `Options: (A) ... (B) ...`; where they do not stand in it, they are written there.

A row of a run has a question, as in `mmmu`, and one response to it:

    {..., "response", "true_false" or "if_right"?: bool}

A chain is a row of the meta set, as in `records`, with "response"? (else its steps, joined) and "answer"?.

A response that is blank or null becomes NO_RESPONSE, one step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from dreamprm_jax.data.answers import NO_RESPONSE, extract_answer
from dreamprm_jax.data.conversation import IMAGE_MARKER, unfit_markers
from dreamprm_jax.data.example import GPT, HUMAN, PLUS, Example, Question, Turn
from dreamprm_jax.data.fields import (
    check_id,
    check_row,
    check_text,
    check_turn_text,
    field_error,
    find_images,
    optional_bool,
    optional_text,
    required,
    shown,
)
from dreamprm_jax.data.formats import mmmu
from dreamprm_jax.data.formats.prompts import FIRST_STEP_HEADING, QUESTION_HEADING
from dreamprm_jax.data.formats.rules import Rules
from dreamprm_jax.data.records import FileRules, parse_example
from dreamprm_jax.data.splitting import split_steps

BEST_OF_N, CHAINS, RUNS = "best_of_n", "chains", "runs"
"""Forms of rows."""


class Response(NamedTuple):
    """A candidate, not yet judged."""

    text: str
    answer: str | None  # the file's own, else extracted
    recorded: bool | None  # what the file says: is it right? None where it does not say
    example: Example  # as it is scored; `row` is that of the file


def form_of(row: Any, place: str) -> str:
    """The form that a row is of, by its fields.

    Raises:
      InputError: none of them.
    """
    row = check_row(row, place, '"question", "image_path", "candidates"')
    for field, form in (("candidates", BEST_OF_N), ("conversations", CHAINS), ("response", RUNS)):
        if field in row and (form != RUNS or "question" in row or "image" in row):
            return form
    raise field_error(
        place,
        "candidates",
        'is missing; give a best-of-N file ("question", "image_path", "candidates"), chains ("id", "image", '
        '"conversations", "true_false"), or runs that have question and response ("id", "question", "options", '
        '"answer", "response")',
    )


# --- Best-of-N rows.


def parse_best_of_n(row: Any, index: int, place: str, rules: Rules) -> tuple[Question, list[Response]]:
    """A question with all its candidates.

    Args:
      row: as parsed from JSON.
      index: its 0-based position, which is also the id of a row that has none.
      place: begins messages ("candidates.jsonl row 17").
      rules: where the images lie, and how a response is split.

    Returns:
      Question, `answer` "" where the row has none, and responses [C].

    Raises:
      InputError: a row that is not as it must be.
    """
    row = check_row(row, place, '"question", "image_path", "candidates"')
    question, turn = _best_of_n_question(row, index, place, rules)
    texts = required(row, "candidates", place)
    if not isinstance(texts, list) or not texts:
        raise field_error(place, "candidates", f"is {shown(texts)}; it must be a list of responses, and not empty")
    flags, answers = _flags(row, len(texts), place), _answers(row, len(texts), place)
    responses = []
    for number, (text, flag) in enumerate(zip(texts, flags, strict=True)):
        response = _response(text, question, turn, f"{place} candidate {number}", f"candidates[{number}]", rules)
        if answers is not None and response.text != NO_RESPONSE:
            response = response._replace(answer=answers[number])
        responses.append(response._replace(recorded=flag))
    return question, responses


def _best_of_n_question(row: dict, index: int, place: str, rules: Rules) -> tuple[Question, str]:
    """The question, and its turn."""
    asked = check_turn_text(required(row, "question", place), place, "question").removeprefix(QUESTION_HEADING)
    text, options = mmmu.split_question_turn(asked)
    if row.get("options") is not None:
        options = mmmu.check_options(row["options"], place)
        text = text if options else asked.removeprefix("Question: ")
    paths = required(row, "image_path", place, "; write null for a question without image")
    question_id = str(check_id(row, place)) if "id" in row else str(index)
    question = Question(
        row=index,
        id=question_id,
        text=text,
        answer="" if row.get("answer") is None else mmmu.check_answer(row["answer"], options, place),
        options=options,
        images=find_images(paths, place, rules.find_image, rules.image_root, "image_path"),
        subject=optional_text(row, "subject", place) or mmmu.subject_of(question_id),
        image_type=optional_text(row, "image_type", place),
        difficulty=optional_text(row, "difficulty", place),
        place=place,
    )
    shows_options = all(option.strip() in asked for option in options)
    return question, QUESTION_HEADING + asked if shows_options else mmmu.question_turn(question)


def _flags(row: dict, count: int, place: str) -> Sequence[bool | None]:
    flags = row.get("true_false")
    if flags is None:
        return [None] * count
    if not isinstance(flags, list) or not all(isinstance(flag, bool) for flag in flags):
        raise field_error(place, "true_false", f"is {shown(flags)}; it must be a list of true and false")
    return _one_each("true_false", flags, count, place)


def _answers(row: dict, count: int, place: str) -> Sequence[str | None] | None:
    answers = row.get("answers")
    if answers is None:
        return None
    if not isinstance(answers, list):
        raise field_error(place, "answers", f"is {shown(answers)}; it must be a list of texts, or null for no answer")
    _one_each("answers", answers, count, place)
    return [None if a is None else check_text(a, place, f"answers[{number}]") for number, a in enumerate(answers)]


def _one_each(field: str, values: list, count: int, place: str) -> list:
    if len(values) != count:
        raise field_error(place, field, f'has {len(values)} entries for {count} "candidates"; give one for each')
    return values


def _response(value: Any, question: Question, turn: str, place: str, field: str, rules: Rules) -> Response:
    """A response in the meta set's form, without a record."""
    blank = value is None or (isinstance(value, str) and not value.strip())
    text = NO_RESPONSE if blank else check_turn_text(value, place, field)
    steps = split_steps(text, rules.splitter)
    if not steps:
        raise field_error(place, field, f"is {shown(value)}; it has no step but only marks")
    turns = mmmu.conversation(turn, steps)
    markers = unfit_markers(turns, len(question.images))
    if markers:
        problem = f"and its question have {markers} {IMAGE_MARKER} marker(s) for {len(question.images)} image(s)"
        raise field_error(place, field, f"{problem}; write one for each, or none to have the images put first")
    example = Example(question.row, question.id, turns, question.images, dataset=question.subject, place=place)
    return Response(text, extract_answer(text, question.options), None, example)


# --- Prepared questions and runs.


def split_candidates(question: Question, rules: Rules) -> tuple[Question, list[Response]]:
    """A prepared question without its candidates, and those, as `parse_best_of_n` gives them.

    Raises:
      InputError: it has none.
    """
    if not question.candidates:
        raise field_error(question.place, "candidates", "is empty; prepare the set with prepare.responses")
    bare, turn = question._replace(candidates=(), true_false=()), mmmu.question_turn(question)
    responses = []
    for number, (text, flag) in enumerate(zip(question.candidates, question.true_false, strict=True)):
        place = f"{question.place} candidate {number}"
        response = _response(text, bare, turn, place, f"candidates[{number}]", rules)
        responses.append(response._replace(recorded=flag))
    return bare, responses


def parse_run(row: Any, index: int, place: str, rules: Rules) -> tuple[Question, Response]:
    """A question and the one response that a run has to it; arguments and errors as of `parse_best_of_n`."""
    row = check_row(row, place, '"id", "question", "options", "answer", "response"')
    check_id(row, place)
    question = mmmu.parse_question(row, index, place, rules)
    text = required(row, "response", place)
    response = _response(text, question, mmmu.question_turn(question), place, "response", rules)
    recorded = optional_bool(row, "true_false", place)
    return question, response._replace(recorded=optional_bool(row, "if_right", place) if recorded is None else recorded)


# --- Chains.


def parse_chain(row: Any, index: int, place: str, rules: Rules) -> tuple[Question, Response]:
    """A row of the meta set as the question and the response that it joins; its labels are not looked at.

    Arguments and errors as of `parse_best_of_n`.
    """
    files = FileRules(rules.find_image, rules.image_root, labels_required=False)
    example = parse_example(row, index, place, files)
    given = row.get("response")
    text = None if given in (None, "") else check_text(given, place, "response")
    question, response = split_chain(example, text)
    if row.get("answer") is not None:
        question = question._replace(answer=mmmu.check_answer(row["answer"], question.options, place))
    return question, response


def split_chain(example: Example, text: str | None = None) -> tuple[Question, Response]:
    """The question and the response of a chain.

    Args:
      example: question and steps in turns of their own, as the meta set has them, or the first step behind the
        question, as VisualPRM-400K has it. Labels are not looked at.
      text: the whole response; None: its steps, joined.

    Raises:
      InputError: it cannot be told where the question ends.
    """
    turn, steps = _question_and_steps(example)
    body, options = mmmu.split_question_turn(turn)
    name = str(example.id)
    question = Question(
        example.row, name, body, "", options, example.images,
        subject=example.dataset or mmmu.subject_of(name), place=example.place,
    )  # fmt: skip
    text = text or "\n\n".join(steps)
    turns = tuple(Turn(GPT, PLUS) if turn.role == GPT else turn for turn in example.turns)
    return question, Response(
        text, extract_answer(text, options), example.true_false, example._replace(turns=turns, soft_labels=None)
    )


def _question_and_steps(example: Example) -> tuple[str, list[str]]:
    turns = [turn for turn in example.turns if turn.role in (HUMAN, GPT)]
    first, *steps = (turn.text for turn in turns if turn.role == HUMAN)
    if turns[1].role == HUMAN:
        return first, steps
    question, heading, step = first.partition(FIRST_STEP_HEADING)
    if not heading:
        problem = f"has question and first step in one turn, without {FIRST_STEP_HEADING.strip()!r} between; part them"
        raise field_error(example.place, "conversations", problem)
    return question.rstrip(), [step, *steps]
