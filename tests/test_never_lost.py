"""Whatever ends a run, the same command goes on to the same bits: kills, signals, a full disk, another config."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from running import assert_same, finished, lines, stopped, without_clocks  # noqa: F401 - fixtures
from small_run import small

from configs import table
from dreamprm_jax import checkpoint, compare, experiment, train
from dreamprm_jax.errors import InputError, Stopped
from dreamprm_jax.experiment import run_training
from dreamprm_jax.metrics import MetricsWriter
from dreamprm_jax.workdir import open_alone

pytestmark = pytest.mark.usefixtures("compilation_cache")

REPOSITORY = Path(__file__).parent.parent
NUM_STEPS = 40  # of a run by `command`, which has one phase: each start traces its step anew


@pytest.fixture(scope="module")
def environment(compilation_cache):
    """Of processes that keep their programs."""
    kept = {"JAX_COMPILATION_CACHE_DIR": str(compilation_cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return {**os.environ, **kept}


def command(workdir, *flags):
    return [
        sys.executable, "run.py", "--config=tests/small_run.py", f"--workdir={workdir}",
        f"--config.num_steps={NUM_STEPS}", "--config.pretrain.num_steps=0", "--config.cold_start.num_steps=0", *flags,
    ]  # fmt: skip


def start(environment, *arguments):
    return subprocess.Popen(
        command(*arguments), cwd=REPOSITORY, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finish(environment, *arguments):
    process = start(environment, *arguments)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return errors


@pytest.fixture(scope="module")
def whole(tmp_path_factory, environment):
    """The workdir of a run that nothing befell."""
    workdir = tmp_path_factory.mktemp("never_lost") / "whole"
    finish(environment, workdir)
    return workdir


def board(workdir):
    """Values of TensorBoard's scalars by (tag, step), as it shows them: a restart purges what comes after."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in sorted((workdir / "tensorboard").iterdir()):
        content, start = path.read_bytes(), 0
        while start + 12 <= len(content):  # length, its checksum, the event, its checksum
            size = int.from_bytes(content[start : start + 8], "little")
            event = Event.FromString(content[start + 12 : start + 12 + size])
            start += size + 16
            if event.session_log.status == event.session_log.START:
                found = {key: value for key, value in found.items() if key[1] < event.step}
            found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
    return {key: value for key, value in found.items() if "second" not in key[0]}


def test_twenty_kills_change_nothing(tmp_path, whole, environment):
    """kill -9 at random moments of the run's life, every third one while a checkpoint is being written."""
    rng, workdir, reached, inside = random.Random(0), tmp_path / "killed", [], 0
    kills = 0
    while kills < 20:
        process = start(environment, workdir)
        began = len(lines(workdir))
        target, delay = began + rng.randint(0, 2), rng.random() * 0.15
        in_a_save = kills % 3 == 2
        while process.poll() is None:
            writing = list(workdir.glob("checkpoints/*tmp*"))
            if writing if in_a_save else len(lines_so_far(workdir)) > target:
                break
            time.sleep(0.001 if in_a_save else 0.01)
        if not in_a_save:
            time.sleep(delay)
        inside += bool(list(workdir.glob("checkpoints/*tmp*")))
        process.kill()
        process.communicate()
        kills += 1
        reached.append(len(lines_so_far(workdir)))
        if reached[-1] >= NUM_STEPS - 4:  # at its end: from the beginning again
            shutil.rmtree(workdir)
    assert inside >= 3
    assert len(set(reached)) > 5
    finish(environment, workdir)
    assert_same(workdir, whole)
    assert not list(workdir.glob("checkpoints/*tmp*"))


def lines_so_far(workdir):
    path = workdir / "metrics.jsonl"
    return path.read_bytes().split(b"\n")[:-1] if path.is_file() else []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_last_step(tmp_path, whole, environment, number):
    flags = ["--config.checkpoint_every=1000"]
    process = start(environment, tmp_path / "run", *flags)
    while len(lines_so_far(tmp_path / "run")) < 9 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == 128 + number
    told = errors.strip().splitlines()[-1]
    saved = max(int(path.name) for path in (tmp_path / "run/checkpoints").iterdir())
    assert told == f"stopped by {number.name}: the run is saved up to step {saved}; the same command goes on"
    assert len(lines(tmp_path / "run")) == saved  # no step missing, none twice
    assert 9 <= saved < NUM_STEPS
    finish(environment, tmp_path / "run", *flags)
    assert_same(tmp_path / "run", whole)
    assert board(tmp_path / "run") == board(whole) != {}


