"""What keeps rows out of a set, what makes them the same, and what a set follows from."""

import errno
import json
import os

import pytest
from PIL import Image

from configs import prepare as prepare_config
from dreamprm_jax.data import builders, passes, raw
from dreamprm_jax.data.answers import NO_RESPONSE
from dreamprm_jax.data.builders import Source, excluded, identity, reason_to_exclude, text_to_exclude
from dreamprm_jax.data.example import HUMAN, Example, Question, Turn
from dreamprm_jax.data.prepared import PreparedExamples, PreparedQuestions
from dreamprm_jax.errors import InputError
from dreamprm_jax.prepare import run_prepare

LONG = "Which of the painters of the Dutch golden age made the picture that is shown here in <image 1>?"
SHORT = "Who created <image 1>?"


def question(text, options=("Anna", "Berta"), name="test_Art_1", **fields):
    return Question(0, name, text, "A", options, **fields)


def chain(first, name=-1):
    return Example(0, name, (Turn(HUMAN, first),))


def reason(row, *questions):
    texts = [text_to_exclude(each) for each in questions]
    return reason_to_exclude(row, excluded([each.id for each in questions], texts, []))


@pytest.mark.parametrize(
    "text",
    [
        f"### Question:\nQuestion: {LONG}\n\nOptions: (A) Clara (B) Dora",
        f"### Question:\n<image>\n{LONG.replace('<image 1>', 'it')}".replace(" it?", "?"),
        f"### Question:\n<image>\n{LONG.upper()}\nA. Clara\n\n### Solution Process:\nLook.",
        f"Please look. {LONG} Answer with a letter.",
    ],
)
def test_a_long_question_is_found_wherever_it_stands(text):
    assert reason(chain(text), question(LONG)) == "question"


def test_a_short_question_counts_with_its_options():
    """Templates are shared by many questions: "Who created <image 1>?" alone tells none of them."""
    asked = question(SHORT)
    assert reason(chain(f"### Question:\nQuestion: {SHORT}\n\nOptions: (A) Anna (B) Berta"), asked) == "question"
    assert reason(chain("### Question:\n<image>\nWho created ?\nA. Anna\nB. Berta"), asked) == "question"
    assert reason(chain(f"### Question:\nQuestion: {SHORT}\n\nOptions: (A) Clara (B) Dora"), asked) is None
    assert reason(chain(f"### Question:\nQuestion: {SHORT} Or not?"), asked) is None
    assert reason(question(SHORT, name="other"), asked) == "question"
    assert reason(question(SHORT, ("Clara", "Dora"), name="other"), asked) is None
    assert reason(question("<image 1>", name="other"), question("<image 1>")) is None  # the image tells, not the text


def test_ids_count_where_both_are_names():
    asked = question(LONG)
    assert reason(chain("Another one", "test_Art_1"), asked) == "id"
    assert reason(chain("Another one", 1), question(LONG, name="1")) is None


def test_what_makes_rows_the_same(tmp_path):
    source = Source("visualprm400k", str(tmp_path), None)
    row = Example(0, -1, (Turn(HUMAN, "a"),), (tmp_path / "images/x.png",))
    here = source._replace(source=os.path.relpath(tmp_path))
    relative = row._replace(images=(builders.Path(os.path.relpath(tmp_path)) / "images/x.png",))
    assert identity(row, source) == identity(relative, here)  # however the folder is named
    assert identity(row, source) != identity(row._replace(images=()), source)
    of_response = Source("mmmu_pro", "q.jsonl", None)
    assert identity(row._replace(id="q1"), of_response) != identity(row._replace(id="q2"), of_response)
    benchmark = Source("mmmu", "q.jsonl", None)
    assert identity(question(LONG), benchmark) != identity(question(SHORT), benchmark)


# --- Whole sets.


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def mmmu(tmp_path):
    """Two questions with their images, and three responses to each."""
    for number in range(2):
        Image.new("RGB", (9, 9), (number, 0, 0)).save(tmp_path / f"{number}.png")
    rows = [
        {"id": f"test_Art_{n}", "question": f"{LONG} {n}", "options": ["a", "b"], "answer": "A", "image_1": f"{n}.png"}
        for n in range(2)
    ]
    write_lines(tmp_path / "q.jsonl", rows)
    write_lines(tmp_path / "r.jsonl", [
        {"id": f"test_Art_{n}", "response": f"1. So.\n\nAnswer: {letter}"} for n in range(2) for letter in "ABA"
    ])  # fmt: skip
    return tmp_path


def prepared(folder, builder, output="data", **options):
    cfg = prepare_config.get_config(builder)
    cfg.prepare.output, cfg.prepare.processes, cfg.data.max_bad_share = str(folder / output), 1, 1.0
    for name, value in options.items():
        cfg.prepare[name] = value if isinstance(value, int) or name == "balance" else str(value)
    summary = run_prepare(cfg, folder)
    reader = PreparedQuestions if builder == "mmmu" else PreparedExamples
    return summary, list(reader(summary["directory"]))


def test_equal_responses_are_draws_and_stay(mmmu):
    summary, found = prepared(mmmu, "mmmu_pro", source=mmmu / "q.jsonl", responses=mmmu / "r.jsonl")
    assert [row.true_false for row in found] == [True, False, True] * 2
    assert summary["dropped"] == {}


