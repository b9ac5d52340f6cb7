"""Files -> Examples: what is read, and that every bad file or row is an InputError that names its place."""

import copy
import gzip
import json
import os
import random

import pytest
from PIL import Image

from dreamprm_jax.data.conversation import CONTROL_TOKENS
from dreamprm_jax.data.example import GPT, HUMAN, SYSTEM, Turn
from dreamprm_jax.data.records import find_image, read_examples
from dreamprm_jax.errors import InputError


def turn(role, value):
    return {"from": role, "value": value}


def good_row(**changes):
    row = {
        "id": "q1",
        "image": "a.png",
        "conversations": [
            turn("system", "Judge."),
            turn("human", "Which colour?"),
            turn("human", "Red."),
            turn("gpt", "+"),
            turn("human", "Answer: red"),
            turn("gpt", "-"),
        ],
        "true_false": False,
        "dataset": "colours",
    }
    return row | changes


def without(field):
    row = good_row()
    del row[field]
    return row


def with_turns(*turns):
    return good_row(conversations=list(turns))


@pytest.fixture
def root(tmp_path):
    """An image directory with a.png, b.png and deep/a.png."""
    root = tmp_path / "images"
    (root / "deep").mkdir(parents=True)
    for name in ("a.png", "b.png", "deep/a.png"):
        Image.new("RGB", (4, 3)).save(root / name)
    return root


