"""Requests: what is tried again, after what time, what ends a run, and where the key comes from."""

import asyncio
import contextlib
import gzip
import re
import socket
import time
from importlib import import_module

import pytest
from chat_server import serving

from configs import ranges
from dreamprm_jax import endpoint
from dreamprm_jax.errors import InputError

KEY = "sk-secret-0123456789"


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def test_waits_double_and_honour_the_server(monkeypatch):
    monkeypatch.setattr(endpoint.random, "uniform", lambda low, high: high)
    waits = [endpoint.wait_before_retry(attempt, 1.0, None) for attempt in range(8)]
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]
    assert endpoint.wait_before_retry(0, 1.0, 30.0) == 30.0
    assert endpoint.wait_before_retry(5, 1.0, 3.0) == 32.0
    monkeypatch.setattr(endpoint.random, "uniform", lambda low, high: low)
    assert endpoint.wait_before_retry(1, 1.0, None) == 1.0  # half of it is by chance


def ask_and_record_waits(behave, retries, timeout=5.0):
    waits = []

    async def sleep(seconds):
        waits.append(seconds)

    async def ask():
        async with endpoint.open_client(server.url, KEY, timeout) as client:
            patience = endpoint.Patience(timeout, retries, 1.0)
            return await endpoint.ask(client, {"model": "m", "messages": []}, patience, KEY, sleep=sleep)

    with serving(behave) as server:
        try:
            return asyncio.run(ask()), waits, len(server.bodies)
        except InputError as error:
            return error, waits, len(server.bodies)


TROUBLES = {
    "429": lambda call: call.fail(429, "slow down", headers={"retry-after": "0.01"}),
    "500": lambda call: call.fail(500, "oops"),
    "502 of a proxy": lambda call: call.send(502, b"<html>bad gateway</html>", {"content-type": "text/html"}),
    "529": lambda call: call.fail(529, "overloaded"),
    "cut off": lambda call: call.send(200, b'{"choices": [', length=1000),
    "no JSON": lambda call: call.send(200, b'{"choices": ['),
    "a page": lambda call: call.send(200, b"<html>hello</html>", {"content-type": "text/html"}),
    "no choices": lambda call: call.answer(),
    "no object": lambda call: call.send(200, b"[1, 2]"),
    "no message": lambda call: call.send(200, b'{"choices": [{"index": 0}]}'),
    "not UTF-8": lambda call: call.send(200, b'{"choices": "\xff\xfe"}'),
    "hang-up": lambda call: call.connection.shutdown(socket.SHUT_RDWR),
    "silence": lambda call: time.sleep(0.6),
}


@pytest.mark.parametrize("name", TROUBLES)
def test_what_may_pass_is_tried_again(name):
    def behave(call, body, number):
        TROUBLES[name](call) if number < 2 else call.answer("Answer: B")

    timeout = 0.3 if name == "silence" else 5.0
    reply, waits, asked = ask_and_record_waits(behave, 3, timeout)
    assert (reply.candidates[0].text, len(waits), asked) == ("Answer: B", 2, 3)


def test_an_answer_that_drips_is_not_waited_for():
    def behave(call, body, number):
        call.send(200, b"{", length=10_000)
        for _ in range(100):
            call.wfile.write(b" ")
            time.sleep(0.05)

    began = time.monotonic()
    error, _, _ = ask_and_record_waits(behave, 0, 0.3)
    assert str(error).startswith("the server sent no whole answer within 0.3 s; run the same command again")
    assert time.monotonic() - began < 4.5  # the answer takes 5


def test_retry_after_is_waited_for_in_seconds_or_until_a_date():
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 300))
    values = ["7", date, "soon", "-3"]

    def behave(call, body, number):
        if number < 4:
            call.fail(429, "slow down", headers={"retry-after": values[number]})
        else:
            call.answer("Answer: B")

    reply, waits, _ = ask_and_record_waits(behave, 5)
    assert reply.candidates[0].text == "Answer: B"
    assert waits[0] == 7
    assert 290 < waits[1] <= 300
    assert 2 <= waits[2] <= 4 and 4 <= waits[3] <= 8  # not to be read: our own


def test_a_server_that_asks_for_hours_ends_the_run():
    error, waits, asked = ask_and_record_waits(
        lambda call, body, number: call.fail(429, "daily limit", headers={"retry-after": "7200"}), 5
    )
    assert (waits, asked) == ([], 1)
    assert str(error) == (
        "the server answered 429: daily limit; it asks to wait 7200 s: run the same command again then"
    )


