"""What benchmarks.traffic reads out of a program and counts, against counts by hand; nothing is compiled for a GPU."""

import json
import sys
from importlib import metadata
from types import SimpleNamespace

import jax
import pytest

from benchmarks import step, traffic

# As XLA prints a program for a GPU: a loop of 5 turns takes row i of a stack, adds x, and puts it into another stack;
# before it a product, zeros for the stack and a copy, after it a sum. f32: 4 bytes, bf16: 2.
PROGRAM = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8,16]{1,0})->f32[8]{0}}

%region_0.1 (a.1: f32[], b.1: f32[]) -> f32[] {
  %a.1 = f32[] parameter(0)
  %b.1 = f32[] parameter(1)
  ROOT %add.9 = f32[] add(%a.1, %b.1)
}

%fused_dynamic_slice (param_0.1: f32[5,8,16], param_1.1: s32[], param_2.1: f32[8,16]) -> f32[8,16] {
  %param_0.1 = f32[5,8,16]{2,1,0} parameter(0)
  %param_1.1 = s32[] parameter(1)
  %param_2.1 = f32[8,16]{1,0} parameter(2)
  %constant.1 = s32[] constant(0)
  %slice.1 = f32[1,8,16]{2,1,0} dynamic-slice(%param_0.1, %param_1.1, %constant.1, %constant.1), \
dynamic_slice_sizes={1,8,16}
  %bitcast.1 = f32[8,16]{1,0} bitcast(%slice.1)
  %multiply.1 = f32[8,16]{1,0} multiply(%param_2.1, %param_2.1)
  ROOT %add.1 = f32[8,16]{1,0} add(%bitcast.1, %multiply.1), metadata={op_name="jit(step)/add (of a row)"}
}

%fused_dynamic_update_slice (param_0.2: bf16[5,8,16], param_1.2: s32[], param_2.2: f32[8,16]) -> bf16[5,8,16] {
  %param_0.2 = bf16[5,8,16]{2,1,0} parameter(0)
  %param_1.2 = s32[] parameter(1)
  %param_2.2 = f32[8,16]{1,0} parameter(2)
  %convert.2 = bf16[8,16]{1,0} convert(%param_2.2)
  %bitcast.2 = bf16[1,8,16]{2,1,0} bitcast(%convert.2)
  %constant.2 = s32[] constant(0)
  %view.2 = bf16[5,8,16]{2,1,0} bitcast(%param_0.2)
  %update.2 = bf16[5,8,16]{2,1,0} dynamic-update-slice(%view.2, %bitcast.2, %param_1.2, %constant.2, %constant.2)
  ROOT %out.2 = bf16[5,8,16]{2,1,0} bitcast(%update.2)
}

%fused_add (param_0.3: s32[]) -> s32[] {
  %param_0.3 = s32[] parameter(0)
  %constant.3 = s32[] constant(1)
  ROOT %add.3 = s32[] add(%param_0.3, %constant.3)
}

%fused_broadcast () -> bf16[5,8,16] {
  %constant.4 = bf16[] constant(0)
  ROOT %broadcast.4 = bf16[5,8,16]{2,1,0} broadcast(%constant.4), dimensions={}
}

%fused_reduce (param_0.5: bf16[5,8,16], param_1.5: f32[8,16]) -> (f32[8], f32[8,16]) {
  %param_0.5 = bf16[5,8,16]{2,1,0} parameter(0)
  %param_1.5 = f32[8,16]{1,0} parameter(1)
  %convert.5 = f32[5,8,16]{2,1,0} convert(%param_0.5)
  %constant.5 = f32[] constant(0)
  %reduce.5 = f32[8]{0} reduce(%convert.5, %constant.5), dimensions={0,2}, to_apply=%region_0.1
  %negate.5 = f32[8,16]{1,0} negate(%param_1.5)
  ROOT %tuple.5 = (f32[8]{0}, f32[8,16]{1,0}) tuple(%reduce.5, %negate.5)
}

