"""Rows written as JSON: how much of a file is read, how a list is taken apart, and what is said of a row that is none.

A file may be far larger unpacked than it is, a line may have no end: both are noticed while they are read.
"""

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from dreamprm_jax.documents import is_bomb
from dreamprm_jax.errors import InputError

MAX_WHOLE = 4 * 2**30
"""Bytes of a file that is read as a whole, unpacked; parsed it takes several times as much."""

MAX_LINE = 64 * 2**20
"""Bytes of one row of JSONL."""

_CHUNK = 16 * 2**20  # bytes

_SPACE = re.compile(r"[ \t\n\r]*")


def opened(path: Path) -> BinaryIO:
    """The file's content, unpacked where its name ends in .gz."""
    return gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb")


def read_whole(file: BinaryIO, path: Path) -> bytes:
    """All of a file of `opened`.

    Raises:
      InputError: more than MAX_WHOLE, or a .gz that is a bomb.
      OSError, EOFError, zlib.error: it cannot be read.
    """
    chunks, size = [], 0
    while chunk := file.read(_CHUNK):
        chunks.append(chunk)
        size += len(chunk)
        check_size(size, path)
        if size > MAX_WHOLE:
            raise InputError(
                f"{path}: has more than {MAX_WHOLE} bytes, too many to read at once; write it as JSONL and prepare it "
                "(configs/prepare.py), which reads it in parts"
            )
    return b"".join(chunks)


def check_size(unpacked: int, path: Path) -> None:
    """Whether so many bytes can honestly come from a file.

    Raises:
      InputError: a .gz unpacks to a hundred times its size and more.
    """
    packed = path.stat().st_size if path.name.endswith(".gz") else unpacked
    if is_bomb(unpacked, packed):
        raise InputError(
            f"{path}: its {packed} bytes unpack to more than {unpacked - 1}; unpack it yourself if it is meant so"
        )


def lines(file: BinaryIO, name: str) -> Iterator[bytes]:
    """The lines of a file of `opened`, line ends included.

    Raises:
      InputError: one is longer than MAX_LINE.
    """
    number = 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            raise InputError(
                f"{name}: line {number} has more than {MAX_LINE} bytes; a row is a line of JSON: correct it"
            )
        yield line


def list_rows(text: str, name: str) -> Iterator[tuple[Any, int]]:
    """Each row of a JSON list, and where it ends in the text, its comma or the closing bracket included (characters).

    Row by row rather than at once, so that an error knows its row.

    Args:
      text: begins with the opening bracket, but for white space or a byte order mark.
      name: of the file, begins messages.

    Raises:
      InputError: damage, since nobody knows how many rows lie behind it.
    """
    decoder, row, position, mark = json.JSONDecoder(), 0, text.index("[") + 1, ","
    first = _after_space(text, position)
    if text.startswith("]", first) and _after_space(text, first + 1) == len(text):
        return  # no rows
    while mark != "]":
        try:
            value, position = decoder.raw_decode(text, _after_space(text, position))
            position = _after_space(text, position) + 1
            mark = text[position - 1 : position]
            if mark not in ("]", ","):
                raise json.JSONDecodeError('expected "," or "]"', text, position - 1)
            if mark == "]" and _after_space(text, position) < len(text):
                raise json.JSONDecodeError('text after the last "]"', text, position)
        except (ValueError, RecursionError) as error:
            line = f" (line {error.lineno})" if isinstance(error, json.JSONDecodeError) else ""
            raise not_json(f"{name} row {row}{line}", error, ", so that the rows behind it cannot be found") from error
        yield value, position
        row += 1


def not_json(place: str, error: Exception, consequence: str = "") -> InputError:
    """The error for a row or file that is no JSON; `error` is the parser's."""
    if isinstance(error, RecursionError):
        reason = "nested too deeply"
    elif isinstance(error, json.JSONDecodeError):
        reason = f"{error.msg} at column {error.colno}"
    else:
        reason = str(error)
    advice = "correct it, or write the file again if it was cut"
    return InputError(f"{place}: not valid JSON ({reason}){consequence}; {advice}", kind="JSON")


def _after_space(text: str, position: int) -> int:
    return _SPACE.match(text, position).end()
