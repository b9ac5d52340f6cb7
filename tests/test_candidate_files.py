"""Every form that questions with candidates are read from, whole and broken."""

import gzip
import json

import pytest
from chat_server import serving
from generating import (
    RIGHT,
    WRONG,
    key,  # noqa: F401 - a fixture
    questions,  # noqa: F401 - a fixture
    run,
)
from PIL import Image
from test_candidates import check_chains, correct, steps_of, turn_of

from configs import prepare as prepare_config
from dreamprm_jax.data.answers import NO_RESPONSE
from dreamprm_jax.data.candidates import disagreements, read_contests
from dreamprm_jax.data.conversation import render
from dreamprm_jax.data.example import GPT
from dreamprm_jax.data.formats.disciplines import discipline
from dreamprm_jax.data.formats.mmmu import question_turn
from dreamprm_jax.errors import InputError
from dreamprm_jax.prepare import run_prepare

# --- Best-of-N files.


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (5, 4), (9, 9, 9)).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def test_what_generate_writes_is_read_as_it_was_asked(questions, tmp_path):  # noqa: F811
    """Three questions: one image, two, and none; options twice, and an open answer of two right ones."""

    def behave(call, body, number):
        call.answer(RIGHT, None) if "How many" not in json.dumps(body["messages"]) else call.answer(
            "So.\n\nAnswer: A Dozen", "Answer: 12.0"
        )

    with serving(behave) as server:
        run(server, questions, tmp_path / "work")
    found = read_contests(tmp_path / "work" / "candidates.jsonl", tmp_path)
    first, second, third = found
    assert first.question.text == "Which <image 1> is it?" and first.question.options == ("red", "green")
    assert turn_of(first) == question_turn(first.question)
    assert [c.text for c in first.candidates] == [RIGHT, NO_RESPONSE]
    assert [c.answer for c in first.candidates] == ["B", None]
    assert [steps_of(c) for c in first.candidates] == [["Look.", "Answer: B"], [NO_RESPONSE]]
    assert correct(found).tolist() == [[True, False], [True, False], [True, True]]
    assert [image.name for image in second.question.images] == ["a.png", "b.jpg"]
    assert third.question.images == () and third.question.answer == "['12', 'a dozen']"
    assert [c.judged for c in third.candidates] == [True, True]
    assert disagreements(found) == []
    check_chains(found)


def test_other_best_of_n_files(picture, tmp_path):
    """The published code's four fields; images relative to the file; lists and .gz; a record against the rules."""
    turn = "Which <image 1>?\nOptions: (A) red (B) light (C) sky"
    row = {"question": turn, "image_path": "a.png", "candidates": [RIGHT, "Answer: sky", " ", None]}
    rows = [
        {**row, "true_false": [False, True, True, False]},
        {**row, "answer": "B", "id": 7, "subject": "Computer Science"},
        {**row, "answer": "B", "true_false": [False] * 4, "answers": ["A", None, "x", "y"], "id": "test_Art_Theory_3"},
    ]
    path = tmp_path / "other.json.gz"
    path.write_bytes(gzip.compress(json.dumps(rows).encode()))
    found = read_contests(path)
    assert [contest.question.id for contest in found] == ["0", "7", "test_Art_Theory_3"]
    assert found[0].question.text == "Which <image 1>?"
    assert found[0].question.options == ("red", "light", "sky")  # read off the turn
    assert turn_of(found[0]) == f"### Question:\n{turn}"  # which stays as it is
    assert correct(found).tolist() == [[False, True, False, False], [True, False, False, False], [False] * 4]
    assert [[c.judged for c in contest.candidates] for contest in found] == [[None] * 4] + [[True] + [False] * 3] * 2
    assert [[c.answer for c in contest.candidates] for contest in found] == [
        *([["B", "C", None, None]] * 2),
        ["A", None, None, None],  # the file's own
    ]
    assert [discipline(contest.question.subject) for contest in found] == [None, "Tech & Engineering", "Art & Design"]
    assert found[1].candidates[0].example.dataset == "Computer Science"
    assert [(row["id"], row["candidate"]) for row in disagreements(found)] == [("test_Art_Theory_3", 0)]
    assert found[0].question.images == (picture,)
    (tmp_path / "elsewhere").mkdir()
    assert read_contests(path, tmp_path / "elsewhere") == found  # beside the file, whatever the directory of the others
    assert render(found[0].candidates[0].example).num_image_markers == 1
    check_chains(found)


