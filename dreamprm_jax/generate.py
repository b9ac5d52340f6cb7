"""N candidate responses per question from an OpenAI-compatible server, as a best-of-N file.

Whatever the server sends is appended to journal.jsonl in the workdir at once, one line a request: a killed run goes
on from there, and nothing that was paid for is asked again. The best-of-N file is made from it at the end, and with it
responses.jsonl, one line a response, which `configs/prepare.py:mmmu_pro` makes a meta set of.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import hashlib
import itertools
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from dreamprm_jax.data.answers import NO_RESPONSE, extract_answer, is_right
from dreamprm_jax.data.bad_rows import RAISE, settle
from dreamprm_jax.data.builders import read_all_questions
from dreamprm_jax.data.example import Question
from dreamprm_jax.data.formats.mmmu import question_turn, right_answers
from dreamprm_jax.data.formats.prompts import QUESTION_HEADING
from dreamprm_jax.data.images import image_format
from dreamprm_jax.endpoint import Candidate, Patience, Reply, RequestFailed, ask, open_client, read_key
from dreamprm_jax.errors import InputError, printable
from dreamprm_jax.messages import (
    Prompts,
    chat_messages,
    check_images,
    fingerprint,
    image_bytes,
    load_prompts,
)
from dreamprm_jax.metrics import METRICS_FILE, write_json_lines
from dreamprm_jax.workdir import check_output, claim_workdir, open_alone

JOURNAL_FILE = "journal.jsonl"
CANDIDATES_FILE, RESPONSES_FILE = "candidates.jsonl", "responses.jsonl"
_MANY_REFUSED = (400, 422)  # what servers answer to `n` above 1 where they know no such thing


class Asked(NamedTuple):
    """A question and what has come back."""

    question: Question
    name: str  # of all that is asked: messages.fingerprint, with "-2" at its second occurrence
    replies: list[Reply]

    @property
    def candidates(self) -> list[Candidate]:
        """All so far, in the order they came in."""
        return [candidate for reply in self.replies for candidate in reply.candidates]


class _Stopped(Exception):
    """The run ends while a request waits for its next attempt."""


def run_generation(cfg: Any, workdir: Path) -> dict[str, Any]:
    """`task=generate`: asks for what is missing, writes the best-of-N file, in the questions' order.

    The workdir gets config.json, journal.jsonl, responses.jsonl and metrics.jsonl, and the candidates where `output`
    names no other place. The same command goes on after a kill or an error. A larger `num_candidates` asks for the
    difference.

    Raises:
      InputError: a question, prompt or image that cannot be sent, before anything is asked; a request that failed in
        the end; a workdir of something else.
      KeyboardInterrupt: after the requests under way have come back.
    """
    settings = cfg.generate
    key = read_key(settings.api_key_variable, settings.base_url)
    if settings.model is None:
        raise InputError("--config.generate.model is missing: name a model that the server has")
    prompts = load_prompts(settings.prompt, settings.prompt_open)
    extra = parse_extra(settings.extra)
    questions = read_questions(cfg.input.path, cfg.input.images, settings.limit)
    sampling = request_settings(settings, extra)
    asked = [Asked(question, name, []) for question, name in _named(questions, prompts, sampling, settings)]
    output = Path(cfg.output) if cfg.output else workdir / CANDIDATES_FILE
    asked_for = hashlib.sha256("".join(item.name for item in asked).encode()).hexdigest()
    claim_workdir(workdir, {"config": cfg.to_dict(), "data": {cfg.input.path: asked_for}}, resumes=False)
    check_output(output, cfg.input.path)
    with _open_journal(workdir / JOURNAL_FILE) as journal:
        _restore(journal, asked)
        skipped = _ask_all(asked, settings, prompts, sampling, key, journal)
    complete = [item for item in asked if len(item.candidates) >= settings.num_candidates]
    rows = [output_row(item, settings.num_candidates, output.parent) for item in complete]
    write_json_lines(output, rows)
    write_json_lines(workdir / RESPONSES_FILE, [line for row in rows for line in response_rows(row)])
    summary = summarise(complete, rows, settings)
    summary["num_skipped"] = skipped
    write_json_lines(workdir / METRICS_FILE, [{"step": 0, "phase": "generate", **summary}])
    return {"output": str(output), **summary}


def read_questions(path: str | None, image_root: str | None, limit: int | None) -> list[Question]:
    """The questions of raw files in MMMU's form (`data/raw.py`) or of a prepared set, all checked.

    Args:
      path: file or directory.
      image_root: directory of the images; None: that of the files.
      limit: take the first so many; None: all.

    Raises:
      InputError: nothing to read, or the first bad row; says how many more there are.
    """
    if path is None:
        raise InputError("--config.input.path is missing: give questions in MMMU's form (.json, .jsonl, .parquet)")
    if not Path(path).exists():
        raise InputError(f"--config.input.path={path}: no such file or directory")
    found = list(itertools.islice(read_all_questions(path, image_root), limit))
    errors: dict[int, InputError] = {}
    for number, question in enumerate(found):
        try:
            if isinstance(question, InputError):
                raise question
            check_images(question)
        except InputError as error:
            errors[number] = error
    settle(errors, len(found), RAISE)
    if not found:
        raise InputError(f"{path}: no rows; give a JSON list of rows, or JSONL")
    return found


def parse_extra(text: str | None) -> dict[str, Any]:
    """`generate.extra` as the object that it is.

    Raises:
      InputError: no JSON object.
    """
    try:
        extra = json.loads(text or "{}")
    except ValueError:
        extra = None
    if not isinstance(extra, dict):
        raise InputError(f"--config.generate.extra={text}: must be a JSON object, such as '{{\"top_k\": 20}}'")
    return extra


def request_settings(settings: Any, extra: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `chat.completions.create` that all requests share; what is None is not sent."""
    optional = {
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        settings.tokens_field: settings.max_tokens,
        "extra_body": extra or None,
    }
    return {"model": settings.model, **{name: value for name, value in optional.items() if value is not None}}


