"""The published JSON files -> Examples, every row checked.

A file is a JSON list of rows, or JSONL (one row a line, blank lines skipped); its content tells which.
`.gz` of either is read too. A row:

    {"id": str | int, "image": str | list of str | null,
     "conversations": [{"from": "system" | "human" | "gpt", "value": str}, ...],
     "true_false"?: bool, "dataset"?: str}

Other fields are left alone. Labels are exactly "+" or "-", as in all published rows: nothing is stripped.
"""

import functools
import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from dreamprm_jax.data.bad_rows import RAISE, settle
from dreamprm_jax.data.conversation import IMAGE_MARKER, check_image_markers
from dreamprm_jax.data.example import GPT, HUMAN, MINUS, PLUS, SYSTEM, Example, Turn
from dreamprm_jax.data.fields import (
    check_id,
    check_row,
    check_turn_text,
    field_error,
    find_images,
    optional_bool,
    optional_text,
    required,
    shown,
)
from dreamprm_jax.data.json_rows import list_rows, not_json, opened, read_whole
from dreamprm_jax.errors import InputError

_MAX_IMAGE_PATH = 4096  # characters; longer ones name no file on any system


class FileRules(NamedTuple):
    """What the rows of one file are checked against."""

    find_image: Callable[[str], Path | None]
    image_root: str | Path | None
    outcome_required: bool = False
    labels_required: bool = True


def read_rows(
    path: str | Path, image_root: str | Path | None, *, outcome_required: bool, labels_required: bool = True
) -> list[Example | InputError]:
    """Reads and checks a training, meta or test file, and gives each bad row's error in its place.

    Args:
      path: the file; its name as given begins `Example.place`.
      image_root: directory that holds the images; None where no row has one.
      outcome_required: meta files: every row must have "true_false".
      labels_required: False where labels are not used (scoring with every label "+"): a gpt turn may then say
        "" or null, and is read as "+".

    Returns:
      The rows in the file's order; `row` is the position among the rows, from 0.

    Raises:
      InputError: the file cannot be read, or has no rows; a JSON list that is damaged hides the rows behind the damage.
    """
    find = functools.cache(functools.partial(find_image, image_root=image_root))
    rules = FileRules(find, image_root, outcome_required, labels_required)
    found: list[Example | InputError] = []
    for row, parsed in enumerate(_parse_rows(_read_text(Path(path)), str(path))):
        try:
            found.append(parse_example(parsed, row, f"{path} row {row}", rules))
        except InputError as error:
            found.append(error)
    if not found:
        raise InputError(f"{path}: no rows; give a JSON list of rows, or JSONL")
    return found


def read_examples(
    path: str | Path, image_root: str | Path | None, *, outcome_required: bool, labels_required: bool = True
) -> list[Example]:
    """`read_rows`, for those who can use no file with a bad row.

    Raises:
      InputError: the first bad row's, with the number of others.
    """
    found = read_rows(path, image_root, outcome_required=outcome_required, labels_required=labels_required)
    settle({row: error for row, error in enumerate(found) if isinstance(error, InputError)}, len(found), RAISE)
    return found


def find_image(value: str, *, image_root: str | Path | None) -> Path | None:
    """The image that a row's path means, or None.

    Leading `/`, `./` and `../` are dropped; then the longest suffix of the path that is a file under
    `image_root` is taken. A file outside the root is never taken, even where the path or a link leads there.
    """
    if not image_root or len(value) > _MAX_IMAGE_PATH:
        return None
    root = os.path.realpath(image_root)
    parts = list(PurePosixPath(value).parts)
    while parts and parts[0] in ("/", "//", ".."):
        del parts[0]
    for start in range(len(parts)):
        candidate = os.path.join(root, *parts[start:])
        if os.path.isfile(candidate) and os.path.realpath(candidate).startswith(os.path.join(root, "")):
            return Path(image_root, *parts[start:])
    return None