def test_options_that_the_question_does_not_show_are_written_behind_it(tmp_path):
    row = {"question": "Which?", "options": ["red", "blue"], "answer": "B", "image_path": None, "candidates": [RIGHT]}
    (contest,) = read_contests(write_lines(tmp_path / "c.jsonl", [row]))
    assert turn_of(contest) == "### Question:\nQuestion: Which?\n\nOptions: (A) red (B) blue"
    shown = {**row, "question": "Which?\nA. red\nB. blue"}
    (contest,) = read_contests(write_lines(tmp_path / "c.jsonl", [shown]))
    assert turn_of(contest) == "### Question:\nWhich?\nA. red\nB. blue"


def test_the_splitter_is_chosen(tmp_path):
    row = {"question": "Q", "image_path": None, "candidates": ["It is 2. Then stop."], "true_false": [True]}
    path = write_lines(tmp_path / "c.jsonl", [row])
    assert steps_of(read_contests(path)[0].candidates[0]) == ["It is 2. Then stop."]
    assert steps_of(read_contests(path, splitter="published")[0].candidates[0]) == ["It is", "Then stop."]
    with pytest.raises(ValueError, match="splitter|rule='other'"):
        read_contests(path, splitter="other")
    with pytest.raises(ValueError, match="judge='mine': must be one of given, rules"):
        read_contests(path, judge="mine")


def best_of_n(**changes):
    row = {"id": "q", "question": "Q", "image_path": "a.png", "candidates": ["x", "Answer: y"],
           "true_false": [True, False]}  # fmt: skip
    return {name: value for name, value in (row | changes).items() if value != "gone"}


BAD_BEST_OF_N = [
    (3, "is 3; a row is an object"),
    (best_of_n(question="gone"), '"question" is missing'),
    (best_of_n(question="<img>"), '"question" holds the control token <img>'),
    (best_of_n(candidates="gone"), '"candidates" is missing'),
    (best_of_n(candidates=[]), '"candidates" is []; it must be a list of responses, and not empty'),
    (best_of_n(candidates="xy"), '"candidates" is "xy"'),
    (best_of_n(candidates=["x", 3]), '"candidates[1]" is 3; it must be text'),
    (best_of_n(candidates=["x", "1. "]), '"candidates[1]" is "1. "; it has no step but only marks'),
    (
        best_of_n(candidates=["x", "<image> and <image>"]),
        '"candidates[1]" and its question have 2 <image> marker(s) for 1 image(s)',
    ),
    (best_of_n(true_false=[True]), '"true_false" has 1 entries for 2 "candidates"; give one for each'),
    (best_of_n(true_false=[True, 0]), '"true_false" is [true, 0]'),
    (best_of_n(true_false="gone"), '"true_false" is missing, and there is no "answer" to judge by'),
    (best_of_n(answers=["x"]), '"answers" has 1 entries for 2'),
    (best_of_n(answers="x"), '"answers" is "x"'),
    (best_of_n(answers=["x", 2]), '"answers[1]" is 2'),
    (best_of_n(image_path="gone"), '"image_path" is missing; write null'),
    (best_of_n(image_path="none.png"), '"image_path" "none.png" is no file under'),
    (best_of_n(image_path="../outside.png"), '"image_path" "../outside.png" is no file under'),
    (best_of_n(image_path=[]), '"image_path" is an empty list'),
    (best_of_n(image_path=[3]), '"image_path" is 3'),
    (best_of_n(options="red"), '"options" is "red"'),
    (best_of_n(options=["red", "blue"], answer="C"), '"answer" is "C"; it must be a letter from A to B'),
    (best_of_n(id=[1]), '"id" is [1]'),
    (best_of_n(subject=1), '"subject" is 1'),
]


@pytest.mark.parametrize(("row", "message"), BAD_BEST_OF_N, ids=range(len(BAD_BEST_OF_N)))
def test_a_bad_row_is_named(picture, tmp_path, row, message):
    (tmp_path / "in").mkdir()
    picture.rename(tmp_path / "in" / "a.png")
    Image.new("RGB", (5, 4)).save(tmp_path / "outside.png")
    path = write_lines(tmp_path / "in" / "c.jsonl", [best_of_n(), row, best_of_n()])
    with pytest.raises(InputError) as error:
        read_contests(path)
    assert str(error.value).startswith("c.jsonl row 1") and message in str(error.value)


def test_rules_need_a_right_answer(picture, tmp_path):
    path = write_lines(tmp_path / "c.jsonl", [best_of_n()])
    with pytest.raises(InputError, match=r'c.jsonl row 0 candidate 0: "answer" is missing, so MMMU'):
        read_contests(path, judge="rules")