def _named(
    questions: list[Question], prompts: Prompts, sampling: dict[str, Any], settings: Any
) -> Iterator[tuple[Question, str]]:
    """Names say what is asked, not where it stands: a file may be reordered or grow."""
    decided = {**sampling, "seed": settings.seed, "max_image_side": settings.max_image_side}
    seen = collections.Counter()
    for question in questions:
        name = fingerprint(question, prompts, decided)
        seen[name] += 1
        yield question, name if seen[name] == 1 else f"{name}-{seen[name]}"


@contextlib.contextmanager
def _open_journal(path: Path) -> Iterator[Any]:
    """The journal, open for reading and appending, ours alone; a last line that a kill cut off is taken away."""
    with open_alone(path) as journal:
        journal.seek(0)
        content = journal.read()
        journal.truncate(content.rfind(b"\n") + 1)
        yield journal


def _restore(journal: Any, asked: list[Asked]) -> None:
    """Gives every question the replies that the journal has for it.

    Raises:
      InputError: a line that is not ours, or no line for any of the questions.
    """
    journal.seek(0)
    by_name = {item.name: item for item in asked}
    lines = journal.read().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            reply = Reply(tuple(Candidate(*candidate) for candidate in row["candidates"]), *row["reply"])
            name = row["asked"]
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{journal.name} line {number}: is no response of a run; remove the line") from error
        if name in by_name:
            by_name[name].replies.append(reply)
    if lines and not any(item.replies for item in asked):
        raise InputError(
            f"{journal.name}: its responses are to other questions, another prompt, model or sampling; give another "
            "--workdir, or remove this one to start over"
        )


def _ask_all(
    asked: list[Asked], settings: Any, prompts: Prompts, sampling: dict[str, Any], key: str, journal: Any
) -> int:
    """Asks until no candidate is missing; the number of questions skipped over."""
    pending = [item for item in asked if len(item.candidates) < settings.num_candidates]
    if not pending:
        return 0
    done = sum(min(len(item.candidates), settings.num_candidates) for item in asked)
    tokens = list(token_totals(asked))
    progress = tqdm(
        total=len(asked) * settings.num_candidates, initial=done, unit="candidate", dynamic_ncols=True,
        file=sys.stderr, mininterval=1.0 if sys.stderr.isatty() else 15.0,
    )  # fmt: skip

    def receive(item: Asked, reply: Reply) -> None:
        row = {"asked": item.name, "id": item.question.id, "candidates": reply.candidates, "reply": reply[1:]}
        journal.write(json.dumps(row).encode() + b"\n")
        journal.flush()
        item.replies.append(reply)
        tokens[0] += reply.prompt_tokens
        tokens[1] += reply.completion_tokens
        shown = {"tokens": f"{sum(tokens):,}"}
        if (cost := price(tokens, settings)) is not None:
            shown["cost"] = f"{cost:.2f}"
        progress.set_postfix(shown, refresh=False)
        progress.update(len(reply.candidates))

    with progress:
        try:
            return asyncio.run(_ask_pending(pending, settings, prompts, sampling, key, receive))
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None


async def _ask_pending(pending, settings, prompts, sampling, key, receive) -> int:
    """`concurrency` workers, each on one question at a time. A failure lets the others finish their requests."""
    patience = Patience(settings.timeout, settings.retries, settings.backoff)
    stop, errors, skipped, queue = asyncio.Event(), [], [], iter(pending)

    async def sleep(seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), seconds)
            raise _Stopped

    async def send(request: dict[str, Any]) -> Reply:
        return await ask(client, request, patience, key, sleep=sleep)

    async def work() -> None:
        for item in queue:
            try:
                while not stop.is_set() and len(item.candidates) < settings.num_candidates:
                    receive(item, await _ask_once(item, settings, prompts, sampling, send))
            except InputError as error:  # RequestFailed, or an image that cannot be decoded
                message = str(error).removeprefix(f"{item.question.place}: ")
                if settings.on_error == "stop" or getattr(error, "status", None) in (401, 403, 404):
                    errors.append(InputError(f"{item.question.place}: {message}"))
                    stop.set()
                else:
                    skipped.append(item)
                    tqdm.write(printable(f"{item.question.place}: skipped: {message}"), file=sys.stderr)
            except _Stopped:
                return
            if stop.is_set():
                return

    async with open_client(settings.base_url, key, settings.timeout) as client:
        with _interruptible(stop):
            await asyncio.gather(*(work() for _ in range(min(settings.concurrency, len(pending)))))
    if errors:
        raise errors[0]
    if stop.is_set():
        raise KeyboardInterrupt
    return len(skipped)


