"""What the tests of generate share: three questions, a run against a local server, and a key."""

import json
from importlib import import_module
from pathlib import Path

import pytest
from chat_server import picture

from configs import ranges
from dreamprm_jax import generate

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
    ranges.validate(cfg)
    return cfg


def run(server, questions, workdir, **fields):
    return generate.run_generation(configured(server, questions, **fields), workdir)


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def answer_right(call, body, number):
    call.answer(*[RIGHT] * body.get("n", 1))


def everything_written(folder):
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