@pytest.mark.parametrize(
    "status, code, message, advice",
    [
        (400, None, "unknown field", "correct the setting or the question that it names"),
        (401, None, "bad key", "check the API key in the environment variable"),
        (403, None, "no access", "the key may not use this model"),
        (404, None, "no such model", "check --config.generate.base_url"),
        (413, None, "too large", "--config.generate.max_image_side=1024"),
        (429, "insufficient_quota", "you have no credit", "correct the setting"),
    ],
)
def test_what_will_not_pass_is_not_tried_again(status, code, message, advice):
    error, waits, asked = ask_and_record_waits(lambda call, body, number: call.fail(status, message, code), 5)
    assert (waits, asked) == ([], 1)
    assert f"the server answered {status}: {message}; " in str(error)
    assert advice in str(error)


def test_patience_ends():
    error, waits, asked = ask_and_record_waits(lambda call, body, number: call.fail(503, "down"), 3)
    assert (len(waits), asked) == (3, 4)
    assert "the server answered 503: down (4 attempts); run the same command again" in str(error)


def test_where_a_key_is_needed(monkeypatch):
    assert endpoint.read_key("OPENAI_API_KEY", None) == KEY
    monkeypatch.setenv("OPENAI_API_KEY", KEY + "\n")
    assert endpoint.read_key("OPENAI_API_KEY", None) == KEY
    monkeypatch.setenv("OPENAI_API_KEY", KEY + "\u2019")
    with pytest.raises(InputError, match="OPENAI_API_KEY holds characters") as caught:
        endpoint.read_key("OPENAI_API_KEY", None)
    assert KEY not in str(caught.value)
    assert endpoint.read_key("", "http://localhost/v1") == endpoint.read_key("OTHER", "http://localhost/v1") == ""
    for variable in ("OTHER", ""):
        with pytest.raises(InputError, match="has no API key: set it"):
            endpoint.read_key(variable, None)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("base_url", f"https://user:{KEY}@host/v1", "without user, password and query"),
        ("base_url", "localhost:8000", "an http:// or https:// address"),
        ("temperature", 3.0, "from 0 to 2"),
        ("top_p", 0.0, "above 0 and at most 1"),
        ("tokens_field", "length", "one of max_tokens"),
        ("on_error", "ask", "one of stop, skip"),
        ("concurrency", 0, "at least 1"),
        ("num_candidates", 0, "at least 1"),
        ("timeout", 0.0, "above 0"),
        ("backoff", -1.0, "at least 0"),
        ("limit", 0, "at least 1"),
        ("price_input", -1.0, "at least 0"),
    ],
)
def test_values_are_checked(field, value, message):
    cfg = import_module("configs.generate").get_config()
    cfg.generate[field] = value
    with pytest.raises(ValueError, match=rf"--config.generate.{field}=.*{re.escape(message)}"):
        ranges.validate(cfg)


# --- A server that means harm.


def bomb(call, status):
    """Endless content, in answer to anything."""
    call.send(status, b"[", length=10**12)
    with contextlib.suppress(OSError):
        for _ in range(1000):
            call.wfile.write(b" " * 2**16)


HOSTILE = {
    "endless": (lambda call: bomb(call, 200), "larger than 1000000 bytes"),
    "endless error": (lambda call: bomb(call, 500), "larger than 1000000 bytes"),
    "packed": (lambda call: call.send(200, gzip.compress(bytes(10**7)), {"content-encoding": "gzip"}), "it is packed"),
    "infinite": (
        lambda call: call.send(
            200, b'{"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": Infinity}}'
        ),
        "no chat completion (OverflowError)",
    ),
    "deep": (lambda call: call.send(200, b'{"choices": ' + b"[" * 100_000), "no chat completion (RecursionError)"),
    "long number": (lambda call: call.send(200, b"9" * 5000), "no chat completion (ValueError)"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_answer_is_a_failure_like_any_other(name, monkeypatch):
    monkeypatch.setattr(endpoint, "MAX_ANSWER", 1_000_000)
    behave, message = HOSTILE[name]
    error, _, asked = ask_and_record_waits(lambda call, body, number: behave(call), 1)
    assert isinstance(error, InputError) and message in str(error)
    assert asked == 2


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_neither_the_key_nor_the_question_goes_where_a_redirect_points(status):
    with serving(lambda call, body, number: call.answer("Answer: B")) as other:
        error, _, asked = ask_and_record_waits(
            lambda call, body, number: call.send(status, b"", {"location": f"{other.url}/chat/completions"}), 3
        )
        assert other.bodies == []
    assert asked == 1
    assert f"answered {status}" in str(error) and "redirects are not followed" in str(error)


def test_an_answers_control_characters_do_not_reach_the_terminal():
    error, _, _ = ask_and_record_waits(lambda call, body, number: call.fail(400, "\x1b]0;title\x07 \x1b[2J\u202e"), 0)
    assert str(error).isprintable() and "\\x1b[2J\\u202e" in str(error)
