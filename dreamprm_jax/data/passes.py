"""What `prepare` does in its processes: rows are scanned, the chosen ones' images looked at, then written.

Each pass is a function of a part (or a shard) that leaves one file, whole or not at all; where it is there already, the
pass is not made again. What it leaves is a function of the raw files and the settings alone.
"""

from __future__ import annotations

import functools
import io
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dreamprm_jax.data import builders
from dreamprm_jax.data.builders import Row, Source
from dreamprm_jax.data.choice import sample_key
from dreamprm_jax.data.example import GPT, ImageSource, Question
from dreamprm_jax.data.formats.mmmu import is_validation
from dreamprm_jax.data.images import open_image
from dreamprm_jax.data.prepared import Shard, chain_record, pixel_hash, question_record, stored_image, write_shard
from dreamprm_jax.data.raw import Part, read_rows
from dreamprm_jax.errors import InputError

VALIDATION = "rows of MMMU's validation questions"
EXCLUDED_FILE = "exclude.json"
BAD = "bad: "
"""What the kind of a dropped row begins with where the row is at fault."""

_KNOWN_IMAGES = 2**14  # files that a process remembers as whole: many rows share one
_CACHED_IMAGES = 16  # images in memory: neighbouring rows often share one


class Settings(NamedTuple):
    """What every pass knows."""

    source: Source
    work: Path  # directory of what the passes leave
    seed: int
    balance: str  # none | source | outcome | source_outcome: what the strata are


class Dropped(NamedTuple):
    """A line of dropped.jsonl."""

    file: str
    row: int
    kind: str  # "bad: FIELD", "duplicate", "excluded: id | question | image"
    reason: str


COLUMNS = np.dtype(
    [("row", np.int64), ("key", np.uint64), ("verdict", np.uint32), ("stratum", np.int64), ("source", np.int64)]
)
"""Of a row that can be used: its number in the file; its choice.sample_key, equal for copies; its builders.verdict, in
which copies may differ; indices into `names`."""


class Scan(NamedTuple):
    """What is known of the R rows of a part that can be used, and of those that cannot."""

    rows: np.ndarray  # COLUMNS [R]
    names: list[str]
    dropped: list[Dropped]


def dropped_for(error: InputError, file: str, row: int) -> Dropped:
    """A bad row."""
    return Dropped(file, row, BAD + error.kind, str(error).removeprefix(f"{file} row {row}: "))


# --- Scan.


def scan(settings: Settings, index: int, part: Part, path: Path) -> None:
    """Checks every row of a part but for its images' pixels, and names it; leaves `scan_file`."""
    if scan_file(settings.work, index).is_file():
        return
    parse = builders.parser(settings.source, part.file, settings.work)
    questions = builders.read_excluded(settings.work / EXCLUDED_FILE)
    rows, names, dropped = [], {}, []
    for number, value in read_rows(path, part):
        try:
            row = parse(value, number, f"{part.file} row {number}")
        except InputError as error:
            dropped.append(dropped_for(error, part.file, number))
            continue
        reason = builders.reason_to_exclude(row, questions)
        if reason:
            dropped.append(Dropped(part.file, number, f"excluded: {reason}", f"{reason} of a question of exclude"))
            continue
        key = sample_key(settings.seed, builders.identity(row, settings.source))
        groups = (names.setdefault(name, len(names)) for name in (_stratum(row, settings.balance), _source(row)))
        rows.append((number, key, builders.verdict(row), *groups))
    file = io.BytesIO()
    text = np.frombuffer(json.dumps([list(names), dropped]).encode(), np.uint8)
    np.savez(file, rows=np.array(rows, COLUMNS), text=text)
    _write(scan_file(settings.work, index), file.getvalue())


def scan_file(work: Path, index: int) -> Path:
    """Where the scan of part `index` is."""
    return work / f"scan-{index:05d}.npz"


def _source(row: Row) -> str:
    return builders.source_of(row) or "(none)"


def _stratum(row: Row, balance: str) -> str:
    source = _source(row) if "source" in balance else ""
    outcome = str(builders.outcome_of(row)) if "outcome" in balance else ""
    return f"{source} {outcome}"


