"""Prepared data sets: TFDS directories of ArrayRecord shards, written and read without TensorFlow.

    OUTPUT/<builder>/<version>/
        <builder>-train.array_record-00000-of-00038, ...   the records, tf.train.Example each
        features.json, dataset_info.json                   `tfds.builder_from_directory(DIR).as_data_source("train")`
        report.json, dropped.jsonl                         what was read, kept and dropped, and why (prepare.py)

A record is a chain (`Example`) or a question (`Question`). Images are stored as files (RGB JPEG or PNG) that every
reader decodes to the same pixels; reading a record decodes none.
"""

from __future__ import annotations

import bisect
import hashlib
import io
import itertools
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, SupportsIndex

from PIL import Image

from dreamprm_jax.data.example import GPT, HUMAN, MINUS, PLUS, SYSTEM, Example, ImageSource, Question, Turn
from dreamprm_jax.data.fields import check_turn_text
from dreamprm_jax.data.images import open_image
from dreamprm_jax.documents import read_json
from dreamprm_jax.errors import InputError

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

VERSION = "1.0.0"
"""Of both schemas; a directory of another one is refused."""

SPLIT = "train"
REPORT = "report.json"
UNFINISHED = ".incomplete"
"""What a directory's name ends in until it is whole."""

_UNKNOWN = -1  # true_false
_METADATA_BYTES = 2**16
_MAX_NAME, _MAX_ROWS = 200, 2**31  # of a file, in characters; of a set
_KINDS = {"soft_labels": "float_list", "true_false": "int64_list", "step_truth": "int64_list"}


class Shard(NamedTuple):
    """One file of a set, as report.json has it."""

    name: str
    rows: int
    bytes: int  # of the file
    record_bytes: int  # of the records in it, before compression
    sha256: str


# --- Schemas.


def chain_features() -> tfds.features.FeaturesDict:
    """The schema of `Example`; a Sequence of T steps or turns holds one value each."""
    import numpy as np
    import tensorflow_datasets as tfds

    text, many = tfds.features.Text, tfds.features.Sequence
    return tfds.features.FeaturesDict(
        {
            "id": text(),
            "place": text(doc="file and row it was read from"),
            "dataset": text(doc='the domain; "" for none'),
            "images": many(tfds.features.Image(shape=(None, None, 3))),
            "roles": many(text(), doc="of each turn: system, human, gpt"),
            "texts": many(text(), doc="of each turn; a gpt turn is the label of the step before it, + or -"),
            "true_false": tfds.features.Scalar(np.int8, doc="is the final answer right? 1, 0, or -1 where not known"),
            "soft_labels": many(np.float32, doc='P("+") of each step; empty for none'),
            "step_truth": many(np.int8, doc="of each step: 1 right, -1 wrong, 0 neutral; empty for none"),
        }
    )


def question_features() -> tfds.features.FeaturesDict:
    """The schema of `Question`."""
    import numpy as np
    import tensorflow_datasets as tfds

    text, many = tfds.features.Text, tfds.features.Sequence
    return tfds.features.FeaturesDict(
        {
            "id": text(),
            "place": text(doc="file and row it was read from"),
            "text": text(doc="as asked, with <image n> where image n (from 1) belongs"),
            "answer": text(doc="a letter where there are options"),
            "options": many(text()),
            "images": many(tfds.features.Image(shape=(None, None, 3))),
            "candidates": many(text(), doc="whole responses"),
            "true_false": many(np.int8, doc="of each candidate: 1 right, 0 wrong"),
            "subject": text(doc='"" for none'),
            "image_type": text(doc='"" for none'),
            "difficulty": text(doc='"" for none'),
        }
    )


# --- Records. TFDS's own encoder writes maps in any order; a set is to be the same bytes whenever it is made.


def chain_record(example: Example) -> bytes:
    """An `Example`, its images as bytes (`stored_image`), as a serialised tf.train.Example.

    `id` becomes text; `row` and `corrupted` are left out.
    """
    return _record(
        id=[str(example.id)],
        place=[example.place],
        dataset=[example.dataset or ""],
        images=example.images,
        roles=[turn.role for turn in example.turns],
        texts=[turn.text for turn in example.turns],
        true_false=[_UNKNOWN if example.true_false is None else int(example.true_false)],
        soft_labels=example.soft_labels or (),
        step_truth=example.step_truth or (),
    )