def test_a_second_signal_does_not_wait():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with train.stop_signal() as asked:
        assert not asked()
        signal.raise_signal(signal.SIGINT)
        assert asked() == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with train.stop_signal() as asked:  # what started us does not want it heard
        signal.raise_signal(signal.SIGINT)
        assert not asked()
    signal.signal(signal.SIGINT, before)


def test_a_signal_while_a_program_is_compiled_is_heard(monkeypatch, tmp_path):
    monkeypatch.setattr(train.Programs, "are_ready", lambda *arguments, **options: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Stopped, match="there was nothing to save yet; the same"):
        run_training(small(table.get_config()), tmp_path / "run")


def test_a_signal_that_ends_the_readers_first_saves_all_the_same(monkeypatch, tmp_path):
    """In a terminal a signal goes to all processes of a run, and the batches' may be gone before ours looks."""
    original = train._placed_batches

    def placed(phase, start):
        for number, batches in enumerate(original(phase, start)):
            if (phase.name, number) == ("bilevel", 3):
                signal.raise_signal(signal.SIGTERM)
                raise RuntimeError("Worker process was terminated unexpectedly")
            yield batches

    monkeypatch.setattr(train, "_placed_batches", placed)
    with pytest.raises(Stopped, match="saved up to step 6"):
        run_training(small(table.get_config()), tmp_path / "run")
    assert (tmp_path / "run/checkpoints/6").is_dir()


def test_tensorboards_writer_may_end_before_the_run(tmp_path):
    """Its thread ends at a full disk; a call that hands it more would then wait for good."""
    writer = MetricsWriter(tmp_path, 0, 30)
    events = writer._board.file_writer.event_writer
    events._worker.stop()
    for step in range(30):  # more than its queue holds
        writer.write({"step": step, "phase": "bilevel", "inner_loss": 1.0, "instance_weights": [1.0]})
    writer.close()
    assert len(lines(tmp_path)) == 30


def test_a_workdir_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "run.lock").mkdir()  # what refuses even a superuser
    refused = pytest.raises(InputError, match=r"run\.lock: cannot be written .*; give another --workdir")
    with refused, open_alone(tmp_path / "run.lock"):
        pass


def test_a_comparison_that_is_asked_to_end_begins_no_other_part(monkeypatch, tmp_path):
    def stopping(cfg, workdir):
        raise Stopped(signal.SIGTERM, "the run is saved up to step 2")

    monkeypatch.setattr(compare, "run_training", stopping)
    job = compare.Job(*(None for _ in compare.Job._fields))._replace(workdir=tmp_path / "part")
    with pytest.raises(Stopped):
        compare.run_part(job)


def test_a_second_run_on_a_workdir_refuses(tmp_path, environment, whole):
    process = start(environment, tmp_path / "run")
    while len(lines_so_far(tmp_path / "run")) < 4 and process.poll() is None:
        time.sleep(0.01)
    second = start(environment, tmp_path / "run")
    _, errors = second.communicate()
    assert second.returncode == 2
    told = [line for line in errors.splitlines() if line.startswith("error:")]
    assert told == [
        f"error: {tmp_path / 'run/run.lock'}: another run writes it; wait for it, or give another --workdir"
    ]
    assert process.poll() is None
    process.communicate()
    assert process.returncode == 0
    assert_same(tmp_path / "run", whole)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 40 MB of its own; where it cannot be mounted, a test skips."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_ends_a_run_with_a_word_and_costs_nothing(small_disk, environment, whole):
    """Full before the first step, within the run, and by what something else writes during a save."""
    filler, workdir = small_disk / "filler", small_disk / "run"
    size = sum(path.stat().st_size for path in (whole / f"checkpoints/{NUM_STEPS}").rglob("*") if path.is_file())
    outcomes = []
    for left in (size // 2, 3 * size, int(2.2 * size), None):
        filler.unlink(missing_ok=True)
        if left is not None:
            free = shutil.disk_usage(small_disk).free
            with filler.open("wb") as file:
                file.write(bytes(max(0, free - left)))
        process = start(environment, workdir)
        _, errors = process.communicate()
        told = [line for line in errors.splitlines() if line.startswith("error:")]
        outcomes.append((process.returncode, len(told)))
        assert "in run_training" not in errors  # no traceback of ours; a writer's thread may leave one
        if process.returncode:
            assert "free some space, and the same command goes on" in told[0]
    assert outcomes[0] == (2, 1) and outcomes[-1] == (0, 0)
    assert set(outcomes) == {(2, 1), (0, 0)}
    assert_same(workdir, whole)


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), ValueError("x: No space left on device [28]")]
)
def test_a_disk_that_fills_up_during_a_save_is_named(tmp_path, monkeypatch, error):
    def save(self, *arguments, **options):
        raise error

    monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "save", save)
    with pytest.raises(InputError, match="checkpoints: the disk is full; free some space, .* from the beginning"):
        run_training(small(table.get_config()), tmp_path / "run")


