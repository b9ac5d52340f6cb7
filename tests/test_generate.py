"""Candidates from a server: what is sent, what is asked again, what a killed run keeps, and where the key never is."""

import base64
import json
import re
import signal
import subprocess
import sys
import threading
import time
from importlib import import_module
from pathlib import Path

import pytest
from chat_server import picture, serving

from configs import base
from dreamprm_jax import endpoint, generate
from dreamprm_jax.data import prepared
from dreamprm_jax.data.answers import NO_RESPONSE
from dreamprm_jax.data.example import Question
from dreamprm_jax.errors import InputError
from dreamprm_jax.prepare import run_prepare

ROOT = Path(__file__).parent.parent
KEY = "sk-secret-0123456789"
RIGHT, WRONG = "[Reasoning]\n1. Look.\n\nAnswer: B", "[Reasoning]\n1. Guess.\n\nAnswer: A"


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def questions(tmp_path):
    """Three questions: one image, two images out of order, an open one without."""
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "b.jpg").write_bytes(picture("JPEG"))
    rows = [
        {"id": "q0", "question": "Which <image 1> is it?", "options": ["red", "green"], "answer": "B",
         "image_1": "a.png"},
        {"id": "q1", "question": "From <image 2> to <image 1>, {options} in <image 2>?", "options": ["x", "y", "z"],
         "answer": "B", "image_1": "a.png", "image_2": "b.jpg"},
        {"id": "q2", "question": "How many?", "options": [], "answer": ["12", "a dozen"]},
    ]  # fmt: skip
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def configured(server, questions, **fields):
    cfg = import_module("configs.generate").get_config()
    with cfg.unlocked():
        cfg.input.path = str(questions)
        cfg.generate.update(
            {"model": "m", "base_url": server.url, "num_candidates": 2, "backoff": 0.001, "timeout": 5.0, **fields}
        )
    base.validate(cfg)
    return cfg


def run(server, questions, workdir, **fields):
    return generate.run_generation(configured(server, questions, **fields), workdir)


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def answer_right(call, body, number):
    call.answer(*[RIGHT] * body.get("n", 1))


def everything_written(folder):
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


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


# --- Going on.


def test_a_finished_run_asks_nothing_and_a_larger_one_the_difference(questions, tmp_path):
    with serving(answer_right) as server:
        first = run(server, questions, tmp_path / "work")
        written = (tmp_path / "work" / "candidates.jsonl").read_bytes()
        assert run(server, questions, tmp_path / "work") == first
        assert (tmp_path / "work" / "candidates.jsonl").read_bytes() == written
        assert len(server.bodies) == 3
        run(server, questions, tmp_path / "work", num_candidates=5)
        assert [body["n"] for body in server.bodies[3:]] == [3, 3, 3]
        rows = rows_of(questions)
        questions.write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
        run(server, questions, tmp_path / "work", num_candidates=5)  # another order of the same questions
        assert len(server.bodies) == 6
    assert [row["id"] for row in rows_of(tmp_path / "work" / "candidates.jsonl")] == ["q2", "q1", "q0"]


def test_a_torn_last_line_is_taken_away_and_asked_again(questions, tmp_path):
    journal = tmp_path / "work" / "journal.jsonl"
    with serving(answer_right) as server:
        run(server, questions, tmp_path / "work")
        whole = journal.read_bytes()
        journal.write_bytes(whole[:-20])
        run(server, questions, tmp_path / "work")
        assert len(server.bodies) == 4
    assert len(rows_of(journal)) == 3
    assert journal.read_bytes().startswith(whole[: whole[:-20].rfind(b"\n") + 1])


