"""Checks of a row's fields that every format shares; each message names place, field and value and says what to do."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dreamprm_jax.data.conversation import find_control_token
from dreamprm_jax.errors import InputError


def field_error(place: str, field: str, problem: str) -> InputError:
    """The error for a field; `problem` goes on after its name ("is 3; it must be text")."""
    return InputError(f'{place}: "{field}" {problem}', kind=re.split(r"\W", field)[0])


def shown(value: Any) -> str:
    """A value for a message, cut to a readable length."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):  # bytes, deep nesting
        text = type(value).__name__
    return text if len(text) <= 80 else text[:77] + "..."


def check_row(row: Any, place: str, fields: str) -> dict:
    """The row itself, which must be an object; `fields` are those it should have, for the message.

    Raises:
      InputError: it is none, or it is the error that reading it gave.
    """
    if isinstance(row, InputError):
        raise row
    if not isinstance(row, dict):
        raise InputError(f"{place}: is {shown(row)}; a row is an object: {fields}")
    return row


def required(row: dict, field: str, place: str, advice: str = "; add it") -> Any:
    """The value of a field that must be there.

    Raises:
      InputError: it is missing.
    """
    if field not in row:
        raise field_error(place, field, f"is missing{advice}")
    return row[field]


def check_text(value: Any, place: str, field: str) -> str:
    """Checks for text that can be tokenised: not empty, no half of a surrogate pair.

    Raises:
      InputError: something else.
    """
    if not isinstance(value, str) or not value.strip():
        raise field_error(place, field, f"is {shown(value)}; it must be text, and not empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = ascii(value[error.start])
        raise field_error(place, field, f"holds {half}, half a surrogate pair; remove it") from error
    return value


def check_turn_text(value: Any, place: str, field: str) -> str:
    """`check_text`, for text that goes into a turn: no control token of the tokenizer either.

    Raises:
      InputError: something else.
    """
    text = check_text(value, place, field)
    token = find_control_token(text)
    if token:
        raise field_error(place, field, f"holds the control token {token}; take it out of the text")
    return text


def optional_text(row: dict, field: str, place: str) -> str | None:
    """The text of a field that may be missing or null.

    Raises:
      InputError: something else than text.
    """
    value = row.get(field)
    return None if value is None else check_text(value, place, field)


def optional_bool(row: dict, field: str, place: str) -> bool | None:
    """The value of a yes-or-no field that may be missing or null.

    Raises:
      InputError: something else than true or false.
    """
    value = row.get(field)
    if value is not None and not isinstance(value, bool):
        raise field_error(place, field, f"is {shown(value)}; it must be true or false")
    return value


def check_id(row: dict, place: str) -> str | int:
    """The row's own id.

    Raises:
      InputError: missing, or neither text nor a whole number.
    """
    row_id = required(row, "id", place)
    if not isinstance(row_id, str | int) or isinstance(row_id, bool):
        raise field_error(place, "id", f"is {shown(row_id)}; it must be text or a whole number")
    return row_id


def find_images(
    value: Any,
    place: str,
    find_image: Callable[[str], Path | None],
    image_root: str | Path | None,
    field: str = "image",
) -> tuple[Path, ...]:
    """The image files of a row's "image" (or another field): a path, a list of paths, or null for none.

    Raises:
      InputError: something else, or a path that names no file under `image_root`.
    """
    if value is None:
        return ()
    names = value if isinstance(value, list) else [value]
    if not names:
        raise field_error(place, field, "is an empty list; write null for a row without image")
    return tuple(check_image(name, place, field, find_image, image_root) for name in names)


def check_image(
    name: Any, place: str, field: str, find_image: Callable[[str], Path | None], image_root: str | Path | None
) -> Path:
    """The image file that a path means.

    Raises:
      InputError: no text, or it names no file under `image_root`.
    """
    check_text(name, place, field)
    if not image_root:
        raise field_error(place, field, f"is {shown(name)}, but no image directory is given; set one")
    image = find_image(name)
    if image is None:
        advice = "put it there, correct the path or set another image directory"
        raise field_error(place, field, f"{shown(name)} is no file under {image_root}; {advice}")
    return image
