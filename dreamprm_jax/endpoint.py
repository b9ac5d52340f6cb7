"""Requests to an OpenAI-compatible server: what is asked again, what ends a run, and a key that nobody sees."""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple

from dreamprm_jax.errors import InputError

HOSTED = "https://api.openai.com/v1"
LONGEST_WAIT = 60.0
"""Between two attempts, in seconds, unless the server asks for more."""

LONGEST_REQUESTED_WAIT = 600.0
"""Seconds; a server that asks for more (a quota of the day) ends the run instead."""

MAX_ANSWER = 64 * 2**20
"""Bytes of one answer: of 64 candidates of 32,768 tokens a quarter."""

_TEMPORARY = {408, 409, 425, 429}  # and all from 500
_MAX_MESSAGE = 300  # characters of what a server said
_SHORTEST_SECRET = 6  # characters; a shorter "key", such as "none", is no secret and may be any word of a text


class Candidate(NamedTuple):
    """One response of the model."""

    text: str  # "" where the server sent no text
    finish_reason: str  # stop | length | content_filter | ...
    refused: bool  # the text is what the model said in place of an answer


class Reply(NamedTuple):
    """What one request brought."""

    candidates: tuple[Candidate, ...]
    prompt_tokens: int
    completion_tokens: int
    model: str


class Failure(NamedTuple):
    """Why one request brought nothing."""

    message: str  # without the key
    status: int | None = None  # of HTTP, where the server answered
    wait: float | None = None  # seconds that the server asks for
    temporary: bool = True


class Patience(NamedTuple):
    """How long one attempt may take, and how often and after what time it is made again."""

    timeout: float  # seconds, of a whole request
    retries: int
    backoff: float  # seconds before the first retry; doubled with each


class RequestFailed(InputError):
    """A request that brought nothing in the end; `status` of HTTP where the server answered."""

    def __init__(self, message: str, status: int | None):
        super().__init__(message)
        self.status = status


def read_key(variable: str, base_url: str | None) -> str:
    """The API key from the environment; "" where there is none.

    Raises:
      InputError: OpenAI's own server needs one, or it cannot be one. The message never has it.
    """
    key = os.environ.get(variable, "").strip() if variable else ""
    if not key and base_url is None:
        raise InputError(
            f"the environment variable {variable or '(none named)'} has no API key: set it, name another with "
            "--config.generate.api_key_variable, or give a server of your own with --config.generate.base_url"
        )
    if not all("!" <= character <= "~" for character in key):
        raise InputError(f"the environment variable {variable} holds characters that no API key has; set it again")
    return key


def redact(text: str, key: str) -> str:
    """The text without the key."""
    return text.replace(key, "[API key]") if len(key) >= _SHORTEST_SECRET else text


def open_client(base_url: str | None, key: str, timeout: float) -> Any:
    """An AsyncOpenAI client that retries nothing by itself, follows no redirect, and reads no more than MAX_ANSWER."""
    import openai  # a second, and only this task needs it

    return openai.AsyncOpenAI(
        base_url=base_url or HOSTED,
        api_key=key or "none",
        timeout=timeout,
        max_retries=0,
        default_headers={"Accept-Encoding": "identity"},  # a packed answer's size is not known before it is unpacked
        http_client=openai.DefaultAsyncHttpxClient(
            timeout=timeout, follow_redirects=False, event_hooks={"response": [_bound]}
        ),
    )


