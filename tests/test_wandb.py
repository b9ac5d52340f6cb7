"""Metrics to Weights & Biases: each step once, one run a workdir, and no training that ends because of it.

`FakeServer` stands for the package and the server behind it, so that the tests need neither; where the package is
installed (requirements-wandb.txt) it is used too, offline.
"""

import importlib.util
import json
import os
import subprocess
import sys
import types
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from configs import ranges, table
from dreamprm_jax import build, compare, experiment, metrics, sharding, sweeps
from dreamprm_jax.errors import InputError
from dreamprm_jax.metrics import MetricsWriter, Wandb

ROOT = Path(__file__).parent.parent


class FakeError(Exception):
    pass


class FakeAuthenticationError(FakeError):
    pass


class FakeUsageError(FakeError):
    pass


class FakeRun:
    """As the package has it: a step below the newest one is lost, with a warning that nobody reads."""

    def __init__(self, server, run_id, project):
        self.server, self.key, self.exit_code = server, (project, run_id), None
        steps = server.logged.setdefault(self.key, [])
        self.starting_step = steps[-1]["step"] + 1 if steps and not server.offline else 0

    def log(self, values, step, commit):
        if self.server.log_error:
            raise self.server.log_error
        assert commit, "without it a line waits for the next one"
        self.server.logged[self.key].append({"step": step, **values})

    def finish(self, exit_code):
        if self.server.finish_error:
            raise self.server.finish_error
        self.exit_code = exit_code


class FakeServer:
    """The package `wandb`, and what it was told."""

    def __init__(self, monkeypatch):
        self.logged, self.inits, self.runs = {}, [], []
        self.init_error = self.log_error = self.finish_error = None
        self.offline = False
        module = types.ModuleType("wandb")
        module.init, module.Settings, module.Histogram = self.init, dict, lambda values: ("histogram", list(values))
        module.errors = types.SimpleNamespace(
            Error=FakeError, AuthenticationError=FakeAuthenticationError, UsageError=FakeUsageError
        )
        module.teardown = lambda: self.held.clear()
        self.held = set()
        monkeypatch.setitem(sys.modules, "wandb", module)

    def init(self, *, mode, project, id, resume=None, **others):
        self.inits.append({"mode": mode, "project": project, "id": id, "resume": resume, **others})
        self.offline = mode == "offline"
        assert id not in self.held, "a failed attempt holds the id until teardown()"
        if self.init_error and not self.offline:
            self.held.add(id)
            raise self.init_error
        self.runs.append(FakeRun(self, id, project))
        return self.runs[-1]


@pytest.fixture
def server(monkeypatch):
    return FakeServer(monkeypatch)


def line(step):
    phase = "cold_start" if step < 2 else "bilevel"
    row = {"step": step, "phase": phase, "example_ids": [3], "inner_loss": 0.5 * step, "clip_active": True}
    return row | ({"instance_weights": [1.0, 2.0]} if phase == "bilevel" else {})


def write(workdir, steps, *, first_step, num_steps=8, project="prm", mode="online", close=True):
    """A process that goes on at `first_step` and writes `steps`; `close=False`: it is killed then."""
    wandb = None if project is None else Wandb(project, mode, {"seed": 0})
    writer = MetricsWriter(workdir, first_step, num_steps, wandb)
    for step in steps:
        writer.advance("bilevel", {})
        writer.write(line(step))
    if not close:
        writer._wandb = None
    writer.close()


def steps_of(server, run=0):
    return [row["step"] for row in list(server.logged.values())[run]]


def test_a_line_is_sent_as_tensorboard_has_it(server, tmp_path):
    write(tmp_path, [1, 2], first_step=1, num_steps=3)
    ((project, run_id), sent), *others = server.logged.items()
    assert (project, others) == ("prm", [])
    assert sent == [
        {"step": 1, "cold_start/inner_loss": 0.5},
        {"step": 2, "bilevel/inner_loss": 1.0, "instance_weights": ("histogram", [1.0, 2.0])},
    ]
    (begun,) = server.inits
    assert (begun["id"], begun["resume"], begun["config"]) == (run_id, "allow", {"seed": 0})
    assert (begun["name"], begun["dir"]) == (tmp_path.name, str(tmp_path))
    assert (tmp_path / "wandb_id").read_text() == f"prm/{run_id}"
    assert server.runs[0].exit_code == 0