def question_record(question: Question) -> bytes:
    """A `Question`, its images as bytes (`stored_image`), as a serialised tf.train.Example; `row` is left out."""
    return _record(
        id=[question.id],
        place=[question.place],
        text=[question.text],
        answer=[question.answer],
        options=question.options,
        images=question.images,
        candidates=question.candidates,
        true_false=[int(right) for right in question.true_false],
        subject=[question.subject or ""],
        image_type=[question.image_type or ""],
        difficulty=[question.difficulty or ""],
    )


def _record(**fields: Sequence[Any]) -> bytes:
    from tensorflow_datasets.proto import tf_example_pb2

    example = tf_example_pb2.Example()
    for name, values in fields.items():
        feature = example.features.feature[name]
        values = [value.encode() if isinstance(value, str) else value for value in values]
        kind = getattr(feature, _KINDS.get(name, "bytes_list"))
        kind.SetInParent()  # an empty list too: TFDS asks for it
        kind.value.extend(values)
    return example.SerializeToString(deterministic=True)


class _Fields:
    """The fields of one record."""

    def __init__(self, record: bytes):
        from tensorflow_datasets.proto import tf_example_pb2

        self._features = tf_example_pb2.Example.FromString(record).features.feature

    def many(self, name: str) -> tuple[Any, ...]:
        feature = self._features[name]
        kind = feature.WhichOneof("kind")
        return tuple(getattr(feature, kind).value) if kind else ()

    def texts(self, name: str) -> tuple[str, ...]:
        return tuple(value.decode() for value in self.many(name))

    def text(self, name: str) -> str:
        return self.texts(name)[0]


def _turn(role: str, text: str) -> Turn:
    """A turn of a record, which anybody may have written: it is held to what a row of JSON is."""
    if role not in (SYSTEM, HUMAN, GPT) or (role == GPT and text not in (PLUS, MINUS)):
        raise ValueError(f"a turn of {role[:20]!r} says {text[:20]!r}")
    return Turn(role, text if role == GPT else check_turn_text(text, "turn", role))


def _example(fields: _Fields, row: int, directory: str) -> Example:
    true_false = fields.many("true_false")[0]
    turns = tuple(_turn(*turn) for turn in zip(fields.texts("roles"), fields.texts("texts"), strict=True))
    return Example(
        row=row,
        id=fields.text("id"),
        turns=turns,
        images=fields.many("images"),
        true_false=None if true_false == _UNKNOWN else bool(true_false),
        dataset=fields.text("dataset") or None,
        soft_labels=fields.many("soft_labels") or None,
        step_truth=fields.many("step_truth") or None,
        place=f"{directory} row {row} ({fields.text('place')})",
    )


def _question(fields: _Fields, row: int, directory: str) -> Question:
    return Question(
        row=row,
        id=fields.text("id"),
        text=fields.text("text"),
        answer=fields.text("answer"),
        options=fields.texts("options"),
        images=fields.many("images"),
        candidates=fields.texts("candidates"),
        true_false=tuple(map(bool, fields.many("true_false"))),
        subject=fields.text("subject") or None,
        image_type=fields.text("image_type") or None,
        difficulty=fields.text("difficulty") or None,
        place=f"{directory} row {row} ({fields.text('place')})",
    )


# --- Writing.


def shard_name(builder: str, index: int, count: int) -> str:
    """The file name that TFDS expects of shard `index` of `count`."""
    return f"{builder}-{SPLIT}.array_record-{index:05d}-of-{count:05d}"


