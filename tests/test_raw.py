"""Raw files: cut between rows, each part read by itself, rows numbered as in the whole file."""

import gzip
import json

import pytest

from dreamprm_jax.data import raw
from dreamprm_jax.errors import InputError


def rows_of(name, content, tmp_path, part_rows=3):
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    file = raw.cut(name, path, part_rows)
    assert [part.first_row for part in file.parts] == list(range(0, file.rows, part_rows))
    return [row for part in file.parts for row in raw.read_rows(path, part)]


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.jsonl.gz"])
@pytest.mark.parametrize("space", ["", "\n", " \n\t"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("number", [0, 1, 3, 8])
def test_files_are_cut_between_rows(name, space, mark, number, tmp_path):
    rows = [{"text": "Ä, ]\n[" * n, "n": n} for n in range(number)]
    for ascii_only in (True, False):
        lines = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
        as_list = f"{mark}{space}[{space}" + f"{space},{space}".join(lines) + f"{space}]{space}"
        as_lines = mark + space + f"\n{space}".join(lines) + space
        for content in (as_list, as_lines):
            if content.strip("\ufeff \n\t"):
                assert rows_of(name, content.encode(), tmp_path) == list(enumerate(rows))


def test_a_broken_list_names_its_row(tmp_path):
    for text, row in (('[{"a": 1}, {"a": ]', 1), ('[{"a": 1} {"a": 2}]', 0), ('[{"a": 1}] x', 0), ('[{"a": 1},]', 1)):
        with pytest.raises(InputError, match=rf"a.json row {row} \(line 1\): not valid JSON"):
            rows_of("a.json", text.encode(), tmp_path)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n' * 1000)[:-20])
    with pytest.raises(InputError, match="b.jsonl.gz: cannot be read"):
        raw.cut("b.jsonl.gz", tmp_path / "b.jsonl.gz")
    with pytest.raises(InputError, match="no such file or directory"):
        raw.find_files(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no raw file"):
        raw.find_files(tmp_path / "empty")
