"""Meta rows that no step sees: which they are, the loss on them, and the best checkpoint that it tells."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from running import Killed, killed_after, lines
from small_run import small
from test_never_lost import board

from configs import ranges, table
from dreamprm_jax import bilevel, build, held_out, steps, train
from dreamprm_jax.checkpoint import Checkpoints
from dreamprm_jax.data import batches
from dreamprm_jax.data.example import GPT, HUMAN, Example, Turn
from dreamprm_jax.errors import InputError, Stopped
from dreamprm_jax.experiment import run_training
from dreamprm_jax.loading import fingerprint_of_model, load_model, load_workdir

pytestmark = pytest.mark.usefixtures("compilation_cache")


def config(**fields):
    """12 meta rows of 6 questions; checkpoints at 2, 4, 6 and 7, of which two are kept."""
    cfg = small(table.get_config())
    cfg.pretrain.num_steps = cfg.cold_start.num_steps = 0
    cfg.noisy_steps.meta_questions, cfg.meta.held_out, cfg.meta_batch_size = 6, 0.4, 4
    cfg.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return cfg


def data_of(cfg):
    return build.training_data(cfg, load_model(cfg.model, cfg.seed))


def pictures_of(dataset):
    return {dataset.examples[row].images for row in dataset.rows}


# --- Which rows.


def test_the_parts_are_disjoint_and_questions_whole_and_the_same_again():
    cfg = config(noisy_steps__meta_questions=30)
    data = data_of(cfg)
    assert sorted([*data.meta.rows, *data.held_out.rows]) == list(range(60))
    assert not pictures_of(data.meta) & pictures_of(data.held_out)
    assert 12 <= len(data.held_out.rows) <= 36
    np.testing.assert_array_equal(data_of(cfg).held_out.rows, data.held_out.rows)
    meta = dataclasses.replace(data.meta, rows=np.arange(60))
    _, other = held_out.part(meta, 0.4, cfg.seed + 1, 4)
    assert other.rows.tolist() != data.held_out.rows.tolist()
    _, more = held_out.part(meta, 0.6, cfg.seed, 4)
    assert set(more.rows) > set(data.held_out.rows)
    turned = dataclasses.replace(meta, examples=meta.examples[::-1])
    _, same = held_out.part(turned, 0.4, cfg.seed, 4)
    assert sorted(59 - same.rows) == data.held_out.rows.tolist()


def test_no_step_draws_a_held_out_row():
    data, cfg = data_of(config()), config()
    plan = build.plan_of(cfg, "meta", data.meta)
    drawn = {row for number in range(len(plan)) for row in plan[number].tolist()}
    assert drawn and not drawn & set(data.held_out.rows.tolist())


def test_a_question_without_a_picture_is_its_text_before_the_steps(tmp_path):
    def chain(text, *images):
        return Example(0, "x", (Turn(HUMAN, text), Turn(GPT, "+")), images)

    heading = "\n\n### Solution Process:\n"
    one, two = (held_out.question_key(chain(f"### Question:\nHow many?{heading}{step}")) for step in ("one", "two"))
    assert one == two != held_out.question_key(chain(f"### Question:\nHow few?{heading}one"))
    (tmp_path / "a.png").write_bytes(b"picture")
    as_file = held_out.question_key(chain(f"Why?{heading}one", tmp_path / "a.png"))
    assert as_file == held_out.question_key(chain("Where? two", b"picture"))
    assert as_file != held_out.question_key(chain("Where? two", b"another"))
    assert as_file != held_out.question_key(chain("Where? two", b"picture", b"picture"))


@pytest.mark.parametrize("share", [1e-6, 1 - 1e-6])
def test_a_side_without_rows_is_refused(share):
    with pytest.raises(
        InputError, match=r"--config.meta.held_out=.*: of the 12 meta rows, which are 6 questions, seed 0"
    ):
        data_of(config(meta__held_out=share))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"meta__held_out": 1.0}, "meta.held_out=1.0: must be at least 0 and below 1"),
        ({"meta__held_out": -0.1}, "meta.held_out=-0.1: must be at least 0 and below 1"),
        ({"recipe": "published"}, "meta.held_out=0.4: the published code holds nothing out"),
        ({"meta__order": "order.json"}, "meta.held_out=0.4: meta.order replays rows exactly"),
    ],
)
def test_what_cannot_be_held_out_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ranges.validate(config(**fields))


def test_uniform_weights_need_a_meta_batch_that_can_be_taken_too():
    cfg = config(weighting__name="uniform", meta_batch_size=3, mesh__data=2)
    with pytest.raises(InputError, match="--config.meta_batch_size=3: must be a multiple of 2"):
        steps.check_rows(cfg, jax.sharding.AbstractMesh((2, 1, 1), ("data", "fsdp", "tensor")))


# --- The loss.


@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_the_loss_is_that_of_a_plain_loop_with_the_parameters_that_score(ema_decay):
    cfg = config(meta_batch_size=4)
    model = load_model(cfg.model, cfg.seed)
    data = build.training_data(cfg, model)
    assert len(data.held_out.rows) % 4  # the last batch is filled up
    weighting, levels = build.instance_weighting(cfg, data.train, model), steps.levels(cfg)

    def problem_of(frozen=None):
        return build.prm_problem(cfg, model, weighting.apply, levels.inner_tx, frozen)

    state = bilevel.init_state(levels.inner_tx, levels.meta_tx, weighting, model.params)
    if ema_decay is not None:
        state = bilevel.with_ema(state)
        state = state._replace(ema=jax.tree.map(lambda leaf: leaf * 1.5, state.ema))
    measured = held_out.measured_on(data.held_out, problem_of, 4, build.reading(cfg), None)
    plain = [
        problem_of().meta_loss(bilevel.scoring_params(state), batches.collate(data.held_out, [row]))[0]
        for row in data.held_out.rows
    ]
    assert len(set(map(float, plain))) > 1
    assert measured.num_rows == len(plain)
    np.testing.assert_allclose(measured.loss(state), np.mean(plain), rtol=1e-5)
    assert (state.ema == {}) == (ema_decay is None)


# --- The best checkpoint.

RISING = {2: 0.3, 4: 0.2, 6: 0.4, 7: 0.5}


def saved_steps(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


@pytest.fixture
def losses_by_step(monkeypatch):
    """Held-out losses as they are given, by checkpoint; the dict may be changed."""
    given = dict(RISING)
    original = held_out.measured_on

    def measured_on(*arguments):
        return original(*arguments)._replace(loss=lambda state: given[int(state.train.step)])

    monkeypatch.setattr(held_out, "measured_on", measured_on)
    return given


def assert_same_params(found, wanted):
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def differ(found, wanted):
    return any(jax.tree.leaves(jax.tree.map(lambda a, b: not np.array_equal(a, b), found, wanted)))


@pytest.fixture
def scored_params(monkeypatch):
    """The parameters that each run's results were made with, in order."""
    found = []
    from dreamprm_jax import results

    original = results.finish

    def finish(cfg, workdir, model, *rest):
        found.append(jax.device_get(model.params))
        return original(cfg, workdir, model, *rest)

    monkeypatch.setattr(results, "finish", finish)
    return found