%body (state.6: (s32[], f32[5,8,16], /*index=2*/bf16[5,8,16], f32[8,16])) -> (s32[], f32[5,8,16], bf16[5,8,16], \
f32[8,16]) {
  %state.6 = (s32[], f32[5,8,16]{2,1,0}, /*index=2*/bf16[5,8,16]{2,1,0}, f32[8,16]{1,0}) parameter(0)
  %i.6 = s32[] get-tuple-element(%state.6), index=0
  %from.6 = f32[5,8,16]{2,1,0} get-tuple-element(%state.6), index=1
  %into.6 = bf16[5,8,16]{2,1,0} get-tuple-element(%state.6), index=2
  %x.6 = f32[8,16]{1,0} get-tuple-element(%state.6), index=3
  %loop_add_fusion = f32[8,16]{1,0} fusion(%from.6, %i.6, %x.6), kind=kLoop, calls=%fused_dynamic_slice
  %loop_dynamic_update_slice_fusion = bf16[5,8,16]{2,1,0} fusion(%into.6, %i.6, %loop_add_fusion), kind=kLoop, \
calls=%fused_dynamic_update_slice
  %loop_add_fusion.1 = s32[] fusion(%i.6), kind=kLoop, calls=%fused_add
  ROOT %tuple.6 = (s32[], f32[5,8,16]{2,1,0}, bf16[5,8,16]{2,1,0}, f32[8,16]{1,0}) tuple(%loop_add_fusion.1, %from.6, \
%loop_dynamic_update_slice_fusion, %x.6)
}

%condition (state.7: (s32[], f32[5,8,16], bf16[5,8,16], f32[8,16])) -> pred[] {
  %state.7 = (s32[], f32[5,8,16]{2,1,0}, bf16[5,8,16]{2,1,0}, f32[8,16]{1,0}) parameter(0)
  %i.7 = s32[] get-tuple-element(%state.7), index=0
  %constant.7 = s32[] constant(5)
  ROOT %less.7 = pred[] compare(%i.7, %constant.7), direction=LT
}

ENTRY %main.1 (x.8: f32[8,16], w.8: bf16[4,16], stack.8: f32[5,8,16]) -> (f32[8], f32[8,16]) {
  %x.8 = f32[8,16]{1,0} parameter(0), sharding={replicated}, metadata={op_name="x"}
  %w.8 = bf16[4,16]{1,0} parameter(1)
  %stack.8 = f32[5,8,16]{2,1,0} parameter(2)
  %constant.8 = s32[] constant(0)
  %copy.8 = bf16[4,16]{0,1} copy(%w.8)
  %custom-call.8 = (f32[8,16]{1,0}, s8[33554432]{0}) custom-call(%x.8, %copy.8), \
custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"alpha_real":1}}
  %product.8 = f32[8,16]{1,0} get-tuple-element(%custom-call.8), index=0
  %loop_broadcast_fusion = bf16[5,8,16]{2,1,0} fusion(), kind=kLoop, calls=%fused_broadcast
  %tuple.8 = (s32[], f32[5,8,16]{2,1,0}, bf16[5,8,16]{2,1,0}, f32[8,16]{1,0}) tuple(%constant.8, %stack.8, \
%loop_broadcast_fusion, %product.8)
  %while.8 = (s32[], f32[5,8,16]{2,1,0}, /*index=2*/bf16[5,8,16]{2,1,0}, f32[8,16]{1,0}) while(%tuple.8), \
condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"},"known_init_step":{"init":"0"}}
  %stack.9 = bf16[5,8,16]{2,1,0} get-tuple-element(%while.8), index=2
  ROOT %input_reduce_fusion = (f32[8]{0}, f32[8,16]{1,0}) fusion(%stack.9, %product.8), kind=kInput, \