def write_shard(path: Path, records: Iterable[bytes]) -> Shard:
    """Writes a shard whole or not at all; one that is there is replaced.

    The bytes depend on the records alone, and one record is in memory at a time.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    # A record a group, so that any one of them is read alone.
    writer = ArrayRecordWriter(str(temporary), "group_size:1")
    rows = record_bytes = 0
    try:
        for record in records:
            writer.write(record)
            rows, record_bytes = rows + 1, record_bytes + len(record)
        writer.close()
        with temporary.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        size = temporary.stat().st_size
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return Shard(path.name, rows, size, record_bytes, sha256)


def write_metadata(directory: Path, builder: str, features: Any, shards: Sequence[Shard], description: str) -> None:
    """features.json and dataset_info.json of a directory whose shards are all there."""
    import tensorflow_datasets as tfds

    template = tfds.core.ShardedFileTemplate(
        data_dir=directory, dataset_name=builder, split=SPLIT, filetype_suffix="array_record"
    )
    split = tfds.core.SplitInfo(
        name=SPLIT,
        shard_lengths=[shard.rows for shard in shards],
        num_bytes=sum(shard.record_bytes for shard in shards),
        filename_template=template,
    )
    tfds.folder_dataset.write_metadata(
        data_dir=str(directory),
        features=features,
        split_infos=[split],
        version=VERSION,
        description=description,
        check_data=False,  # by TensorFlow
    )


# --- Reading.


def is_prepared(path: str | Path) -> bool:
    """Whether `path` is meant as a TFDS directory; opening it says what is wrong with one."""
    return any((Path(path) / name).is_file() for name in ("dataset_info.json", "features.json"))


def refuse_parent(path: str | Path) -> None:
    """Checks that a path of raw files is not the directory of a builder, whose prepared set is one below.

    Raises:
      InputError: it is.
    """
    if is_prepared(Path(path) / VERSION):
        raise InputError(f"{path}: holds a prepared set; did you mean {Path(path) / VERSION}?")


def holds_questions(directory: str | Path) -> bool:
    """Whether the rows of a set are questions, not chains.

    Raises:
      InputError: no set, or an unfinished one.
    """
    return "answer" in _read_info(Path(directory)).fields


def fingerprint(directory: str | Path) -> str:
    """What a run keeps to know its data again: a hash of the shards' names, sizes and hashes.

    Raises:
      InputError: not a finished set of `prepare`, or a shard has not the size that report.json says.
    """
    directory = Path(directory)
    _read_info(directory)
    path = directory / REPORT
    try:
        shards = [Shard(**shard) for shard in read_json(path, "prepare the set again")["shards"]]
        names = [_checked_name(shard.name) for shard in shards]
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: is not as prepare writes it; prepare the set again") from error
    for name, shard in zip(names, shards, strict=True):
        path = directory / name
        if not path.is_file() or path.stat().st_size != shard.bytes:
            raise InputError(f"{path}: is not the file of {shard.bytes} bytes that was written; prepare the set again")
    return hashlib.sha256(json.dumps(shards).encode()).hexdigest()


class _Info(NamedTuple):
    """What a set's metadata says."""

    builder: str
    shard_lengths: tuple[int, ...]
    fields: frozenset[str]


def _checked_name(name: str) -> str:
    """A file's name as it stands in metadata; ValueError where it would lead out of the directory."""
    if name in ("", ".", "..") or len(name) > _MAX_NAME or "\0" in name or Path(name).name != name:
        raise ValueError(name)
    return name


def _read_info(directory: Path) -> _Info:
    unfinished = directory.with_name(directory.name + UNFINISHED)
    if directory.name.endswith(UNFINISHED) or (not directory.exists() and unfinished.is_dir()):
        raise InputError(f"{directory}: is not finished; the command that began it goes on with it")
    if not is_prepared(directory):
        inside = sorted(path.parent for path in directory.glob("*/**/dataset_info.json"))
        advice = f"did you mean {inside[0]}?" if inside else "prepare one with configs/prepare.py"
        raise InputError(f"{directory}: is no prepared data set (it has no dataset_info.json); {advice}")
    names = ("dataset_info.json", "features.json")
    info, features = (read_json(directory / name, "prepare the set again") for name in names)
    try:
        builder, version, (split,) = _checked_name(info["name"]), info["version"], info["splits"]
        lengths = tuple(map(int, split["shardLengths"]))
        fields = frozenset(features["featuresDict"]["features"])
        if any(length < 0 for length in lengths) or not 0 < sum(lengths) < _MAX_ROWS:
            raise ValueError(lengths)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{directory}: its metadata is not as prepare writes it; prepare the set again") from error
    if version != VERSION:
        raise InputError(f"{directory}: has version {version} of the schema, this code reads {VERSION}; prepare again")
    return _Info(builder, lengths, fields)