@pytest.fixture
def params_at(monkeypatch):
    """The whole parameters at each checkpoint, by its step."""
    found = {}
    original = Checkpoints.save

    def save(self, step, snapshot):
        found[step] = jax.device_get(bilevel.scoring_params(snapshot.state))
        original(self, step, snapshot)

    monkeypatch.setattr(Checkpoints, "save", save)
    return found


def test_the_best_outlives_the_last_n_and_is_what_scores_and_loads(
    tmp_path, losses_by_step, scored_params, params_at, capsys
):
    losses_by_step |= {2: 0.2, 4: 0.2}  # of equal ones the first
    summary = run_training(config(), tmp_path / "run")
    assert saved_steps(tmp_path / "run") == [2, 6, 7]
    assert (summary["best_step"], summary["held_out_loss"]) == (2, 0.2)
    assert json.loads((tmp_path / "run/summary.json").read_text()) == summary
    assert_same_params(scored_params[0], params_at[2])
    assert_same_params(load_workdir(tmp_path / "run")[1], params_at[2])
    assert differ(params_at[2], params_at[7])
    rows = lines(tmp_path / "run", "held_out.jsonl")
    assert [(row["step"], row["held_out_loss"]) for row in rows] == list(losses_by_step.items())
    told = capsys.readouterr().err
    assert f"held-out loss of {rows[0]['num_rows']} meta rows: the best, 0.2 at step 2 scores" in told


