"""Questions with candidates: the recorded runs, the published meta set and the embedded benchmark, whole; votes."""

import collections
import json
from pathlib import Path

import numpy as np
import pytest
from test_splitting import HEADER, MARK, WORD, _is_made_of

from dreamprm_jax.data import noisy_steps
from dreamprm_jax.data.answers import vote_key
from dreamprm_jax.data.candidates import disagreements, noisy_contests, read_contests
from dreamprm_jax.data.example import GPT, HUMAN, SYSTEM
from dreamprm_jax.data.formats.disciplines import DISCIPLINES, discipline
from dreamprm_jax.data.formats.mmmu import question_turn
from dreamprm_jax.data.formats.prompts import DREAMPRM_SYSTEM
from dreamprm_jax.errors import InputError


def steps_of(candidate):
    return [turn.text for turn in candidate.example.turns if turn.role == HUMAN][1:]


def turn_of(contest):
    (turn,) = {next(turn.text for turn in c.example.turns if turn.role == HUMAN) for c in contest.candidates}
    return turn


def correct(contests):
    return np.array([[candidate.correct for candidate in contest.candidates] for contest in contests])


def check_chains(contests):
    """What holds of every form: numbers, the meta set's form, and the images of the question."""
    every = [candidate for contest in contests for candidate in contest.candidates]
    assert sorted(candidate.example.row for candidate in every) == list(range(len(every)))
    for contest in contests:
        assert not contest.question.candidates
        for candidate in contest.candidates:
            roles = [turn.role for turn in candidate.example.turns]
            assert roles == [SYSTEM, HUMAN] + [HUMAN, GPT] * candidate.example.num_steps
            assert candidate.example.num_steps >= 1
            assert {turn.text for turn in candidate.example.turns if turn.role == GPT} == {"+"}
            assert candidate.example.turns[0].text == DREAMPRM_SYSTEM
            assert candidate.example.images == contest.question.images
            assert candidate.example.true_false is candidate.correct


# --- The recorded runs.

RUNS = [f"gpt-4o_{run}.jsonl" for run in ("standard_10_options__cot", "standard_10_options__direct", "vision_cot",
                                          "vision_direct")]  # fmt: skip


@pytest.fixture(scope="module")
def gpt4o(shared):
    return read_contests(shared / "mmmu/gpt4o", need_images=False)


def majority(contests, credit=np.mean):
    """Share of right majority votes, answers tied for the lead sharing the credit; no answer is no vote.

    `credit`: what an answer is worth by its candidates' flags, of which the record has both for one letter.
    """
    total = 0.0
    for _, candidates in contests:
        votes = collections.Counter(c.answer for c in candidates if c.answer is not None)
        leaders = [answer for answer, count in votes.items() if count == max(votes.values())]
        worth = [credit([c.correct for c in candidates if c.answer == answer]) for answer in leaders]
        total += sum(worth) / max(len(leaders), 1)
    return total / len(contests)


def test_gpt4os_runs_give_their_recorded_figures(gpt4o):
    right = correct(gpt4o)
    assert right.shape == (1730, 4)
    assert right.mean(0).round(4).tolist() == [0.5503, 0.4012, 0.5006, 0.4243]
    assert right.any(1).mean().round(4) == 0.7364
    assert round(majority(gpt4o), 4) == 0.5310
    assert round(majority(gpt4o, credit=lambda flags: flags[0]), 4) == 0.5361
    assert sum(c.answer is None for _, candidates in gpt4o for c in candidates) == 219
    keys = {vote_key(c.answer, q.options) == c.answer for q, candidates in gpt4o for c in candidates}
    assert keys == {True}  # a letter is its own vote
    assert [candidate.example.place for candidate in gpt4o[5].candidates] == [f"{name} row 5" for name in RUNS]
    check_chains(gpt4o)


def test_no_run_loses_text_other_than_marks(gpt4o):
    for _, candidates in gpt4o:
        for candidate in candidates:
            text, steps = candidate.text, WORD.findall("\n".join(steps_of(candidate)))
            if WORD.findall(text) != steps:  # most have no mark at all
                header = text.find(HEADER)
                spared = [match.span(1) for match in MARK.finditer(text)] + [(header, header + len(HEADER))]
                assert _is_made_of(text, steps, spared), text


def test_the_record_and_the_rules_differ_in_94_verdicts(gpt4o):
    """All are mistakes of the script that recorded them; tests/test_answers.py shows where they come from.

    - no answer, 20: refusals and texts that end in none, recorded as right, since a letter was drawn for them or the
      pronoun of "I'm sorry" was taken for (I).
    - wrong, 65: right ones recorded as wrong by a capital behind the choice ("C. 2.86 A", "Answer: A. (D)", "D. PIERRE-
      AUGUSTE RENOIR") or before it, in the reasoning; two are of the one row whose options are a list in a list.
    - right, 9: wrong ones recorded as right by such a capital ("E. C", where (C) is right).
    """
    found = disagreements(gpt4o)
    kinds = {kind: [0] * 4 for kind in GPT4O_KINDS}
    for row in found:
        kind = "no answer" if row["answer"] is None else "wrong" if row["judged"] else "right"
        kinds[kind][row["candidate"]] += 1
        assert row["judged"] == (row["answer"] == row["right_answer"])
        assert row["recorded"] != row["judged"]
    assert kinds == GPT4O_KINDS
    assert json.loads(json.dumps(found)) == found
    assert found[0] == {
        "id": "test_History_134",
        "candidate": 1,
        "place": "gpt-4o_standard_10_options__direct.jsonl row 3",
        "response_end": "J. A dramatic increase in migration",
        "recorded": False,
        "judged": True,
        "answer": "J",
        "right_answer": "J",
    }