async def _ask_once(item: Asked, settings: Any, prompts: Prompts, sampling: dict[str, Any], send: Any) -> Reply:
    """All missing candidates in one request; where the server refuses that, one of them."""
    received = len(item.candidates)
    missing = settings.num_candidates - received
    messages = await asyncio.to_thread(chat_messages, item.question, prompts, settings.max_image_side)
    request = {**sampling, "messages": messages}
    if settings.seed is not None:
        # one a request: the same one twice would bring the same text twice
        request["seed"] = (settings.seed + int(item.name[:8], 16) + received) % 2**31
    try:
        return await send({**request, "n": missing} if missing > 1 else request)
    except RequestFailed as error:
        if missing == 1 or error.status not in _MANY_REFUSED:
            raise
    return await send(request)


@contextlib.contextmanager
def _interruptible(stop: asyncio.Event) -> Iterator[None]:
    """The first Ctrl-C lets the requests under way come back, the second does not wait for them."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()

    def interrupt() -> None:
        if stop.is_set():
            task.cancel()
            return
        tqdm.write("stopping after the requests under way; Ctrl-C again to lose them", file=sys.stderr)
        stop.set()

    with contextlib.suppress(RuntimeError, ValueError):  # not in the main thread
        loop.add_signal_handler(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        with contextlib.suppress(RuntimeError, ValueError):
            loop.remove_signal_handler(signal.SIGINT)


def output_row(item: Asked, num_candidates: int, folder: Path) -> dict[str, Any]:
    """A line of the best-of-N file; images that are no files are put beside it."""
    question, candidates = item.question, item.candidates[:num_candidates]
    texts = [candidate.text if candidate.text.strip() else NO_RESPONSE for candidate in candidates]
    paths = [_image_path(source, f"{item.name}_{number}", folder) for number, source in enumerate(question.images, 1)]
    prompt_tokens, completion_tokens = token_totals([item])
    return {
        "id": question.id,
        "question": question_turn(question).removeprefix(QUESTION_HEADING),
        "image_path": paths[0] if len(paths) == 1 else paths or None,
        "candidates": texts,
        "true_false": [is_right(text, right_answers(question), question.options) for text in texts],
        "options": question.options,
        "answer": question.answer,
        "answers": [extract_answer(text, question.options) for text in texts],
        "finish_reasons": [candidate.finish_reason for candidate in candidates],
        "refused": [candidate.refused for candidate in candidates],
        "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens},
        "model": item.replies[-1].model,
    }


def response_rows(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The texts of a line of the best-of-N file, each as a line that `prepare.responses` takes."""
    for number, (text, is_correct) in enumerate(zip(row["candidates"], row["true_false"], strict=True)):
        if text != NO_RESPONSE:
            yield {"id": row["id"], "candidate": number, "response": text, "true_false": is_correct}


def _image_path(source: Any, name: str, folder: Path) -> str:
    if isinstance(source, Path):
        return str(source)
    path = folder / "images" / f"{name}.{image_format(source, name).lower()}"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(image_bytes(source))
    return str(path.relative_to(folder))


def token_totals(asked: list[Asked]) -> tuple[int, int]:
    """(prompt, completion) tokens of all replies."""
    replies = [reply for item in asked for reply in item.replies]
    return sum(reply.prompt_tokens for reply in replies), sum(reply.completion_tokens for reply in replies)


def price(totals: Sequence[int], settings: Any) -> float | None:
    """What so many (prompt, completion) tokens cost, in the prices' currency; None without both prices."""
    if settings.price_input is None or settings.price_output is None:
        return None
    return (totals[0] * settings.price_input + totals[1] * settings.price_output) / 1e6


def summarise(complete: list[Asked], rows: list[dict[str, Any]], settings: Any) -> dict[str, Any]:
    """The run in numbers; accuracies as shares, over the questions that have all their candidates."""
    flags = [flag for row in rows for flag in row["true_false"]]
    reasons = [reason for row in rows for reason in row["finish_reasons"]]
    totals = token_totals(complete)
    return {
        "model": settings.model,
        "num_questions": len(rows),
        "num_candidates": settings.num_candidates,
        "pass_at_1": sum(flags) / max(len(flags), 1),
        "any_of_n": sum(any(row["true_false"]) for row in rows) / max(len(rows), 1),
        "num_truncated": reasons.count("length"),
        "num_refused": sum(flag for row in rows for flag in row["refused"]),
        "num_empty": sum(text == NO_RESPONSE for row in rows for text in row["candidates"]),
        "num_without_answer": sum(answer is None for row in rows for answer in row["answers"]),
        "prompt_tokens": totals[0],
        "completion_tokens": totals[1],
        "cost": price(totals, settings),
    }