def test_neither_console_nor_code_nor_git_remote_leaves_the_machine(server, tmp_path):
    write(tmp_path, [], first_step=0)
    settings = server.inits[0]["settings"]
    assert (settings["console"], settings["disable_code"], settings["disable_git"]) == ("off", True, True)
    assert 0 < settings["finish_timeout"] < 600  # a lost network must not hold the end of a run


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_a_killed_run_goes_on_as_the_same_run_with_each_step_once(server, tmp_path, mode):
    write(tmp_path, range(6), first_step=0, mode=mode, close=False)  # the newest checkpoint is of step 4
    write(tmp_path, range(4, 8), first_step=4, mode=mode)
    assert len(server.logged) == 1
    assert steps_of(server) == list(range(8))
    assert [row["step"] for row in metrics.read_metrics(tmp_path)] == list(range(8))


def test_a_run_that_is_watched_later_has_its_earlier_steps_too(server, tmp_path):
    write(tmp_path, range(4), first_step=0, project=None, close=False)
    write(tmp_path, [3, 4], first_step=3)
    assert steps_of(server) == [0, 1, 2, 3, 4]


def test_another_project_is_another_run_with_all_steps(server, tmp_path):
    write(tmp_path, range(4), first_step=0)
    write(tmp_path, [4], first_step=4, project="other")
    assert [project for project, _ in server.logged] == ["prm", "other"]
    assert steps_of(server, 1) == [0, 1, 2, 3, 4]


def test_what_the_server_has_is_not_sent_again(server, tmp_path):
    """A line may have been sent by a process whose files are lost."""
    write(tmp_path, range(4), first_step=0)
    (tmp_path / "metrics.jsonl").write_text("")
    write(tmp_path, range(6), first_step=0)
    assert steps_of(server) == list(range(6))


def test_a_run_that_stops_early_counts_as_failed_there(server, tmp_path):
    with pytest.raises(InputError), closing(MetricsWriter(tmp_path, 0, 8, Wandb("prm", "online", {}))):
        raise InputError("the loss is no longer finite")
    assert server.runs[0].exit_code == 1


@pytest.mark.parametrize("error", [FakeAuthenticationError("no key"), FakeUsageError("no key")])
def test_nobody_logged_in_is_told_before_a_line_is_lost(server, tmp_path, error):
    write(tmp_path, range(4), first_step=0, project=None)
    server.init_error = error
    with pytest.raises(InputError, match=r"config.wandb.project=prm: no key; run `wandb login`, or set .*mode=offline"):
        write(tmp_path, [], first_step=2)
    assert len(metrics.read_metrics(tmp_path)) == 4


def test_without_a_network_the_run_is_offline(server, tmp_path, capsys):
    server.init_error = FakeError("no answer")
    write(tmp_path, range(3), first_step=0)
    assert [begun["mode"] for begun in server.inits] == ["online", "offline"]
    assert server.inits[0]["id"] == server.inits[1]["id"]
    assert steps_of(server) == [0, 1, 2]
    assert "wandb: no answer; offline, `wandb sync` sends" in capsys.readouterr().err


def test_an_error_while_it_is_sent_ends_the_sending_and_no_training(server, tmp_path, capsys):
    server.log_error = RuntimeError("broken")
    write(tmp_path, range(3), first_step=0)
    assert [row["step"] for row in metrics.read_metrics(tmp_path)] == [0, 1, 2]
    assert capsys.readouterr().err.count("wandb: broken; this process sends no more") == 1


def test_an_error_at_the_end_is_told_too(server, tmp_path, capsys):
    server.finish_error = RuntimeError("broken")
    write(tmp_path, range(3), first_step=0)
    assert "wandb: broken" in capsys.readouterr().err


