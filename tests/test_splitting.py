"""Responses -> steps: the published splitter on every published row; ours loses nothing but enumeration marks."""

import json
import random
import re
import time

import pytest

from dreamprm_jax.data.splitting import ANSWER, HEADER, RULES, split_steps


def ours(response):
    return list(split_steps(response, "whole_numbers"))


def published(response):
    return list(split_steps(response, "published"))


@pytest.fixture(scope="module")
def meta_rows(shared):
    return json.loads((shared / "mmmu/meta_MMMU_Pro.json").read_text())


@pytest.fixture(scope="module")
def responses(shared, meta_rows):
    """The published meta set's 1,656, and GPT-4o's 6,920 on MMMU-Pro."""
    files = sorted((shared / "mmmu/gpt4o").glob("*.jsonl"))
    lines = [line for file in files for line in file.read_text().splitlines()]
    texts = [row["response"] for row in meta_rows] + [json.loads(line)["response"] for line in lines]
    assert len(texts) == 1656 + 6920
    return texts


def test_the_published_rule_gives_back_every_published_step(meta_rows):
    for number, row in enumerate(meta_rows):
        steps = [turn["value"] for turn in row["conversations"] if turn["from"] == "human"][1:]
        assert published(row["response"]) == steps, number


@pytest.mark.parametrize(
    ("response", "steps"),
    [
        ("", []),
        (" \n\n\t", []),
        ("D", ["D"]),
        ("The answer is 2. Then stop.", ["The answer is 2. Then stop."]),
        ("One.\n\nTwo.\n \nThree.", ["One.", "Two.", "Three."]),
        ("1. One\n\nstill one\n\n2. Two", ["One\n\nstill one", "Two"]),
        ("1. One\n2. Two", ["One", "Two"]),
        ("Intro\n\n1) One\n2) Two", ["Intro", "One", "Two"]),
        ("Step 1: One\n\nStep 2: Two", ["One", "Two"]),
        ("Step 1 — One\n\nStep 2 — Two", ["— One", "— Two"]),
        ("Step 1. One\nStep 2 shows why.", ["One\nStep 2 shows why."]),
        ("步骤1: 一\n\n步骤2: 二", ["一", "二"]),
        ("1、一\n2、二", ["一", "二"]),
        ("①One\n②Two", ["One", "Two"]),
        ("1. One\n   1. Inner\n   2. Inner too\n2. Two", ["One", "Inner", "Inner too", "Two"]),
        ("1. Only one mark\n\nnext", ["Only one mark", "next"]),
        ("Both give\n1. Then stop.", ["Both give\n1. Then stop."]),
        ("It is\n3. Then stop.\n\n4. Four", ["It is\n3. Then stop.", "4. Four"]),
        ("1. Weigh\n2.5 kg of it\n\n2. Cool", ["Weigh\n2.5 kg of it", "Cool"]),
        ("1. In\n\n1882. A year\n\n2. Out", ["In\n\n1882. A year", "Out"]),
        ("### Step 1: One\n\n### Step 2: Two", ["### Step 1: One", "### Step 2: Two"]),
        ("[Reasoning]\nA.\n\nB.\nAnswer: C", ["A.", "B.", "Answer: C"]),
        ("Well.\n[Reasoning]\nA.\nAnswer:  C \n\nIndeed.", ["Well.", "A.", "Answer: C", "Indeed."]),
        ("Well. [Reasoning] A.\nAnswer: C", ["Well.", "A.", "Answer: C"]),
        ("[Reasoning]\nA.\nAnswer:\nC", ["A.", "Answer: C"]),
        ("[Reasoning]\nA.", ["[Reasoning]\nA."]),
        ("A.\n\nAnswer: C", ["A.", "Answer: C"]),
        ("A.\nAnswer: B? No.\nAnswer: C", ["A.", "Answer: B? No.", "Answer: C"]),
    ],
)
def test_our_rule(response, steps):
    assert ours(response) == steps


@pytest.mark.parametrize(
    ("response", "steps"),
    [
        ("The answer is 2. Then stop.", ["The answer is", "Then stop."]),
        ("[Reasoning]\nx = 2.\n\nAnswer: C\nsaid", ["x = 2.", "Answer: C"]),
        ("378 / (378 + 2) = 1", ["378 / (378 +", "= 1"]),
        ("Intro\n\n29.4 m\n\n30.1 m", ["Intro", "4 m", "1 m"]),
        ("Intro\n\n1. One mark\n\nnext", ["Intro", "One mark", "next"]),
        ("A.\n\nAnswer: C", ["A.", "Answer: C", "Answer: C"]),
        ("", []),
    ],
)
def test_the_published_rule_with_its_faults(response, steps):
    assert published(response) == steps


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="rule='other': must be one of whole_numbers, published"):
        split_steps("a", "other")


