"""Candidates from a server: what is sent, what comes back, and what is written."""

import base64
import json
import time
from importlib import import_module

import pytest
from chat_server import serving
from generating import (
    KEY,
    RIGHT,
    WRONG,
    answer_right,
    everything_written,
    key,  # noqa: F401 - a fixture
    questions,  # noqa: F401 - a fixture
    rows_of,
    run,
)

from dreamprm_jax.data import prepared
from dreamprm_jax.data.answers import NO_RESPONSE
from dreamprm_jax.prepare import run_prepare

# --- What is sent and written.


def test_candidates_of_a_small_file(questions, tmp_path):
    def behave(call, body, number):
        text = json.dumps(body["messages"])
        call.answer("So it is.\n\nAnswer: 12 of them", "Answer: 11") if "How many" in text else call.answer(
            RIGHT, WRONG
        )

    with serving(behave) as server:
        summary = run(server, questions, tmp_path / "work", price_input=2.0, price_output=10.0)
        assert len(server.bodies) == 3
        assert all(body["n"] == 2 and body["model"] == "m" and body["max_tokens"] == 4096 for body in server.bodies)
        assert not {"temperature", "top_p", "seed"} & {name for body in server.bodies for name in body}
        assert all(headers["Authorization"] == f"Bearer {KEY}" for headers in server.headers)
    rows = rows_of(tmp_path / "work" / "candidates.jsonl")
    assert [row["id"] for row in rows] == ["q0", "q1", "q2"]
    assert rows[0]["question"] == "Question: Which <image 1> is it?\n\nOptions: (A) red (B) green"
    assert rows[0]["candidates"] == [RIGHT, WRONG]
    assert [row["true_false"] for row in rows] == [[True, False]] * 3
    assert [row["answers"] for row in rows] == [["B", "A"], ["B", "A"], ["12 of them", "11"]]
    assert rows[0]["image_path"] == str(tmp_path / "a.png")
    assert rows[1]["image_path"] == [str(tmp_path / "a.png"), str(tmp_path / "b.jpg")]
    assert rows[2]["image_path"] is None
    assert rows[0]["usage"] == {"prompt_tokens": 100, "completion_tokens": 20}
    assert rows[0]["model"] == "served" and rows[0]["finish_reasons"] == ["stop", "stop"]
    assert (summary["pass_at_1"], summary["any_of_n"], summary["num_questions"]) == (0.5, 1.0, 3)
    assert (summary["prompt_tokens"], summary["completion_tokens"]) == (300, 60)
    assert summary["cost"] == pytest.approx((300 * 2 + 60 * 10) / 1e6)
    assert KEY.encode() not in everything_written(tmp_path)
    assert json.loads((tmp_path / "work" / "config.json").read_text())["config"]["task"] == "generate"
    assert rows_of(tmp_path / "work" / "metrics.jsonl")[0]["phase"] == "generate"


def test_images_arrive_byte_for_byte_where_the_text_names_them(questions, tmp_path):
    with serving(answer_right) as server:
        run(server, questions, tmp_path / "work", concurrency=1)
    content = server.bodies[1]["messages"][0]["content"]
    kinds = [part["type"] for part in content]
    assert kinds == ["text", "image_url", "text", "image_url", "text"]
    for part, kind, name in ((content[1], "jpeg", "b.jpg"), (content[3], "png", "a.png")):
        head, _, data = part["image_url"]["url"].partition(",")
        assert head == f"data:image/{kind};base64"
        assert base64.b64decode(data) == (tmp_path / name).read_bytes()
    assert content[0]["text"] == "From "
    # what a question says in braces is no placeholder, and an image stands once
    assert content[4]["text"].startswith(", {options} in <image 2>?\n\nOptions:\n(A) x\n(B) y\n(C) z\n\nSolve")
    assert [part["type"] for part in server.bodies[2]["messages"][0]["content"]] == ["text"]
    assert "Options" not in server.bodies[2]["messages"][0]["content"][0]["text"]


def test_sampling_and_further_fields_are_sent_and_every_request_has_its_own_seed(questions, tmp_path):
    def behave(call, body, number):
        call.answer(RIGHT)  # one, whatever n says

    sampling = {"temperature": 0.7, "top_p": 0.9, "max_tokens": 99, "tokens_field": "max_completion_tokens", "seed": 5}
    with serving(behave) as server:
        run(server, questions, tmp_path / "work", extra='{"top_k": 20}', concurrency=1, **sampling)
    for body in server.bodies:
        assert (body["temperature"], body["top_p"], body["max_completion_tokens"], body["top_k"]) == (0.7, 0.9, 99, 20)
        assert "max_tokens" not in body
    assert len({body["seed"] for body in server.bodies}) == 6