def test_force_goes_on_with_another_config_and_keeps_the_record(stopped, finished, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(stopped, workdir)
    cfg = small(table.get_config())
    cfg.inner.lr, cfg.outer.lr = 1e-5, 1e-4
    with pytest.raises(InputError, match="inner.lr=.* now .*1e-05 .and 1 more.*or go on .* --config.resume=force"):
        run_training(cfg, workdir)
    cfg.resume = "force"
    run_training(cfg, workdir)
    told = capsys.readouterr().err
    assert "config.inner.lr: " in told and "config.outer.lr: " in told
    record = json.loads((workdir / "config.json").read_text())
    assert len(record["forced"]) == 1 and len(record["forced"][0]) == 2
    assert record["config"]["inner"]["lr"] == 1e-5
    rows = lines(workdir)
    assert [row["step"] for row in rows] == list(range(10))
    before = lines(finished)
    assert without_clocks(rows[:7]) == without_clocks(before[:7]) and rows[7]["lr"] < before[7]["lr"] / 10
    cfg.resume = "same"
    assert run_training(cfg, workdir)["num_steps"] == 7  # finished, and its own again


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cold_start.num_steps": 3}, "the phases before it cannot change"),
        ({"ema_decay": 0.9}, r"ema/.* is missing there, by the config \("),
    ],
)
def test_force_refuses_what_cannot_go_on(stopped, tmp_path, change, message):
    workdir = tmp_path / "run"
    shutil.copytree(stopped, workdir)
    cfg = small(table.get_config())
    cfg.update_from_flattened_dict({"resume": "force", **change})
    with pytest.raises(InputError, match=message):
        run_training(cfg, workdir)
    assert (workdir / "checkpoints/7").is_dir()
    assert json.loads((workdir / "config.json").read_text()) == json.loads((stopped / "config.json").read_text())


def test_a_force_that_is_refused_leaves_a_finished_run_as_it_was(finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    cfg = small(table.get_config())
    cfg.resume, cfg.ema_decay = "force", 0.9
    with pytest.raises(InputError, match="ema/.* is missing there"):
        run_training(cfg, workdir)
    for name in ("config.json", "summary.json", "metrics.jsonl"):
        assert (workdir / name).read_bytes() == (finished / name).read_bytes()
    assert run_training(small(table.get_config()), workdir)["num_steps"] == 7


def test_out_of_device_memory_names_the_shapes_and_the_settings(tmp_path, monkeypatch):
    message = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 85.45GiB with allocator GPU_0_bfc"

    def call(self, state, *batches):
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(train.Programs, "__call__", call)
    cfg = small(table.get_config())
    cfg.pretrain.num_steps = cfg.cold_start.num_steps = 0
    with pytest.raises(InputError) as found:
        run_training(cfg, tmp_path / "run")
    told = str(found.value)
    assert told.startswith("step 0: bilevel, batches of 4 and 4 rows of ")
    assert "asked for 85.45GiB" in told
    for flag in ("micro_batch_size=1", "meta_micro_batch_size=1", "model.remat=full", "model.moment_dtype=bfloat16"):
        assert f"--config.{flag}" in told
    message = "INTERNAL: something else"
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        run_training(cfg, tmp_path / "other")


def test_what_a_setting_already_is_is_not_advised():
    cfg = small(table.get_config())
    cfg.micro_batch_size = cfg.meta_micro_batch_size = 1
    cfg.images.max_tiles = 6
    cfg.model.remat, cfg.model.moment_dtype, cfg.model.trained = "full", "bfloat16", "adapters"
    advice = experiment.steps.relief(cfg, "bilevel", None)
    assert not any(name in advice for name in ("micro_batch", "remat", "moment_dtype"))
    assert "--config.images.max_tiles=3" in advice
