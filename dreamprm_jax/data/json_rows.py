"""Rows written as JSON: how a list is taken apart row by row, and what is said of one that cannot be."""

import json
import re
from collections.abc import Iterator
from typing import Any

from dreamprm_jax.errors import InputError

_SPACE = re.compile(r"[ \t\n\r]*")


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
