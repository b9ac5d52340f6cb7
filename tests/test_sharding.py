"""Where arrays lie on a mesh, and that dividing the work changes nothing: on forced CPU devices, in processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from configs import table
from dreamprm_jax import sharding, steps
from dreamprm_jax.errors import InputError
from dreamprm_jax.loading import load_model
from dreamprm_jax.models import internvl, presets

TESTS = Path(__file__).parent
ROOT = TESTS.parent


def with_devices(count):
    flags = os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={count}"
    return {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": f"{TESTS}{os.pathsep}{ROOT}"}


def on_eight_devices(script, *arguments):
    command = [sys.executable, TESTS / script, *arguments]
    done = subprocess.run(command, env=with_devices(8), capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


# --- The table of partitions.


@pytest.fixture(scope="module")
def shapes_1b():
    return jax.eval_shape(lambda: internvl.init(presets.PRESETS["internvl3_1b"], jax.random.key(0)))


def partitions(mesh, tree):
    found = jax.tree_util.tree_leaves_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in found]
    return {
        name: (leaf, sharding.partition(mesh, name, leaf.shape)) for name, (_, leaf) in zip(names, found, strict=True)
    }


def test_everything_large_is_divided(shapes_1b):
    """By fsdp all but a few norms and biases; by tensor besides what has heads or hidden widths."""
    mesh = AbstractMesh((1, 4, 2), sharding.AXES)
    found = partitions(mesh, shapes_1b)
    whole = [leaf.size for leaf, spec in found.values() if "fsdp" not in spec]
    assert sum(whole) < 0.005 * sum(leaf.size for leaf, _ in found.values())
    kernels = [spec for name, (_, spec) in found.items() if name.endswith("kernel") and "patch" not in name]
    assert len(kernels) == 13 and all("tensor" in spec for spec in kernels)
    per_device = sharding.bytes_on_device(mesh, shapes_1b)
    assert per_device < 1.03 * sum(4 * leaf.size for leaf, _ in found.values()) / 8


def test_moments_and_averages_lie_where_their_parameters_do(shapes_1b):
    """A state has each parameter's path at the end of its moments' paths."""
    mesh = AbstractMesh((1, 4, 2), sharding.AXES)
    alone = [spec for _, spec in partitions(mesh, shapes_1b).values()]
    state = {"params": shapes_1b, "opt_state": ({"mu": shapes_1b}, {"nu": shapes_1b}), "ema": shapes_1b}
    assert [spec for _, spec in partitions(mesh, state).values()] == 4 * alone


def test_an_axis_that_cannot_be_divided_evenly_stays_whole():
    mesh = AbstractMesh((1, 4, 8), sharding.AXES)
    assert sharding.partition(mesh, "layers/k/kernel", (24, 896, 2, 64)) == PartitionSpec(None, "fsdp", None)
    assert sharding.partition(mesh, "embedding", (151_674, 898)) == PartitionSpec(None, None)


def test_a_table_is_divided_where_it_is_large():
    mesh, large = AbstractMesh((4, 2, 1), sharding.AXES), sharding.LARGE
    assert sharding.partition(mesh, "opt_state/nu/table", (large,)) == PartitionSpec(("data", "fsdp"))
    assert sharding.partition(mesh, "meta_params/table", (large - 8,)) == PartitionSpec()
    assert sharding.table_length(large - 1) == large - 1
    assert sharding.table_length(large + 1) == large + 1024
    assert sharding.partition(mesh, "last_weights/rows", (large + 1,)) == PartitionSpec(None)


# --- What is refused.


def test_a_mesh_needs_its_devices():
    with pytest.raises(
        InputError, match=r"--config.mesh.data=1 --config.mesh.fsdp=2 .*needs 2 devices, and there are 1"
    ):
        sharding.make_mesh(sharding.Layout(1, 2, 1))
    with pytest.raises(InputError, match="needs 3 devices"):
        sharding.make_mesh(sharding.Layout(0, 3, 1))
    assert sharding.make_mesh(sharding.Layout(0, 1, 1)) is None


@pytest.mark.parametrize(
    ("field", "value"),
    [("batch_size", 6), ("meta_batch_size", 2), ("cold_start.batch_size", 3)],
)
def test_rows_are_divided_evenly(field, value):
    cfg, mesh = table.get_config(), AbstractMesh((2, 2, 2), sharding.AXES)
    cfg.batch_size = cfg.meta_batch_size = 8
    cfg.micro_batch_size, cfg.meta_micro_batch_size = 1, 2  # on each of four
    steps.check_rows(cfg, mesh)
    cfg.update_from_flattened_dict({field: value})
    with pytest.raises(InputError, match=f"--config.{field}={value}: must be a multiple of 4, since "):
        steps.check_rows(cfg, mesh)
    cfg.update_from_flattened_dict({"batch_size": 8, "meta_batch_size": 8, field: 12, "micro_batch_size": 2})
    with pytest.raises(InputError, match=f"--config.{field}=12: gives each device 3 rows, which it cannot take 2 at"):
        steps.check_rows(cfg, mesh)


def test_heads_are_whole_on_a_device():
    """The tiny model has 2 heads in the vision tower and 4 in the language model."""
    with pytest.raises(InputError, match=r"--config.mesh.tensor=4: .* 2 heads .* 4 of the language model; .* 1, 2$"):
        load_model(table.get_config().model, 0, mesh=AbstractMesh((1, 1, 4), sharding.AXES))


# --- Nothing changes.


def test_the_toy_is_the_same_on_eight_devices():
    on_eight_devices("sharded_table.py")


@pytest.mark.parametrize(
    "cases",
    [
        ["table:dot,recompute,tangent,tangent_recomputed,identity:8,1,1/2,2,2"],
        ["table:unrolled,mixed:2,2,2"],
        ["net:tangent,dot:2,2,2", "domain:dot:1,8,1", "scores::8,1,1/2,2,2"],
    ],
    ids=["one step", "two steps", "others"],
)
def test_a_divided_model_has_the_meta_gradient_of_one_device(cases):
    on_eight_devices("sharded_model.py", *cases)


def test_two_processes_have_the_meta_gradient_of_one_device():
    """The rows of a batch are divided between them, and by fsdp the parameters."""
    case = "table:dot,mixed:2,2,1/1,2,2"
    command = [sys.executable, TESTS / "sharded_model.py", f"localhost:{free_port()}"]
    two = [
        subprocess.Popen(
            [*command, number, case], env=with_devices(2), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for number in "01"
    ]
    told = [process.communicate(timeout=900)[0].decode() for process in two]
    assert [process.returncode for process in two] == [0, 0], told[0][-3000:] + told[1][-3000:]


# --- A whole run in two processes, killed, and gone on with by one.

RUN = [
    "--config=configs/table.py", "--config.pretrain.num_steps=1", "--config.cold_start.num_steps=2",
    "--config.num_steps=9", "--config.checkpoint_every=2", "--config.batch_size=8", "--config.meta_batch_size=8",
    "--config.cold_start.batch_size=8", "--config.pretrain.batch_size=8", "--config.noisy_steps.pretrain=16",
    "--config.noisy_steps.cold_start=16", "--config.noisy_steps.clean=8", "--config.noisy_steps.flipped=8",
    "--config.noisy_steps.test_questions=3", "--config.noisy_steps.meta_questions=4",
]  # fmt: skip


def start(workdir, log, devices, *arguments):
    command = [sys.executable, "run.py", *RUN, f"--workdir={workdir}", *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=with_devices(devices), stdout=log, stderr=log)


def start_two(workdir, logs, *arguments):
    shared = [f"--config.distributed.coordinator=localhost:{free_port()}", "--config.distributed.num_processes=2"]
    return [
        start(workdir, log, 2, "--config.mesh.data=2", "--config.mesh.fsdp=2", *shared,
              f"--config.distributed.process_id={number}", *arguments)
        for number, log in enumerate(logs)
    ]  # fmt: skip


def metrics(workdir):
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def test_processes_agree_on_what_they_decide_by():
    """Else cards of unlike memory would take different estimators, and wait for each other for good.

    What is placed is not compared: weights of rows not seen yet are NaN, and parameters too many to be sent around.
    """
    port = str(free_port())
    command = [sys.executable, TESTS / "two_processes.py", port]
    two = [subprocess.Popen([*command, number], env=with_devices(1)) for number in ("0", "1")]
    assert [process.wait(timeout=120) for process in two] == [0, 0]


def test_a_signal_to_one_of_two_processes_saves_for_both(tmp_path):
    """All stop before the same step, as JAX's preemption service has it."""
    shared = tmp_path / "shared"
    with (tmp_path / "log").open("w+b") as log, (tmp_path / "log1").open("w+b") as log1:
        two = start_two(shared, (log, log1), "--config.checkpoint_every=1000")
        while len(metrics(shared)) < 5 and all(process.poll() is None for process in two):
            time.sleep(0.05)
        two[1].send_signal(signal.SIGTERM)
        assert [process.wait(timeout=600) for process in two] == [143, 143], (
            log1.seek(0) or log1.read()[-3000:].decode()
        )
    saved = max(int(path.name) for path in (shared / "checkpoints").iterdir())
    assert 5 <= saved == len(metrics(shared)) < 12
    assert f"the run is saved up to step {saved}" in (tmp_path / "log").read_text()