def test_what_is_no_file_of_contests_is_told(tmp_path):
    cases = {
        "broken.jsonl": ("{nothing", "broken.jsonl row 0: not valid JSON"),
        "broken.json": ('[{"candidates": []}, {]', "broken.json row 1.*not valid JSON"),
        "empty.jsonl": ("\n", "no rows"),
        "responses.jsonl": ('{"id": "q", "response": "x"}', 'row 0: "candidates" is missing; give a best-of-N file'),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(InputError, match=message):
            read_contests(tmp_path / name)
    with pytest.raises(InputError, match="no such file"):
        read_contests(tmp_path / "nothing.jsonl")
    folder = tmp_path / "work"
    folder.mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        write_lines(folder / name, [best_of_n()])
    with pytest.raises(InputError, match=r"holds 2 files; of this form give one alone, such as .*a.jsonl"):
        read_contests(folder)


# --- Chains.


def chain(name="q", step="So.", turn="### Question:\nQuestion: Q\n\nOptions: (A) red (B) blue", **changes):
    turns = [("system", "s"), ("human", turn), ("human", step), ("gpt", "-"), ("human", "Answer: B"), ("gpt", "+")]
    conversations = [{"from": role, "value": text} for role, text in turns]
    return {"id": name, "image": None, "conversations": conversations, "true_false": True} | changes


def test_chains_of_one_id_are_one_question_wherever_they_stand(tmp_path):
    rows = [chain("q"), chain("p", true_false=False), chain("q", "No.", response="No.\nAnswer: A", true_false=False)]
    first, second = read_contests(write_lines(tmp_path / "meta.jsonl", rows))
    assert (first.question.id, second.question.id) == ("q", "p")
    assert first.question.options == ("red", "blue") and first.question.text == "Q"
    assert [c.text for c in first.candidates] == ["So.\n\nAnswer: B", "No.\nAnswer: A"]
    assert [c.answer for c in first.candidates] == ["B", "A"]
    assert [c.example.row for c in (*first.candidates, *second.candidates)] == [0, 2, 1]  # the file's
    assert [c.example.place for c in first.candidates] == ["meta.jsonl row 0", "meta.jsonl row 2"]
    assert {turn.text for turn in first.candidates[0].example.turns if turn.role == GPT} == {"+"}
    assert first.candidates[0].example.turns[0].text == "s"  # the row itself


def test_chains_are_judged_where_a_row_has_the_right_answer(tmp_path):
    rows = [chain(answer="B"), chain(answer="B", true_false=False, response="Answer: B")]
    path = write_lines(tmp_path / "meta.jsonl", rows)
    (contest,) = read_contests(path)
    assert [(c.correct, c.judged) for c in contest.candidates] == [(True, True), (False, True)]
    assert correct(read_contests(path, judge="rules")).tolist() == [[True, True]]


def test_a_first_step_behind_the_question(tmp_path):
    turns = ["### Question:\nQ\n\n### Solution Process:\nOne.", "Two."]
    conversations = [{"from": role, "value": text} for turn in turns for role, text in (("human", turn), ("gpt", "+"))]
    row = chain(conversations=conversations)
    (contest,) = read_contests(write_lines(tmp_path / "meta.jsonl", [row]))
    assert (contest.question.text, contest.candidates[0].text) == ("Q", "One.\n\nTwo.")
    conversations[0]["value"] = "Q One."
    with pytest.raises(InputError, match="has question and first step in one turn"):
        read_contests(write_lines(tmp_path / "meta.jsonl", [row]))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (chain(turn="### Question:\nQuestion: P\n\nOptions: (A) red (B) blue"), "has another text; give it another id"),
        (chain(turn="### Question:\nQuestion: Q\n\nOptions: (A) red (B) green"), "has another options"),
        (chain(image="a.png"), "has another images"),
        (chain(answer="A"), "has another answer"),
        (chain(true_false=None), '"true_false" is missing, and there is no "answer"'),
        (chain(response=3), '"response" is 3'),
        (chain(conversations=[]), '"conversations" is []'),
    ],
)
def test_a_bad_chain_is_named(picture, tmp_path, other, message):
    path = write_lines(tmp_path / "meta.jsonl", [chain(), chain("p"), other])
    with pytest.raises(InputError) as error:
        read_contests(path)
    assert str(error.value).startswith("meta.jsonl row 2: ") and message in str(error.value)


# --- Runs.


def answer_row(name="q1", response=RIGHT, **changes):
    return {"id": name, "question": "Q", "options": ["red", "blue"], "answer": "B", "response": response} | changes


