"""Raw files -> prepared sets: what is kept, dropped, drawn and reported, whatever the processes and however it ends."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tensorflow_datasets as tfds
from PIL import Image

from benchmarks import raw_rows
from configs import prepare as prepare_config
from configs import ranges
from dreamprm_jax import prepare
from dreamprm_jax.data import builders, passes, raw
from dreamprm_jax.data.prepared import PreparedExamples, PreparedQuestions, is_prepared
from dreamprm_jax.errors import InputError

ROOT = Path(__file__).parent.parent


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(raw, "PART_ROWS", 8)
    monkeypatch.setattr(prepare, "SHARD_ROWS", 12)
    forget()


def forget():
    """What a process remembers of images that a test then breaks."""
    passes._decode_file.cache_clear()
    passes._stored.cache_clear()


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "raw" / "images"
    folder.mkdir(parents=True)
    for number in range(6):
        Image.new("RGB", (20, 10 + number), (number, 99, 199)).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def rows(images):
    rng = random.Random(0)
    return [raw_rows.visualprm_raw_row(rng, f"images/{n % 6}.png" if n % 7 else None) for n in range(40)]


@pytest.fixture
def source(tmp_path, rows):
    """Two files of 25 and 15 rows."""
    folder = tmp_path / "raw" / "annotations"
    write_lines(folder / "ai2d_extracted_prm.jsonl", rows[:25])
    write_lines(folder / "geometry3k_extracted_prm.jsonl", rows[25:])
    return folder


def kept_by_source(summary):
    return json.loads((Path(summary["directory"]) / "report.json").read_text())["by_source"]


def config(source, output, builder="visualprm400k", **options):
    cfg = prepare_config.get_config(builder)
    cfg.seed = options.pop("seed", 0)
    options = {"images": str(Path(source).parent), "processes": 1} | options
    for name in ("on_error", "max_bad_share"):
        if name in options:
            cfg.data[name] = options.pop(name)
    for name, value in {"source": str(source), "output": str(output), **options}.items():
        cfg.prepare[name] = value if not isinstance(value, Path) else str(value)
    ranges.validate(cfg)
    return cfg


def prepared(source, output, builder="visualprm400k", **options):
    """The summary and the set."""
    summary = prepare.run_prepare(config(source, output, builder, **options), output)
    rows = (PreparedQuestions if builder == "mmmu" else PreparedExamples)(summary["directory"])
    return summary, [rows[i] for i in range(len(rows))]


def hashes(directory):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in Path(directory).iterdir()}


def dropped(summary):
    return [json.loads(line) for line in (Path(summary["directory"]) / "dropped.jsonl").read_text().splitlines()]


def test_every_row_comes_in_the_files_order(source, rows, tmp_path):
    summary, found = prepared(source, tmp_path / "out")
    assert (summary["read"], summary["kept"], summary["dropped"]) == (40, 40, {})
    for number, (row, example) in enumerate(zip(rows, found, strict=True)):
        file, place = ("ai2d", number) if number < 25 else ("geometry3k", number - 25)
        assert example.place.endswith(f"1.0.0 row {number} ({file}_extracted_prm.jsonl row {place})")
        assert example.dataset == file
        steps = row["steps_with_score"]
        assert example.soft_labels == tuple(step["score"] for step in steps)
        assert len(example.images) == (number % 7 > 0)
        assert example.turns[-2].text == steps[-1]["step"] or len(steps) == 1
    assert kept_by_source(summary) == {name: {"usable": n, "kept": n} for name, n in (("ai2d", 25), ("geometry3k", 15))}
    assert summary["counts"]["steps +"] == sum(turn.text == "+" for row in found for turn in row.turns)
    assert len(tfds.builder_from_directory(summary["directory"]).as_data_source("train")) == 40
    shards = sorted(Path(summary["directory"]).glob("*.array_record*"))
    assert [path.name[-14:] for path in shards] == ["00000-of-00003", "00001-of-00003", "00002-of-00003"]
    assert not list((tmp_path / "out" / "visualprm400k").glob("*.*.*.*")), "nothing is left beside the set"


def bad_rows(rows, images):
    """Row 2 no JSON, 5 no image file, 9 a broken image, 11 a bad score, 13 not UTF-8, 20 a copy of 3."""
    (images / "broken.png").write_bytes((images / "1.png").read_bytes()[:45])
    lines = [json.dumps(row) for row in rows]
    lines[2] = lines[2][:50]
    lines[5] = json.dumps(rows[5] | {"image": "images/none.png"})
    lines[9] = json.dumps(rows[9] | {"image": "images/broken.png"})
    lines[11] = json.dumps(rows[11] | {"steps_with_score": [{"step": "x", "score": 2}]})
    lines[13] = lines[13][:-1] + ', "x": "\udcff"}'
    lines[20] = lines[3]
    return lines


def test_bad_rows_are_left_out_and_accounted_for(rows, images, tmp_path, capsys):
    source = tmp_path / "raw" / "a.jsonl"
    source.write_bytes("\n".join(bad_rows(rows, images)).encode(errors="surrogateescape"))
    summary, found = prepared(source, tmp_path / "out", max_bad_share=0.2)
    assert (summary["read"], summary["kept"]) == (40, 34)
    assert summary["dropped"] == {
        "bad: image": 2, "bad: JSON": 2, "bad: steps_with_score": 1, "duplicate": 1,
    }  # fmt: skip
    assert [(row["row"], row["kind"]) for row in dropped(summary)] == [
        (2, "bad: JSON"), (5, "bad: image"), (9, "bad: image"), (11, "bad: steps_with_score"),
        (13, "bad: JSON"), (20, "duplicate"),
    ]  # fmt: skip
    reasons = [row["reason"] for row in dropped(summary)]
    assert '"images/none.png" is no file under' in reasons[1]
    assert 'broken.png" cannot be read as an image' in reasons[2]
    assert "not UTF-8" in reasons[4] and reasons[5] == "of a.jsonl row 3"
    assert "WARNING: 5 rows cannot be used" in capsys.readouterr().err
    places = {int(row.place.rstrip(")").rsplit(" ", 1)[1]) for row in found}
    assert places == set(range(40)) - {2, 5, 9, 11, 13, 20}


def test_too_many_bad_rows_are_an_error_and_more_patience_or_a_mended_file_is_taken(rows, images, tmp_path):
    source = tmp_path / "raw" / "a.jsonl"
    source.write_bytes("\n".join(bad_rows(rows, images)).encode(errors="surrogateescape"))
    work = tmp_path / "out" / "visualprm400k" / "1.0.0.work"
    with pytest.raises(
        InputError, match=r"^a.jsonl row 2: not valid JSON .* \(and 3 more bad rows: .*dropped.jsonl\)$"
    ):
        prepared(source, tmp_path / "out", on_error="raise")
    message = r"4 of 40 rows cannot be used \(bad: JSON: 2, .*share=0.05; all are in .*, the first is a.jsonl row 2"
    with pytest.raises(InputError, match=message):
        prepared(source, tmp_path / "out", max_bad_share=0.05)
    assert len((work / "dropped.jsonl").read_text().splitlines()) == 4
    assert not is_prepared(work.with_name("1.0.0"))
    (images / "none.png").write_bytes((images / "0.png").read_bytes())
    assert prepared(source, tmp_path / "out", max_bad_share=0.1)[0]["kept"] == 35


def test_broken_images_alone_can_be_too_many_and_scans_are_kept_then(source, images, tmp_path):
    (images / "1.png").write_bytes(b"broken")
    work = tmp_path / "out" / "visualprm400k" / "1.0.0.work"
    message = r'^ai2d_extracted_prm.jsonl row 1: "image" .*1.png.*\(and \d more bad rows: .*Where images have'
    with pytest.raises(InputError, match=message):
        prepared(source, tmp_path / "out", on_error="raise")
    scanned = (work / "scan-00000.npz").stat().st_ino
    with pytest.raises(InputError, match=r"of 40 rows cannot be used \(bad: image: \d\)"):
        prepared(source, tmp_path / "out", max_bad_share=0.1)
    assert (work / "scan-00000.npz").stat().st_ino == scanned


# The sample.


def texts(found):
    return {row.turns[1].text for row in found}


def test_a_sample_is_seeded_and_knows_no_order_of_files(source, rows, tmp_path):
    first, same = (texts(prepared(source, tmp_path / name, sample=15)[1]) for name in ("a", "b"))
    other = texts(prepared(source, tmp_path / "c", sample=15, seed=1)[1])
    random.Random(1).shuffle(rows)
    write_lines(tmp_path / "raw" / "turned.jsonl", rows)
    turned = texts(prepared(tmp_path / "raw" / "turned.jsonl", tmp_path / "d", images=source.parent, sample=15)[1])
    assert first == same == turned != other
    assert len(first) == 15
    more = texts(prepared(source, tmp_path / "e", sample=20)[1])
    assert first < more


def test_a_sample_is_balanced_and_a_small_stratum_is_filled_up(source, tmp_path):
    stale = tmp_path / "a" / "visualprm400k" / "1.0.0.incomplete" / "x.array_record-00000-of-00001.7.tmp"
    write_lines(stale, ["of a killed writer"])
    summary, _ = prepared(source, tmp_path / "a", sample=20, balance="source")
    assert not list(Path(summary["directory"]).glob("*.tmp"))
    assert {name: n["kept"] for name, n in kept_by_source(summary).items()} == {"ai2d": 10, "geometry3k": 10}
    summary, _ = prepared(source, tmp_path / "b", sample=34, balance="source")
    assert {name: n["kept"] for name, n in kept_by_source(summary).items()} == {"ai2d": 19, "geometry3k": 15}
    _, found = prepared(source, tmp_path / "c", sample=10, balance="outcome")
    assert sum(builders.outcome_of(row) for row in found) == 5
    summary, _ = prepared(source, tmp_path / "d", sample=50)
    assert (summary["kept"], summary["short_of_sample"]) == (40, 10)


def test_a_broken_image_in_the_sample_is_replaced_by_the_next_row(source, images, tmp_path):
    _, whole = prepared(source, tmp_path / "a", sample=15)
    used = {row.images[0] for row in whole if row.images}
    for path in sorted(path for path in images.iterdir() if path.read_bytes() in used)[:4]:  # replacements break too
        path.write_bytes(b"broken")
    forget()
    summary, found = prepared(source, tmp_path / "b", sample=15, max_bad_share=1.0)
    assert summary["kept"] == 15 and summary["dropped"]["bad: image"] > 0
    gone = texts(whole) - texts(found)
    assert len(gone) > 0 and len(texts(found) - texts(whole)) == len(gone)
    next_ones = texts(prepared(source, tmp_path / "c", sample=30, max_bad_share=1.0)[1])
    assert texts(found) < next_ones


# What is left out.


def mmmu_question(number, image, **changes):
    return {
        "id": f"validation_Art_{number}",
        "question": f"Question {number} <image 1> asks which of these very old paintings is the oldest one of all?",
        "options": ["red", "blue"],
        "answer": "A",
        "image_1": image,
    } | changes


@pytest.fixture
def test_set(images, tmp_path):
    for number in range(2):
        Image.new("RGB", (30, 30), (200, number, 9)).save(images / f"test{number}.png")
    path = tmp_path / "raw" / "test_set.jsonl"
    write_lines(path, [mmmu_question(n, f"images/test{n}.png") for n in range(2)])
    return path


def test_questions_of_the_test_set_are_left_out(rows, images, test_set, tmp_path):
    with Image.open(images / "test1.png") as image:
        image.quantize().save(images / "other name.png")  # the same pixels
    rows[4]["question"] = (
        "<image>\nQuestion 0 asks  WHICH of these very old paintings is the oldest one of all?\nA. red"
    )
    rows[8]["image"] = "images/other name.png"
    write_lines(tmp_path / "raw" / "a.jsonl", rows)
    for name, exclude in (("raw", test_set), ("set", Path(prepared(test_set, tmp_path / "t", "mmmu")[0]["directory"]))):
        summary, _ = prepared(tmp_path / "raw" / "a.jsonl", tmp_path / name, exclude=exclude)
        assert [(row["row"], row["kind"]) for row in dropped(summary)] == [
            (4, "excluded: question"), (8, "excluded: image"),
        ]  # fmt: skip


# The other builders.


def test_mmmu_pro_joins_responses_to_questions(images, test_set, tmp_path, capsys):
    pro = [mmmu_question(n, f"images/{n}.png", id=f"test_Art_{n}", question=f"What {n}?") for n in range(3)]
    hidden = mmmu_question(9, "images/0.png", id="test_Art_9", answer="?")
    write_lines(tmp_path / "raw" / "pro.jsonl", [*pro, mmmu_question(1, "images/test1.png"), hidden])
    answers = [{"id": f"test_Art_{n}", "response": f"Look {n}.\n\nAnswer: {'AB'[n % 2]}"} for n in (0, 1, 2, 9)]
    write_lines(tmp_path / "responses.jsonl", [*answers, answers[1] | {"id": "validation_Art_1"}, {"id": "none"}])
    source = tmp_path / "raw" / "pro.jsonl"
    options = {"images": images.parent, "responses": tmp_path / "responses.jsonl", "max_bad_share": 1.0}
    summary, found = prepared(source, tmp_path / "a", "mmmu_pro", **options)
    assert [(row.id, row.true_false, row.dataset) for row in found] == [
        ("test_Art_0", True, "Art"), ("test_Art_1", False, "Art"), ("test_Art_2", True, "Art"),
        ("validation_Art_1", False, "Art"),
    ]  # fmt: skip
    assert summary["dropped"] == {"bad: id": 2}
    assert "whose question cannot be used (pro.jsonl row 4" in dropped(summary)[0]["reason"]
    assert (summary["counts"]["right answers"], summary["counts"]["wrong answers"]) == (2, 2)
    assert "validation split are in it" in capsys.readouterr().err
    summary, found = prepared(source, tmp_path / "b", "mmmu_pro", exclude=test_set, **options)
    assert [row.id for row in found] == ["test_Art_0", "test_Art_1", "test_Art_2"]
    assert summary["dropped"] == {"bad: id": 2, "excluded: id": 1}
    with pytest.raises(InputError, match=r"--config\.prepare\.responses is missing"):
        prepared(source, tmp_path / "c", "mmmu_pro")


def test_mmmu_keeps_questions_with_their_candidates(images, test_set, tmp_path):
    answers = [{"id": "validation_Art_1", "response": f"Answer: {letter}"} for letter in "AB"]
    write_lines(tmp_path / "responses.jsonl", answers)
    _, found = prepared(
        test_set, tmp_path / "out", "mmmu", images=images.parent, responses=tmp_path / "responses.jsonl"
    )
    assert [question.id for question in found] == ["validation_Art_0", "validation_Art_1"]
    assert [question.candidates for question in found] == [(), ("Answer: A", "Answer: B")]
    assert found[1].true_false == (True, False)
    assert found[0].images == ((images / "test0.png").read_bytes(),)


def test_parquet_with_images_inside(images, tmp_path):
    import pyarrow
    from pyarrow import parquet

    rows = [
        mmmu_question(n, {"bytes": (images / f"{n}.png").read_bytes(), "path": None}, options="['red', 'blue']")
        for n in range(5)
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "validation.parquet", row_group_size=2)
    _, found = prepared(tmp_path / "validation.parquet", tmp_path / "out", "mmmu")
    assert [question.place.split("(")[1] for question in found] == [f"validation.parquet row {n})" for n in range(5)]
    assert [question.images for question in found] == [((images / f"{n}.png").read_bytes(),) for n in range(5)]
    (tmp_path / "validation.parquet").write_bytes(b"PAR1 broken")
    with pytest.raises(InputError, match="validation.parquet: cannot be read"):
        prepared(tmp_path / "validation.parquet", tmp_path / "other", "mmmu")


def test_visualprocessbench(images, tmp_path):
    row = {"image": ["images/1.png"], "question": "How?", "data_source": "maths",
           "response": {"steps": ["a", "b"], "process_correctness": [1, -1]}}  # fmt: skip
    write_lines(tmp_path / "raw" / "test.jsonl", [row, row])
    _, found = prepared(tmp_path / "raw" / "test.jsonl", tmp_path / "o", "visualprocessbench", images=images.parent)
    assert [example.step_truth for example in found] == [(1, -1)] * 2, "a benchmark keeps every row"


# The same output again, and other options.


def test_a_finished_set_says_so_and_other_options_are_refused(source, rows, tmp_path, capsys):
    summary, _ = prepared(source, tmp_path / "out", sample=10)
    before = hashes(summary["directory"])
    again, _ = prepared(source, tmp_path / "out", sample=10)
    assert "was finished before" in capsys.readouterr().err
    assert again["kept"] == 10 and hashes(summary["directory"]) == before
    for options, difference in (
        ({"sample": 11}, "sample=10, now sample=11"),
        ({"sample": 10, "seed": 1}, "seed=0, now"),
    ):
        with pytest.raises(InputError, match=f"was begun with {difference}"):
            prepared(source, tmp_path / "out", **options)
    write_lines(source / "ai2d_extracted_prm.jsonl", rows[:24])
    with pytest.raises(InputError, match="ai2d_extracted_prm.jsonl has changed since it was begun"):
        prepared(source, tmp_path / "out", sample=10)


def test_an_empty_set_is_an_error(source, images, tmp_path):
    for path in images.iterdir():
        path.write_bytes(b"broken")
    write_lines(source / "ai2d_extracted_prm.jsonl", [])
    rows = [json.loads(line) for line in (source / "geometry3k_extracted_prm.jsonl").read_text().splitlines()]
    write_lines(source / "geometry3k_extracted_prm.jsonl", [row for row in rows if row["image"]])
    with pytest.raises(InputError, match="no row is left; bad: image: .* .the first: .*cannot be read as an image"):
        prepared(source, tmp_path / "out", max_bad_share=1.0)


# Processes. The driver makes parts small, in the one process that cuts them.

DRIVER = """
import os, signal, sys
from pathlib import Path
from dreamprm_jax import prepare
from dreamprm_jax.data import passes, raw

