"""Instance weights for other trainers: JSON lines, CSV and Parquet with the same rows and columns.

    example_id  row of the training file, from 0: what a trainer that has the file joins on
    id_json     the row's "id" as JSON text: `json.loads` gives it back as the file has it, number, text or null
    weight      as applied; empty (null) where a net has not seen the row
    visits      how often training drew the row

and what a run on the embedded benchmark knows besides: dataset, corrupted, loss. JSON text because ids are whatever a
file holds: -1 is not "-1", and in a spreadsheet a text in quotes is never a formula. Nor is a name that begins with a
letter or digit.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dreamprm_jax.errors import InputError
from dreamprm_jax.metrics import write_json_lines

WEIGHTS_FILE = "instance_weights.jsonl"
_COLUMNS = {  # and their types, as Arrow names them
    "example_id": "int64",
    "id_json": "string",
    "weight": "double",
    "visits": "int64",
    "dataset": "string",
    "corrupted": "bool",
    "loss": "double",
}


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_number(value: Any) -> bool:
    return value is None or type(value) in (int, float)


def _is_name(value: Any) -> bool:
    """A text that no spreadsheet takes for a formula."""
    return isinstance(value, str) and re.match(r"\w", value) is not None


_ALWAYS = {"id": lambda value: True, "example_id": _is_count, "weight": _is_number, "visits": _is_count}
_SOMETIMES = {"dataset": _is_name, "corrupted": lambda value: type(value) is bool, "loss": _is_number}


def read_weights(workdir: Path) -> list[dict[str, Any]]:
    """The lines of a run's instance_weights.jsonl; none where the run has none.

    Raises:
      InputError: a line that no run wrote; names it.
    """
    path = workdir / WEIGHTS_FILE
    if not path.is_file():
        return []
    return [_read_line(text, f"{path} row {row}") for row, text in enumerate(path.read_text("utf-8").splitlines())]


def _read_line(text: str, place: str) -> dict[str, Any]:
    try:
        line = json.loads(text)
    except ValueError as error:
        raise InputError(f"{place}: not JSON ({error}); restore the file as the run wrote it") from error
    for field, is_right in (_ALWAYS | _SOMETIMES).items():
        if field in _ALWAYS and not (isinstance(line, dict) and field in line):
            raise InputError(f'{place}: "{field}" is missing; restore the file as the run wrote it')
        if field in line and not is_right(line[field]):
            raise InputError(f'{place}: "{field}" is {line[field]!r}; restore the file as the run wrote it')
    return line


def write_weights(directory: Path, lines: Sequence[dict[str, Any]]) -> None:
    """weights.jsonl, weights.csv and weights.parquet of the lines of `read_weights`."""
    write_json_lines(directory / "weights.jsonl", list(lines))
    rows = [{**line, "id_json": json.dumps(line["id"])} for line in lines]
    columns = {name: [row.get(name) for row in rows] for name in _COLUMNS if any(name in row for row in rows)}
    with (directory / "weights.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))  # None is an empty cell
    import pyarrow as pa  # loads slowly
    from pyarrow import parquet

    schema = pa.schema([(name, pa.type_for_alias(_COLUMNS[name])) for name in columns])
    parquet.write_table(pa.Table.from_pydict(columns, schema), directory / "weights.parquet")


def weight_figures(lines: Sequence[dict[str, Any]]) -> dict[str, float | int]:
    """What a model card says of the weights: rows, rows that were drawn, and how the known weights are spread."""
    known = np.array([line["weight"] for line in lines if line["weight"] is not None], np.float64)
    figures: dict[str, float | int] = {"rows": len(lines), "drawn": sum(line["visits"] > 0 for line in lines)}
    if len(known):
        low, quarter, median, three_quarters, high = np.quantile(known, (0, 0.25, 0.5, 0.75, 1))
        figures |= {"mean": known.mean(), "standard deviation": known.std(), "lowest": low, "lower quartile": quarter}
        figures |= {"median": median, "upper quartile": three_quarters, "highest": high}
    return figures