def test_two_processes_share_a_run_and_one_goes_on_with_it(tmp_path):
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    with (tmp_path / "log").open("w+b") as log, (tmp_path / "log1").open("w+b") as log1:
        two = start_two(shared, (log, log1))
        alone = start(whole, log, 1)
        deadline = time.monotonic() + 900
        while len(metrics(shared)) < 8 and all(process.poll() is None for process in two):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        for process in two:
            process.send_signal(signal.SIGKILL)
            process.wait()
        reached = len(metrics(shared))
        assert 8 <= reached < 12, log1.seek(0) or log1.read()[-3000:].decode()
        assert alone.wait(timeout=900) == 0
        assert start(shared, log, 1).wait(timeout=900) == 0
    first, second = metrics(whole), metrics(shared)
    assert [row["step"] for row in second] == list(range(12)) == [row["step"] for row in first]
    for one, other in zip(first, second, strict=True):
        assert one["example_ids"] == other["example_ids"]
        for name in ("inner_loss", "meta_loss", "grad_norm", "meta_grad_norm"):
            if name in one:
                assert other[name] == pytest.approx(one[name], rel=1e-4), (name, one["step"])
    texts = [(folder / "instance_weights.jsonl").read_text() for folder in (whole, shared)]
    weights = [np.array([json.loads(line)["weight"] for line in text.splitlines()]) for text in texts]
    np.testing.assert_allclose(*weights, atol=1e-3)
    assert json.loads((shared / "summary.json").read_text())["best_of_n"]
