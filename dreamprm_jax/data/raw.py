"""Raw files of any size, cut into parts that are read by themselves: JSONL, a JSON list, either as .gz, and Parquet.

A part is some thousand whole rows of one file, so its rows are read in flat memory wherever they stand; rows keep the
numbers that they have in the whole file, from 0. Blank lines of JSONL are no rows.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from dreamprm_jax.data.json_rows import check_size, lines, list_rows, not_json, opened, read_whole
from dreamprm_jax.errors import InputError

if TYPE_CHECKING:
    import pyarrow.parquet as parquet

PART_ROWS = 4096
PART_BYTES = 32 * 2**20
"""A part ends with the row that reaches one of the two."""

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")

_BATCH_ROWS = 64  # of Parquet in memory at a time: rows may hold images
_BOM = b"\xef\xbb\xbf"


class Part(NamedTuple):
    """Whole rows of one file."""

    file: str  # name, as in places: relative to the source
    kind: str  # lines | list | parquet
    first_row: int
    rows: int
    start: int  # byte of the (unpacked) file; Parquet: row group
    stop: int


class RawFile(NamedTuple):
    """A file that has been looked through."""

    name: str
    rows: int
    sha256: str  # of its content, unpacked
    parts: tuple[Part, ...]


def find_files(source: str | Path) -> dict[str, Path]:
    """The raw files that a path means, by name: the file itself, those of a directory, or those of a pattern.

    In the order of their names. A pattern, `MMMU/*/validation-*.parquet`, names files from its first folder without a
    wildcard on.

    Raises:
      InputError: there is none.
    """
    source = Path(source)
    if any(sign in str(source) for sign in "*?["):
        return _matching(source)
    if source.is_file():
        return {source.name: source}
    if not source.is_dir():
        raise InputError(f"{source}: no such file or directory; give raw files ({', '.join(SUFFIXES)})")
    found = (path for path in source.rglob("*") if path.name.endswith(SUFFIXES) and path.is_file())
    files = {path.relative_to(source).as_posix(): path for path in found}
    if not files:
        raise InputError(f"{source}: holds no raw file; they end in {', '.join(SUFFIXES)}")
    return dict(sorted(files.items()))


def pattern_root(pattern: Path) -> Path:
    """The folder above the first wildcard of a path; the path itself where it has none."""
    parts = pattern.parts
    plain = next((i for i, part in enumerate(parts) if any(sign in part for sign in "*?[")), len(parts))
    return Path(*parts[:plain])


def folder(path: str | Path) -> Path:
    """The directory that the files of a path lie in: itself, a file's, or that above a pattern's first wildcard."""
    root = pattern_root(Path(path))
    return root if root.is_dir() else root.parent


def _matching(pattern: Path) -> dict[str, Path]:
    root = pattern_root(pattern)
    found = sorted(root.glob(str(pattern.relative_to(root))))
    files = {path.relative_to(root).as_posix(): path for path in found if path.is_file()}
    if not files:
        raise InputError(f"{pattern}: no file is named so; give raw files ({', '.join(SUFFIXES)})")
    return files


def cut(name: str, path: Path, part_rows: int = PART_ROWS) -> RawFile:
    """Reads a file once and says where its parts are.

    Raises:
      InputError: it cannot be read, or a JSON list is broken (the rows behind the place cannot be found then).
    """
    if path.name.endswith(".parquet"):
        return _cut_parquet(name, path)
    try:
        with opened(path) as file:
            start = file.read(2**16).removeprefix(_BOM).lstrip()
            file.seek(0)
            cut_file = _cut_list if start.startswith(b"[") else _cut_lines
            return cut_file(name, path, file, part_rows)
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(name, error) from error


def read_rows(path: Path, part: Part, wanted: Callable[[int], bool] = lambda row: True) -> Iterator[tuple[int, Any]]:
    """The rows of a part: their numbers in the file, and what they hold as parsed JSON.

    A row that cannot be parsed is given as its InputError.

    Args:
      path: the file.
      part: from `cut`.
      wanted: rows of other numbers are skipped, unparsed.

    Raises:
      InputError: the file cannot be read.
    """
    rows = {"lines": _read_lines, "list": _read_list, "parquet": _read_parquet}[part.kind](path, part)
    try:
        for row, parse in enumerate(rows, start=part.first_row):
            if wanted(row):
                yield row, _parsed(parse, f"{part.file} row {row}")
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(part.file, error) from error


def file_rows(name: str, path: Path) -> Iterator[tuple[Any, int, str]]:
    """All rows of a file: each as parsed JSON (or its InputError), its number, and what begins messages about it.

    Raises:
      InputError: the file cannot be read.
    """
    for part in cut(name, path).parts:
        for row, value in read_rows(path, part):
            yield value, row, f"{name} row {row}"


def _parsed(parse: Callable[[], Any], place: str) -> Any:
    try:
        return parse()
    except UnicodeDecodeError as error:
        return InputError(f"{place}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8", kind="JSON")
    except (ValueError, RecursionError) as error:
        return not_json(place, error)


def _unreadable(name: str, error: Exception) -> InputError:
    reason = getattr(error, "strerror", None) or error
    return InputError(f"{name}: cannot be read ({reason}); replace it with a whole file")


# --- JSONL.


def _cut_lines(name: str, path: Path, file: BinaryIO, part_rows: int) -> RawFile:
    digest, parts = hashlib.sha256(), []
    row = first_row = start = position = 0
    for line in lines(file, name):
        digest.update(line)
        position += len(line)
        check_size(position, path)
        row += _is_row(line)
        if row - first_row == part_rows or (row > first_row and position - start >= PART_BYTES):
            parts.append(Part(name, "lines", first_row, row - first_row, start, position))
            first_row, start = row, position
    if row > first_row:
        parts.append(Part(name, "lines", first_row, row - first_row, start, position))
    return RawFile(name, row, digest.hexdigest(), tuple(parts))


def _is_row(line: bytes) -> bool:
    return bool(line.removeprefix(_BOM).strip())


def _read_lines(path: Path, part: Part) -> Iterator[Callable[[], Any]]:
    with opened(path) as file:
        file.seek(part.start)
        position = part.start
        while position < part.stop:
            line = file.readline()
            position += len(line)
            if not line:
                raise EOFError("it is shorter than it was")
            if _is_row(line):
                yield lambda line=line: json.loads(line.removeprefix(_BOM).decode())


# --- A JSON list. It is looked through as a whole, its parts are read by themselves.


def _cut_list(name: str, path: Path, file: BinaryIO, part_rows: int) -> RawFile:
    content = read_whole(file, path)
    try:
        text = content.decode()
        ends = [text.index("[") + 1, *(end for _, end in list_rows(text, name))]
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: byte {error.start} is not UTF-8 ({error.reason}); save it as UTF-8") from error
    parts, position, byte = [], ends[0], len(text[: ends[0]].encode())
    for first_row in range(0, len(ends) - 1, part_rows):
        last = min(first_row + part_rows, len(ends) - 1)
        start, byte = byte, byte + len(text[position : ends[last]].encode())
        position = ends[last]
        parts.append(Part(name, "list", first_row, last - first_row, start, byte))
    return RawFile(name, len(ends) - 1, hashlib.sha256(content).hexdigest(), tuple(parts))


def _read_list(path: Path, part: Part) -> Iterator[Callable[[], Any]]:
    with opened(path) as file:
        file.seek(part.start)
        text = file.read(part.stop - part.start).decode()
    for value, _ in list_rows(f"[{text.rstrip()[:-1]}]", part.file):
        yield lambda value=value: value


# --- Parquet.


def _parquet(path: Path, name: str) -> parquet.ParquetFile:
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(path, pre_buffer=False)
    except (OSError, pyarrow.ArrowException) as error:
        raise _unreadable(name, error) from error


def _cut_parquet(name: str, path: Path) -> RawFile:
    with _parquet(path, name) as file:
        counts = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    parts, row = [], 0
    for group, count in enumerate(counts):
        parts.append(Part(name, "parquet", row, count, group, group + 1))
        row += count
    with path.open("rb") as content:
        return RawFile(name, row, hashlib.file_digest(content, "sha256").hexdigest(), tuple(parts))


def _read_parquet(path: Path, part: Part) -> Iterator[Callable[[], Any]]:
    import pyarrow

    with _parquet(path, part.file) as file:
        try:
            for batch in file.iter_batches(_BATCH_ROWS, row_groups=range(part.start, part.stop)):
                for value in batch.to_pylist():
                    yield lambda value=value: value
        except (pyarrow.ArrowException, ValueError, OverflowError) as error:  # also values that Python has no type for
            raise _unreadable(part.file, error) from error
