"""Prepared sets: what is written is read back, here and by TFDS, and what is wrong with a directory is named."""

import hashlib
import io
import json
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grain
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from dreamprm_jax.data import prepared
from dreamprm_jax.data.example import GPT, HUMAN, SYSTEM, Example, Question, Turn
from dreamprm_jax.data.images import open_image
from dreamprm_jax.data.prepared import PreparedExamples, PreparedQuestions, fingerprint, is_prepared, stored_image
from dreamprm_jax.errors import InputError

ROOT = Path(__file__).parent.parent


def noise(mode="RGB", size=(9, 7), seed=0):
    bands = {"RGB": 3, "RGBA": 4, "LA": 2, "CMYK": 4}.get(mode, 1)
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], bands), np.uint8)
    return Image.frombytes(mode, size, values.tobytes())


def saved(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chain(number, **changes):
    turns = (Turn(SYSTEM, "Judge."), Turn(HUMAN, f"<image>Größe {number}?"), Turn(GPT, "+"), Turn(HUMAN, "2"))
    row = Example(
        row=number,
        id=f"q{number}",
        turns=(*turns, Turn(GPT, "-")),
        images=(saved(noise(seed=number)), saved(noise(size=(3, 4)), "JPEG")),
        true_false=True,
        dataset="sizes",
        soft_labels=(0.25, 1.0),
        step_truth=(-1, 0),
        place=f"a.jsonl row {number}",
    )
    return row._replace(**changes)


CHAINS = [
    chain(0),
    chain(1, images=(), true_false=None, dataset=None, soft_labels=None, step_truth=None),
    chain(2, true_false=False, soft_labels=(0.5, 0.0)),
    chain(3, id=-1),
    chain(4),
]
QUESTIONS = [
    Question(0, "v1", "What <image 1>?", "A", ("red", "blue"), (saved(noise()),), ("It is A", "B"), (True, False),
             "Art", "Paintings", "Easy", "q.jsonl row 0"),
    Question(1, "v2", "How many?", "3", place="q.jsonl row 1"),
]  # fmt: skip


def write(directory, records, features, builder="toy", sizes=(2, 3)):
    directory.mkdir(parents=True)
    records, shards = iter(records), []
    for index, size in enumerate(sizes):
        path = directory / prepared.shard_name(builder, index, len(sizes))
        shards.append(prepared.write_shard(path, [next(records) for _ in range(size)]))
    prepared.write_metadata(directory, builder, features, shards, "a toy")
    (directory / prepared.REPORT).write_text(json.dumps({"shards": [shard._asdict() for shard in shards]}))
    return directory


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    directory = tmp_path_factory.mktemp("made") / "toy" / "1.0.0"
    return write(directory, map(prepared.chain_record, CHAINS), prepared.chain_features())


@pytest.fixture
def copy(tmp_path):
    return write(tmp_path / "toy" / "1.0.0", map(prepared.chain_record, CHAINS), prepared.chain_features())


def test_chains_come_back(made):
    rows = PreparedExamples(made)
    assert len(rows) == 5
    for number, original in enumerate(CHAINS):
        place = f"{made} row {number} (a.jsonl row {number})"
        assert rows[number] == original._replace(id=str(original.id), place=place)
    with pytest.raises(IndexError, match="no row 5: it has 5"):
        rows[5]


def test_questions_come_back(tmp_path):
    records = map(prepared.question_record, QUESTIONS)
    directory = write(tmp_path / "q" / "1.0.0", records, prepared.question_features(), sizes=(2,))
    rows = PreparedQuestions(directory)
    places = [f"{directory} row {n} (q.jsonl row {n})" for n in range(2)]
    assert [rows[n] for n in range(2)] == [q._replace(place=p) for q, p in zip(QUESTIONS, places, strict=True)]
    source = tfds.builder_from_directory(directory).as_data_source("train")
    assert list(source[0]["candidates"]) == [b"It is A", b"B"]
    assert source[1]["answer"] == b"3" and len(source[1]["options"]) == 0
    with pytest.raises(InputError, match="holds questions; its rows have no 'texts'"):
        PreparedExamples(directory)


def test_tfds_reads_the_same_without_tensorflow(made):
    source = tfds.builder_from_directory(made).as_data_source("train")
    assert "tensorflow" not in sys.modules
    assert len(source) == 5
    for original, row in zip(CHAINS, source, strict=True):
        assert row["id"].decode() == str(original.id)
        assert [text.decode() for text in row["texts"]] == [turn.text for turn in original.turns]
        assert row["true_false"] == (-1 if original.true_false is None else original.true_false)
        np.testing.assert_array_equal(np.asarray(row["soft_labels"]), original.soft_labels or ())
        np.testing.assert_array_equal(np.asarray(row["step_truth"]), original.step_truth or ())
        for pixels, image in zip(row["images"], original.images, strict=True):
            np.testing.assert_array_equal(pixels, open_image(image, "here"))


def test_a_set_is_the_same_bytes_whenever_it_is_made(made, copy):
    hashes = [
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}
        for directory in (made, copy)
    ]
    assert hashes[0] == hashes[1]
    assert fingerprint(made) == fingerprint(copy)


