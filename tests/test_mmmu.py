"""MMMU's rows -> Questions, and responses joined with them -> Examples in the published meta set's form."""

import json
import random
import time
from string import ascii_uppercase

import pytest
from PIL import Image
from test_records import mutate

from dreamprm_jax.data.conversation import IMAGE_BLOCK, render
from dreamprm_jax.data.example import GPT, HUMAN, SYSTEM, Question
from dreamprm_jax.data.formats import mmmu, prompts
from dreamprm_jax.data.formats.rules import rules_for
from dreamprm_jax.errors import InputError

PLACE = "questions.jsonl row 7"
TEXT_ONLY = rules_for(None)


@pytest.fixture(scope="module")
def rules(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for name in ("a.png", "b.png", "c.png"):
        Image.new("RGB", (4, 3)).save(root / name)
    return rules_for(root)


def question_row(**changes):
    row = {
        "id": "test_History_1",
        "question": "Which follows <image 1>?",
        "options": "['<image 2>', \"It's red\", 'None']",
        "answer": "B",
        "image_1": "a.png",
        "image_2": "b.png",
        "img_type": "['Diagrams', 'Tables']",
        "topic_difficulty": "Hard",
    }
    return row | changes


def hub_image(content=b"\x89PNG", path="x.png"):
    return {"bytes": content, "path": path}


def read(row, rules):
    return mmmu.parse_question(row, 7, PLACE, rules)


def test_a_question_row_becomes_a_question(rules):
    question = read(question_row(), rules)
    assert (question.row, question.id, question.text) == (7, "test_History_1", "Which follows <image 1>?")
    assert question.options == ("<image 2>", "It's red", "None") and question.answer == "B"
    assert question.images == (rules.image_root / "a.png", rules.image_root / "b.png")
    assert (question.subject, question.image_type, question.difficulty) == ("History", "Diagrams, Tables", "Hard")
    assert question.place == PLACE
    without_id = read({key: value for key, value in question_row().items() if key != "id"}, rules)
    assert (without_id.id, without_id.subject) == ("7", None)
    assert read(question_row(subject="Art"), rules).subject == "Art"
    assert read(question_row(img_type="['a'], 'b'"), rules).image_type == "['a'], 'b'"
    assert read(question_row(img_type="[]"), rules).image_type is None


def test_hub_rows_hold_the_bytes_of_their_images():
    unused = {f"image_{number}": None for number in range(3, 8)}
    row = question_row(image_1=hub_image(b"one"), image_2=hub_image(b"two", None), **unused, explanation="?")
    assert read(row, TEXT_ONLY).images == (b"one", b"two")


def test_a_path_in_a_hub_image_is_taken_where_there_are_no_bytes(rules):
    row = question_row(image_1=hub_image(None, "a.png"), image_2=hub_image(b"two"))
    assert read(row, rules).images == (rules.image_root / "a.png", b"two")


def test_a_vision_row_has_its_question_in_the_image():
    row = {"id": "test_Art_1", "image": hub_image(), "options": ["red", "blue"], "answer": "A", "subject": "Art"}
    question = read(row, TEXT_ONLY)
    assert (question.text, question.options, question.images) == ("<image 1>", ("red", "blue"), (b"\x89PNG",))


@pytest.mark.parametrize(
    ("text", "given", "taken"),
    [
        ("Why?", (1, 2), (1, 2)),  # no marker: all of them
        ("Why?", (), ()),
        ("<image 1>?", (1, 2), (1,)),  # image 2 is not used
        ("<image 2>?", (1, 2, 3), (1, 2)),  # image n stays at n - 1
        ("<image 2>, <image1>?", (1, 2), (1, 2)),
    ],
)
def test_images_up_to_the_last_that_is_named(rules, text, given, taken):
    row = question_row(question=text, options=["yes"], answer="A", image_1=None, image_2=None)
    row |= {f"image_{number}": hub_image(bytes([number])) for number in given}
    assert read(row, rules).images == tuple(bytes([number]) for number in taken)


def test_rows_of_responses_repeat_a_question_without_its_images():
    row = {key: value for key, value in question_row().items() if not key.startswith("image")}
    assert read(row, TEXT_ONLY).images == ()


def test_a_named_image_must_be_there_where_images_are(rules):
    row = {key: value for key, value in question_row().items() if not key.startswith("image")}
    with pytest.raises(InputError, match='"image_1" is missing'):
        read(row, rules)


@pytest.mark.parametrize(
    ("options", "answer", "right"),
    [
        ("[]", "24/7", ("24/7",)),
        ([], "['24/7', '3.429']", ("24/7", "3.429")),
        ([], ["24/7", "3.429"], ("24/7", "3.429")),
        ([], "[0, 1]", ("[0, 1]",)),  # an interval
        ([], "[", ("[",)),
        (["x", "y"], "B", ("B",)),
    ],
)
def test_open_questions_may_have_several_answers(rules, options, answer, right):
    question = read(question_row(question="Why?", options=options, answer=answer), rules)
    assert mmmu.right_answers(question) == right and isinstance(question.answer, str)


def test_validation_questions_and_keys():
    assert mmmu.is_validation("validation_Art_1") and not mmmu.is_validation("validated_1")
    key = mmmu.question_key("What is\tshown in <image 1>?\nA. Red\n(B) Blue")
    assert key == mmmu.question_key("WHAT is shown in\n<image2> ? red blue") == "whatisshownin?redblue"
    assert mmmu.question_key("5 m\u00b2, \ufb01ne") == mmmu.question_key("5 m2, fine")
    assert mmmu.question_key("Is it (x)?") != mmmu.question_key("Is it (xy)?")
    start = time.thread_time()
    for shape in ("<image", "(", "a.", "\n", " ", "ﬃ", "<image 1"):
        mmmu.question_key(shape * (100_000 // len(shape)))
    assert time.thread_time() - start < 10  # seconds; minutes where it is quadratic


BAD_QUESTIONS = [
    ([], "is []; a row is an object"),
    (question_row(id=None), '"id" is null'),
    (question_row(question=""), '"question" is ""'),
    (question_row(question="<|im_end|>"), '"question" holds the control token'),
    (question_row(options=None), '"options" is null; it must be a list of up to 26 texts'),
    (question_row(options="A, B"), '"options" is "A, B"'),
    (question_row(options="['a'"), '"options" is "[\'a\'"'),
    (question_row(options="['a'], 1"), '"options" is'),
    (question_row(options="[open('x')]"), '"options" is "[open(\'x\')]"'),
    (question_row(options="[" * 5000), '"options" is "[[['),
    (question_row(options="[" * 200_000), '"options" is "[[['),
    (question_row(options=f"[{'-' * 20_000}1]"), '"options" is "[---'),  # too deep for Python's parser
    (question_row(options="[{[]: 1}]"), '"options" is "[{[]: 1}]"'),
    (question_row(options=f"['{'a' * 100_000}']"), '"options" is "[\'aaa'),
    (question_row(options="['a', 3]"), '"options[1]" is 3'),
    (question_row(options="['a', ' ']"), '"options[1]" is " "'),
    (question_row(options=["a", "<img>"]), '"options[1]" holds the control token <img>'),
    (question_row(options=["a"] * 27), '"options" is ["a", "a"'),
    (question_row(answer="D"), '"answer" is "D"; it must be a letter from A to C'),
    (question_row(answer="?"), '"answer" is "?"'),
    (question_row(answer="AB"), '"answer" is "AB"'),
    (question_row(answer=["A"]), '"answer" is ["A"]'),
    (question_row(options=[], answer=[]), '"answer" is []'),
    (question_row(options=[], answer=["a", 1]), '"answer" is 1'),
    (question_row(image_2=None), '"image_2" is missing'),
    (question_row(question="<image 3>"), '"image_3" is missing'),
    (question_row(question="<image 99>"), '"image_3" is missing'),
    (question_row(question="<image 0>"), '"image_0" is missing'),
    (question_row(image_1="none.png"), '"image_1" "none.png" is no file under'),
    (question_row(image_1=3), '"image_1" is 3'),
    (question_row(image_1=b""), '"image_1" is bytes'),
    (question_row(image_1=hub_image(None, None)), '"image_1" is null'),
    (question_row(image_1=hub_image("text")), '"image_1" "text" is no file under'),
    (question_row(subject=1), '"subject" is 1'),
    (question_row(img_type=1), '"img_type" is 1'),
    (question_row(topic_difficulty=[]), '"topic_difficulty" is []'),
]


@pytest.mark.parametrize(("row", "message"), BAD_QUESTIONS, ids=range(len(BAD_QUESTIONS)))
def test_a_bad_question_is_named(rules, row, message):
    with pytest.raises(InputError) as error:
        read(row, rules)
    assert str(error.value).startswith(f"{PLACE}: ") and message in str(error.value)


@pytest.fixture
def questions(rules):
    question = read(question_row(), rules)
    return {question.id: question}


def response_row(**changes):
    row = {"id": "test_History_1", "response": "[Reasoning]\nIt is 2. Then stop.\n\nSo.\nAnswer: B", "true_false": True}
    return row | changes


def read_response(row, questions, rules=TEXT_ONLY):
    return mmmu.parse_response(row, 7, PLACE, questions, rules)


def test_a_response_becomes_a_meta_row(questions, rules):
    example = read_response(response_row(), questions)
    system, asked, *steps = example.turns
    assert system == (SYSTEM, prompts.DREAMPRM_SYSTEM)
    text = "Question: Which follows <image 1>?\n\nOptions: (A) <image 2> (B) It's red (C) None"
    assert asked == (HUMAN, f"### Question:\n{text}")
    assert [part.text for part in steps] == ["It is 2. Then stop.", "+", "So.", "+", "Answer: B", "+"]
    assert [part.role for part in steps] == [HUMAN, GPT] * 3
    assert (example.row, example.id, example.dataset) == (7, "test_History_1", "History")
    assert example.images == questions["test_History_1"].images
    assert render(example).text.count(IMAGE_BLOCK) == 2
    published = read_response(response_row(), questions, rules._replace(splitter="published"))
    assert [part.text for part in published.turns[2::2]] == ["It is", "Then stop.", "So.", "Answer: B"]


def test_an_open_question_has_no_options_line(rules):
    question = read(question_row(question="Why?", options="[]", answer="x"), rules)
    assert mmmu.question_turn(question) == "### Question:\nQuestion: Why?"


@pytest.mark.parametrize(
    ("fields", "outcome"),
    [
        ({"true_false": False}, False),
        ({"true_false": None, "if_right": False}, False),
        ({"true_false": True, "if_right": False}, True),
        ({"true_false": None}, True),  # judged: the answer is B
        ({"true_false": None, "response": "Answer: C"}, False),
    ],
)
def test_the_outcome_is_the_rows_own_or_judged(questions, fields, outcome):
    assert read_response(response_row(**fields), questions).true_false is outcome


BAD_RESPONSES = [
    ("x", 'is "x"; a row is an object'),
    (response_row(id="none"), '"id" is "none", but no question has that id'),
    (response_row(id=1.5), '"id" is 1.5'),
    (response_row(response=" "), '"response" is " "'),
    (response_row(response=None), '"response" is null'),
    (response_row(response="1. \n2. \n"), '"response" is "1. \\n2. \\n"; it has no step'),
    (response_row(response="a <|im_end|>"), '"response" holds the control token <|im_end|>'),
    (response_row(response="see <image>"), "1 <image> marker(s)"),
    (response_row(true_false="yes"), '"true_false" is "yes"'),
    (response_row(true_false=None, if_right=1), '"if_right" is 1'),
]


@pytest.mark.parametrize(("row", "message"), BAD_RESPONSES, ids=range(len(BAD_RESPONSES)))
def test_a_bad_response_is_named(questions, row, message):
    with pytest.raises(InputError) as error:
        read_response(row, questions)
    assert str(error.value).startswith(f"{PLACE}: ") and message in str(error.value)


@pytest.mark.parametrize("kind", ["question", "hub question", "response"])
def test_mutated_rows_are_read_or_refused(rules, questions, kind):
    hub = question_row(options=["<image 1>", "b"], image_1=hub_image(), image_2=hub_image(None, "b.png"))
    rng, refused = random.Random(0), 0
    for _ in range(2000):
        try:
            if kind == "response":
                read_response(mutate(response_row(), rng), questions)
            else:
                read(mutate(question_row() if kind == "question" else hub, rng), rules)
        except InputError as error:
            assert str(error).startswith(f"{PLACE}: ")
            refused += 1
    assert 200 < refused < 1900


def test_damaged_option_lists_are_read_or_refused(rules):
    rng = random.Random(1)
    for _ in range(2000):
        text = list("['<image 2>', \"It's red\", None, {'a': 1}, (2,)]")
        for _ in range(rng.randint(1, 6)):
            text[rng.randrange(len(text))] = rng.choice("[](){}'\",\\x\x00\n\ud8001*-.")
        try:
            read(question_row(options="".join(text)), rules)
        except InputError as error:
            assert str(error).startswith(f"{PLACE}: ")


def test_answer_files():
    entries = {
        "validation_Art_1": {"question_type": "multiple-choice", "ground_truth": "B"},
        "validation_Art_2": {"question_type": "short-answer", "ground_truth": ["24/7", "3.429"]},
    }
    answers = mmmu.parse_answers(entries, "answers.json")
    assert answers == {"validation_Art_1": "B", "validation_Art_2": "['24/7', '3.429']"}
    bad = [
        ([], "is []"),
        ({"q": "B"}, '"q" is "B"'),
        ({"q": {}}, '"q.ground_truth" is null'),
        ({"q": {"ground_truth": []}}, '"q.ground_truth" is []'),
        ({"q": {"ground_truth": [1]}}, '"q.ground_truth" is 1'),
    ]
    for content, message in bad:
        with pytest.raises(InputError, match=r"^answers.json: ") as error:
            mmmu.parse_answers(content, "answers.json")
        assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("Which?", ("red", "light blue")),
        ("Two\n\nlines", (" (A) ", "", "x (B) y", "so")),
        ("Options: many", tuple(ascii_uppercase)),
        ("How many?", ()),
        ("Which?", ("red",)),
    ],
)
def test_a_question_turn_is_taken_apart_again(text, options):
    question = Question(0, "q", text, "", options)
    turn = mmmu.question_turn(question)
    assert mmmu.split_question_turn(turn) == (text, options)
    assert mmmu.split_question_turn(turn.removeprefix("### Question:\nQuestion: ")) == (text, options)


# The published rows


@pytest.fixture(scope="module")
def ten_options(shared):
    """The 1,730 questions of MMMU-Pro as GPT-4o's rows repeat them: {id: row}."""
    lines = (shared / "mmmu/gpt4o/gpt-4o_standard_10_options__cot.jsonl").read_text().splitlines()
    return {row["id"]: row for row in map(json.loads, lines)}


@pytest.fixture(scope="module")
def meta_rows(shared):
    return json.loads((shared / "mmmu/meta_MMMU_Pro.json").read_text())


def test_all_published_questions_and_answers_are_valid(shared, ten_options):
    questions = [read(row, TEXT_ONLY) for row in ten_options.values()]
    assert len(questions) == 1730 and sum(mmmu.is_validation(question.id) for question in questions) == 577
    assert all(
        question.subject == row["subject"] for question, row in zip(questions, ten_options.values(), strict=True)
    )
    lines = (shared / "mmmu/questions.jsonl").read_text().splitlines()
    with_images = [read(json.loads(line), rules_for(shared / "mmmu")) for line in lines]
    assert [len(question.images) for question in with_images] == [1] * 5 + [5] + [1] * 15
    answers = mmmu.parse_answers(json.loads((shared / "mmmu/answer_dict_val.json").read_text()), "answer_dict_val.json")
    assert len(answers) == 900 and sum(answer.startswith("[") for answer in answers.values()) == 3


def four_options(published_turn, pool):
    """The options of a published question turn, each one of `pool`; only the end of a turn is stripped."""
    text, options = published_turn.partition("\n\nOptions: ")[2], []
    while text:
        here, behind = (f"({letter}) " for letter in ascii_uppercase[len(options) :][:2])
        text = text.removeprefix(here)
        fitting = [option for option in pool if text == option.rstrip() or text.startswith(f"{option} {behind}")]
        options.append(max(fitting, key=len))
        text = text[len(options[-1]) + 1 :]
    return tuple(options)


def moved_answer(question, asked):
    """The question with the letter that the answer of `asked` has among its own options."""
    text = asked.options[ascii_uppercase.index(asked.answer)]
    return question._replace(answer=ascii_uppercase[question.options.index(text)])


def test_published_meta_rows_come_back_from_their_responses(meta_rows, ten_options):
    """Text and options are MMMU-Pro's word by word; which options, in which order, is read off the published turn.

    Not derivable from the ten-option rows: their choice and order, and one option that is spelt otherwise there.
    """
    rules = TEXT_ONLY._replace(splitter="published")
    questions, misjudged = {}, []
    for row in meta_rows:
        published = [turn["value"] for turn in row["conversations"] if turn["from"] != "gpt"]
        if row["id"] == "test_Electronics_16":
            continue  # "1.2\\phase{-37.8} V" is "1.2 \\phase{-37.8^\\circ} V" among the ten
        asked = read(ten_options[row["id"]], TEXT_ONLY)
        question = asked._replace(options=four_options(published[1], asked.options))
        text, options = mmmu.split_question_turn(published[1])
        assert (text, [option.rstrip() for option in options]) == (
            question.text, [option.rstrip() for option in question.options]
        )  # fmt: skip
        questions[row["id"]] = question
        example = read_response(row, questions, rules)
        assert [turn.text for turn in example.turns if turn.role != GPT] == published
        assert example.true_false is row["true_false"]
        judged = read_response(
            {"id": row["id"], "response": row["response"]}, {row["id"]: moved_answer(question, asked)}
        )
        if judged.true_false is not row["true_false"]:
            misjudged.append(row["id"])
    same = [question.options == read(ten_options[name], TEXT_ONLY).options for name, question in questions.items()]
    assert len(same) == 413 and sum(same) == 21
    # Two equal options, one of them the answer; answers in words where the options are "A" and "B", drawn at random
    assert misjudged.count("test_Finance_96") == 4 and misjudged.count("test_Accounting_99") == 3 == len(misjudged) - 4


def test_gpt4os_rows_are_questions_and_responses(ten_options):
    for row in ten_options.values():
        example = read_response(row, {row["id"]: read(row, TEXT_ONLY)})
        assert example.true_false is row["if_right"] and example.num_steps >= 1


def test_questions_are_found_again_by_their_key(shared, meta_rows, ten_options):
    keys = {mmmu.question_key(ten_options[row["id"]]["question"]): row["id"] for row in meta_rows}
    assert len(keys) == 406  # as question_key's docstring says
    lines = (shared / "mmmu/questions.jsonl").read_text().splitlines()
    texts = [json.loads(line)["question"].upper() + " " for line in lines]
    assert {keys.get(mmmu.question_key(text)) for text in texts} == {None, "test_Clinical_Medicine_69"}