def test_other_questions_or_settings_in_a_workdir_are_refused(questions, tmp_path):
    with serving(answer_right) as server:
        run(server, questions, tmp_path / "work")
        for fields in (
            {"temperature": 0.5},
            {"model": "other"},
            {"max_image_side": 2},
            {"prompt_open": "{question}?", "prompt": "{question}{options}"},
        ):
            with pytest.raises(InputError, match="are to other questions, another prompt, model or sampling"):
                run(server, questions, tmp_path / "work", **fields)
        assert len(server.bodies) == 3
        (tmp_path / "work" / "journal.jsonl").write_text("{}\n")
        with pytest.raises(InputError, match="line 1: is no response of a run"):
            run(server, questions, tmp_path / "work")
        (tmp_path / "work" / "config.json").write_text('{"config": {"task": "train"}, "data": {}}')
        with pytest.raises(InputError, match="not the record of a run of this task"):
            run(server, questions, tmp_path / "work")


def test_two_runs_do_not_write_one_journal(questions, tmp_path):
    with generate._open_journal(tmp_path / "journal.jsonl"), serving(answer_right) as server:
        with pytest.raises(InputError, match="another run writes it"):
            run(server, questions, tmp_path)
        assert not server.bodies


def test_an_error_lets_the_others_finish_and_keeps_them(questions, tmp_path):
    gate = threading.Event()

    def behave(call, body, number):
        if "How many" in json.dumps(body["messages"]):
            call.fail(400, "policy")
            gate.set()
        else:
            gate.wait(5)
            time.sleep(0.1)
            call.answer(RIGHT)  # one of two: the other is not asked for any more

    with serving(behave) as server:
        with pytest.raises(InputError, match=r"questions.jsonl row 2: the server answered 400: policy; correct"):
            run(server, questions, tmp_path / "work")
        assert len(rows_of(tmp_path / "work" / "journal.jsonl")) == 2
        asked = len(server.bodies)
        summary = run(server, questions, tmp_path / "work", on_error="skip")
        assert len(server.bodies) == asked + 2 + 2  # what was missing; the refused one with n, then without
    assert (summary["num_questions"], summary["num_skipped"]) == (2, 1)
    assert [row["id"] for row in rows_of(tmp_path / "work" / "candidates.jsonl")] == ["q0", "q1"]


def test_a_wrong_key_or_model_is_no_question_to_skip(questions, tmp_path):
    with serving(lambda call, body, number: call.fail(404, "no such model")) as server:
        with pytest.raises(InputError, match="404: no such model; check"):
            run(server, questions, tmp_path / "work", on_error="skip", concurrency=1)
        assert len(server.bodies) == 1