def test_runs_are_matched_by_id(picture, tmp_path):
    (tmp_path / "runs").mkdir()
    image = {"question": "Q <image 1>", "image_1": "a.png"}
    write_lines(tmp_path / "runs/1.jsonl", [answer_row(**image), answer_row("q2", WRONG, if_right=True)])
    (tmp_path / "runs/2.json").write_text(json.dumps([answer_row("q2", ""), answer_row("q1", WRONG, **image)]))
    found = read_contests(tmp_path / "runs", tmp_path)
    assert [contest.question.id for contest in found] == ["q1", "q2"]
    assert [[c.text for c in contest.candidates] for contest in found] == [[RIGHT, WRONG], [WRONG, NO_RESPONSE]]
    assert correct(found).tolist() == [[True, False], [True, False]]
    assert [c.judged for c in found[1].candidates] == [False, False]
    assert found[0].question.images == (picture,)
    check_chains(found)
    (alone, _) = read_contests(tmp_path / "runs/1*", tmp_path)
    assert len(alone.candidates) == 1


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ([answer_row("q1")], '2.jsonl: has no row with "id" "q2", which 1.jsonl row 1 answers;'),
        ([answer_row(f"q{n}") for n in (1, 2, 3, 4)],
         '1.jsonl: has no row with "id" "q3", which 2.jsonl row 2 answers (nor to 1 more)'),
        ([answer_row("q1"), answer_row("q2", options=["red", "sky"])],
         '2.jsonl row 1: "id" is "q2", as in 1.jsonl row 1, whose question has another options'),
        ([answer_row("q1"), answer_row("q1")], '2.jsonl row 1: "id" is "q1", as in 2.jsonl row 0; a file is one run'),
        ([{**answer_row("q1"), "id": None}], '2.jsonl row 0: "id" is null'),
        ([answer_row("q1", "1. ")], '2.jsonl row 0: "response" is "1. "; it has no step but only marks'),
        ([answer_row("q1", if_right="yes")], '2.jsonl row 0: "if_right" is "yes"'),
    ],
)  # fmt: skip
def test_a_bad_run_is_named(tmp_path, second, message):
    write_lines(tmp_path / "1.jsonl", [answer_row("q1"), answer_row("q2")])
    write_lines(tmp_path / "2.jsonl", second)
    with pytest.raises(InputError) as error:
        read_contests(tmp_path, need_images=False)
    assert str(error.value).startswith(message)


# --- Prepared sets.


def prepared(folder, builder, **options):
    cfg = prepare_config.get_config(builder)
    cfg.prepare.output, cfg.prepare.processes, cfg.data.on_error = str(folder / "data"), 1, "raise"
    for name, value in options.items():
        cfg.prepare[name] = str(value)
    return run_prepare(cfg, folder)["directory"]


def test_prepared_questions_and_chains_read_as_their_files_do(picture, tmp_path):
    """The same contests from runs, from a set of questions and from a set of chains."""
    image = {"question": "Q <image 1>", "image_1": "a.png"}
    rows = [answer_row(f"test_Art_{n}", **image) for n in (1, 2)]
    write_lines(tmp_path / "q.jsonl", rows)
    write_lines(tmp_path / "r.jsonl", [{"id": row["id"], "response": text, "true_false": text == WRONG}
                                       for text in (RIGHT, WRONG) for row in rows])  # fmt: skip
    options = {"source": tmp_path / "q.jsonl", "responses": tmp_path / "r.jsonl"}
    of_questions = read_contests(directory := prepared(tmp_path, "mmmu", **options))
    of_chains = read_contests(prepared(tmp_path, "mmmu_pro", **options))
    for contests in (of_questions, of_chains):
        assert [contest.question.id for contest in contests] == ["test_Art_1", "test_Art_2"]
        assert [contest.question.subject for contest in contests] == ["Art", "Art"]
        assert correct(contests).tolist() == [[False, True]] * 2
        assert [steps_of(candidate) for candidate in contests[0].candidates] == [["Look.", "Answer: B"],
                                                                               ["Guess.", "Answer: A"]]  # fmt: skip
        assert all(contest.question.images == (picture.read_bytes(),) for contest in contests)
        check_chains(contests)
    assert len(disagreements(of_questions)) == 4 and not disagreements(of_chains)
    with pytest.raises(InputError, match="did you mean .*1.0.0"):
        read_contests(directory.rsplit("/", 1)[0])
    bare = prepared(tmp_path / "bare", "mmmu", source=tmp_path / "q.jsonl", images=tmp_path)
    with pytest.raises(InputError, match='"candidates" is empty; prepare the set with prepare.responses'):
        read_contests(bare)