def killed(settings, index, part, path):
    if part.file.startswith("geometry") and part.first_row == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    passes.scan(settings, index, part, path)

if __name__ == "__main__":
    source, output, how = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    from configs import prepare as config
    cfg = config.get_config("visualprm400k")
    cfg.prepare.source, cfg.prepare.images, cfg.prepare.output = str(source), str(source.parent), str(output)
    cfg.prepare.processes, cfg.prepare.sample = 2, 30
    raw.PART_ROWS, prepare.SHARD_ROWS = 8, 12
    if how == "killed":
        prepare.passes = type("Passes", (), {**vars(passes), "scan": staticmethod(killed)})
    try:
        prepare.run_prepare(cfg, output)
    except prepare.InputError as error:
        sys.exit(f"error: {error}")
    if "jax" in sys.modules:
        sys.exit("jax was loaded")
"""


@pytest.fixture
def command(source, tmp_path):
    (tmp_path / "driver.py").write_text(DRIVER)

    def command(output, how="whole"):
        return subprocess.Popen(
            [sys.executable, tmp_path / "driver.py", source, output, how],
            env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    return command


def test_a_killed_command_goes_on_and_the_set_is_the_same_to_the_byte(command, source, tmp_path):
    expected = hashes(prepared(source, tmp_path / "one", sample=30)[0]["directory"])
    output, kills, rng = tmp_path / "two", 0, random.Random(0)
    for least in sorted(rng.sample(range(1, 16), 3)):  # files that are there when it is killed
        process = command(output)
        while process.poll() is None and sum(path.is_file() for path in output.rglob("*")) < least:
            time.sleep(0.002)
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
    process = command(output)
    errors = process.communicate()[1]
    assert process.returncode == 0, errors
    assert hashes(output / "visualprm400k" / "1.0.0") == expected
    assert kills >= 2
    assert [path.name for path in (output / "visualprm400k").iterdir()] == ["1.0.0"]


def test_a_killed_worker_is_an_error_that_names_its_part(command, tmp_path):
    process = command(tmp_path / "out", "killed")
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert "error: scan, geometry3k_extracted_prm.jsonl rows 8 to 14: the process that worked on it was k" in errors
    process = command(tmp_path / "out")
    assert process.communicate(timeout=60) and process.returncode == 0


def test_two_commands_do_not_prepare_one_set(source, tmp_path):
    work = tmp_path / "out" / "visualprm400k" / "1.0.0.work"
    cfg = config(source, tmp_path / "out")
    with prepare._claimed(work, {"options": {}, "files": []}), pytest.raises(InputError, match="another command is"):
        prepare.run_prepare(cfg, tmp_path / "out")


# The command line.


def test_the_command_line_never_loads_jax(source, tmp_path):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "run.py", "--config=configs/prepare.py:visualprm400k",
         f"--config.prepare.source={source}", f"--config.prepare.images={source.parent}",
         f"--config.prepare.output={tmp_path / 'out'}", "--config.prepare.processes=2"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["kept"] == 40
    loaded = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "tensorflow_datasets" in loaded and not loaded & {"jax", "flax", "tensorflow"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("configs/prepare.py",), "needs a builder: configs/prepare.py:visualprm400k"),
        (("configs/prepare.py:mmlu",), "'mmlu' is not known; choose from visualprm400k, mmmu_pro"),
        (("configs/prepare.py:mmmu", "prepare.source=/none"), "/none: no such file or directory"),
        (("configs/prepare.py:mmmu", "prepare.balance=source"), "where all rows are taken there is nothing to balance"),
        (("configs/prepare.py:mmmu", "prepare.sampel=2"), "the nearest is --config.prepare.sample"),
    ],
)
def test_wrong_commands(arguments, message):
    flags = [f"--config={arguments[0]}", *(f"--config.{argument}" for argument in arguments[1:])]
    done = subprocess.run([sys.executable, "run.py", *flags], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