@pytest.fixture
def read(tmp_path, root):
    """Writes text, bytes or rows to a file and reads it back as Examples."""

    def read(content, name="meta.json", outcome_required=True, **options):
        path = tmp_path / name
        if isinstance(content, list):
            content = json.dumps(content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_examples(path, root, outcome_required=outcome_required, **options)

    return read


def test_a_row_becomes_an_example(read, root, tmp_path):
    first, second = read([good_row(), good_row(id=-1, image=None, dataset=None, extra={"left": "alone"})])
    assert first.turns[:4] == (
        *(Turn(SYSTEM, "Judge."), Turn(HUMAN, "Which colour?"), Turn(HUMAN, "Red."), Turn(GPT, "+")),
    )
    assert (first.row, first.id, first.images) == (0, "q1", (root / "a.png",))
    assert (first.true_false, first.dataset, first.num_steps) == (False, "colours", 2)
    assert first.place == f"{tmp_path / 'meta.json'} row 0"
    assert (second.row, second.id, second.images, second.dataset) == (1, -1, (), None)
    assert second.place.endswith("meta.json row 1")


def test_list_and_lines_and_gz_give_the_same_rows(read):
    rows = [good_row(id=1), good_row(id=2, image=["a.png", "b.png"])]
    lines = "\n".join(map(json.dumps, rows))
    expected = [example._replace(place="") for example in read(rows)]
    for content, name in (
        (json.dumps(rows, indent=1), "spaced.json"),
        (lines, "x.jsonl"),
        ("\n" + lines.replace("\n", "\r\n\n") + "\n\n", "blank_lines.jsonl"),
        (b"\xef\xbb\xbf" + lines.encode(), "mark.jsonl"),
        (lines, "lines_in_a.json"),
        (gzip.compress(lines.encode()), "x.jsonl.gz"),
    ):
        assert [example._replace(place="") for example in read(content, name)] == expected, name


def test_outcome_is_needed_in_meta_files_only(read):
    assert read([without("true_false")], outcome_required=False)[0].true_false is None
    with pytest.raises(InputError, match=r'row 0: "true_false" is missing'):
        read([without("true_false")])


def test_missing_labels_are_allowed_where_they_are_not_used(read):
    for value in ("", None):
        row = with_turns(turn("human", "a"), turn("gpt", value), turn("human", "b"), turn("gpt", "-"))
        labels = [part.text for part in read([row], labels_required=False)[0].turns if part.role == GPT]
        assert labels == ["+", "-"]
        with pytest.raises(InputError, match=r'row 0: "conversations\[1\].value"'):
            read([row])


def test_markers_match_images_or_are_absent(read):
    two = [turn("human", "<image> and <image>"), turn("gpt", "+")]
    assert len(read([good_row(image=["a.png", "b.png"], conversations=two)])[0].images) == 2
    for image in (None, "a.png", ["a.png", "b.png", "a.png"]):
        with pytest.raises(InputError, match=r'row 0: "conversations" has 2 <image> marker'):
            read([good_row(image=image, conversations=two)])


HUMAN_TURN, LABEL = turn("human", "a"), turn("gpt", "+")
BAD_ROWS = [
    (7, "is 7; a row is an object"),
    (without("id"), '"id" is missing'),
    (good_row(id=1.5), '"id" is 1.5'),
    (good_row(id=True), '"id" is true'),
    (good_row(id=None), '"id" is null'),
    (without("image"), '"image" is missing; write null'),
    (good_row(image=3), '"image" is 3'),
    (good_row(image=[]), '"image" is an empty list'),
    (good_row(image=""), '"image" is ""'),
    (good_row(image=["a.png", None]), '"image" is null'),
    (good_row(image="none.png"), '"image" "none.png" is no file under'),
    (good_row(image="a\0.png"), '"image" "a\\u0000.png" is no file under'),
    (good_row(image="a/" * 100_000), "is no file under"),
    (good_row(image="deep"), '"image" "deep" is no file under'),
    (without("conversations"), '"conversations" is missing'),
    (good_row(conversations=[]), '"conversations" is []'),
    (good_row(conversations={"from": "gpt"}), '"conversations" is {"from": "gpt"}'),
    (with_turns("a", LABEL), '"conversations[0]" is "a"'),
    (with_turns({"value": "a"}, LABEL), '"conversations[0].from" is null'),
    (with_turns(turn("user", "a"), LABEL), '"conversations[0].from" is "user"; it must be "system"'),
    (with_turns(turn(["human"], "a"), LABEL), '"conversations[0].from" is ["human"]'),
    (with_turns({"from": "human"}, LABEL), '"conversations[0].value" is null'),
    (with_turns(turn("human", 5), LABEL), '"conversations[0].value" is 5'),
    (with_turns(turn("human", " \n"), LABEL), '"conversations[0].value" is " \\n"'),
    (with_turns(turn("human", "x\ud800"), LABEL), "holds '\\ud800', half a surrogate pair"),
    (with_turns(LABEL), '"conversations[0]" is a "gpt" turn, but no "human" turn is before it'),
    (with_turns(turn("system", "s"), LABEL), '"conversations[1]" is a "gpt" turn, but no'),
    (with_turns(HUMAN_TURN, LABEL, LABEL), '"conversations[2]" is a "gpt" turn, but no'),
    (with_turns(HUMAN_TURN, turn("system", "s"), LABEL), '"conversations[1]" is a "system" turn'),
    (with_turns(HUMAN_TURN, LABEL, HUMAN_TURN), '"conversations" ends with a "human" turn'),
    (with_turns(turn("system", "<image>"), HUMAN_TURN, LABEL), '"conversations[0].value" holds <image>'),
    (with_turns(HUMAN_TURN, turn("gpt", "+ ")), '"conversations[1].value" is "+ "; a label is exactly'),
    (with_turns(HUMAN_TURN, turn("gpt", True)), '"conversations[1].value" is true'),
    (good_row(true_false=1), '"true_false" is 1; it must be true or false'),
    (good_row(true_false=None), '"true_false" is missing'),
    (good_row(dataset=3), '"dataset" is 3'),
    (good_row(dataset=float("nan")), '"dataset" is NaN'),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS, ids=[message[:40] for _, message in BAD_ROWS])
@pytest.mark.parametrize("lines", [False, True], ids=["list", "lines"])
def test_a_bad_row_is_named(read, row, message, lines):
    rows = [good_row(), good_row(), row]
    with pytest.raises(InputError) as error:
        read("\n".join(map(json.dumps, rows)) if lines else rows)
    assert "meta.json row 2: " in str(error.value) and message in str(error.value)
    assert "more bad rows" not in str(error.value)


@pytest.mark.parametrize("token", CONTROL_TOKENS)
def test_control_tokens_in_the_text_are_refused(read, token):
    for role in ("system", "human"):
        row = with_turns(turn(role, f"see {token} here"), turn("human", "step"), turn("gpt", "+"))
        with pytest.raises(InputError, match=r'row 0: "conversations\[0\].value" holds the control token') as error:
            read([row])
        assert token in str(error.value)


def test_the_first_bad_row_and_the_number_of_others(read):
    rows = [good_row(), good_row(id=None), good_row(), good_row(image=0), 5]
    with pytest.raises(InputError, match=r'row 1: "id" is null.* \(and 2 more bad rows\)$'):
        read(rows)


DEEP = "[" * 100_000
BAD_FILES = [
    (b"", "no rows"),
    (b" \n", "no rows"),
    (b"[]", "no rows"),
    (b"[] x", "row 0 (line 1): not valid JSON"),
    (b"{", "row 0 (line 1): not valid JSON"),
    (b"nonsense", "row 0 (line 1): not valid JSON"),
    (b"\x89PNG\r\n\x1a\n", "line 1 is not UTF-8"),
    (b"[\n{}\n]\n]", "row 0 (line 3): not valid JSON (text after"),
    (json.dumps([good_row(), good_row()], indent=0)[:-200].encode(), "row 1 (line"),
    (
        json.dumps(good_row()).encode() + b"\n" + json.dumps(good_row())[:-9].encode(),
        "row 1 (line 2): not valid JSON",
    ),
    (b"[" + json.dumps(good_row()).encode() + b",]", "row 1 (line 1): not valid JSON (Expecting value"),
    (b"[" + json.dumps(good_row()).encode() + b" 5]", 'row 0 (line 1): not valid JSON (expected ","'),
    (f'[{{"id": {DEEP}'.encode(), "row 0: not valid JSON (nested too deeply)"),
    (f'{{"id": {DEEP}'.encode(), "row 0 (line 1): not valid JSON (nested too deeply)"),
    (b'{"id": ' + b"9" * 5000 + b"}", "row 0 (line 1): not valid JSON"),
]


@pytest.mark.parametrize(("content", "message"), BAD_FILES, ids=range(len(BAD_FILES)))
def test_a_bad_file_is_named(read, content, message):
    with pytest.raises(InputError) as error:
        read(content)
    assert "meta.json" in str(error.value) and message in str(error.value)


def test_a_file_that_is_not_there_or_cannot_be_unpacked(read, tmp_path, root):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            read_examples(path, root, outcome_required=False)
    whole = gzip.compress(b"[1, 2, 3]" * 99)
    for content in (b"[]", whole[:-9], whole[:12] + b"\xff\xff" + whole[14:]):
        with pytest.raises(InputError, match="x.json.gz: cannot be read"):
            read(content, "x.json.gz")


def test_an_image_without_an_image_directory(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps([good_row()]))
    with pytest.raises(InputError, match=r'row 0: "image" is "a.png", but no image directory is given'):
        read_examples(path, None, outcome_required=False)
    path.write_text(json.dumps([good_row(image=None)]))
    assert read_examples(path, None, outcome_required=False)[0].images == ()


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("a.png", "a.png"),
        ("./a.png", "a.png"),
        ("../../data/deep/a.png", "deep/a.png"),
        ("../a.png", "a.png"),
        ("/mnt/x/images/deep/a.png", "deep/a.png"),
        ("/mnt/x/deeper/a.png", "a.png"),
        ("deep/../a.png", "deep/../a.png"),
        ("deep/../../secret.png", None),
        ("x/../secret.png", None),
        ("../secret.png", None),
        ("link.png", None),
        ("linked/secret.png", None),
        ("inner.png", "inner.png"),
        ("deep", None),
        ("..", None),
        (".", None),
        ("/", None),
    ],
)
def test_image_paths_stay_under_the_root(root, tmp_path, value, found):
    outside = tmp_path / "images2"
    outside.mkdir()
    for path in (tmp_path / "secret.png", outside / "secret.png"):
        path.write_bytes(b"")
    os.symlink(tmp_path / "secret.png", root / "link.png")
    os.symlink(outside, root / "linked")
    os.symlink(root / "a.png", root / "inner.png")
    assert find_image(value, image_root=root) == (root / found if found else None)


