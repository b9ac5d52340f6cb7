"""Runs of small_run.py and what they leave: finished, stopped on the way, compared."""

import json
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from small_run import small

from configs import table
from dreamprm_jax import train
from dreamprm_jax.experiment import run_training


class Killed(Exception):
    """What `killed_after` raises."""


def killed_after(num_steps, monkeypatch):
    """Ends a run right after it has sent off that many steps: nothing more is written, as at a kill."""
    original, count = train._Logger.push, 0

    def push(logger, *step):
        nonlocal count
        original(logger, *step)
        count += 1
        if count == num_steps:
            raise Killed

    monkeypatch.setattr(train._Logger, "push", push)


def lines(workdir, name="metrics.jsonl"):
    """The rows of one of a run's files; none before there is one."""
    path = workdir / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def without_clocks(rows):
    """Rows without what no second run has again."""
    return [{key: value for key, value in row.items() if "second" not in key} for row in rows]


def arrays(workdir):
    """All arrays of the newest checkpoint, by name."""
    with ocp.CheckpointManager(workdir / "checkpoints") as manager:
        saved = manager.restore(manager.latest_step(), args=ocp.args.Composite(arrays=ocp.args.StandardRestore()))
    found = jax.tree_util.tree_leaves_with_path(saved["arrays"])
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in found}


def assert_same(workdir, whole):
    """Parameters, both optimizers, the table, the logs, the results: to the bit."""
    assert without_clocks(lines(workdir)) == without_clocks(lines(whole))
    for name in ("instance_weights.jsonl", "meta_params.safetensors", "test_scores.jsonl"):
        assert (workdir / name).read_bytes() == (whole / name).read_bytes()
    found, wanted = arrays(workdir), arrays(whole)
    assert found.keys() == wanted.keys()
    for name, leaf in wanted.items():
        np.testing.assert_array_equal(found[name], leaf, err_msg=name)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run in the midst of its steps, with two checkpoints."""
    workdir = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patched:
        killed_after(9, patched)  # the sixth of the weighted phase
        with pytest.raises(Killed):
            run_training(small(table.get_config()), workdir)
    assert sorted(int(path.name) for path in (workdir / "checkpoints").iterdir()) == [5, 7]
    return workdir


@pytest.fixture(scope="module")
def finished(stopped, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("stopped") / "finished"
    shutil.copytree(stopped, workdir)
    run_training(small(table.get_config()), workdir)
    return workdir