def test_a_source_goes_to_other_processes_and_threads(made):
    rows = PreparedExamples(made)
    rows[0]
    there = pickle.loads(pickle.dumps(rows))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: there[i % 5].row, range(200)))
    assert found == [i % 5 for i in range(200)]
    steps = grain.MapDataset.source(rows).shuffle(seed=0).map(lambda example: example.num_steps)
    assert [steps[i] for i in range(5)] == [2] * 5


def test_opening_a_set_is_cheap(made):
    code = (
        "import sys; from dreamprm_jax.data.prepared import PreparedExamples, fingerprint; "
        f"rows = PreparedExamples({str(made)!r}); fingerprint(rows.directory); "
        "sys.exit(bool({'jax', 'tensorflow_datasets'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_no_pixel_is_decoded_on_reading(made, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("an image was opened")

    monkeypatch.setattr(Image, "open", refuse)
    assert PreparedExamples(made)[0].images == CHAINS[0].images


# Directories that are none.


def test_what_is_no_set_is_told(tmp_path, copy):
    assert is_prepared(copy) and not is_prepared(copy.parent) and not is_prepared(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"is no prepared data set .*did you mean .*1\.0\.0\?"):
        PreparedExamples(copy.parent)
    with pytest.raises(InputError, match="prepare one with configs/prepare.py"):
        PreparedExamples(tmp_path / "nothing")
    with pytest.raises(InputError, match="holds chains"):
        PreparedQuestions(copy)


def test_an_unfinished_set_is_told(copy):
    copy.rename(copy.with_name("1.0.0.incomplete"))
    for path in (copy, copy.with_name("1.0.0.incomplete")):
        with pytest.raises(InputError, match="is not finished; the command that began it goes on"):
            PreparedExamples(path)


def change(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_another_version_and_a_damaged_record_of_the_set_are_told(copy):
    change(copy / "dataset_info.json", '"version": "1.0.0"', '"version": "2.0.0"')
    with pytest.raises(InputError, match=r"has version 2\.0\.0 of the schema, this code reads 1\.0\.0"):
        PreparedExamples(copy)
    change(copy / "dataset_info.json", '"shardLengths"', '"lengths"')
    with pytest.raises(InputError, match="metadata is not as prepare writes it"):
        PreparedExamples(copy)
    (copy / "dataset_info.json").write_text("{")
    with pytest.raises(InputError, match=r"dataset_info\.json: not JSON"):
        fingerprint(copy)


def test_a_damaged_record_names_shard_and_row(copy):
    path = copy / "toy-train.array_record-00001-of-00002"
    data = bytearray(path.read_bytes())
    data[data.index(b"\x28\xb5\x2f\xfd") + 50] ^= 255  # in the first block that zstd wrote
    path.write_bytes(data)
    rows = PreparedExamples(copy)
    assert rows[0].id == "q0"
    with pytest.raises(InputError, match=r"00001-of-00002 row \d \(row \d of the set\): is damaged") as caught:
        [rows[i] for i in range(2, 5)]
    assert str(path) in str(caught.value)


def test_a_cut_or_missing_shard_is_told(copy):
    path = copy / "toy-train.array_record-00001-of-00002"
    path.write_bytes(path.read_bytes()[:-40000])
    with pytest.raises(InputError, match=r"is not the file of \d+ bytes that was written"):
        fingerprint(copy)
    with pytest.raises(InputError, match="row 0 .row 2 of the set.: is damaged"):
        PreparedExamples(copy)[2]
    path.unlink()
    with pytest.raises(InputError, match="00001-of-00002: is missing"):
        PreparedExamples(copy)


def test_a_shard_that_fails_leaves_nothing(tmp_path):
    def records():
        yield b"one"
        raise InputError("bad")

    with pytest.raises(InputError, match="bad"):
        prepared.write_shard(tmp_path / "shard", records())
    assert not list(tmp_path.iterdir())


# Images: what is stored is decoded to the same pixels by Pillow, by us and by TFDS.


def turned_jpeg():
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(noise(), "JPEG", exif=exif)


def sixteen_bits():
    """An RGB PNG of 16 bits a channel, which Pillow itself cannot write."""
    import struct
    import zlib

    def part(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + noise(size=(18, 1), seed=n).tobytes() for n in range(7))
    header = struct.pack(">IIBBBBB", 9, 7, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", zlib.compress(rows)) + part(b"IEND", b"")


def frames(kind):
    return saved(noise(), kind, save_all=True, append_images=[noise(seed=1)])


def palette(transparency=None):
    image = noise().quantize(16)
    return saved(image) if transparency is None else saved(image, transparency=transparency)


KEPT = {
    "png": saved(noise()),
    "jpeg": saved(noise(), "JPEG"),
    "progressive jpeg": saved(noise(), "JPEG", progressive=True),
}
REPLACED = {
    "palette": palette(),
    "palette with transparency": palette(3),
    "palette with alpha": palette(bytes(range(16))),
    "RGB with a transparent colour": saved(noise(), transparency=(1, 2, 3)),
    **{f"{mode} png": saved(noise(mode)) for mode in ("RGBA", "LA", "L")},
    "1-bit png": saved(noise("L").convert("1")),
    "grey with a transparent value": saved(noise("L"), transparency=5),
    "CMYK jpeg": saved(noise("CMYK"), "JPEG"),
    "grey jpeg": saved(noise("L"), "JPEG"),
    "16-bit grey png": saved(Image.fromarray(np.arange(63, dtype=np.uint16).reshape(7, 9) * 1000)),
    "16-bit rgb png": sixteen_bits(),
    "turned jpeg": turned_jpeg(),
    "animated gif": frames("GIF"),
    "animated png": frames("PNG"),
    "jpeg of several pictures": frames("MPO"),
    "webp": saved(noise(), "WEBP"),
    "bmp": saved(noise(), "BMP"),
    "tiff": saved(noise(), "TIFF"),
    "ppm": saved(noise(), "PPM"),
    "mostly metadata": saved(noise()) + bytes(2**17),
}


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("name", [*KEPT, *REPLACED])
@pytest.mark.parametrize("as_file", [False, True])
def test_a_stored_image_has_the_pixels_of_the_original(name, as_file, tmp_path):
    original = {**KEPT, **REPLACED}[name]
    source = original
    if as_file:
        source = tmp_path / "image"
        source.write_bytes(original)
    stored = stored_image(source, "a row")
    assert stored_image(source, "a row", checked=True) == stored
    assert (stored == original) == (name in KEPT)
    expected = np.asarray(open_image(original, "a row"))
    np.testing.assert_array_equal(open_image(stored, "a row"), expected)
    np.testing.assert_array_equal(tfds.features.Image(shape=(None, None, 3)).decode_example_np(stored), expected)
    with Image.open(io.BytesIO(stored)) as image:
        assert (image.mode, getattr(image, "n_frames", 1)) == ("RGB", 1)
        assert "transparency" not in image.info and image.getexif().get(0x0112, 1) == 1


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF"])
def test_a_truncated_image_is_refused(kind, tmp_path):
    (tmp_path / "cut").write_bytes(saved(noise(size=(200, 200)), kind)[:-3000])
    with pytest.raises(InputError, match='a.jsonl row 3: "image" .*cut" cannot be read as an image'):
        stored_image(tmp_path / "cut", "a.jsonl row 3")


def test_an_image_that_is_too_large_or_not_there_is_refused(tmp_path):
    Image.new("RGB", (9500, 9500)).save(tmp_path / "large.png")
    for checked in (False, True):
        with pytest.raises(InputError, match=r"large\.png\" is too large"):
            stored_image(tmp_path / "large.png", "here", checked=checked)
        with pytest.raises(InputError, match=r"none\.png\" cannot be read"):
            stored_image(tmp_path / "none.png", "here", checked=checked)
