"""Questions with the candidates to choose from: what an evaluation reads."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from dreamprm_jax.data import raw
from dreamprm_jax.data.answers import NO_RESPONSE, is_right
from dreamprm_jax.data.bad_rows import RAISE, settle
from dreamprm_jax.data.conversation import IMAGE_MARKER
from dreamprm_jax.data.example import HUMAN, PLUS, Example, Question
from dreamprm_jax.data.fields import field_error, shown
from dreamprm_jax.data.formats import contests as forms
from dreamprm_jax.data.formats.contests import Response
from dreamprm_jax.data.formats.mmmu import right_answers
from dreamprm_jax.data.formats.rules import Rules, rules_for
from dreamprm_jax.data.prepared import (
    PreparedExamples,
    PreparedQuestions,
    holds_questions,
    is_prepared,
    refuse_parent,
)
from dreamprm_jax.errors import InputError

if TYPE_CHECKING:
    from dreamprm_jax.data import noisy_steps

JUDGES = ("given", "rules")

_END = 200  # characters of a response that a disagreement shows

_Parsed = TypeVar("_Parsed")


class Candidate(NamedTuple):
    """One candidate response to a question."""

    text: str  # the whole response
    answer: str | None  # its final answer, for votes (answers.vote_key); None where none is recognised
    correct: bool  # what counts
    judged: bool | None  # what MMMU's rules say; None where they cannot be applied (no right answer at hand)
    example: Example  # the chain as it is scored, every label "+"; its true_false is `correct`
    recorded: bool | None = None  # what the file says; None where it says nothing


class Contest(NamedTuple):
    """A question and its C candidates."""

    question: Question  # without candidates; `answer` is "" where the right one is not known
    candidates: tuple[Candidate, ...]  # [C]


def read_contests(
    path: str | Path,
    images: str | Path | None = None,
    *,
    need_images: bool = True,
    splitter: str = "whole_numbers",
    judge: str = "given",
) -> list[Contest]:
    """Questions with their candidates, from any of these; fields and content tell which:

    - a best-of-N file, a row a question (`formats/contests.py` has the fields);
    - a prepared set of questions with candidates;
    - a file or prepared set of chains in the meta set's form: those of one id are the candidates of one question,
      wherever they stand;
    - runs, files whose rows have question and response: a file, a directory or a pattern. The c-th candidate of a
      question is the one of the c-th file by name.

    Args:
      path: where they are. JSON list or JSONL, `.gz` of either, or Parquet.
      images: directory of the images; None: that of the files. A best-of-N file's may also lie beside it.
      need_images: False leaves images where they are, paths as they are written, which baselines can do with; scoring
        cannot.
      splitter: `splitting.split_steps`' rule, for responses that are no chains yet.
      judge: "given" takes the file's word for what is right, and MMMU's rules where it says nothing; "rules" takes them
        for all.

    Returns:
      Contests in the file's order, for runs the first one's. Examples are in the meta set's form, `row` counts all
      candidates from 0, of chains in the file's order, and `place` says where each was read.

    Raises:
      InputError: nothing to read, or the first bad row; says how many more there are.
      ValueError: another judge or splitter.
    """
    if judge not in JUDGES:
        raise ValueError(f"judge={judge!r}: must be one of {', '.join(JUDGES)}")
    root = raw.folder(path) if images is None else Path(images)
    asked = _read(Path(path), rules_for(root, splitter=splitter, images_needed=need_images))
    if not asked:
        raise InputError(f"{path}: no rows; give a JSON list of rows, or JSONL")
    return _numbered(settled(lambda question, given: _contest(question, given, judge), asked))


def noisy_contests(questions: Sequence[noisy_steps.Question]) -> list[Contest]:
    """The test questions of the embedded benchmark, with the truth of every step in `Example.step_truth`.

    Its questions have no rules to be judged by, so `judged` is None, and a right answer is known only where a candidate
    has it.
    """
    return _numbered([_noisy_contest(question) for question in questions])


def disagreements(contests: Iterable[Contest]) -> list[dict[str, Any]]:
    """Where the record and MMMU's rules say different things of a candidate, for reading by hand.

    Args:
      contests: read with either judge.

    Returns:
      For each such candidate its question's id, its number (of runs: the run's), its place, the end of its text,
      both verdicts, its answer and the right one.
    """
    return [
        {
            "id": contest.question.id,
            "candidate": number,
            "place": candidate.example.place,
            "response_end": candidate.text[-_END:],
            "recorded": candidate.recorded,
            "judged": candidate.judged,
            "answer": candidate.answer,
            "right_answer": contest.question.answer,
        }
        for contest in contests
        for number, candidate in enumerate(contest.candidates)
        if None not in (candidate.judged, candidate.recorded) and candidate.judged != candidate.recorded
    ]


# --- Reading.


def _read(path: Path, rules: Rules) -> list[tuple[Question, Sequence[Response]]]:
    if is_prepared(path):
        return _read_prepared(path, rules)
    refuse_parent(path)
    files = raw.find_files(path)
    first = next(iter(files))
    first_row = next(raw.file_rows(first, files[first]), None)
    if first_row is None:
        return []
    row, _, place = first_row
    form = forms.form_of(row, place)
    if form == forms.RUNS:
        return _match_runs({name: _parsed_file(forms.parse_run, name, file, rules) for name, file in files.items()})
    if len(files) > 1:
        raise InputError(f"{path}: holds {len(files)} files; of this form give one alone, such as {files[first]}")
    if form == forms.CHAINS:
        return _group(_parsed_file(forms.parse_chain, first, files[first], rules))
    beside = rules_for(files[first].parent, images_needed=rules.images_needed)
    both = rules._replace(find_image=lambda name: rules.find_image(name) or beside.find_image(name))
    return _parsed_file(forms.parse_best_of_n, first, files[first], both)


def _read_prepared(path: Path, rules: Rules) -> list[tuple[Question, Sequence[Response]]]:
    if holds_questions(path):
        questions = PreparedQuestions(path)
        return settled(lambda row: forms.split_candidates(questions[row], rules), ((n,) for n in range(len(questions))))
    chains = PreparedExamples(path)
    return _group(settled(lambda row: forms.split_chain(chains[row]), ((n,) for n in range(len(chains)))))


def _parsed_file(
    parse: Callable[[Any, int, str, Rules], _Parsed], name: str, file: Path, rules: Rules
) -> list[_Parsed]:
    return settled(lambda *row: parse(*row, rules), raw.file_rows(name, file))


def settled(parse: Callable[..., _Parsed], rows: Iterable[tuple]) -> list[_Parsed]:
    """What each row, given as the arguments of `parse`, is parsed to.

    Raises:
      InputError: the first bad row's, with the number of others.
    """
    found, errors = [], {}
    for number, row in enumerate(rows):
        try:
            found.append(parse(*row))
        except InputError as error:
            errors[number] = error
    settle(errors, len(found) + len(errors), RAISE)
    return found


def _group(chains: Iterable[tuple[Question, Response]]) -> list[tuple[Question, list[Response]]]:
    """Chains by question; the images of a question are kept once."""
    groups: dict[str, tuple[Question, list[Response]]] = {}
    for question, response in chains:
        first, responses = groups.setdefault(question.id, (question, []))
        _check_same(first, question)
        responses.append(response._replace(example=response.example._replace(images=first.images)))
    return list(groups.values())


def _match_runs(runs: dict[str, list[tuple[Question, Response]]]) -> list[tuple[Question, list[Response]]]:
    (first_name, first), *others = [(name, _by_id(rows)) for name, rows in runs.items()]
    for name, run in others:
        _check_complete(name, run, first)
        _check_complete(first_name, first, run)
        for question_id, (question, _) in run.items():
            _check_same(first[question_id][0], question)
    every = [first, *(run for _, run in others)]
    return [(question, [run[name][1] for run in every]) for name, (question, _) in first.items()]


def _by_id(rows: list[tuple[Question, Response]]) -> dict[str, tuple[Question, Response]]:
    found: dict[str, tuple[Question, Response]] = {}
    for question, response in rows:
        other = found.setdefault(question.id, (question, response))[0]
        if other is not question:
            problem = f"is {shown(question.id)}, as in {other.place}; a file is one run: put the other one into its own"
            raise field_error(question.place, "id", problem)
    return found


def _check_complete(name: str, run: dict, other: dict) -> None:
    missing = [question for key, (question, _) in other.items() if key not in run]
    if missing:
        more = f" (nor to {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise InputError(
            f'{name}: has no row with "id" {shown(missing[0].id)}, which {missing[0].place} answers{more}; every run '
            "must answer every question: add it, or take it out of the others",
            kind="id",
        )


def _check_same(first: Question, other: Question) -> None:
    for field in ("text", "options", "answer", "images"):
        if getattr(first, field) != getattr(other, field):
            problem = (
                f"is {shown(other.id)}, as in {first.place}, whose question has another {field}; give it another id"
            )
            raise field_error(other.place, "id", problem)


# --- Judging.


def _contest(question: Question, responses: Sequence[Response], judge: str) -> Contest:
    return Contest(question, tuple(_candidate(response, question, judge) for response in responses))


def _candidate(response: Response, question: Question, judge: str) -> Candidate:
    text, answer, recorded, example = response
    judged = is_right(text, right_answers(question), question.options) if question.answer else None
    correct = recorded if judge == "given" and recorded is not None else judged
    if text == NO_RESPONSE:
        correct = False
    elif correct is None and judge == "given":
        problem = 'is missing, and there is no "answer" to judge by; add one of them'
        raise field_error(example.place, "true_false", problem)
    elif correct is None:
        problem = "is missing, so MMMU's rules cannot judge; add it, or let judge=given take the record"
        raise field_error(example.place, "answer", problem)
    return Candidate(text, answer, correct, judged, example._replace(true_false=correct), recorded)


def _noisy_contest(given: noisy_steps.Question) -> Contest:
    first = given.examples[0]
    text, _, _ = next(turn.text for turn in first.turns if turn.role == HUMAN).removeprefix(IMAGE_MARKER).partition(" ")
    answer = next((answer for answer, right in zip(given.answers, given.correct, strict=True) if right), "")
    question = Question(first.row, str(first.id), text, answer, images=first.images, place=first.place)
    candidates = []
    for example, answer, right, labels in zip(*given, strict=True):
        steps = [turn.text for turn in example.turns if turn.role == HUMAN]
        steps[0] = steps[0].removeprefix(f"{IMAGE_MARKER}{text} ")
        truth = tuple(1 if label == PLUS else -1 for label in labels)
        candidates.append(Candidate("\n".join(steps), answer, right, None, example._replace(step_truth=truth)))
    return Contest(question, tuple(candidates))


def _numbered(contests: Iterable[Contest]) -> list[Contest]:
    """With `Example.row` counting all candidates; chains of a file keep its numbers, whatever order they come in."""
    contests = list(contests)
    rows = sorted(candidate.example.row for contest in contests for candidate in contest.candidates)
    if rows == list(range(len(rows))):
        return contests
    numbers = itertools.count()
    return [
        contest._replace(
            candidates=tuple(c._replace(example=c.example._replace(row=next(numbers))) for c in contest.candidates)
        )
        for contest in contests
    ]