# A mark as a reader sees it: it begins a line; what follows it is not a decimal.
MARK = re.compile(r"^\s*(Step\s*\d+\s*[:.]?|\d+[.)](?!\d)|[①-⑳])", re.MULTILINE)
WORD = re.compile(r"\w+|[^\w\s]")


def test_only_marks_are_lost_and_nothing_is_said_twice(responses):
    """The words of the steps are the response's, in order; those that are missing stand in marks, or are a header."""
    for response in responses:
        spared = [match.span(1) for match in MARK.finditer(response)]
        header = response.find(HEADER)
        spared.append((header, header + len(HEADER)))
        steps = WORD.findall("\n".join(ours(response)))
        assert _is_made_of(response, steps, spared), response


def _is_made_of(response, steps, spared):
    """Is `steps` the words of `response`, some of those in `spared` spans left out? Follows every way to read it."""
    in_mark = {position for start, end in spared for position in range(start, end)}
    read = {0}  # numbers of words of `steps` that can have been read
    for word in WORD.finditer(response):
        after = {count + 1 for count in read if count < len(steps) and steps[count] == word.group()}
        read = after | read if word.start() in in_mark else after
    return len(steps) in read


def test_the_check_above_sees_a_lost_number_and_a_doubled_word():
    assert _is_made_of("1. Is 2. So", ["Is", "2", ".", "So"], [(0, 2)])
    assert not _is_made_of("1. Is 2. So", ["Is", "So"], [(0, 2)])
    assert not _is_made_of("1. Is", ["Is", "Is"], [(0, 2)])


NUMBER_WITH_END = re.compile(r"(?<!\S)\d+[.)]")


def test_the_rules_differ_where_a_number_ends_a_sentence_or_stands_last_in_brackets(meta_rows):
    """The kinds and counts that the module's docstring states: nothing else is lost by the published rule."""
    kinds = {".": 0, ")": 0, "both": 0}
    for row in meta_rows:
        left, right = "\n".join(published(row["response"])), "\n".join(ours(row["response"]))
        if left == right:
            continue
        spared = [match.span() for match in NUMBER_WITH_END.finditer(right)]
        assert _is_made_of(right, WORD.findall(left), spared)
        lost = [mark for mark in ".)" if left.count(mark) < right.count(mark)]
        kinds["both" if len(lost) == 2 else lost[0]] += 1
    assert kinds == {".": 49, ")": 37, "both": 10}


def test_an_answer_is_the_last_step_of_every_published_row_that_has_one(meta_rows):
    answered = [row["response"] for row in meta_rows if ANSWER in row["response"]]
    assert len(answered) == 757
    for response in answered:
        assert ours(response)[-1] == published(response)[-1]
        assert ours(response)[-1].startswith("Answer: ")


HUNDRED_KB = 100_000
SHAPES = [
    "\n",
    " ",
    "\n ",
    "\t\n",
    "1",
    "1.",
    "1. ",
    "1.\n",
    "1)\n\n",
    "Step ",
    "Step 1",
    "Step 1 ",
    "Step 1 :\n",
    "①",
    "9" * 50,
]
SHAPES += [
    HEADER,
    ANSWER,
    ANSWER + "\n",
    HEADER + "\n" + ANSWER,
    "a\n\n",
    "步骤",
    ".",
    "٣. ",
    "x 2. ",
    "\r\n",
    "\x85",
    "\u2028",
]


@pytest.mark.parametrize("shape", SHAPES, ids=ascii)
@pytest.mark.parametrize("around", [("", ""), ("1", ". x"), ("Step 1", "x"), (HEADER, "x"), ("\n", "\nx" + ANSWER)])
def test_a_hostile_text_takes_no_time(shape, around):
    """0.2 s at most; where the time grows with the square of the length, minutes."""
    text = around[0] + shape * (HUNDRED_KB // len(shape)) + around[1]
    start = time.thread_time()
    for rule in RULES:
        split_steps(text, rule)
    assert time.thread_time() - start < 10


def test_any_text_is_split_into_steps_that_are_not_blank():
    rng = random.Random(0)
    parts = ["1.", "2)", "Step 1", ":", " ", "\n", "\n\n", "3", "x", ANSWER, HEADER, "①", "\ud800", "\x00", "٣.", "²."]
    for _ in range(2000):
        text = "".join(rng.choices(parts, k=rng.randint(0, 30)))
        for rule in RULES:
            assert all(step.strip() == step != "" for step in split_steps(text, rule))