def command(server, questions, workdir, *flags):
    settings = {"model": "m", "base_url": server.url, "num_candidates": 2, "backoff": 0.001, "concurrency": 1}
    return [
        sys.executable, "run.py", "--config=configs/generate.py", f"--config.input.path={questions}",
        f"--workdir={workdir}", *(f"--config.generate.{name}={value}" for name, value in settings.items()), *flags,
    ]  # fmt: skip


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_goes_on(questions, tmp_path, sign):
    second, go_on = threading.Event(), threading.Event()

    def behave(call, body, number):
        if number == 1:
            second.set()
            go_on.wait(20)
        answer_right(call, body, number)

    with serving(behave) as server:
        process = subprocess.Popen(
            command(server, questions, tmp_path / "work"), cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        assert second.wait(60)
        process.send_signal(sign)
        if sign == signal.SIGINT:
            time.sleep(0.3)
        go_on.set()
        _, stderr = process.communicate(timeout=30)
        kept = {signal.SIGKILL: 1, signal.SIGINT: 2}[sign]  # an interrupted run waits for what is under way
        assert process.returncode == {signal.SIGKILL: -9, signal.SIGINT: 130}[sign]
        assert "Traceback" not in stderr
        assert len(rows_of(tmp_path / "work" / "journal.jsonl")) == kept
        assert not (tmp_path / "work" / "candidates.jsonl").exists()
        run(server, questions, tmp_path / "work", concurrency=1)
        assert len(server.bodies) == 2 + 3 - kept
    assert [row["id"] for row in rows_of(tmp_path / "work" / "candidates.jsonl")] == ["q0", "q1", "q2"]
    assert len(rows_of(tmp_path / "work" / "journal.jsonl")) == 3


# --- The key.


def echo(call, body):
    """The key, as servers say it back."""
    return call.headers["Authorization"].removeprefix("Bearer ")


ECHOES = {
    "error": lambda call, body: call.fail(401, f"Incorrect API key provided: {echo(call, body)}."),
    "error at a cut": lambda call, body: call.fail(400, "x" * 290 + echo(call, body)),
    "page": lambda call, body: call.send(500, f"<p>{echo(call, body)}".encode(), {"content-type": "text/html"}),
    "escaped": lambda call, body: call.send(
        200, json.dumps({"choices": [{"message": {"content": KEY}}]}).replace("sk-", "\\u0073k-").encode()
    ),
    "answer": lambda call, body: call.answer(f"Your key is {echo(call, body)}.\nAnswer: B", finish_reason=KEY),
}


@pytest.mark.parametrize("name", ECHOES)
def test_the_key_is_nowhere(questions, tmp_path, name, capfd, caplog):
    caplog.set_level("DEBUG")
    with serving(lambda call, body, number: ECHOES[name](call, body)) as server:
        try:
            run(server, questions, tmp_path / "work", retries=1)
        except InputError as error:
            while error:
                assert KEY not in repr(error) and "sk-secret" not in str(error)
                error = error.__cause__ or error.__context__
        else:
            assert name in ("answer", "escaped")
        assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert b"sk-secret" not in everything_written(tmp_path)
    out, err = capfd.readouterr()
    assert "sk-secret" not in out + err + caplog.text


def test_a_refused_key_is_one_line_and_exit_status_2(questions, tmp_path):
    with serving(lambda call, body, number: ECHOES["error"](call, body)) as server:
        python, *rest = command(server, questions, tmp_path / "work")
        told = [python, "-X", "importtime", *rest]
        done = subprocess.run(told, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "401: Incorrect API key provided: [API key]" in errors[0]
    assert "Traceback" not in done.stderr and KEY not in done.stderr + done.stdout
    loaded = set(re.findall(r"\| +(\w+)$", done.stderr, re.MULTILINE))
    assert "openai" in loaded and not loaded & {"jax", "flax", "torch", "tensorflow"}


def test_no_key_is_sent_where_none_is_named(questions, tmp_path):
    with serving(answer_right) as server:
        run(server, questions, tmp_path / "work", api_key_variable="")
        assert {headers["Authorization"] for headers in server.headers} == {"Bearer none"}


# --- Mistakes, before anything is asked.


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"extra": "[1]"}, r"generate.extra=\[1\]: must be a JSON object"),
        ({"extra": "{"}, "must be a JSON object"),
        ({"model": None}, "generate.model is missing"),
    ],
)
def test_settings_that_cannot_be(questions, tmp_path, fields, message):
    with serving(answer_right) as server:
        with pytest.raises(InputError, match=message):
            run(server, questions, tmp_path / "work", **fields)
        assert not server.bodies and not (tmp_path / "work").exists()


def test_a_bad_row_or_image_is_named(questions, tmp_path):
    rows = rows_of(questions)
    del rows[2]["answer"]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a.png").write_bytes(b"no image")
    with serving(answer_right) as server:
        with pytest.raises(InputError, match=r'questions.jsonl row 0: "image" .*a.png.* \(and 2 more bad rows\)'):
            run(server, questions, tmp_path / "work")
        (tmp_path / "a.png").write_bytes(picture())
        questions.write_text(json.dumps(rows[0]) + "\n")
        cfg = configured(server, questions)
        cfg.output = str(questions)
        with pytest.raises(InputError, match="is the input file itself"):
            generate.run_generation(cfg, tmp_path / "work")
        with pytest.raises(InputError, match="no such file or prepared directory"):
            run(server, tmp_path / "none.jsonl", tmp_path / "work")
        assert not server.bodies