JUNK = [
    None,
    0,
    -1.5,
    float("nan"),
    True,
    "",
    "+",
    "<image>",
    "<img>",
    "\ud800",
    [],
    {},
    [[]],
    {"from": "gpt"},
    1e999,
]


def mutate(row, rng):
    """Replaces, removes or doubles one node of a row."""
    row = copy.deepcopy(row)
    node = row
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = rng.choice(keys)
        if isinstance(node[key], dict | list) and node[key] and rng.random() < 0.7:
            node = node[key]
            continue
        action = rng.choice(["junk", "junk", "delete", "double"])
        if action == "delete":
            del node[key]
        elif action == "double" and isinstance(node, list):
            node.insert(key, node[key])
        else:
            node[key] = rng.choice(JUNK)
        return row


def test_mutated_rows_are_read_or_refused(read):
    rng = random.Random(0)
    outcomes = {True: 0, False: 0}
    for _ in range(200):
        try:
            read([good_row(), mutate(good_row(), rng)])
            outcomes[True] += 1
        except InputError as error:
            assert "meta.json row 1: " in str(error)
            outcomes[False] += 1
    assert min(outcomes.values()) > 20, outcomes


def test_damaged_bytes_are_read_or_refused(read):
    rng = random.Random(1)
    whole = json.dumps([good_row(), good_row()], ensure_ascii=False).encode()
    for _ in range(200):
        content = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        if rng.random() < 0.3:
            del content[rng.randrange(len(content)) :]
        try:
            read(bytes(content))
        except InputError as error:
            assert "meta.json" in str(error)


def test_all_published_meta_rows_are_valid(read, shared):
    rows = json.loads((shared / "mmmu/meta_MMMU_Pro.json").read_text())
    examples = read([row | {"image": "../data/meta_images/a.png"} for row in rows])
    assert len(examples) == 1656
    assert sum(example.num_steps for example in examples) == 3296
    assert [example.true_false for example in examples] == [row["true_false"] for row in rows]
    with pytest.raises(InputError, match=r'row 0: "image" .*\(and 1655 more bad rows\)'):
        read(rows)
    real = read_examples(shared / "golden/meta_rows.json", shared / "mmmu/images", outcome_required=True)
    assert len(real) == 12
