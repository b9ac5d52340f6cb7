"""Scores find their chains whatever order the chains of a file's questions stand in."""

import json

import numpy as np
import pytest

from dreamprm_jax.data.candidates import read_contests
from dreamprm_jax.errors import InputError
from dreamprm_jax.evaluate import read_scores
from tests.test_candidate_files import chain, write_lines


@pytest.fixture
def contests(tmp_path):
    """Two questions whose chains stand in turn: rows 0 and 2, rows 1 and 3."""
    rows = [chain(name, step) for name, step in (("q", "One."), ("p", "Two."), ("q", "Three."), ("p", "Four."))]
    return read_contests(write_lines(tmp_path / "meta.jsonl", rows))


def chains_of(contests):
    return [candidate.example for contest in contests for candidate in contest.candidates]


def line(value, **fields):
    return {"step_scores": [value / 10, value / 10], "num_tokens": 7 + value, **fields}


@pytest.mark.parametrize("order", [None, [0, 1, 2, 3], [3, 1, 0, 2]])
def test_lines_go_to_their_rows(contests, tmp_path, order):
    """As `task=score` leaves them for the same file; without "row" they are in the file's order."""
    lines = [line(row) for row in range(4)] if order is None else [line(row, row=row) for row in order]
    found = read_scores(write_lines(tmp_path / "s.jsonl", lines), chains_of(contests), "full")
    assert [example.row for example in chains_of(contests)] == [0, 2, 1, 3]
    np.testing.assert_allclose([steps[0] for steps in found.steps], [0.0, 0.2, 0.1, 0.3])
    assert found.num_tokens == [7, 9, 8, 10]


@pytest.mark.parametrize(
    "rows, message",
    [
        ([0, 1, 2, 2], 's.jsonl row 3: "row" is 2; it must be the chain\'s number, each once'),
        ([0, 1, 2, "3"], 's.jsonl row 3: "row" is "3"; it must be'),
        ([0, 1, 2, True], 's.jsonl row 3: "row" is true; it must be'),
        ([0, 1, 2, 9], 's.jsonl row 3: "row" is 9, but no chain has that number'),
    ],
)
def test_rows_that_no_chain_has(contests, tmp_path, rows, message):
    path = write_lines(tmp_path / "s.jsonl", [line(0, row=row) for row in rows])
    with pytest.raises(InputError) as error:
        read_scores(path, chains_of(contests), "full")
    assert message in str(error.value)
    assert json.loads(path.read_text().splitlines()[0])["row"] == 0