class _File(NamedTuple):
    """A whole shard, as ArrayRecord's data source asks for it."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


class _Records:
    """Random access to the rows of a set: picklable, shared by threads, files opened when first read."""

    def __init__(self, directory: str | Path, field: str, parse: Callable[[_Fields, int, str], Any]):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self.directory = str(directory)
        info = _read_info(Path(directory))
        if field not in info.fields:
            holds = "questions" if "answer" in info.fields else "chains" if "texts" in info.fields else "something else"
            raise InputError(f"{directory}: holds {holds}; its rows have no {field!r}: give a set of another builder")
        count = len(info.shard_lengths)
        self._paths = [Path(directory) / shard_name(info.builder, i, count) for i in range(count)]
        self._ends = tuple(itertools.accumulate(info.shard_lengths))
        self._parse = parse
        for path in self._paths:
            if not path.is_file():
                raise InputError(f"{path}: is missing; put it back, or prepare the set again")
        files = [_File(str(path), 0, n, n) for path, n in zip(self._paths, info.shard_lengths, strict=True)]
        self._source = ArrayRecordDataSource(files)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: SupportsIndex) -> Any:
        """Row `index` of the set, images as stored bytes.

        Raises:
          IndexError: not in [0, len).
          InputError: the record is damaged; names shard and row.
        """
        row = index.__index__()
        if not 0 <= row < len(self):
            raise IndexError(f"{self.directory} has no row {row}: it has {len(self)}")
        try:
            return self._parse(_Fields(self._source[row]), row, self.directory)
        except Exception as error:  # ArrayRecord and protobuf raise types of their own
            shard = bisect.bisect_right(self._ends, row)
            raise InputError(
                f"{self._paths[shard]} row {row - (self._ends[shard - 1] if shard else 0)} (row {row} of the set): is "
                f"damaged ({type(error).__name__}: {error}); copy the shard again, or prepare the set again"
            ) from error

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.directory!r})"  # Grain keeps it with an iterator's state


class PreparedExamples(_Records):
    """The chains of a prepared set, by row.

    Raises:
      InputError: no set, an unfinished one, one of questions, or of another version of the schema.
    """

    def __init__(self, directory: str | Path):
        super().__init__(directory, "texts", _example)


class PreparedQuestions(_Records):
    """The questions of a prepared set, by row; errors as those of `PreparedExamples`."""

    def __init__(self, directory: str | Path):
        super().__init__(directory, "answer", _question)


# --- Images.


def stored_image(source: ImageSource, place: str, *, checked: bool = False) -> bytes:
    """An image as a file that any reader decodes to what `images.open_image` gives: an RGB JPEG or 8-bit RGB PNG.

    The file itself where it is one already, without transparency, orientation or animation, which readers treat
    differently, and not mostly metadata; else a new PNG.

    Args:
      source: file or bytes.
      place: begins an error's message.
      checked: `open_image` has decoded it before; it need not be decoded only to see whether it is whole.

    Raises:
      InputError: no image, a broken or truncated one, or one too large.
    """
    plain = _plain_file(source)
    if plain is not None and checked:
        return plain
    image = open_image(source, place)
    return _png(image) if plain is None else plain


def _plain_file(source: ImageSource) -> bytes | None:
    """The file's bytes where every reader sees the same pixels in them."""
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            if image.mode != "RGB" or "transparency" in image.info:
                return None
            if image.format == "PNG" and (data[24] != 8 or b"acTL" in data):  # bit depth; an animation
                return None
            if image.format == "MPO" or _is_turned(image):
                return None
            return data if len(data) <= image.width * image.height * 3 + _METADATA_BYTES else None
    except Exception:  # whatever is wrong with it, `open_image` says it
        return None


def _is_turned(image: Image.Image) -> bool:
    return image.getexif().get(0x0112, 1) != 1


def _png(image: Image.Image) -> bytes:
    image.info.clear()  # a transparent colour of the original would come along
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=3)  # half the time of 6, and a few per cent more bytes
    return file.getvalue()


def pixel_hash(source: ImageSource, place: str) -> str:
    """Of the decoded pixels: the same for one image in any lossless format."""
    image = open_image(source, place)
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