@pytest.mark.parametrize("found", [None, types.ModuleType("wandb")], ids=["none", "a folder of that name"])
@pytest.mark.parametrize("run", [experiment.run_training, partial(compare.run_comparison, configs={})])
def test_a_missing_package_is_told_before_anything_starts(monkeypatch, tmp_path, found, run):
    monkeypatch.setitem(sys.modules, "wandb", found)
    cfg = table.get_config()
    cfg.wandb.project = "prm"
    monkeypatch.setattr(experiment, "_run_training", lambda *arguments: pytest.fail("it has started"))
    monkeypatch.setattr(sweeps, "settings", lambda *arguments: pytest.fail("it has started"))
    with pytest.raises(InputError, match=r"config.wandb.project: .*pip install -r requirements-wandb.txt"):
        run(cfg, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_only_the_first_process_and_only_where_asked(monkeypatch):
    cfg = table.get_config()
    assert not experiment.watched(cfg)
    cfg.wandb.project = "prm"
    assert experiment.watched(cfg)
    monkeypatch.setattr(sharding, "is_first", lambda: False)
    assert not experiment.watched(cfg)


def test_a_workdir_takes_its_run_whoever_watches():
    cfg = table.get_config()
    record = build.record(cfg)
    cfg.wandb.project, cfg.wandb.mode = "prm", "offline"
    assert build.record(cfg) == record


def test_a_run_without_it_never_loads_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    write(tmp_path, range(3), first_step=0, project=None)
    assert not (tmp_path / "wandb_id").exists()


@pytest.mark.parametrize(("field", "value"), [("project", ""), ("project", "a/b"), ("mode", "disabled")])
def test_values_that_cannot_be(field, value):
    cfg = table.get_config()
    cfg.wandb[field] = value
    with pytest.raises(ValueError, match=f"--config.wandb.{field}={value}: must be"):
        ranges.validate(cfg)


def test_a_task_that_trains_nothing_refuses_it():
    cfg = table.get_config()
    cfg.task, cfg.wandb.project = "score", "prm"
    with pytest.raises(ValueError, match="--config.wandb.project=prm: task=score trains nothing"):
        ranges.validate(cfg)


REAL = """
import sys
from pathlib import Path
from dreamprm_jax.metrics import MetricsWriter, Wandb, check_wandb
check_wandb()
workdir, mode, first, last, num_steps = Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:])
writer = MetricsWriter(workdir, first, num_steps, Wandb("prm", mode, {"seed": 0}))
for step in range(first, last):
    writer.advance("bilevel", {})
    writer.write({"step": step, "phase": "bilevel", "inner_loss": 0.5, "instance_weights": [1.0, 2.0]})
writer.close()
"""


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb: requirements-wandb.txt")
@pytest.mark.parametrize("mode", ["offline", "online"])
def test_the_real_package_without_a_network(tmp_path, mode):
    key = "0123456789" * 4
    no_server = {"WANDB_API_KEY": key, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "3"}
    for first, last in ((0, 6), (4, 8)):
        arguments = [sys.executable, "-c", REAL, str(tmp_path), mode, str(first), str(last), "8"]
        environment = {**os.environ, **no_server, "HOME": str(tmp_path / "home")}
        done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert "sends no more" not in done.stderr
    found = [records(path) for path in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))]
    assert [step for _, steps in found for step in steps] == list(range(8))
    assert len({run_id for run_id, _ in found}) == 1 and len(found) == 2
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files and not any(key.encode() in path.read_bytes() for path in files)


def records(path):
    """The id and the steps of a file that `wandb sync` would send: records in the form of a LevelDB log."""
    from wandb.proto import wandb_internal_pb2

    content, run_id, steps, record = path.read_bytes(), None, [], b""
    place = 7  # the file's own header
    while place < len(content):
        left = 2**15 - place % 2**15  # of the block; a header of 7 bytes is never cut
        if left < 7:
            place += left
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or its last part
            parsed, record = wandb_internal_pb2.Record.FromString(record), b""
            run_id = parsed.run.run_id or run_id
            if parsed.HasField("history"):
                steps.append(parsed.history.step.num)
                values = {item.key or item.nested_key[0]: item.value_json for item in parsed.history.item}
                assert "instance_weights" in values and json.loads(values["bilevel/inner_loss"]) == 0.5
    return run_id, steps