def test_prompts_of_ones_own(questions, tmp_path):
    (tmp_path / "prompt.txt").write_text("Q {question} O {options} \\frac{a}{b}")
    with serving(answer_right) as server:
        prompts = {"prompt": str(tmp_path / "prompt.txt"), "prompt_open": "Open: {question}"}
        run(server, questions, tmp_path / "work", concurrency=1, **prompts)
    texts = ["".join(part.get("text", "#") for part in body["messages"][0]["content"]) for body in server.bodies]
    assert texts[0] == "Q Which # is it? O (A) red\n(B) green \\frac{a}{b}"
    assert texts[2] == "Open: How many?"


# --- Answers that are none, or odd.


def test_the_responses_become_a_meta_set(questions, tmp_path):
    with serving(lambda call, body, number: call.answer(RIGHT, WRONG)) as server:
        run(server, questions, tmp_path / "work")
    cfg = import_module("configs.prepare").get_config("mmmu_pro")
    cfg.prepare.source, cfg.prepare.output, cfg.prepare.processes = str(questions), str(tmp_path / "data"), 1
    cfg.prepare.responses = str(tmp_path / "work" / "responses.jsonl")
    found = prepared.PreparedExamples(run_prepare(cfg, tmp_path)["directory"])
    outcomes = [(row.id, row.true_false) for row in (found[number] for number in range(len(found)))]
    assert outcomes == [("q0", True), ("q0", False), ("q1", True), ("q1", False), ("q2", False), ("q2", False)]


def test_odd_answers_are_counted_and_keep_their_place(questions, tmp_path):
    def behave(call, body, number):
        if number == 0:
            call.answer(RIGHT, None)
        elif number == 1:
            call.answer("Long, and cut", finish_reason="length")
        elif number == 2:
            call.answer(None, refusal="I cannot help with that.")
        else:
            call.answer([{"type": "text", "text": "Answer: "}, {"type": "text", "text": "12"}], "\ud800 Answer: 12")

    with serving(behave) as server:
        summary = run(server, questions, tmp_path / "work", concurrency=1)
    rows = rows_of(tmp_path / "work" / "candidates.jsonl")
    assert rows[0]["candidates"] == [RIGHT, NO_RESPONSE]
    assert rows[1]["candidates"] == ["Long, and cut", "I cannot help with that."]
    assert rows[1]["refused"] == [False, True] and rows[1]["finish_reasons"] == ["length", "stop"]
    assert rows[2]["candidates"] == ["Answer: 12", "? Answer: 12"]
    assert [row["true_false"] for row in rows] == [[True, False], [False, False], [True, True]]
    written = rows_of(tmp_path / "work" / "responses.jsonl")
    assert [(row["id"], row["candidate"]) for row in written] == [
        *(("q0", 0), ("q1", 0), ("q1", 1), ("q2", 0), ("q2", 1))
    ]  # but for the empty one
    counts = ("num_truncated", "num_refused", "num_empty", "num_without_answer")
    assert tuple(summary[name] for name in counts) == (1, 1, 1, 3)


@pytest.mark.parametrize("refusal", [None, 400, 422])
def test_a_server_that_gives_one_at_a_time(questions, tmp_path, refusal):
    def behave(call, body, number):
        if refusal and body.get("n", 1) > 1:
            call.fail(refusal, "n must be 1")
        else:
            call.answer(RIGHT)

    with serving(behave) as server:
        summary = run(server, questions, tmp_path / "work", num_candidates=3)
    assert summary["num_questions"] == 3
    assert all(len(row["candidates"]) == 3 for row in rows_of(tmp_path / "work" / "candidates.jsonl"))


def test_more_than_was_asked_for_is_left_in_the_journal(questions, tmp_path):
    with serving(lambda call, body, number: call.answer(*[RIGHT] * 5)) as server:
        run(server, questions, tmp_path / "work")
    assert all(len(row["candidates"]) == 2 for row in rows_of(tmp_path / "work" / "candidates.jsonl"))


# --- One at a time, many at a time.


def test_no_more_requests_at_a_time_than_asked_for(questions, tmp_path):
    rows = rows_of(questions)
    questions.write_text("".join(json.dumps({**rows[2], "id": str(n), "question": f"{n}?"}) + "\n" for n in range(12)))

    def behave(call, body, number):
        time.sleep(0.05)
        answer_right(call, body, number)

    with serving(behave) as server:
        run(server, questions, tmp_path / "work", concurrency=4)
        assert server.most_running == 4


def test_equal_questions_are_asked_each(questions, tmp_path):
    questions.write_text((json.dumps(rows_of(questions)[2]) + "\n") * 3)
    with serving(answer_right) as server:
        for _ in range(2):  # the second run goes on from the first
            assert run(server, questions, tmp_path / "work")["num_questions"] == 3
            assert len(server.bodies) == 3
