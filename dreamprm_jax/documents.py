"""JSON documents of strangers, such as a checkpoint's config.json: read whole, so only where they are small files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dreamprm_jax.errors import InputError

MAX_BYTES = 256 * 2**20
"""Ten times what the tokenizer.json of a vocabulary of 150,000 takes."""

_PACKED, _SMALL = 100, 64 * 2**20


def is_bomb(unpacked: int, packed: int) -> bool:
    """Whether so many bytes are too many for a file of `packed`: more than 64 MiB, and a hundred times as many.

    Text as it is written shrinks to a tenth, the same letter over and over to a thousandth.
    """
    return unpacked > max(_SMALL, _PACKED * packed)


def read_bytes(path: Path, limit: int = MAX_BYTES) -> bytes:
    """The content of a regular file of at most `limit` bytes; a pipe or a device is never opened.

    Raises:
      OSError: it is not there, or cannot be read.
      ValueError: no regular file, or a larger one; says which.
    """
    if path.exists() and not path.is_file():
        raise ValueError("not a regular file")
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"larger than {limit} bytes")
    return content


def read_json(path: Path, advice: str) -> Any:
    """The value in a JSON file; of a key that stands twice in an object the last counts.

    Args:
      path: the file.
      advice: ends messages ("download it again").

    Raises:
      InputError: it cannot be read, or is no JSON: nested too deeply, a number too long, not UTF-8.
    """
    try:
        return json.loads(read_bytes(path).decode())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {advice}") from error
    except RecursionError as error:
        raise InputError(f"{path}: not JSON (nested too deeply); {advice}") from error
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); {advice}") from error