calls=%fused_reduce
}
"""

# name -> kind, times, bytes read, bytes written
BY_HAND = {
    "copy.8": ("copies and transposes", 1, 4 * 16 * 2, 4 * 16 * 2),
    "custom-call.8": ("products", 1, 8 * 16 * 4 + 4 * 16 * 2, 8 * 16 * 4),  # no scratch memory
    "loop_broadcast_fusion": ("zeros", 1, 0, 5 * 8 * 16 * 2),
    # One row, i, and x once, though it is multiplied by itself.
    "loop_add_fusion": ("other", 5, 8 * 16 * 4 + 4 + 8 * 16 * 4, 8 * 16 * 4),
    # i and the row, which is written in half the bytes; the stack stays where it is.
    "loop_dynamic_update_slice_fusion": ("stacks", 5, 4 + 8 * 16 * 4, 8 * 16 * 2),
    "loop_add_fusion.1": ("other", 5, 4, 4),
    "input_reduce_fusion": ("other", 1, 5 * 8 * 16 * 2 + 8 * 16 * 4, 8 * 4 + 8 * 16 * 4),
}


def alone(*lines):
    """A program of these instructions."""
    given = "\n".join(f"  {line}" for line in lines)
    return f"HloModule jit_step\n\nENTRY %main.1 (x.1: f32[100,16]) -> f32[100,16] {{\n{given}\n}}\n"


def fused(*lines):
    """A program whose fusion is of these instructions."""
    given = "\n".join(f"  {line}" for line in lines)
    begin = f"%fused (x.1: f32[100,16]) -> f32[100,16] {{\n{given}\n}}\n\n"
    x, i, rows = "%x.1 = f32[100,16]{1,0} parameter(0)", "%i = s32[4]{0} parameter(1)", "%r = f32[4,16] parameter(2)"
    fusion = "ROOT %a_fusion = f32[100,16]{1,0} fusion(%x.1, %i, %r), kind=kInput, calls=%fused"
    return begin + alone(x, i, rows, fusion)


def moved(text):
    (kernel,) = traffic.kernels(text)
    return kernel.read, kernel.written


def test_every_kernel_is_counted_as_by_hand():
    found = {kernel.name: tuple(kernel)[1:] for kernel in traffic.kernels(PROGRAM)}
    assert found == BY_HAND


def test_a_kernel_moves_what_it_reads_and_writes_each_time():
    assert traffic.Kernel("a", "other", 3, 10, 7).moved == 51


def test_a_gather_reads_rows_and_a_scatter_adds_to_rows():
    x, i = "%x.2 = f32[100,16]{1,0} parameter(0)", "%i.2 = s32[4]{0} parameter(1)"
    rows = "%r.2 = f32[4,16]{1,0} parameter(2)"
    gather = "ROOT %g.2 = f32[4,16]{1,0} gather(%x.2, %i.2), offset_dims={1}, slice_sizes={1,16}"
    assert moved(fused(x, i, gather)) == (256 + 16, 256)
    scatter = "ROOT %s.2 = f32[100,16]{1,0} scatter(%x.2, %i.2, %r.2), to_apply=%region_0.1"
    assert moved(fused(x, i, rows, scatter)) == (256 + 16 + 256, 256)  # what is there, where, and what is added


def test_an_array_that_is_used_whole_beside_its_slice_is_read_once():
    x = "%x.2 = f32[100,16]{1,0} parameter(0)"
    row = "%row.2 = f32[1,16]{1,0} slice(%x.2), slice={[0:1], [0:16]}"
    total = "ROOT %sum.2 = f32[100,16]{1,0} add(%x.2, %b.2)"
    assert moved(fused(x, row, "%b.2 = f32[100,16]{1,0} broadcast(%row.2), dimensions={1}", total)) == (6400, 6400)


def test_slices_and_updates_outside_of_fusions():
    x, i = "%x.1 = f32[100,16]{1,0} parameter(0)", "%i.1 = s32[] parameter(1)"
    row = "%r.1 = f32[1,16]{1,0} parameter(2)"
    update = "ROOT %dynamic-update-slice.1 = f32[100,16]{1,0} dynamic-update-slice(%x.1, %r.1, %i.1, %i.1)"
    assert moved(alone(x, i, row, update)) == (64, 64)
    cut = "ROOT %dynamic-slice.1 = f32[1,16]{1,0} dynamic-slice(%x.1, %i.1, %i.1), dynamic_slice_sizes={1,16}"
    assert moved(alone(x, i, cut)) == (64, 64)


def test_of_several_outputs_those_in_place_count_as_updates():
    x, i, rows = (
        "%x.2 = f32[100,16]{1,0} parameter(0)",
        "%i.2 = s32[] parameter(1)",
        "%r.2 = f32[4,16]{1,0} parameter(2)",
    )
    update = "%u.2 = f32[100,16]{1,0} dynamic-update-slice(%x.2, %r.2, %i.2, %i.2)"
    both = "ROOT %both.2 = (f32[100,16]{1,0}, f32[4,16]{1,0}) tuple(%u.2, %n.2)"
    assert moved(fused(x, i, rows, update, "%n.2 = f32[4,16]{1,0} negate(%r.2)", both)) == (256 + 4, 256 + 256)


def test_operands_are_what_is_in_parentheses():
    x = "%x.1 = f32[100,16]{1,0} parameter(0)"
    assert moved(alone(x, "ROOT %s.1 = f32[100,16]{1,0} sort(%x.1), dimensions={0}, to_apply=%x.1")) == (6400, 6400)
    pair = "%p.1 = (f32[4]{0}, f32[8]{0}) parameter(1)"  # XLA may print an operand's shape too
    given = "ROOT %s.1 = f32[] custom-call((f32[4]{0}, f32[8]{0}) %p.1, f32[100,16]{1,0} %x.1)"
    assert moved(alone(x, pair, given)) == (48 + 6400, 4)


@pytest.mark.parametrize(
    "name,opcode,target,kind",
    [
        ("custom-call.7", "custom-call", "__cublas$gemm", "products"),
        ("dot_product_attention_bwd.1", "custom-call", "__cudnn$fmhaSoftmaxBackward", "fused attention"),
        ("loop_add_fusion.13.remat", "fusion", "", "XLA's remat"),
        ("loop_pad_fusion.2", "fusion", "", "pads"),
        ("pad.2", "pad", "", "pads"),
        ("loop_transpose_fusion", "fusion", "", "copies and transposes"),
        ("wrapped_broadcast", "fusion", "", "zeros"),
        ("broadcast.3", "broadcast", "", "zeros"),
        ("loop_broadcast_select_fusion.1", "fusion", "", "other"),
        ("wrapped_dynamic-update-slice", "fusion", "", "stacks"),
        ("custom-call.8", "custom-call", "cu_threefry2x32", "other"),
        ("fusion.870", "fusion", "", "other"),
    ],
)
def test_kinds_go_by_names_and_targets(name, opcode, target, kind):
    assert traffic.kind_of(traffic.Instruction(name, "f32[]", opcode, (), False, None, None, target)) == kind


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(ValueError, match=r"while\.8: how often the loop turns is known when it runs"):
        traffic.kernels(PROGRAM.replace("known_trip_count", "unknown"))
    choice = "ROOT %c.1 = f32[] conditional(%p.1, %x.1, %x.1), true_computation=%a, false_computation=%b"
    with pytest.raises(ValueError, match=r"c\.1: what is run is known when it runs"):
        traffic.kernels(alone(choice))
    with pytest.raises(ValueError, match="how wide is s4"):
        traffic.num_bytes("(f32[2]{0}, s4[2]{0})")


def told_at_once(monkeypatch, capsys, has_gpu):
    """What the command says before it compiles anything, with status 2."""
    monkeypatch.setattr(traffic.hardware_utils, "has_visible_nvidia_gpu", lambda: has_gpu)
    monkeypatch.setattr(sys, "argv", ["traffic"])
    with pytest.raises(SystemExit) as left:
        traffic.main()
    assert left.value.code == 2
    return capsys.readouterr().err


def test_a_missing_plugin_is_told_in_one_line(monkeypatch, capsys):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(traffic.metadata, "version", missing)
    version = jax.__version__
    assert told_at_once(monkeypatch, capsys, has_gpu=False) == (
        "error: jax's CUDA plugin of this jax is not installed: "
        f"pip install --no-deps jax-cuda12-pjrt=={version} jax-cuda12-plugin=={version}\n"
    )


def test_a_plugin_of_another_jax_is_as_good_as_none(monkeypatch):
    monkeypatch.setattr(traffic.hardware_utils, "has_visible_nvidia_gpu", lambda: False)
    monkeypatch.setattr(traffic.metadata, "version", lambda name: jax.__version__)
    assert traffic.refusal() is None
    monkeypatch.setattr(traffic.metadata, "version", lambda name: "0.0.1" if "pjrt" in name else jax.__version__)
    assert "pip install" in traffic.refusal()


def test_a_machine_with_a_gpu_is_refused(monkeypatch, capsys):
    told = told_at_once(monkeypatch, capsys, has_gpu=True)
    assert told.count("\n") == 1 and "benchmarks.step measures" in told


class Compiled:
    """Of a program: what the benchmark asks for."""

    def as_text(self):
        return PROGRAM

    def memory_analysis(self):
        return SimpleNamespace(argument_size_in_bytes=3 * 2**30, temp_size_in_bytes=2**29)


def test_a_line_for_every_program(monkeypatch, tmp_path, capsys):
    asked = []

    def compiled(config, setting, options):
        asked.append((config.remat, config.scan_unroll, config.attention, config.compute_dtype, setting))
        return Compiled()

    monkeypatch.setattr(traffic, "refusal", lambda: None)
    monkeypatch.setattr(traffic.metadata, "version", lambda name: "1.2")
    monkeypatch.setattr(traffic, "compiled", compiled)
    path = tmp_path / "traffic.json"
    told = "--programs training,bilevel,scoring --batch-sizes 8 --micro-batch 4 --meta-micro-batch 2 --scan-unroll 3"
    monkeypatch.setattr(sys, "argv", ["traffic", *told.split(), "--json", str(path)])
    traffic.main()
    names = ("training", "bilevel", "scoring")
    assert asked == [("dots", 3, "cudnn", "bfloat16", step.Setting(name, 8, 7, 1)) for name in names]
    report = json.loads(path.read_text())
    rows = report["Bytes that kernels read and write"]
    told = ("program", "remat", "rows at a time", "meta rows at a time")
    assert [[row[name] for name in told] for row in rows] == [
        ["training", "dots", 4, None],
        ["bilevel (dot)", "dots", 4, 2],
        ["scoring", None, 8, None],
    ]
    by_kind = dict.fromkeys(traffic.KINDS, 0)
    for kind, times, read, written in BY_HAND.values():
        by_kind[kind] += times * (read + written)
    row = rows[0]
    assert (row["B"], row["scan_unroll"], row["state GiB"], row["temporary GiB"]) == (8, 3, 3.0, 0.5)
    assert {kind: row[f"{kind} GB"] for kind in by_kind} == {kind: size / 1e9 for kind, size in by_kind.items()}
    rest = sum(by_kind.values()) - by_kind["products"]
    assert row["sum without products and attention GB"] == pytest.approx(rest / 1e9)
    assert row["figures"] == "computed" and "computed, not measured" in report["compiled for"]
    assert report["options"]["jax-cuda12-pjrt"] == "1.2" and report["machine"]["jax"] == jax.__version__
    assert path.with_suffix(".md").read_text() == capsys.readouterr().out


def test_an_iteration_takes_rows_alone_and_meta_rows_together_unless_told(monkeypatch):
    monkeypatch.setattr(traffic, "compiled", lambda *given: Compiled())
    config = traffic.workload.WIDE
    line = traffic.line(config, step.Setting("bilevel", 8, 1, 1), step.Options())
    assert (line["rows at a time"], line["meta rows at a time"]) == (1, 8)
    line = traffic.line(config, step.Setting("bilevel", 2, 1, 1), step.Options(micro_batch=4, meta_micro_batch=4))
    assert (line["rows at a time"], line["meta rows at a time"]) == (2, 2)
    line = traffic.line(config, step.Setting("training", 8, 1, 1), step.Options())
    assert (line["rows at a time"], line["meta rows at a time"]) == (8, None)


def test_the_card_stands_in_for_a_gpu_only_while_it_is_asked_to():
    attention = traffic.fused_attention_stablehlo
    before = attention.check_cudnn_version
    with traffic.as_the_card():
        assert traffic.xla_bridge.canonicalize_platform("gpu") == "cuda"
        assert traffic.xla_bridge.canonicalize_platform("cpu") == "cpu"
        assert attention.check_cudnn_version() == 91_000
        assert attention.check_compute_capability("9.0") and not attention.check_compute_capability("10.0")
        assert jax.default_backend() != "cpu"
    assert jax.default_backend() == "cpu" and attention.check_cudnn_version is before
