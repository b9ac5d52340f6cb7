"""The whole run on the embedded benchmark at a small size: files, resume, refusal, another run's model."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from running import Killed, killed_after, lines, without_clocks
from safetensors.numpy import load_file, save_file
from small_run import small

from configs import domain, net, score, table
from dreamprm_jax import bilevel, build, experiment, train, weighting
from dreamprm_jax.data import noisy_steps
from dreamprm_jax.errors import InputError
from dreamprm_jax.experiment import run_training
from dreamprm_jax.loading import load_model


def small_config(get_config=table.get_config):
    return small(get_config())


pytestmark = pytest.mark.usefixtures("compilation_cache")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "whole"
    return workdir, run_training(small_config(), workdir)


def test_a_run_leaves_every_file(finished):
    workdir, summary = finished
    names = {path.name for path in workdir.iterdir()}
    assert names == {
        "config.json", "metrics.jsonl", "tensorboard", "checkpoints", "model", "instance_weights.jsonl",
        "test_scores.jsonl",
        "meta_params.safetensors", "summary.json", "report.html", "run.lock",
    }  # fmt: skip
    assert json.loads((workdir / "summary.json").read_text()) == summary
    assert (summary["weighting"], summary["recipe"]) == ("table", "corrected")
    rules = {"pass_at_1", "majority", "weighted_vote", "prm", "oracle"}
    assert set(summary["best_of_n"]) == rules | {"num_candidates", "num_questions"}
    assert 0 <= summary["auroc"] <= 1
    assert any(path.name.startswith("events") for path in (workdir / "tensorboard").iterdir())


def test_metrics_have_a_line_a_step_with_what_the_step_did(finished):
    rows = lines(finished[0])
    assert [row["step"] for row in rows] == list(range(10))
    assert [row["phase"] for row in rows] == ["pretrain"] + ["cold_start"] * 2 + ["bilevel"] * 7
    for row in rows[:3]:
        assert not {"meta_loss", "meta_lr", "instance_weights", "meta_grad"} & set(row)
    for row in rows[3:]:
        assert len(row["example_ids"]) == len(row["instance_weights"]) == len(row["meta_grad"]) == 4
        assert {
            "inner_loss", "weighted_loss", "meta_loss", "meta_prediction", "grad_norm", "clip_active",
            "meta_grad_norm", "lr", "meta_lr", "examples_per_second",
        } <= set(row)  # fmt: skip
        assert set(row["meta_grad"]) == {str(example) for example in row["example_ids"]}
        assert row["meta_grad_norm"] > 0
    assert rows[3]["instance_weights"] == [1.0] * 4


def test_weights_are_listed_row_by_row(finished):
    workdir, _ = finished
    rows = lines(workdir, "instance_weights.jsonl")
    table_file = load_file(workdir / "meta_params.safetensors")["table"]
    visits = np.bincount([example for row in lines(workdir)[3:] for example in row["example_ids"]], minlength=len(rows))
    assert [row["example_id"] for row in rows] == list(range(len(rows)))
    np.testing.assert_allclose([row["weight"] for row in rows], table_file)
    assert [row["visits"] for row in rows] == visits.tolist()
    assert all((row["weight"] == 1.0) == (row["visits"] == 0) for row in rows)
    assert {row["corrupted"] for row in rows} == {True, False}


@pytest.mark.parametrize("last_step", [1, 5, 9])
def test_a_killed_run_goes_on_bit_for_bit(finished, tmp_path, monkeypatch, last_step):
    """Killed in the cold start, in the bilevel phase off a checkpoint, and in its last step."""
    workdir = tmp_path / "killed"
    killed_after(last_step + 1, monkeypatch)
    with pytest.raises(Killed):
        run_training(small_config(), workdir)
    monkeypatch.undo()
    summary = run_training(small_config(), workdir)
    whole, expected = finished
    assert without_clocks(lines(workdir)) == without_clocks(lines(whole))
    assert (workdir / "instance_weights.jsonl").read_bytes() == (whole / "instance_weights.jsonl").read_bytes()
    assert (workdir / "meta_params.safetensors").read_bytes() == (whole / "meta_params.safetensors").read_bytes()
    assert summary["best_of_n"] == expected["best_of_n"]


def test_a_finished_run_answers_with_its_summary(finished, monkeypatch, capsys):
    workdir, summary = finished
    monkeypatch.setattr(experiment, "train", lambda *args: pytest.fail("trained again"))
    assert run_training(small_config(), workdir) == summary
    assert "is finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("field", "content", "message"),
    [
        ("train.order", "[24]", "entry 0: 24 is not a row number from 0 to 23"),
        ("train.order", None, "cannot be read"),
        ("weighting.init", None, "not a readable safetensors file"),
    ],
)
def test_a_bad_file_is_found_before_the_workdir_is_touched(tmp_path, field, content, message):
    path = tmp_path / "file"
    if content is not None:
        path.write_text(content)
    cfg = small_config()
    cfg.update_from_flattened_dict({field: str(path)})
    with pytest.raises(InputError, match=f"{path}.*{message}"):
        run_training(cfg, tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_another_config_in_the_same_workdir_is_refused(finished):
    cfg = small_config()
    cfg.inner.lr = 0.5
    with pytest.raises(InputError, match="begun with config.inner.lr=.* now config.inner.lr=0.5"):
        run_training(cfg, finished[0])


def test_a_workdir_is_a_checkpoint(finished):
    cfg = score.get_config()
    cfg.model.checkpoint = str(finished[0])
    model = load_model(cfg.model, seed=0)
    assert model.tokenizer.vocab_size == noisy_steps.tokenizer().get_vocab_size()
    fresh = load_model(table.get_config().model, seed=small_config().seed)
    assert jax.tree.structure(model.params) == jax.tree.structure(fresh.params)
    moved = [not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (model.params, fresh.params)), strict=True)]
    assert sum(moved) > len(moved) // 2


def test_report_is_one_page_with_pictures_and_no_links(finished):
    page = (finished[0] / "report.html").read_text()
    figures, pictured = page.split("<h2>Rows of highest weight</h2>")
    assert figures.count("data:image/png;base64,") == figures.count("<img alt=") == 4
    assert pictured.count("data:image/png;base64,") == pictured.count('<article class="card">') == 20
    assert "http" not in page.split("<body>")[1].split("<pre>")[0]
    assert "flipped, corrupted" in page
    assert "<h1>DreamPRM-1.5 in JAX: table, recipe corrected</h1>" in page


def test_a_meta_batch_may_be_taken_in_parts():
    cfg = small_config()
    model = load_model(cfg.model, seed=0)
    meta = build.training_data(cfg, model).meta
    batch = next(build.stream_of(cfg, "meta", meta)(0))
    found = []
    for size in (None, 2):
        cfg.meta_micro_batch_size = size
        meta_loss = build.prm_problem(cfg, model, None, None).meta_loss
        program = jax.jit(meta_loss).lower(model.params, batch)
        found.append((program.compile()(model.params, batch), program.as_text().count("stablehlo.while")))
    (whole, loops), (parts, more_loops) = found
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), whole, parts)
    assert more_loops > loops  # it was in parts


def test_the_net_lists_each_rows_weight_when_last_seen(tmp_path):
    cfg = small_config(net.get_config)
    cfg.num_steps, cfg.ema_decay, cfg.identity_cosine_every = 4, 0.5, 2
    summary = run_training(cfg, tmp_path / "run")
    rows, metrics = lines(tmp_path / "run", "instance_weights.jsonl"), lines(tmp_path / "run")[3:]
    seen = {}
    for line in metrics:
        seen |= dict(zip(line["example_ids"], line["instance_weights"], strict=True))
    assert {row["example_id"]: row["weight"] for row in rows if row["visits"]} == pytest.approx(seen)
    assert all((row["weight"] is None) == (row["visits"] == 0) for row in rows)
    shapes = {name: leaf.shape for name, leaf in load_file(tmp_path / "run/meta_params.safetensors").items()}
    assert shapes == {
        "hidden.kernel": (3, 10), "hidden.bias": (10,), "output.kernel": (10, 1), "output.bias": (1,),
    }  # fmt: skip
    assert np.shape(metrics[0]["meta_grad"]["hidden.kernel"]) == (3, 10)
    assert ["identity_cosine" in line for line in metrics] == [True, False, True, False]
    assert all(-1 <= line["identity_cosine"] <= 1 for line in metrics[::2])
    assert {"zero_share", "v_norm", "u_norm", "identity_cosine", "effective_sample_share"} <= set(
        summary["diagnostics"]
    )


def test_five_inner_steps_learn_one_weight_per_source(tmp_path):
    cfg = small_config(domain.get_config)
    cfg.num_steps, cfg.batch_size = 2, 2
    summary = run_training(cfg, tmp_path)
    metrics = lines(tmp_path)[3:]
    assert summary["hypergradient"] == "mixed"
    assert [len(line["example_ids"]) for line in metrics] == [10, 10]
    assert [len(line["instance_weights"]) for line in metrics] == [10, 10]
    rows = lines(tmp_path, "instance_weights.jsonl")
    assert 1 < len({row["weight"] for row in rows}) <= 4
    assert load_file(tmp_path / "meta_params.safetensors")["table"].shape == (4,)


def test_the_moving_average_is_what_scores(tmp_path):
    cfg = small_config()
    cfg.num_steps, cfg.ema_decay = 2, 0.9
    run_training(cfg, tmp_path)
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        saved = manager.restore(5, args=ocp.args.Composite(arrays=ocp.args.StandardRestore()))["arrays"]
    score_cfg = score.get_config()
    score_cfg.model.checkpoint = str(tmp_path)
    loaded = load_model(score_cfg.model, seed=0).params
    for one, average, last in zip(*map(jax.tree.leaves, (loaded, saved["ema"], saved["train"]["params"])), strict=True):
        np.testing.assert_array_equal(one, average)
        assert average.shape == last.shape
    moved = [
        not np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(saved["train"]["params"]), strict=True)
    ]
    assert any(moved)


def test_an_init_file_with_a_value_that_is_not_finite_is_refused(tmp_path):
    values = np.ones(24, np.float32)
    values[3] = np.nan
    save_file({"table": values}, tmp_path / "init.safetensors")
    cfg = small_config()
    cfg.weighting.init = str(tmp_path / "init.safetensors")
    with pytest.raises(InputError, match=r"table\[3\] is nan"):
        run_training(cfg, tmp_path / "work")


def test_a_resumed_run_frees_the_fresh_state_before_it_reads_the_saved_one():
    tx, params = optax.adam(1e-3), {"kernel": jnp.ones((3, 2))}
    state = bilevel.with_ema(bilevel.init_state(tx, tx, weighting.uniform(), params))
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)

    class Saved:
        def restore_latest(self, template, sums):
            assert sums == {"leaf": 1}
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
            assert not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(template))
            return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), template)

    phase = train.Phase("bilevel", 0, 1, None, (), None)
    fresh = experiment.Snapshot(state, {"phase": "bilevel", "next_step": 1, "sums": {"leaf": 1}})
    found = experiment._restored(Saved(), (phase, tx), fresh, lambda params: (params, {}))
    assert found == experiment.Snapshot(shapes, fresh.progress)
