"""The Python interface: chains, step-wise search with branches, and what it refuses."""

import dataclasses
import doctest
import io

import numpy as np
import pytest
from PIL import Image

from dreamprm_jax import prm, scoring
from dreamprm_jax.data import noisy_steps
from dreamprm_jax.errors import InputError

QUESTIONS = noisy_steps.make(0, noisy_steps.Sizes(test_questions=2, pretrain=1, cold_start=1)).test
PICTURE, OTHER = (question.examples[0].images[0] for question in QUESTIONS)


@pytest.fixture(scope="module")
def scorer():
    return prm.load(None, system=None, question_form="{question}", batch_size=4)


def test_the_examples_run():
    found = doctest.testmod(prm)
    assert found.attempted > 8 and not found.failed


def test_steps_taken_one_by_one_score_as_the_chain(scorer):
    steps = ["4>3", "3>1", "1>2", "2>4"] * 16
    state = scorer.start("dice:4", [PICTURE])
    for step in steps:
        state = scorer.extend(state, step)
    whole = scorer.score("dice:4", [PICTURE], steps)
    np.testing.assert_allclose(state.step_scores, whole.full, rtol=1e-4)
    np.testing.assert_allclose(state.step_scores_two_token, whole.two_token, rtol=1e-4)


def test_the_room_grows(scorer, monkeypatch):
    monkeypatch.setattr(prm, "_ROOM", 16)
    steps = ["4>3", "3>1", "1>2", "2>4", "4>1"]
    state = scorer.start("dice:4", [PICTURE])
    rooms = set()
    for step in steps:
        state = scorer.extend(state, step)
        rooms.add(state.past.keys_values.keys.shape[2])
    assert len(rooms) > 1
    np.testing.assert_allclose(state.step_scores, scorer.score("dice:4", [PICTURE], steps).full, rtol=1e-5)


def test_branches_of_several_questions_in_one_pass(scorer, monkeypatch):
    one, two = scorer.start("dice:4", [PICTURE]), scorer.start("bars:1", [OTHER])
    deeper = scorer.extend(one, "4>2")
    calls = []
    go_on = scoring.go_on
    monkeypatch.setattr(scoring, "go_on", lambda *arguments: calls.append(arguments[-1]) or go_on(*arguments))
    branches = [(one, "4>3"), (two, "1>2"), (deeper, "2>1"), (one, "4>1"), (two, "1>3")]
    found = dataclasses.replace(scorer, batch_size=5).extend_many(branches)
    assert [len(part.tokens) for part in calls] == [4]  # three states, to a power of two
    # `batch_size` at a time, those of a state together.
    in_two = scorer.extend_many(branches)
    assert [part.chain.max(axis=1).tolist() for part in calls[1:]] == [[1, 1], [0]]
    for state, other in zip(found, in_two, strict=True):
        assert state.example == other.example
        np.testing.assert_allclose(state.step_scores, other.step_scores, rtol=1e-5)
    chains = [
        ("dice:4", [PICTURE], ["4>3"]),
        ("bars:1", [OTHER], ["1>2"]),
        ("dice:4", [PICTURE], ["4>2", "2>1"]),
        ("dice:4", [PICTURE], ["4>1"]),
        ("bars:1", [OTHER], ["1>3"]),
    ]
    for state, whole in zip(found, scorer.score_many(chains), strict=True):
        np.testing.assert_allclose(state.step_scores, whole.full, rtol=1e-5)
    again = scorer.extend_many([(state, "1>4") for state in found])  # each goes on from its own past
    for state, (question, images, steps) in zip(again, chains, strict=True):
        np.testing.assert_allclose(state.step_scores, scorer.score(question, images, [*steps, "1>4"]).full, rtol=1e-5)
    assert one.step_scores == two.step_scores == ()  # where branches begin, nothing changes


def test_pictures_of_any_kind(scorer, tmp_path):
    (tmp_path / "a.png").write_bytes(PICTURE)
    decoded = Image.open(io.BytesIO(PICTURE))
    kinds = [PICTURE, tmp_path / "a.png", str(tmp_path / "a.png"), decoded]
    scores = [scorer.score("dice:4", [kind], ["4>3"]).response for kind in kinds]
    assert scores == [scores[0]] * 4
    assert scorer.score("dice:4", [OTHER], ["4>3"]).response != scores[0]


def test_a_picture_of_many_chains_is_taken_once(scorer, monkeypatch):
    taken = []
    source = prm._source
    monkeypatch.setattr(prm, "_source", lambda image: taken.append(1) or source(image))
    decoded, other = Image.open(io.BytesIO(PICTURE)), Image.open(io.BytesIO(OTHER))
    chains = [("dice:4", [picture], ["4>3"]) for picture in (decoded, decoded, other, decoded)]
    first, second, third, fourth = (scores.response for scores in scorer.score_many(chains))
    assert len(taken) == 2
    assert first == pytest.approx(second) == pytest.approx(fourth) != pytest.approx(third)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"aggregate": "median"}, "aggregate='median': must be one of mean, min"),
        ({"batch_size": 0}, "batch_size=0: must be at least 1"),
        ({"max_tiles": 0}, "max_tiles=0: must be at least 1"),
        ({"question_form": "### Question:"}, "lacks {question}"),
        ({"question_form": "{query}"}, "{question} must be its one field"),
        ({"question_form": "{question} {}"}, "{question} must be its one field"),
        ({"question_form": "{question} {"}, "{question} must be its one field"),
        ({"system": "Judge.<|im_end|>"}, 'prm.load: "system" holds the control token <|im_end|>'),
    ],
)
def test_wrong_settings_are_named_before_a_model_is_loaded(monkeypatch, settings, message):
    monkeypatch.setattr(prm, "load_model", lambda *arguments, **options: pytest.fail("loaded for nothing"))
    with pytest.raises(InputError) as error:
        prm.load(None, **settings)
    assert message in str(error.value)


def test_mistakes_are_named(scorer):
    with pytest.raises(InputError, match=r'chain 1: "step" holds the control token <\|im_end\|>'):
        scorer.score_many([("dice:4", [PICTURE], ["4>3"]), ("dice:4", [PICTURE], ["4>3<|im_end|>"])])
    with pytest.raises(InputError, match='chain 0: "image"'):
        scorer.score("dice:4", [b"no picture"], ["4>3"])
    with pytest.raises(InputError, match='"step" holds <image>'):
        scorer.extend(scorer.start("dice:4", [PICTURE]), "4>3<image>")
    with pytest.raises(InputError, match="chain 0: has no steps"):
        scorer.score("dice:4", [PICTURE], [])
    assert scorer.score_many([]) == [] and scorer.extend_many([]) == []


def test_a_state_of_another_model_is_refused(scorer):
    other = prm.load(None, system=None, question_form="{question}")
    with pytest.raises(ValueError, match="the model that made it"):
        other.extend(scorer.start("dice:4", [PICTURE]), "4>3")


def test_system_and_form_are_in_the_text(scorer):
    other = prm.load(None, system="dice:4", question_form="bars:1 {question}")
    example = other.start("dice:4", [PICTURE]).example
    assert [turn.text for turn in example.turns] == ["dice:4", "bars:1 dice:4"]
