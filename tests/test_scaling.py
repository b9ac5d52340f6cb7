"""The benchmark of scaling: collectives read from program texts, theory's arithmetic, and one beside the other."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from benchmarks import collectives, communication, scaling
from benchmarks.communication import Work
from dreamprm_jax.models import presets
from dreamprm_jax.sharding import Layout

TESTS = Path(__file__).parent
ONE_B = presets.PRESETS["internvl3_1b"]

PROGRAM = """HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%product (a: f32[4,8], b: f32[8,16]) -> f32[4,16] {
  %a = f32[4,8]{1,0} parameter(0)
  %b = f32[8,16]{1,0} parameter(1)
  ROOT %dot.1 = f32[4,16]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%below (counter: s32[]) -> pred[] {
  %counter = s32[] parameter(0)
  %limit = s32[] constant(5)
  ROOT %less = pred[] compare(%counter, %limit), direction=LT
}

%inner (state: f32[4,8]) -> f32[4,16] {
  %state = f32[4,8]{1,0} parameter(0)
  %w = bf16[8,16]{1,0} all-gather(%part), replica_groups=[2,4]<=[8], dimensions={0}, metadata={op_name="gate"}
  ROOT %fused = f32[4,16]{1,0} fusion(%state, %w), kind=kCustom, calls=%product
}

%outer (state: f32[4,8]) -> f32[4,8] {
  %state.1 = f32[4,8]{1,0} parameter(0)
  %while.1 = (s32[], f32[4,8]{1,0}) while(%state.1), condition=%below, body=%inner
  %parts = (f32[2]{0}, /*index=1*/f32[3]{0}) all-to-all(%state.1, %state.1), replica_groups={{0,1},{2,3}}
}

ENTRY %main (p: f32[4,8]) -> f32[4,8] {
  %p = f32[4,8]{1,0} parameter(0)
  %while.2 = (s32[], f32[4,8]{1,0}) while(%p), condition=%below, body=%outer, backend_config={"known_trip_count":{"n":"3"}}
  %all-reduce-start.1 = f32[10]{0} all-reduce-start(%p), replica_groups=mesh['a'=2,'b'=4,'c'=3], device_ids=([6,4]T(1,0)) {'a', 'b':(1)2}, to_apply=%add
  %scattered = f32[5]{0} reduce-scatter(%p), replica_groups=[4,2]<=[8], dimensions={0}, to_apply=%add
  ROOT %moved = f32[7]{0} collective-permute(%p), source_target_pairs={{0,1},{1,0}}
}
"""  # noqa: E501


def test_a_program_is_read_with_its_loops():
    found = collectives.read(PROGRAM)
    kinds = {one.kind: (one.runs, one.group, one.num_bytes) for one in found.collectives}
    assert kinds == {
        "all-gather": (15, 4, 2 * 8 * 16),  # 5 turns, a limit in the condition, within 3
        "all-to-all": (3, 2, 4 * 5),
        "all-reduce": (1, 4, 40),
        "reduce-scatter": (1, 2, 20),
        "collective-permute": (1, 2, 28),
    }
    assert found.flops == 15 * 2 * 4 * 8 * 16
    assert [one.source for one in found.collectives if one.kind == "all-gather"] == ["gate"]


def test_a_loop_that_does_not_say_how_often_it_turns_is_an_error():
    with pytest.raises(ValueError, match="how often it turns: %while.1"):
        collectives.read(PROGRAM.replace("constant(5)", "add(%counter, %counter)"))


@pytest.mark.parametrize(
    "kind,sent", [("all-reduce", 12), ("all-gather", 6), ("reduce-scatter", 24), ("all-to-all", 6)]
)
def test_what_a_ring_of_four_sends(kind, sent):
    """Results of 8 bytes a device; an all-reduce is a reduce-scatter to quarters and an all-gather of them."""
    assert collectives.ring_bytes(kind, 8, 4) == sent
    parts = collectives.ring_bytes("reduce-scatter", 8 / 4, 4) + collectives.ring_bytes("all-gather", 8, 4)
    assert collectives.ring_bytes("all-reduce", 8, 4) == parts
    assert collectives.ring_bytes(kind, 8, 1) == 0


def work(data=1, fsdp=1, tensor=1):
    return Work(ONE_B, Layout(data, fsdp, tensor), 8, 7, 2232, 4)


def test_a_layout_of_data_alone_sends_gradients_alone():
    size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(communication.shapes(ONE_B)))
    one = communication.volume(work(data=8), "training", 2, True, True)
    assert one == (2 * 7 / 8 * 4 * size, 0, 0, 0, 0)
    assert communication.volume(work(data=8), "dot", 2, True, True) == (2 * one.gradients, 0, 0, 0, 0)
    assert communication.state_bytes(ONE_B, Layout(8, 1, 1)) == 12 * size


def test_parts_of_gradients_are_half_of_whole_ones():
    """But for what fsdp leaves whole, which is little."""
    whole, parts = (communication.gradient_bytes(work(fsdp=8), scattered, apart=True) for scattered in (False, True))
    assert 0.5 < parts / whole < 0.51
    alone = [communication.gradient_bytes(work(data=8), scattered, apart=True) for scattered in (False, True)]
    assert alone[0] == alone[1]


def test_every_byte_of_weights_is_half_in_bfloat16():
    passes = communication.PASSES["dot"]
    assert communication.weight_bytes(work(fsdp=8), passes, 4) == 2 * communication.weight_bytes(
        work(fsdp=8), passes, 2
    )
    in_two_turns = communication.weight_bytes(work(fsdp=4), passes, 2) / communication.weight_bytes(
        work(data=2, fsdp=4), passes, 2
    )
    assert in_two_turns == pytest.approx(3 / 2)  # two passes, one of them twice


def test_the_computed_tables(monkeypatch, tmp_path, capsys):
    path = tmp_path / "scaling.json"
    arguments = ["scaling", "--size", "internvl3_1b", "--computed", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", arguments)
    scaling.main()
    found = json.loads(path.read_text())
    for row in found["communication"]:
        parts = [row[f"{name} GB"] for name in communication.Volume._fields]
        assert row["all GB"] == pytest.approx(sum(parts))
        assert row["ms, network"] == pytest.approx(9 * row["ms, NVLink"])
    for row in found["state GB"]:
        assert row["1x8x1"] == pytest.approx(row["8x1x1"] / 8, rel=0.03)
    assert "computed" in capsys.readouterr().out


def test_compiled_steps_send_what_theory_says():
    """On eight forced devices in a process of their own; nothing is run."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"}
    command = [sys.executable, TESTS / "scaled_steps.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