def test_a_loss_that_is_not_finite_is_no_best_and_the_last_scores_where_all_are_so(
    tmp_path, losses_by_step, scored_params, params_at, capsys
):
    losses_by_step |= dict.fromkeys((2, 4, 6, 7), float("nan"))
    summary = run_training(config(), tmp_path / "run")
    assert not {"best_step", "held_out_loss"} & set(summary)
    assert saved_steps(tmp_path / "run") == [6, 7]
    assert_same_params(scored_params[0], params_at[7])
    assert_same_params(load_workdir(tmp_path / "run")[1], params_at[7])
    assert [row["held_out_loss"] for row in lines(tmp_path / "run", "held_out.jsonl")] == [None] * 4
    assert "none has a finite one: the last scores" in capsys.readouterr().err


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("held_out") / "whole"
    return workdir, run_training(config(), workdir)


def assert_same_end(workdir, whole):
    assert lines(workdir, "held_out.jsonl") == lines(whole, "held_out.jsonl")
    assert board(workdir) == board(whole)
    assert [step for tag, step in board(whole) if tag == "bilevel/held_out_loss"] == [1, 3, 5, 6]
    for name in ("instance_weights.jsonl", "meta_params.safetensors", "test_scores.jsonl"):
        assert (workdir / name).read_bytes() == (whole / name).read_bytes()
    assert_same_params(load_workdir(workdir)[1], load_workdir(whole)[1])
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (workdir, whole)]
    assert len({(summary["best_step"], summary["held_out_loss"]) for summary in summaries}) == 1


def test_a_run_measures_each_checkpoint_of_the_weighted_phase_on_rows_it_never_drew(whole):
    workdir, summary = whole
    rows = lines(workdir, "held_out.jsonl")
    assert [row["step"] for row in rows] == [2, 4, 6, 7]
    best = min(rows, key=lambda row: (row["held_out_loss"], row["step"]))
    assert (summary["best_step"], summary["held_out_loss"]) == (best["step"], best["held_out_loss"])
    assert {best["step"], 6, 7} == set(saved_steps(workdir))


@pytest.mark.parametrize("number", [3, 6])
def test_a_killed_run_goes_on_to_the_same_bits_and_the_same_best(whole, tmp_path, monkeypatch, number):
    with monkeypatch.context() as patched:
        killed_after(number + 1, patched)
        with pytest.raises(Killed):
            run_training(config(), tmp_path / "run")
    run_training(config(), tmp_path / "run")
    assert_same_end(tmp_path / "run", whole[0])


