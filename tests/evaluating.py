"""What the tests of `task=evaluate` share: a tiny model, its configs, and small files of each kind."""

import json
from pathlib import Path

import jax
import pytest
import tokenizers
from PIL import Image

from configs import evaluate as evaluate_config
from dreamprm_jax import scoring
from dreamprm_jax.data import noisy_steps
from dreamprm_jax.data.formats.prompts import (
    DREAMPRM_CHOICES,
    DREAMPRM_SYSTEM,
    VISUALPRM_FIRST_STEP,
    VISUALPRM_SYSTEM,
)
from dreamprm_jax.errors import InputError
from dreamprm_jax.evaluate import run_evaluation
from dreamprm_jax.models import convert, internvl, presets

ROOT = Path(__file__).parent.parent
WORDS = "Which is it? It look Look. think Think. Answer: A B C (A) (B) red green blue so So"
SPLITS = noisy_steps.Sizes(
    pretrain=1, cold_start=1, clean=1, flipped=0, always_plus=0, trivial=0, shifted=0, test_questions=12
)


STEPS = ("Look. It is red", "Think. So blue", "so green")
CANDIDATES = [
    {"id": "x", "image_path": "a.png", "true_false": [True, False, False, True], "answers": ["1", "2", "2", None],
     "candidates": [STEPS[0], "\n\n".join(STEPS), STEPS[1], "\n\n".join(STEPS[:2])]},
    {"id": "y", "image_path": "b.png", "true_false": [False, True], "answers": ["1", "2"], "candidates": STEPS[1:]},
    {"id": "z", "image_path": None, "true_false": [True, True, False], "answers": ["3", "3", "4"],
     "candidates": ["\n\n".join(STEPS[1:]), STEPS[0], STEPS[1]]},
]  # fmt: skip
CHAINS = [
    ("Which is it?", ["Look. red", "so blue"], [1, -1], "MMMU", "a.png"),
    ("Which is it?", ["Look. red", "so green"], [1, 1], "MMMU", "a.png"),
    ("Which is it? blue", ["Think.", "so", "so red"], [-1, 0, -1], "MathVision", "b.png"),
    ("Which is it? green", ["Think.", "So"], [1, 1], "MathVision", "b.png"),
]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> str:
    """An untrained model; its tokenizer has the embedded benchmark's words, those of the prompts, and WORDS."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = noisy_steps.tokenizer()
    texts = (DREAMPRM_SYSTEM, VISUALPRM_SYSTEM, VISUALPRM_FIRST_STEP, DREAMPRM_CHOICES, "Question:", WORDS)
    known = tokenizer.get_vocab()
    words = dict.fromkeys(word for text in texts for word in text.split() if word not in known)
    vocab = {**known, **{word: len(known) + number for number, word in enumerate(words)}}
    tokenizer.model = tokenizers.models.WordLevel(vocab, unk_token="<unknown>")
    config = presets.tiny(tokenizer.get_vocab_size())
    convert.save_checkpoint(config, internvl.init(config, jax.random.key(0, impl="rbg")), folder, "original")
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder)


def config(argument="", **fields):
    """Few sub-samples, no pictures unless asked for; `candidates__path` sets candidates.path."""
    cfg = evaluate_config.get_config(argument)
    cfg.evaluate.num_samples, cfg.evaluate.threshold = 5, 0.5
    cfg.noisy_steps.update(SPLITS._asdict())
    cfg.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return cfg


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def results_of(workdir):
    return json.loads((workdir / "results.json").read_text())


def refused(workdir, **fields):
    with pytest.raises(InputError) as error:
        run_evaluation(config(**fields), workdir)
    assert not (workdir / "results.json").exists()
    return str(error.value)


def no_scoring(monkeypatch):
    monkeypatch.setattr(scoring, "score_windows", lambda *a, **k: pytest.fail("scored for nothing"))


@pytest.fixture
def best_of_n(tmp_path):
    """Questions of 2 to 4 candidates, two pictures, one question without."""
    return write_candidates(tmp_path, CANDIDATES)


def write_candidates(folder, rows):
    for name, size in (("a.png", (28, 28)), ("b.png", (56, 28))):
        Image.new("RGB", size, (9, 99, 199)).save(folder / name)
    return write_lines(folder / "candidates.jsonl", [{"question": "Which is it?", **row} for row in rows])


def score_lines(counts, value=0.5, **fields):
    return [{"step_scores": [value] * count, "step_scores_two_token": [value] * count, **fields} for count in counts]


def write_chains(folder):
    rows = [
        {"image": [image], "question": question,
         "response": {"steps": steps, "process_correctness": marks}, "data_source": source}
        for question, steps, marks, source, image in CHAINS
    ]  # fmt: skip
    write_candidates(folder, [])
    return write_lines(folder / "chains.jsonl", rows)
