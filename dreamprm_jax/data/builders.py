"""The public data sets by name: what reads their rows, and what a row is drawn and left out by."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dreamprm_jax.data import raw
from dreamprm_jax.data.answers import NO_RESPONSE
from dreamprm_jax.data.example import GPT, HUMAN, MINUS, Example, ImageSource, Question
from dreamprm_jax.data.fields import field_error
from dreamprm_jax.data.formats import mmmu, visualprm, visualprocessbench
from dreamprm_jax.data.formats.rules import LabelRule, Rules, content_id, rules_for
from dreamprm_jax.data.prepared import PreparedQuestions, is_prepared, refuse_parent
from dreamprm_jax.errors import InputError

QUESTION_BUILDERS = ("mmmu",)
"""Builders of questions; the other ones' rows are chains."""

REPEATING_BUILDERS = ("mmmu_pro", "visualprocessbench")
"""Equal rows are all kept: responses are draws (406 of the 1,656 published ones repeat another), and the rows of a
benchmark are what they are."""

Row = Example | Question
Parse = Callable[[Any, int, str], Row]

_QUESTION = re.compile(r"### Question:\n(?:Question: )?(.*?)(?:\n\n### Solution Process:\n.*)?", re.DOTALL)
_OPTIONS = "\n\nOptions: "
_ANCHOR = 40  # characters by which a long question is found inside another text; a shorter one must be all of it


class Source(NamedTuple):
    """What the rows of a set are read from, and how; text and numbers, so that it can be kept and compared."""

    builder: str  # visualprm400k | mmmu_pro | mmmu | visualprocessbench
    source: str  # raw files: one, or a directory of them; mmmu_pro: its questions
    images: str | None = None  # image root; None: `source`, or the directory it is in
    responses: str | None = None  # mmmu_pro, mmmu: candidate responses, a file or a directory
    threshold: float = 0.0  # visualprm400k: a step is "+" above this share of right rollouts
    soft_labels: bool = True  # visualprm400k: also keep that share
    splitter: str = "whole_numbers"  # mmmu_pro: how a response becomes steps


def row_files(source: Source) -> dict[str, Path]:
    """The files whose rows become the rows of the set, by name.

    Raises:
      InputError: there are none.
    """
    if source.builder != "mmmu_pro":
        return raw.find_files(source.source)
    if source.responses is None:
        raise InputError("--config.prepare.responses is missing: mmmu_pro joins candidate responses to its questions")
    return raw.find_files(source.responses)


def parser(source: Source, file: str, unpacked: Path) -> Parse:
    """What reads the rows of one file.

    Args:
      source: of the set.
      file: its name in `row_files`.
      unpacked: directory for the images that mmmu_pro's questions hold, so that they are not kept in memory.

    Returns:
      (row as parsed, number, place) -> Example or Question; raises InputError for a row that is not as it must be.
    """
    rules = _rules(source)
    if source.builder == "visualprm400k":
        return functools.partial(_parse_visualprm, rules=rules._replace(dataset=visualprm.domain(file)))
    if source.builder == "visualprocessbench":
        return functools.partial(visualprocessbench.parse, rules=rules)
    if source.builder == "mmmu_pro":
        return functools.partial(_parse_response, questions=_questions(source, unpacked), rules=rules)
    return functools.partial(_parse_with_candidates, source=source, rules=rules)


def _parse_visualprm(row: Any, index: int, place: str, rules: Rules) -> Example:
    """A row named by its content, as the files say -1 of each."""
    example = visualprm.parse(row, index, place, rules)
    return example._replace(id=content_id(example, rules.image_root)) if example.id == visualprm.NO_ID else example


def image_root(source: Source) -> str:
    """The directory that holds the images of the rows."""
    return source.images or str(raw.folder(source.source))


def _rules(source: Source) -> Rules:
    labels = LabelRule(source.threshold, source.soft_labels)
    return rules_for(image_root(source), labels=labels, splitter=source.splitter)