def test_an_image_that_cannot_be_decoded_costs_no_other_answer(questions, tmp_path):
    """Its header is whole, so that it is found only when it is to be scaled."""
    whole = picture("JPEG", (64, 64))
    (tmp_path / "b.jpg").write_bytes(whole[:-40])
    with serving(answer_right) as server:
        with pytest.raises(InputError, match=r'questions.jsonl row 1: "image"'):
            run(server, questions, tmp_path / "work", max_image_side=2)
        kept = len(rows_of(tmp_path / "work" / "journal.jsonl"))
        assert kept == len(server.bodies)
        summary = run(server, questions, tmp_path / "work", max_image_side=2, on_error="skip")
        assert (summary["num_questions"], summary["num_skipped"]) == (2, 1)
        assert len(server.bodies) == 2


def test_a_key_in_pieces_is_no_key_in_the_files(questions, tmp_path):
    parts = [{"type": "text", "text": text} for text in (KEY[:9], KEY[9:])]
    with serving(lambda call, body, number: call.answer(*[parts] * body.get("n", 1))) as server:
        run(server, questions, tmp_path / "work")
    assert KEY.encode() not in everything_written(tmp_path / "work")


def test_the_first_questions_alone(questions, tmp_path):
    with serving(answer_right) as server:
        assert run(server, questions, tmp_path / "work", limit=1)["num_questions"] == 1
        assert run(server, questions, tmp_path / "work")["num_questions"] == 3
        assert len(server.bodies) == 3


def test_images_as_bytes_are_put_beside_the_candidates(tmp_path):
    question = Question(0, "q", "?", "5", images=(picture(), picture("JPEG")))
    reply = endpoint.Reply((endpoint.Candidate("Answer: 5", "stop", False),), 1, 1, "m")
    row = generate.output_row(generate.Asked(question, "ab12", [reply]), 1, tmp_path)
    assert row["image_path"] == ["images/ab12_1.png", "images/ab12_2.jpeg"]
    assert [(tmp_path / path).read_bytes() for path in row["image_path"]] == list(question.images)


def test_questions_of_a_prepared_set(tmp_path):
    stored = tmp_path / "stored"
    stored.mkdir()
    asked = [Question(row, f"q{row}", "<image 1>?", "B", ("x", "y"), (picture(),), subject="Art") for row in range(2)]
    shard = prepared.write_shard(stored / prepared.shard_name("mmmu", 0, 1), map(prepared.question_record, asked))
    prepared.write_metadata(stored, "mmmu", prepared.question_features(), [shard], "two questions")
    with serving(answer_right) as server:
        summary = run(server, stored, tmp_path / "work")
        assert (summary["num_questions"], summary["pass_at_1"]) == (2, 1.0)
        assert run(server, stored, tmp_path / "one", limit=1)["num_questions"] == 1
        (stored / "dataset_info.json").unlink()
        with pytest.raises(InputError, match="no prepared data set"):
            run(server, stored, tmp_path / "none")
    for row in rows_of(tmp_path / "work" / "candidates.jsonl"):
        assert (tmp_path / "work" / row["image_path"]).read_bytes() == picture()


def test_real_questions_go_out_whole(shared, tmp_path):
    with serving(answer_right) as server:
        summary = run(server, shared / "mmmu" / "questions.jsonl", tmp_path / "work", num_candidates=4)
    assert summary["num_questions"] == 21
    sent = [part for body in server.bodies for part in body["messages"][0]["content"] if part["type"] == "image_url"]
    stored = {base64.b64encode(path.read_bytes()).decode() for path in (shared / "mmmu" / "images").iterdir()}
    assert sent and all(part["image_url"]["url"].partition(",")[2] in stored for part in sent)
