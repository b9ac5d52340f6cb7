"""A whole run that trains adapters, its moments in bfloat16: resumed, loaded from its workdir, and what stood still."""

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from running import Killed, killed_after, lines, without_clocks
from test_training import small_config

from configs import score
from dreamprm_jax import results
from dreamprm_jax.experiment import run_training
from dreamprm_jax.loading import load_model

pytestmark = pytest.mark.usefixtures("compilation_cache")


def adapters_config():
    cfg = small_config()
    cfg.num_steps, cfg.ema_decay, cfg.checkpoints_to_keep = 3, 0.5, 10
    cfg.model.trained, cfg.model.lora_rank, cfg.model.moment_dtype = "adapters", 2, "bfloat16"
    return cfg


def run_and_catch(cfg, workdir):
    """(summary, the parameters that scored)."""
    caught = {}
    original = results.finish

    def finish(cfg, workdir, model, *rest):
        caught["params"] = model.params
        return original(cfg, workdir, model, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "finish", finish)
        return run_training(cfg, workdir), caught["params"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "whole"
    return workdir, *run_and_catch(adapters_config(), workdir)


def saved(workdir, step):
    with ocp.CheckpointManager(workdir / "checkpoints") as manager:
        return manager.restore(step, args=ocp.args.Composite(arrays=ocp.args.StandardRestore()))["arrays"]


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_pretraining_moves_everything_and_the_rest_of_the_run_its_adapters(finished):
    """Steps: 1 of pretraining, 2 of the cold start, 3 weighted."""
    pretrained, cold, end = (saved(finished[0], step) for step in (1, 3, 6))
    assert not pretrained["frozen"] and set(pretrained["train"]["params"]) == {"language", "projector", "vision"}
    for later in (cold, end):
        assert set(later["train"]["params"]) == set(later["ema"]) == {"language"}
        assert not later["frozen"]["language"]["layers"]["q"].keys() & {"lora_a", "lora_b"}
        kept = jax.tree.map(lambda leaf: leaf, later["frozen"])
        for leaves in kept["language"]["layers"].values():
            leaves.pop("lora_scale", None)
        assert_same(kept, pretrained["train"]["params"])
    adapters = [state["train"]["params"]["language"]["layers"]["down"]["lora_b"] for state in (cold, end)]
    assert np.all(adapters[0] != 0) and np.all(adapters[0] != adapters[1])
    assert {leaf.dtype.name for leaf in jax.tree.leaves(end["train"]["opt_state"])} == {"int32", "bfloat16"}


def test_a_workdir_is_the_model_that_scored(finished):
    workdir, _, params = finished
    cfg = score.get_config()
    cfg.model.checkpoint = str(workdir)
    assert_same(load_model(cfg.model, seed=0).params, params)
    assert not np.array_equal(
        params["language"]["layers"]["q"]["kernel"], saved(workdir, 6)["frozen"]["language"]["layers"]["q"]["kernel"]
    )


@pytest.mark.parametrize("last_step", [0, 4])
def test_a_killed_run_goes_on_bit_for_bit(finished, tmp_path, monkeypatch, last_step):
    """Killed at the end of pretraining, after which the model is parted, and in the weighted phase."""
    killed_after(last_step + 2, monkeypatch)
    with pytest.raises(Killed):
        run_training(adapters_config(), tmp_path / "killed")
    monkeypatch.undo()
    summary, params = run_and_catch(adapters_config(), tmp_path / "killed")
    assert without_clocks(lines(tmp_path / "killed")) == without_clocks(lines(finished[0]))
    assert_same(params, finished[2])
    assert summary["best_of_n"] == finished[1]["best_of_n"]
    assert (tmp_path / "killed/test_scores.jsonl").read_bytes() == (finished[0] / "test_scores.jsonl").read_bytes()


def test_training_goes_on_from_adapters_with_new_ones(finished, tmp_path):
    """A workdir's model is an ordinary one: another run parts it anew."""
    cfg = adapters_config()
    cfg.model.checkpoint, cfg.pretrain.num_steps, cfg.cold_start.num_steps, cfg.num_steps = str(finished[0]), 0, 1, 0
    run_training(cfg, tmp_path / "next")
    kept = saved(tmp_path / "next", 1)["frozen"]["language"]["layers"]["q"]["kernel"]
    np.testing.assert_array_equal(kept, finished[2]["language"]["layers"]["q"]["kernel"])