def _read_text(path: Path) -> str:
    try:
        with opened(path) as file:
            content = read_whole(file, path)
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}: line {line} is not UTF-8 ({error.reason}); save it as UTF-8") from error
    except (OSError, EOFError, ValueError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read ({reason}); give a .json or .jsonl file") from error


def _parse_rows(text: str, name: str) -> Iterator[Any]:
    """The rows of a file as parsed JSON; a line that cannot be parsed is given as its InputError."""
    if text.lstrip(" \t\n\r").startswith("["):
        return (value for value, _ in list_rows(text, name))
    return _parse_lines(text, name)


def _parse_lines(text: str, name: str) -> Iterator[Any]:
    row = 0
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                yield not_json(f"{name} row {row} (line {number})", error)
            row += 1


def parse_example(row: Any, index: int, place: str, rules: FileRules) -> Example:
    """One parsed row, checked.

    Args:
      row: as parsed; the InputError that parsing gave is raised.
      index: its 0-based position, `Example.row`.
      place: begins messages ("meta.json row 17").
      rules: of its file.

    Raises:
      InputError: a row that is not as it must be.
    """
    row = check_row(row, place, '"id", "image", "conversations"')
    row_id = check_id(row, place)
    value = required(row, "image", place, "; write null for a row without image")
    images = find_images(value, place, rules.find_image, rules.image_root)
    turns = _turns(required(row, "conversations", place), place, rules.labels_required)
    check_image_markers(turns, len(images), place)
    true_false = optional_bool(row, "true_false", place)
    if true_false is None and rules.outcome_required:
        raise field_error(place, "true_false", "is missing; a meta row needs true or false")
    dataset = optional_text(row, "dataset", place)
    return Example(
        row=index, id=row_id, turns=turns, images=images, true_false=true_false, dataset=dataset, place=place
    )


def _turns(value: Any, place: str, labels_required: bool) -> tuple[Turn, ...]:
    if not isinstance(value, list) or not value:
        raise field_error(place, "conversations", f"is {shown(value)}; it must be a list of turns, and not empty")
    turns: list[Turn] = []
    for number, item in enumerate(value):
        field = f"conversations[{number}]"
        turn = _turn(item, place, field, labels_required)
        if turn.role == SYSTEM and number > 0:
            raise field_error(place, field, 'is a "system" turn; only the first turn can be one')
        if turn.role == GPT and (number == 0 or turns[-1].role != HUMAN):
            raise field_error(place, field, 'is a "gpt" turn, but no "human" turn is before it; add the step')
        turns.append(turn)
    if turns[-1].role != GPT:
        problem = f'ends with a "{turns[-1].role}" turn; the last step needs its "gpt" turn too'
        raise field_error(place, "conversations", problem)
    return tuple(turns)


def _turn(item: Any, place: str, field: str, labels_required: bool) -> Turn:
    if not isinstance(item, dict):
        raise field_error(place, field, f'is {shown(item)}; a turn is an object with "from" and "value"')
    role = item.get("from")
    if role not in (SYSTEM, HUMAN, GPT):
        raise field_error(place, f"{field}.from", f'is {shown(role)}; it must be "system", "human" or "gpt"')
    field = f"{field}.value"
    if role == GPT:
        return Turn(GPT, _label(item.get("value"), place, field, labels_required))
    text = check_turn_text(item.get("value"), place, field)
    if role == SYSTEM and IMAGE_MARKER in text:
        raise field_error(place, field, f'holds {IMAGE_MARKER}; images can stand in "human" turns only')
    return Turn(role, text)


def _label(value: Any, place: str, field: str, labels_required: bool) -> str:
    if value in (PLUS, MINUS):
        return value
    if not labels_required and value in ("", None):
        return PLUS
    raise field_error(place, field, f'is {shown(value)}; a label is exactly "{PLUS}" or "{MINUS}"')