# --- Questions and the responses to them.


def read_all_questions(path: str, images: str | None) -> Iterator[Question | InputError]:
    """The questions of a prepared set, a raw file, a directory or pattern of those; the error of a bad row.

    Args:
      path: where they are.
      images: directory of the images; None: that of the files.

    Raises:
      InputError: no such files, or a file that cannot be read.
    """
    return (question for _, question in _questions_by_id(path, images))


def _questions_by_id(path: str, images: str | None) -> Iterator[tuple[str, Question | InputError]]:
    if is_prepared(path):
        prepared = PreparedQuestions(path)
        yield from ((question.id, question) for question in (prepared[i] for i in range(len(prepared))))
        return
    refuse_parent(path)
    rules = _rules(Source("mmmu", path, images))
    for row, index, place in _all_rows(path):
        try:
            question = mmmu.parse_question(row, index, place, rules)
            yield question.id, question
        except InputError as error:
            yield str(row.get("id", index)) if isinstance(row, dict) else str(index), error


def _all_rows(path: str) -> Iterator[tuple[Any, int, str]]:
    for name, file in raw.find_files(path).items():
        yield from raw.file_rows(name, file)


@functools.cache
def _questions(source: Source, unpacked: Path) -> dict[str, Question | InputError]:
    """By id, every image in a file of its own; the error of a row that cannot be used."""
    questions: dict[str, Question | InputError] = {}
    for name, question in _questions_by_id(source.source, source.images):
        if name in questions:
            both = " and ".join(q.place for q in (questions[name], question) if isinstance(q, Question))
            raise InputError(
                f"{source.source}: two questions have the id {name!r} ({both or 'bad rows'}); take one of them out, or "
                "give one subset's files alone"
            )
        if isinstance(question, Question):
            question = question._replace(images=tuple(_unpack(image, unpacked) for image in question.images))
        questions[name] = question
    return questions


def _parse_response(
    row: Any, index: int, place: str, questions: Mapping[str, Question | InputError], rules: Rules
) -> Example:
    question = questions.get(str(row.get("id"))) if isinstance(row, dict) else None
    if isinstance(question, InputError):
        raise field_error(place, "id", f"is {row['id']!r}, whose question cannot be used ({question})")
    return mmmu.parse_response(row, index, place, questions, rules)


def _unpack(image: ImageSource, directory: Path) -> Path:
    if isinstance(image, Path):
        return image
    path = directory / hashlib.sha256(image).hexdigest()
    if not path.is_file():
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        temporary.write_bytes(image)
        os.replace(temporary, path)
    return path


def _parse_with_candidates(row: Any, index: int, place: str, source: Source, rules: Rules) -> Question:
    question = mmmu.parse_question(row, index, place, rules)
    given = _responses(source.responses).get(question.id, ()) if source.responses else ()
    texts, judged = [], []
    for response, number, where in given:
        if not str(response.get("response") or "").strip():
            texts.append(NO_RESPONSE)  # a question keeps its N candidates
            judged.append(False)
            continue
        found = mmmu.parse_response(response, number, where, {question.id: question}, rules)
        texts.append(response["response"])
        judged.append(bool(found.true_false))
    return question._replace(candidates=tuple(texts), true_false=tuple(judged))


def count_strays(source: Source) -> int:
    """Responses to `mmmu` whose id no question has."""
    if source.builder != "mmmu" or not source.responses:
        return 0
    ids = {name for name, _ in _questions_by_id(source.source, source.images)}
    return sum(len(rows) for name, rows in _responses(source.responses).items() if name not in ids)


@functools.cache
def _responses(path: str) -> dict[str, list[tuple[dict, int, str]]]:
    """Rows of responses with their places, by the id of their question."""
    found: dict[str, list] = {}
    for row, index, place in _all_rows(path):
        if not isinstance(row, dict) or "id" not in row:
            raise row if isinstance(row, InputError) else InputError(f'{place}: "id" is missing; add it')
        found.setdefault(str(row["id"]), []).append(({k: row[k] for k in _RESPONSE & set(row)}, index, place))
    return found