async def _bound(response: Any) -> None:
    """Before anything of an answer's content is read: lets no more of it in than MAX_ANSWER.

    Raises:
      httpx2.DecodingError: it is packed.
    """
    import httpx2

    if response.headers.get("content-encoding", "identity") != "identity":
        raise httpx2.DecodingError("it is packed, which was not asked for", request=response.request)
    stream = response.stream

    class Bounded(httpx2.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            size = 0
            async for chunk in stream:
                size += len(chunk)
                if size > MAX_ANSWER:
                    raise httpx2.DecodingError(f"it is larger than {MAX_ANSWER} bytes", request=response.request)
                yield chunk

        async def aclose(self) -> None:
            await stream.aclose()

    response.stream = Bounded()


async def ask(
    client: Any,
    request: dict[str, Any],
    patience: Patience,
    key: str,
    *,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> Reply:
    """One chat completion, tried again after what may pass.

    Tried again: 408, 409, 425, 429, 5xx, timeouts, broken connections, answers that are no chat completion. Not: a
    request that the server refuses (other 4xx), an exhausted quota.

    Args:
      client: of `open_client`.
      request: arguments of `chat.completions.create`.
      sleep: waits so many seconds.

    Raises:
      RequestFailed: says what the server said and what to do.
    """
    for attempt in range(patience.retries + 1):
        outcome = await _attempt(client, request, patience.timeout, key)
        if isinstance(outcome, Reply):
            return outcome
        wait = wait_before_retry(attempt, patience.backoff, outcome.wait)
        if not outcome.temporary or wait > LONGEST_REQUESTED_WAIT:
            break
        if attempt < patience.retries:
            await sleep(wait)
    raise RequestFailed(_explain(outcome, attempt + 1), outcome.status)


def wait_before_retry(attempt: int, backoff: float, requested: float | None) -> float:
    """Seconds before attempt + 1: doubled each time, half of it at random, and no less than the server asks for."""
    longest = min(backoff * 2.0**attempt, LONGEST_WAIT)
    return max(random.uniform(longest / 2, longest), requested or 0.0)


_ADVICE = {
    401: "check the API key in the environment variable that --config.generate.api_key_variable names",
    403: "the key may not use this model or server: check --config.generate.model and the account",
    404: "check --config.generate.base_url (it ends with /v1 at most servers) and --config.generate.model",
    **dict.fromkeys((301, 302, 303, 307, 308), "redirects are not followed: give the address with base_url"),
    413: "send smaller images: --config.generate.max_image_side=1024",
}


def _explain(failure: Failure, attempts: int) -> str:
    times = "" if attempts == 1 else f" ({attempts} attempts)"
    if failure.wait and failure.wait > LONGEST_REQUESTED_WAIT:
        advice = f"it asks to wait {failure.wait:.0f} s: run the same command again then"
    elif failure.status is None or failure.temporary:
        advice = "run the same command again when the server is well: what has been received is kept"
    else:
        advice = _ADVICE.get(failure.status, "correct the setting or the question that it names")
    return f"{failure.message}{times}; {advice}"


async def _attempt(client: Any, request: dict[str, Any], timeout: float, key: str) -> Reply | Failure:
    """Failures are values: an exception would carry the request, and its headers the key."""
    import openai

    try:
        async with asyncio.timeout(timeout):  # the client's own timeout is for each read
            raw = await client.chat.completions.with_raw_response.create(**request)
        return _read_reply(_without(json.loads(raw.content), key), key)
    except openai.APIStatusError as error:
        return _status_failure(error, key)
    except (openai.APITimeoutError, TimeoutError):
        return Failure(f"the server sent no whole answer within {timeout:g} s")
    except openai.APIConnectionError as error:
        cause = error.__cause__
        return Failure(redact(f"no connection to the server ({type(cause).__name__}: {cause})", key))
    except (
        *(ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError, OverflowError, openai.APIError),
    ) as error:
        return Failure(redact(f"the server's answer is no chat completion ({type(error).__name__})", key))


def _without(value: Any, key: str) -> Any:
    """Parsed JSON without the key, wherever it stands and however it was spelled."""
    return json.loads(redact(json.dumps(value), json.dumps(key)[1:-1]))


def _read_reply(body: dict[str, Any], key: str) -> Reply:
    choices = [_read_choice(choice, key) for choice in body["choices"]]
    if not choices:
        raise ValueError("no choices")
    usage = body.get("usage") or {}
    return Reply(
        tuple(choices),
        int(usage.get("prompt_tokens") or 0),
        int(usage.get("completion_tokens") or 0),
        str(body.get("model") or ""),
    )


def _read_choice(choice: dict[str, Any], key: str) -> Candidate:
    """Some servers send text in parts, some refuse in a field of its own."""
    message = choice["message"]
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(part["text"] for part in content if isinstance(part.get("text"), str))
    text = content if isinstance(content, str) else ""
    refusal = message.get("refusal")
    refused = (isinstance(refusal, str) and bool(refusal.strip())) or choice.get("finish_reason") == "content_filter"
    if not text.strip():
        text = refusal if isinstance(refusal, str) else ""
    # half a surrogate pair, of a server that cuts UTF-16: no file can hold it
    text = redact(text.encode("utf-8", "replace").decode(), key)  # its parts may make up the key
    return Candidate(text, str(choice.get("finish_reason") or ""), refused)


def _status_failure(error: Any, key: str) -> Failure:
    body = error.body if isinstance(error.body, dict) else {}
    # a list is shown as parsed: spelled with escapes, the key would not be known again
    listed = json.dumps(error.body, ensure_ascii=False) if isinstance(error.body, list) else None
    said = body.get("message") or listed or error.response.text or error.message
    # redacted before it is cut: half a key is too much
    said = " ".join(redact(str(said), key).split())
    said = said if len(said) <= _MAX_MESSAGE else said[:_MAX_MESSAGE] + "..."
    status = error.status_code
    temporary = (status in _TEMPORARY or status >= 500) and body.get("code") != "insufficient_quota"
    return Failure(f"the server answered {status}: {said}", status, _retry_after(error.response.headers), temporary)


def _retry_after(headers: Any) -> float | None:
    """Seconds of a Retry-After header, which has seconds or a date; None where there is none to read."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError, OverflowError):
            return None
    return seconds if seconds >= 0 else None  # not of NaN either
