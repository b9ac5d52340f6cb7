"""A checkpoint that is not what was saved is told and set aside; what is read is what was saved, to the bit."""

import json
import random
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from running import arrays, assert_same, finished, lines, stopped  # noqa: F401 - fixtures
from small_run import small

from configs import table
from dreamprm_jax import checkpoint
from dreamprm_jax.checkpoint import bit_sums, check_sums
from dreamprm_jax.errors import InputError
from dreamprm_jax.experiment import run_training
from dreamprm_jax.loading import load_workdir

pytestmark = pytest.mark.usefixtures("compilation_cache")


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("damage", [truncated, flipped, Path.unlink])
@pytest.mark.parametrize("which", ["data", "progress"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_taken(
    stopped, finished, tmp_path, capsys, damage, which
):
    workdir = tmp_path / "run"
    shutil.copytree(stopped, workdir)
    newest = workdir / "checkpoints/7"
    damage(largest(newest) if which == "data" else newest / "progress/metadata")
    if which == "progress" and damage is not flipped:  # a model's own reader looks at its parameters alone
        with pytest.raises(InputError, match=f"{newest}: is damaged") as found:
            load_workdir(workdir)
        assert "\n" not in str(found.value)
    run_training(small(table.get_config()), workdir)
    assert f"{newest}: is damaged (" in capsys.readouterr().err
    assert (workdir / "damaged/7").is_dir()
    assert_same(workdir, finished)


def test_without_a_good_checkpoint_a_run_says_so_and_takes_nothing_back(stopped, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(stopped, workdir)
    for step in (5, 7):
        truncated(workdir / f"checkpoints/{step}/progress/metadata")
    with pytest.raises(InputError, match="checkpoints/5: is damaged .*, was the only one, .* begins the run anew"):
        run_training(small(table.get_config()), workdir)
    assert sorted(path.name for path in (workdir / "damaged").iterdir()) == ["5", "7"]
    assert lines(workdir) == lines(stopped)


@pytest.mark.parametrize(
    "error", [OSError(5, "Input/output error"), MemoryError(), jax.errors.JaxRuntimeError("INTERNAL")]
)
def test_what_says_nothing_of_the_bytes_is_no_damage(stopped, tmp_path, monkeypatch, error):
    def restore(self, *arguments, **options):
        raise error

    workdir = tmp_path / "run"
    shutil.copytree(stopped, workdir)
    monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "restore", restore)
    with pytest.raises(type(error)):
        run_training(small(table.get_config()), workdir)
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["5", "7"]


def test_what_a_kill_cut_short_is_cleared(stopped, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(stopped, workdir)
    left = workdir / "checkpoints/6.orbax-checkpoint-tmp"
    shutil.copytree(workdir / "checkpoints/5", left)
    run_training(small(table.get_config()), workdir)
    assert not left.exists()


def test_every_bit_of_every_file_of_a_checkpoint_counts(stopped, finished, tmp_path):
    """One file after the other, a bit at a place of its own: what is read is what was saved, or it is not read."""
    rng = random.Random(1)
    saved = arrays(finished)
    for path in sorted(path for path in (finished / "checkpoints/10").rglob("*") if path.is_file()):
        for _ in range(3):
            workdir = tmp_path / "run"
            shutil.copytree(finished, workdir)
            spoilt = workdir / path.relative_to(finished)
            content = bytearray(spoilt.read_bytes())
            if not content:
                continue
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            spoilt.write_bytes(content)
            try:
                _, params = load_workdir(workdir)
            except InputError as error:
                assert "is damaged" in str(error)
            else:
                wanted = {name: leaf for name, leaf in saved.items() if "'params'" in name}
                found = jax.tree_util.tree_leaves_with_path(params)
                assert len(found) == len(wanted)
                for (key, leaf), (name, truth) in zip(found, wanted.items(), strict=True):
                    assert name.endswith(jax.tree_util.keystr(key))
                    np.testing.assert_array_equal(leaf, truth)
            shutil.rmtree(workdir)


def test_the_sums_tell_any_change():
    tree = {"a": np.arange(12, dtype=np.float32).reshape(3, 4), "b": [np.ones(5, jax.numpy.bfloat16), np.int32(3)]}
    tree = jax.tree.map(jax.numpy.asarray, tree)
    sums = bit_sums(tree)
    assert set(sums) == {"a", "b/0", "b/1"}
    check_sums(tree, json.loads(json.dumps(sums)))
    swapped = tree["a"].at[0, 0].set(tree["a"][2, 3]).at[2, 3].set(tree["a"][0, 0])
    for name, other in (
        ("a", tree | {"a": tree["a"].at[1, 2].multiply(1 + 2**-23)}),
        ("a", tree | {"a": swapped}),
        ("b/0", tree | {"b": [tree["b"][0].at[4].set(-1), tree["b"][1]]}),
        ("b/1", tree | {"b": [tree["b"][0], tree["b"][1] + 1]}),
    ):
        with pytest.raises(ValueError, match=f"{name} is not what was saved, 1 of 3"):
            check_sums(other, sums)