def read_scan(work: Path, index: int) -> Scan:
    """What `scan` left."""
    with np.load(scan_file(work, index), allow_pickle=False) as saved:
        names, dropped = json.loads(saved["text"].tobytes())
        return Scan(saved["rows"], names, [Dropped(*row) for row in dropped])


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def write_json(path: Path, content: Any) -> None:
    """Writes a file whole or not at all."""
    _write(path, json.dumps(content).encode())


# --- Look.


def look(settings: Settings, turn: int, index: int, part: Part, path: Path, rows: np.ndarray) -> None:
    """Decodes every image of the given rows of a part; leaves `look_file`: the rows to be dropped."""
    if look_file(settings.work, turn, index).is_file():
        return
    pixels = builders.read_excluded(settings.work / EXCLUDED_FILE).pixels
    dropped = []
    for row in _rows(settings, part, path, rows):
        try:
            hashes = {_look_at(image, bool(pixels)) for image in row.images}
        except InputError as error:
            dropped.append(dropped_for(InputError(f"{row.place}{error}", kind=error.kind), part.file, row.row))
            continue
        if hashes & pixels:
            dropped.append(Dropped(part.file, row.row, "excluded: image", "an image of a question of exclude"))
    write_json(look_file(settings.work, turn, index), dropped)


def look_file(work: Path, turn: int, index: int) -> Path:
    """Where the look at part `index` of round `turn` is."""
    return work / f"look-{turn:03d}-{index:05d}.json"


def read_look(work: Path, turn: int, index: int) -> list[Dropped]:
    """What `look` left."""
    return [Dropped(*row) for row in json.loads(look_file(work, turn, index).read_text(encoding="utf-8"))]


def _rows(settings: Settings, part: Part, path: Path, rows: np.ndarray) -> Iterator[Row]:
    parse = builders.parser(settings.source, part.file, settings.work)
    for number, value in read_rows(path, part, set(rows.tolist()).__contains__):
        yield parse(value, number, f"{part.file} row {number}")


def _look_at(image: ImageSource, hashed: bool) -> str:
    return _decode_file(image, hashed) if isinstance(image, Path) else _decode(image, hashed)


def _decode(image: ImageSource, hashed: bool) -> str:
    """The hash of its pixels, where asked for.

    Raises:
      InputError: it cannot be decoded; the row's place is to be put before the message.
    """
    if hashed:
        return pixel_hash(image, "")
    open_image(image, "")
    return ""


_decode_file = functools.lru_cache(_KNOWN_IMAGES)(_decode)


# --- Write.


class Written(NamedTuple):
    """A finished shard and what is in it."""

    shard: Shard
    counts: dict[str, int]


Chosen = list[tuple[Part, Path, np.ndarray]]
"""Parts, and the rows taken of each."""


def write(settings: Settings, directory: Path, name: str, chosen: Chosen) -> None:
    """Writes a shard; leaves it in `directory`, and then `written_file` beside what the other passes left."""
    if written_file(settings.work, name).is_file() and (directory / name).is_file():
        return
    counts: Counter[str] = Counter()
    rows = (row for part, path, numbers in chosen for row in _rows(settings, part, path, numbers))
    shard = write_shard(directory / name, (_record(row, counts) for row in rows))
    write_json(written_file(settings.work, name), [shard, sorted(counts.items())])


def written_file(work: Path, name: str) -> Path:
    """Where the account of a shard is."""
    return work / f"{name}.json"


def read_written(work: Path, name: str) -> Written:
    """What `write` left."""
    shard, counts = json.loads(written_file(work, name).read_text(encoding="utf-8"))
    return Written(Shard(*shard), dict(counts))


def _record(row: Row, counts: Counter[str]) -> bytes:
    images = tuple(map(_stored, row.images))
    counts[f"source: {_source(row)}"] += 1
    counts["images"] += len(images)
    counts["image bytes"] += sum(map(len, images))
    if isinstance(row, Question):
        counts["candidates"] += len(row.candidates)
        counts["right candidates"] += sum(row.true_false)
        return question_record(row._replace(images=images))
    for turn in row.turns:
        if turn.role == GPT:
            counts[f"steps {turn.text}"] += 1
    if row.true_false is not None:
        counts["right answers" if row.true_false else "wrong answers"] += 1
    if is_validation(str(row.id)):
        counts[VALIDATION] += 1
    return chain_record(row._replace(images=images))


@functools.lru_cache(_CACHED_IMAGES)
def _stored(image: ImageSource) -> bytes:
    return stored_image(image, "while writing", checked=True)
