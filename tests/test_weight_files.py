"""Instance weights as JSON lines, CSV and Parquet: the same rows, and ids that survive whatever they hold."""

import csv
import json

import pytest
from pyarrow import parquet

from dreamprm_jax.errors import InputError
from dreamprm_jax.weight_files import read_weights, weight_figures, write_weights

IDS = [
    *(-1, "-1", 7.5, None, True, "", "a,b", 'a "quoted" one', "two\nlines", "two\r\nlines", "=1+2", "+1", "-x", "@sum"),
    *("\t=1", "'", "é 数", "\ud800", "nul\0", ["a", 1], {"file": "x.json", "row": 3}, 2**70, "1e5", "null"),
]


def lines_of(ids):
    return [
        {"example_id": row, "id": value, "weight": None if row == 2 else 1 / (row + 3), "visits": row}
        for row, value in enumerate(ids)
    ]


def from_csv(directory):
    with (directory / "weights.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_every_form_has_the_same_rows(tmp_path):
    lines = lines_of(IDS)
    write_weights(tmp_path, lines)
    assert [json.loads(text) for text in (tmp_path / "weights.jsonl").read_text().splitlines()] == lines
    rows = parquet.read_table(tmp_path / "weights.parquet").to_pylist()
    for found in (rows, from_csv(tmp_path)):
        assert [json.loads(row["id_json"]) for row in found] == IDS
        assert [type(json.loads(row["id_json"])) for row in found] == list(map(type, IDS))
        assert [int(row["example_id"]) for row in found] == list(range(len(IDS)))
        assert [float(row["weight"]) if row["weight"] not in ("", None) else None for row in found] == [
            line["weight"] for line in lines
        ]
        assert [int(row["visits"]) for row in found] == [line["visits"] for line in lines]
    assert from_csv(tmp_path)[2]["weight"] == "" and rows[2]["weight"] is None


def test_no_cell_begins_a_formula_and_no_row_is_two_lines(tmp_path):
    write_weights(tmp_path, lines_of(["=1+2", "@x", "+1", "two\nlines"]))
    assert (tmp_path / "weights.csv").read_text().count("\n") == 5
    for row in from_csv(tmp_path):
        assert row["id_json"][0] == '"'


def test_what_the_embedded_benchmark_knows_comes_along(tmp_path):
    known = [{**line, "dataset": "flipped", "corrupted": True, "loss": 0.5} for line in lines_of([1, 2])]
    write_weights(tmp_path, known)
    rows = parquet.read_table(tmp_path / "weights.parquet").to_pylist()
    assert [(row["dataset"], row["corrupted"], row["loss"]) for row in rows] == [("flipped", True, 0.5)] * 2
    write_weights(tmp_path, lines_of([1]))
    assert list(from_csv(tmp_path)[0]) == ["example_id", "id_json", "weight", "visits"]


WHOLE = '{"example_id": 1, "id": 1, "visits": 1, "weight": 1'


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ('{"example_id": 1', "row 1: not JSON"),
        ("7", 'row 1: "id" is missing'),
        ('{"example_id": 1, "id": 1, "visits": 1}', 'row 1: "weight" is missing'),
        ('{"example_id": "1", "id": 1, "visits": 1, "weight": 1}', "row 1: \"example_id\" is '1'"),
        ('{"example_id": 1, "id": 1, "visits": 1, "weight": "1"}', "row 1: \"weight\" is '1'"),
        ('{"example_id": 9223372036854775808, "id": 1, "visits": 1, "weight": 1}', 'row 1: "example_id" is 922'),
        ('{"example_id": 1, "id": 1, "visits": -1, "weight": 1}', 'row 1: "visits" is -1'),
        (WHOLE + ', "dataset": "=HYPERLINK(1)"}', "row 1: \"dataset\" is '=HYPERLINK(1)'"),
        (WHOLE + ', "dataset": 5}', 'row 1: "dataset" is 5'),
        (WHOLE + ', "corrupted": 1}', 'row 1: "corrupted" is 1'),
        (WHOLE + ', "loss": []}', 'row 1: "loss" is []'),
    ],
)
def test_a_line_that_no_run_wrote_is_named(tmp_path, second, message):
    first = json.dumps(lines_of([1])[0])
    (tmp_path / "instance_weights.jsonl").write_text(f"{first}\n{second}\n")
    with pytest.raises(InputError, match="instance_weights.jsonl") as error:
        read_weights(tmp_path)
    assert message in str(error.value)


def test_figures_are_of_the_known_weights():
    lines = [{"weight": weight, "visits": visits} for weight, visits in ((0.0, 1), (1.0, 2), (None, 0), (2.0, 0))]
    figures = weight_figures(lines)
    assert (figures["rows"], figures["drawn"]) == (4, 2)
    assert [figures[name] for name in ("lowest", "mean", "median", "highest")] == [0.0, 1.0, 1.0, 2.0]
    assert figures["lower quartile"] == 0.5 and figures["upper quartile"] == 1.5
    assert set(weight_figures([{"weight": None, "visits": 0}])) == {"rows", "drawn"}
