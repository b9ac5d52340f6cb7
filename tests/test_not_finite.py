"""A loss or a gradient that is not finite: nothing moves, the rows are written down, a hopeless run says so."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from running import lines
from small_run import small
from toy import NUM_EXAMPLES, batch_of, small_problem

from configs import table
from dreamprm_jax import bilevel, build, losses, optimizers, train, weighting
from dreamprm_jax.errors import InputError, Stopped
from dreamprm_jax.experiment import run_training
from dreamprm_jax.hypergradient import ESTIMATORS
from dreamprm_jax.inner import advance
from dreamprm_jax.metrics import read_metrics

TABLE = weighting.instance_table(NUM_EXAMPLES, "projected", 0.0, 3.0)


def poisoned(problem, bad_row, value):
    """The problem, where the loss of a row is `value` times what it is."""

    def spoilt(params, batch):
        found, outputs = problem.losses(params, batch)
        return found * jnp.where(batch.example_id == bad_row, value, 1.0), outputs

    return problem._replace(losses=spoilt)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("moment_dtype", [None, "bfloat16"])
def test_no_estimator_lets_a_bad_row_move_anything(name, moment_dtype):
    tx = optimizers.adamw(lambda count: 0.1, weight_decay=0.1, moment_dtype=moment_dtype)
    meta_tx = optimizers.per_entry_rmsprop(lambda count: 0.1)
    problem, params = small_problem(tx, TABLE)
    state = bilevel.init_state(problem.inner_tx, meta_tx, TABLE, params)
    step = jax.jit(
        lambda problem, state, batch: bilevel.bilevel_step(
            problem, ESTIMATORS[name], meta_tx, TABLE, state, batch, batch
        ),
        static_argnums=0,
    )
    good, bad = batch_of([0, 1, 2, 3]), batch_of([1, 2, 4, 5])
    state, _ = step(problem, state, good)
    after, metrics = step(poisoned(problem, 5, jnp.nan), state, bad)
    assert not np.isfinite(metrics["grad_norm"])
    kept = [(state.train.params, after.train.params), (state.meta_params, after.meta_params)]
    kept += [(state.train.opt_state[0], after.train.opt_state[0]), (state.meta_opt_state[0], after.meta_opt_state[0])]
    assert after.meta_opt_state[1].count == after.train.opt_state[-1].count == after.train.step == 2  # schedules go on
    jax.tree.map(np.testing.assert_array_equal, *zip(*kept, strict=True))
    onward, metrics = step(problem, after, good)
    assert np.isfinite(metrics["grad_norm"])
    moved = [
        not np.array_equal(a, b)
        for a, b in zip(*map(jax.tree.leaves, (after.train.params, onward.train.params)), strict=True)
    ]
    assert all(moved)


def test_a_loss_that_is_not_finite_has_no_finite_gradient():
    """A logit of minus infinity: the loss is infinite, the softmax's gradient would not be."""
    logits = jnp.zeros((2, 1, 5)).at[0, 0, 3].set(-jnp.inf)
    labels = jnp.full((2, 1), 3)

    def total(logits, row):
        return losses.example_losses(losses.label_log_probs(logits, labels), jnp.ones((2, 1), bool), "mean")[row]

    assert not np.isfinite(np.asarray(jax.grad(total)(logits, 0))[0]).all()
    assert np.isfinite(np.asarray(jax.grad(total)(jnp.zeros((2, 1, 5)), 0))).all()


def test_an_optimizer_of_ones_own_moves_no_parameter():
    problem, params = small_problem(optax.sgd(0.1, momentum=0.9), TABLE)
    state = bilevel.init_train_state(problem.inner_tx, params)
    moved, _ = advance(problem, state, jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.inf), params))
    jax.tree.map(np.testing.assert_array_equal, moved, params)


def test_a_run_goes_on_past_a_bad_row_and_writes_it_down(tmp_path, monkeypatch, capsys):
    original, spoilt = build.prm_problem, 5
    monkeypatch.setattr(build, "prm_problem", lambda *args: poisoned(original(*args), spoilt, jnp.inf))
    cfg = small(table.get_config())
    cfg.pretrain.num_steps = cfg.cold_start.num_steps = 0
    run_training(cfg, tmp_path / "run")
    metrics, skipped = lines(tmp_path / "run"), lines(tmp_path / "run", "skipped_steps.jsonl")
    met = [row["step"] for row in metrics if spoilt in row["example_ids"]]
    assert met and [row["step"] for row in metrics] == list(range(7))
    assert [row["step"] for row in skipped] == met == [row["step"] for row in metrics if not row.get("applied", True)]
    for row in skipped:
        assert spoilt in row["example_ids"] and len(row["meta_example_ids"]) == 4
        assert set(row["figures"]) >= {"grad_norm", "meta_grad_norm"}
    assert "NaN" not in (tmp_path / "run/metrics.jsonl").read_text()
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [step for step in range(7) if step not in met]
    assert lines(tmp_path / "run", "instance_weights.jsonl")[spoilt]["weight"] == 1.0
    assert f"not applied, since not finite: {{'step': {met[0]}" in capsys.readouterr().err


def test_too_many_in_a_row_end_the_run_at_the_last_good_checkpoint(tmp_path):
    cfg = small(table.get_config())
    cfg.inner.lr, cfg.num_steps = 1e30, 30
    with pytest.raises(
        InputError, match=r"skipped_steps\.jsonl: .* 3 in a row, .* Lower inner.lr.* checkpoint"
    ) as found:
        run_training(cfg, tmp_path / "run")
    skipped = lines(tmp_path / "run", "skipped_steps.jsonl")
    assert [row["step"] - skipped[0]["step"] for row in skipped] == [0, 1, 2]
    saved = sorted(int(path.name) for path in (tmp_path / "run/checkpoints").iterdir())
    assert str(found.value).endswith(f"the last good checkpoint is {tmp_path / 'run/checkpoints' / str(saved[-1])}")
    assert saved[-1] <= skipped[0]["step"]  # none of parameters in doubt
    assert [row["step"] for row in lines(tmp_path / "run")] == list(range(skipped[-1]["step"] + 1))


def test_a_signal_after_a_step_that_was_skipped_saves_nothing(tmp_path, monkeypatch):
    """Its parameters are in doubt until a step is applied."""
    original, stops = build.prm_problem, train._stops
    monkeypatch.setattr(build, "prm_problem", lambda *args: poisoned(original(*args), 17, jnp.inf))
    monkeypatch.setattr(train, "_stops", lambda phase, step, asked: step == 6 or stops(phase, step, asked))
    cfg = small(table.get_config())
    cfg.pretrain.num_steps = cfg.cold_start.num_steps = 0
    cfg.checkpoint_every = 2
    with pytest.raises(Stopped, match="saved up to step 4;"):
        run_training(cfg, tmp_path / "run")
    assert [row["step"] for row in lines(tmp_path / "run", "skipped_steps.jsonl")] == [5]
    assert max(int(path.name) for path in (tmp_path / "run/checkpoints").iterdir()) == 4