@pytest.mark.parametrize("changed", ["q.jsonl", "r.jsonl", "x.jsonl"])
@pytest.mark.parametrize("builder", ["mmmu_pro", "mmmu"])
def test_a_set_follows_from_all_its_files(mmmu, builder, changed):
    write_lines(mmmu / "x.jsonl", [{"id": "v", "question": "Hm?", "options": ["a", "b"], "answer": "A"}])
    options = {"source": mmmu / "q.jsonl", "responses": mmmu / "r.jsonl", "exclude": mmmu / "x.jsonl"}
    prepared(mmmu, builder, **options)
    assert prepared(mmmu, builder, **options)[0]["kept"]  # as it is: was finished before
    lines = (mmmu / changed).read_text().splitlines()
    (mmmu / changed).write_text("\n".join([lines[0].replace('"id": "', '"id": "new_'), *lines[1:]]))
    with pytest.raises(InputError, match=rf"{changed} has changed since it was begun"):
        prepared(mmmu, builder, **options)


def test_a_file_without_ids_excludes_by_text_and_image_alone(mmmu):
    rows = [json.loads(line) for line in (mmmu / "q.jsonl").read_text().splitlines()]
    for row in rows:
        del row["id"]
    write_lines(mmmu / "x.jsonl", [{**row, "question": "Hm?", "image_1": None} for row in rows])
    write_lines(mmmu / "rows.jsonl", rows)
    assert len(prepared(mmmu, "mmmu", source=mmmu / "rows.jsonl", exclude=mmmu / "x.jsonl")[1]) == 2


def test_responses_of_a_test_set_are_kept_blank_or_counted(mmmu):
    responses = [{"id": "test_Art_0", "response": text} for text in ("Answer: A", "", None, "Answer: B")]
    write_lines(mmmu / "r.jsonl", [*responses, {"id": "nobody", "response": "Answer: A"}])
    summary, found = prepared(mmmu, "mmmu", source=mmmu / "q.jsonl", responses=mmmu / "r.jsonl")
    assert found[0].candidates == ("Answer: A", NO_RESPONSE, NO_RESPONSE, "Answer: B")
    assert found[0].true_false == (True, False, False, False)
    assert found[1].candidates == ()
    assert summary["responses_without_question"] == 1


def test_copies_that_disagree_are_told(tmp_path):
    row = {"image": None, "question": "What?", "steps_with_score": [{"step": "So.", "score": 1.0}]}
    other = {**row, "steps_with_score": [{"step": "So.", "score": 0.0}]}
    write_lines(tmp_path / "a.jsonl", [row, row, other])
    summary, found = prepared(tmp_path, "visualprm400k", source=tmp_path / "a.jsonl")
    assert summary["dropped"] == {"duplicate": 1, "duplicate with other labels": 1}
    assert len(found) == 1


def test_a_pattern_names_the_files_of_one_split(tmp_path, mmmu):
    for subject in ("Art", "Math"):
        folder = tmp_path / "hub" / subject
        folder.mkdir(parents=True)
        for split in ("validation", "test"):
            row = {"id": f"{split}_{subject}_1", "question": f"Question of {subject}?", "options": ["a", "b"],
                   "answer": "A" if split == "validation" else "?"}  # fmt: skip
            write_lines(folder / f"{split}-0.jsonl", [row])
    _, found = prepared(tmp_path, "mmmu", source=tmp_path / "hub/*/validation-*.jsonl")
    assert [row.id for row in found] == ["validation_Art_1", "validation_Math_1"]
    with pytest.raises(InputError, match="no file is named so"):
        prepared(tmp_path, "mmmu", "none", source=tmp_path / "hub/*/none-*.jsonl")
    assert raw.pattern_root(tmp_path / "hub/*/x") == tmp_path / "hub"


def test_a_full_disk_is_one_line_and_the_command_goes_on(mmmu, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    options = {"source": mmmu / "q.jsonl", "responses": mmmu / "r.jsonl"}
    monkeypatch.setattr(passes, "write_shard", full)
    with pytest.raises(InputError, match="No space left on device.*; make room, and the same command goes on"):
        prepared(mmmu, "mmmu_pro", **options)
    monkeypatch.undo()
    assert prepared(mmmu, "mmmu_pro", **options)[0]["kept"] == 6


def test_a_folder_of_versions_is_no_exclusion(mmmu):
    prepared(mmmu, "mmmu", source=mmmu / "q.jsonl")
    with pytest.raises(InputError, match=r"did you mean .*mmmu/1\.0\.0"):
        prepared(mmmu, "mmmu_pro", source=mmmu / "q.jsonl", responses=mmmu / "r.jsonl", exclude=mmmu / "data/mmmu")


def test_two_questions_of_one_id_are_both_named(mmmu):
    lines = (mmmu / "q.jsonl").read_text()
    (mmmu / "q.jsonl").write_text(lines + lines)
    with pytest.raises(InputError, match=r"the id 'test_Art_0' \(q.jsonl row 0 and q.jsonl row 2\)"):
        prepared(mmmu, "mmmu_pro", source=mmmu / "q.jsonl", responses=mmmu / "r.jsonl")