_RESPONSE = {"id", "response", "true_false", "if_right"}


# --- What a row is named, grouped and left out by.


def identity(row: Row, source: Source) -> str:
    """What a row says, as a text: rows of one identity are copies.

    A question's is its id with its text.
    """
    if isinstance(row, Question):
        return f"{row.id}\n{row.text}\n{row.options}"
    if source.builder == "mmmu_pro":  # its images are those of the question
        return f"{row.id} {content_id(row._replace(images=()))}"
    return content_id(row, image_root(source))


def verdict(row: Row) -> int:
    """What copies may differ in, labels and outcome, as a number."""
    labels = [] if isinstance(row, Question) else [turn.text for turn in row.turns if turn.role == GPT]
    return zlib.crc32(json.dumps([labels, row.true_false]).encode())


def source_of(row: Row) -> str:
    """The domain, "" for none."""
    return (row.subject if isinstance(row, Question) else row.dataset) or ""


def outcome_of(row: Row) -> bool:
    """Is the answer right? Of a chain without an answer: are all steps? Of a question: has it a right candidate?"""
    if isinstance(row, Question):
        return any(row.true_false)
    if row.true_false is not None:
        return row.true_false
    return not any(turn.role == GPT and turn.text == MINUS for turn in row.turns)


class Excluded(NamedTuple):
    """Questions that must not come into a set, and their images."""

    ids: frozenset[str] = frozenset()
    texts: frozenset[str] = frozenset()  # `question_key`s
    anchored: Mapping[str, tuple[str, ...]] = {}  # long ones by their first characters
    pixels: frozenset[str] = frozenset()  # prepared.pixel_hash of each image


def text_to_exclude(question: Question) -> str:
    """The key that tells a question by its text; "" where the text does not.

    A short one is a template that many questions share ("Who created <image 1>?"): it counts with its options alone.
    """
    key = mmmu.question_key(question.text)
    return key if not key or len(key) >= _ANCHOR else mmmu.question_key(_question_text(question))


def excluded(ids: list[str], texts: list[str], pixels: list[str]) -> Excluded:
    """The questions with these ids, keys (`text_to_exclude`) and images."""
    anchored: dict[str, tuple[str, ...]] = {}
    for text in texts:
        if len(text) >= _ANCHOR:
            anchored[text[:_ANCHOR]] = (*anchored.get(text[:_ANCHOR], ()), text)
    return Excluded(frozenset(ids), frozenset(texts) - {""}, anchored, frozenset(pixels))


@functools.cache
def read_excluded(path: Path) -> Excluded:
    """`excluded` of a JSON file {"ids", "texts", "pixels"}."""
    return excluded(**json.loads(path.read_text(encoding="utf-8")))


def reason_to_exclude(row: Row, questions: Excluded) -> str | None:
    """ "id" or "question" where the row's own is among `questions`; None where neither is."""
    if str(row.id) in questions.ids and not isinstance(row.id, int):
        return "id"
    return "question" if _holds(mmmu.question_key(_question_text(row)), questions) else None


def _question_text(row: Row) -> str:
    """Question and options; a chain's as its first turn has them."""
    if isinstance(row, Question):
        return "\n".join([row.text, *row.options])
    first = next(turn.text for turn in row.turns if turn.role == HUMAN)
    match = _QUESTION.fullmatch(first)
    return (match[1] if match else first).replace(_OPTIONS, "\n")


def _holds(key: str, questions: Excluded) -> bool:
    """Whether the text is one of the questions, or has one of the long ones in it (its choices may follow)."""
    if key in questions.texts:
        return True
    if not questions.anchored:
        return False
    anchors = (questions.anchored.get(key[i : i + _ANCHOR]) for i in range(len(key) - _ANCHOR + 1))
    return any(key.startswith(text, i) for i, texts in enumerate(anchors) for text in texts or ())