def test_a_kill_between_the_line_and_the_checkpoint_leaves_no_line_twice(whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        original = Checkpoints.save

        def save(self, step, snapshot):
            if step == 6:
                raise Killed
            original(self, step, snapshot)

        patched.setattr(Checkpoints, "save", save)
        with pytest.raises(Killed):
            run_training(config(), tmp_path / "run")
    assert [row["step"] for row in lines(tmp_path / "run", "held_out.jsonl")] == [2, 4, 6]
    run_training(config(), tmp_path / "run")
    assert_same_end(tmp_path / "run", whole[0])


def test_where_a_signal_comes_does_not_change_the_best(tmp_path, losses_by_step, monkeypatch):
    """What is saved at a signal is not measured: step 5 would be the best."""
    losses_by_step |= {5: 0.0}
    with monkeypatch.context() as patched:
        original = train._stops
        patched.setattr(train, "_stops", lambda phase, step, asked: step == 5 or original(phase, step, asked))
        with pytest.raises(Stopped, match="saved up to step 5"):
            run_training(config(), tmp_path / "run")
    assert 5 in saved_steps(tmp_path / "run")
    summary = run_training(config(), tmp_path / "run")
    assert [row["step"] for row in lines(tmp_path / "run", "held_out.jsonl")] == [2, 4, 6, 7]
    assert summary["best_step"] == 4


def test_uniform_weights_are_measured_too(tmp_path, losses_by_step):
    assert run_training(config(weighting__name="uniform"), tmp_path / "run")["best_step"] == 4


# --- What goes wrong.


def test_other_held_out_rows_cannot_go_on_by_force(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        killed_after(4, patched)
        with pytest.raises(Killed):
            run_training(config(), tmp_path / "run")
    for share in (0.0, 0.7):
        with pytest.raises(InputError, match="was saved while other meta rows were held out"):
            run_training(config(meta__held_out=share, resume="force"), tmp_path / "run")


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def another_number(path):
    path.write_text(path.read_text().replace("0.2", "0.1"))


def another_name(path):
    path.write_text(path.read_text().replace("held_out_loss", "held_our_loss"))


def other_arrays(path):
    """As if they were not those that were saved."""
    progress = json.loads(path.read_text())
    path.write_text(json.dumps({**progress, "sums": {name: total ^ 1 for name, total in progress["sums"].items()}}))


@pytest.fixture(scope="module")
def fourth_is_best(tmp_path_factory):
    """A finished run whose best checkpoint is an old one; its summary is yet to be written."""
    workdir = tmp_path_factory.mktemp("fourth") / "run"
    with pytest.MonkeyPatch.context() as patched:
        original = held_out.measured_on
        lowest_at_4 = lambda state: RISING[int(state.train.step)]  # noqa: E731
        patched.setattr(held_out, "measured_on", lambda *arguments: original(*arguments)._replace(loss=lowest_at_4))
        assert run_training(config(), workdir)["best_step"] == 4
    (workdir / "summary.json").unlink()
    return workdir


def test_a_run_that_begins_from_it_knows_its_best(fourth_is_best, tmp_path):
    """What is loaded counts, not what was written last."""
    workdir = shutil.copytree(fourth_is_best, tmp_path / "run")
    before = fingerprint_of_model(str(fourth_is_best))
    for step, is_same in ((7, True), (4, False)):
        largest = max((workdir / f"checkpoints/{step}").rglob("*"), key=lambda path: path.stat().st_size)
        largest.write_bytes(largest.read_bytes() + b"x")
        assert (fingerprint_of_model(str(workdir)) == before) == is_same


@pytest.mark.parametrize(
    ("damage", "what"),
    [(cut, "metrics"), (another_number, "metrics"), (another_name, "metrics"), (other_arrays, "progress")],
)
def test_a_damaged_best_is_told_and_set_aside(fourth_is_best, tmp_path, losses_by_step, capsys, damage, what):
    workdir = tmp_path / "run"
    shutil.copytree(fourth_is_best, workdir)
    files = [path for path in (workdir / "checkpoints/4" / what).rglob("*") if path.is_file() and path.suffix != ".txt"]
    damage(max(files, key=lambda path: path.stat().st_size))
    with pytest.raises(InputError, match="checkpoints/4: is damaged") as found:
        load_workdir(workdir)
    assert "\n" not in str(found.value)
    assert run_training(config(), workdir)["best_step"] == 6
    assert "checkpoints/4: is damaged" in capsys.readouterr().err
    assert (workdir / "damaged/4").is_dir()


def test_without_held_out_rows_all_is_as_it_was(tmp_path):
    summary = run_training(config(meta__held_out=0.0), tmp_path / "run")
    assert not {"best_step", "held_out_loss"} & set(summary)
    assert not (tmp_path / "run/held_out.jsonl").exists()
    assert saved_steps(tmp_path / "run") == [6, 7]
    assert not list((tmp_path / "run/checkpoints").glob("*/metrics"))
