"""Candidates from a server: what a killed run keeps, where the key never is, and mistakes before anything is asked."""

import base64
import json
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from chat_server import picture, serving
from generating import (
    KEY,
    RIGHT,
    ROOT,
    answer_right,
    configured,
    everything_written,
    key,  # noqa: F401 - a fixture
    questions,  # noqa: F401 - a fixture
    rows_of,
    run,
)

from dreamprm_jax import endpoint, generate
from dreamprm_jax.data import prepared
from dreamprm_jax.data.example import Question
from dreamprm_jax.errors import InputError

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
        with pytest.raises(InputError, match="was begun with config.task=train, now config.task=generate"):
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
    "escaped list": lambda call, body: call.send(401, json.dumps([KEY]).replace("sk-", "\\u0073k-").encode()),
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
                assert KEY not in repr(error) and "sk-secret" not in str(error) and "k-secret" not in str(error)
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
        with pytest.raises(InputError, match="none.jsonl: no such file or directory"):
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
        with pytest.raises(InputError, match="dataset_info.json: cannot be read .*; prepare the set again"):
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