GPT4O_KINDS = {  # by run: cot, direct, vision cot, vision direct
    "no answer": [0, 0, 1, 19],
    "wrong": [2, 57, 3, 3],
    "right": [0, 8, 1, 0],
}


def test_the_rules_may_judge_all(shared, gpt4o):
    direct = shared / "mmmu/gpt4o" / RUNS[1]
    strict = read_contests(direct, need_images=False, judge="rules")
    assert correct(strict).tolist() == [[contest.candidates[1].judged] for contest in gpt4o]
    assert (correct(strict)[:, 0] != correct(gpt4o)[:, 1]).sum() == 65
    changed = [row for row in disagreements(gpt4o) if row["candidate"] == 1]
    assert disagreements(strict) == [{**row, "candidate": 0} for row in changed]  # whichever of the two counts


def test_every_recorded_subject_has_its_discipline(gpt4o):
    counts = collections.Counter(discipline(contest.question.subject) for contest in gpt4o)
    assert counts == GPT4O_DISCIPLINES


GPT4O_DISCIPLINES = {
    "Art & Design": 228,
    "Business": 286,
    "Science": 291,
    "Health & Medicine": 286,
    "Humanities & Social Science": 222,
    "Tech & Engineering": 417,
}


# --- The published meta set.


def test_the_published_meta_set_is_414_questions(shared):
    path = shared / "mmmu/meta_MMMU_Pro.json"
    contests = read_contests(path, need_images=False)
    right = correct(contests)
    assert right.shape == (414, 4)
    assert right.any(1).sum() == 281
    assert right.sum() == 834 and right.mean().round(4) == 0.5036
    assert round(majority(contests), 4) == 0.5133
    assert not disagreements(contests)  # no right answer to judge by
    check_chains(contests)
    assert contests[0].question.images == (Path("../data/meta_images/test_Art_113.png"),)  # not looked for
    rows = json.loads(path.read_text())
    by_id = collections.defaultdict(list)
    for row in rows:
        by_id[row["id"]].append(row)
    assert [contest.question.id for contest in contests] == list(by_id)
    for contest in contests:
        given = by_id[contest.question.id]
        assert [candidate.text for candidate in contest.candidates] == [row["response"] for row in given]
        assert turn_of(contest) == given[0]["conversations"][1]["value"] == question_turn(contest.question)
        said = [[turn["value"] for turn in row["conversations"] if turn["from"] == "human"][1:] for row in given]
        assert [steps_of(candidate) for candidate in contest.candidates] == said
        right_letters = {candidate.answer for candidate in contest.candidates if candidate.correct} - {None}
        assert len(right_letters) <= 1
        assert not any(c.answer in right_letters and not c.correct for c in contest.candidates)


def test_images_are_looked_for_where_they_are_needed(shared):
    with pytest.raises(InputError, match="is no file under .*more bad rows"):
        read_contests(shared / "mmmu/meta_MMMU_Pro.json", shared / "mmmu/images")
    with pytest.raises(InputError, match='cot.jsonl row 0: "image_1" is missing'):
        read_contests(shared / "mmmu/gpt4o")


# --- The embedded benchmark.


def test_noisy_contests():
    sizes = noisy_steps.Sizes(
        pretrain=1, cold_start=1, clean=1, flipped=0, always_plus=0, trivial=0, shifted=0, test_questions=5
    )
    given = noisy_steps.make(3, sizes).test
    contests = noisy_contests(given)
    assert correct(contests).tolist() == [list(question.correct) for question in given]
    for asked, (question, candidates) in zip(given, contests, strict=True):
        assert tuple(candidate.answer for candidate in candidates) == asked.answers
        for candidate, example, labels in zip(candidates, asked.examples, asked.step_labels, strict=True):
            assert candidate.example == example._replace(step_truth=tuple(2 * (label == "+") - 1 for label in labels))
            assert f"<image>{question.text} {candidate.text}".split("\n") == [
                turn.text for turn in example.turns if turn.role == HUMAN
            ]
            assert candidate.judged is None and question.images == example.images
    shifted = noisy_contests(given[1:])
    assert shifted[0].candidates[0].example.row == 0


# --- Votes and disciplines.


@pytest.mark.parametrize(
    ("answer", "options", "vote"),
    [
        (None, ("red", "blue"), None),
        (" .", ("red", "blue"), None),
        ("B", ("red", "blue"), "B"),
        ("(B) blue", ("red", "blue"), "B"),
        ("Blue.", ("red", "blue"), "B"),
        ("C", ("red", "blue"), None),
        (None, (), None),
        ("  ", (), None),
        ("1,200.004", (), 1200.0),
        ("$-120$", (), -120.0),
        ("Blue", (), "blue"),
        ("NaN", (), "nan"),
    ],
)
def test_votes(answer, options, vote):
    assert vote_key(answer, options) == vote


def test_open_answers_of_one_value_are_one_vote():
    assert vote_key("12", ()) == vote_key("12.000", ()) == vote_key("12.", ()) != vote_key("13", ())
    assert vote_key("C", ()) == vote_key("c", ()) != vote_key("d", ())


def test_disciplines():
    assert sum(map(len, DISCIPLINES.values())) == 30 and len(DISCIPLINES) == 6
    assert discipline("Computer Science") == discipline("Architecture_and_Engineering") == "Tech & Engineering"
    assert discipline("clinical medicine") == discipline("Clinical_Medicine") == "Health & Medicine"
    assert discipline("Manage") == "Business" and discipline("Astrology") is None is discipline(None)
