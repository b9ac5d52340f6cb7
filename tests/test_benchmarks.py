"""The benchmarks' own arithmetic; what they measure is in docs/reproduction.md and docs/performance.md."""

import contextlib
import json
import os
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from unittest.mock import ANY

import jax
import pytest

from benchmarks import card, memory, pipeline, prepare, roofline, scoring, startup, step, workload
from dreamprm_jax.models import internvl, presets

CONFIG = presets.InternVLConfig(
    vision=presets.VisionConfig(width=64, num_layers=3, num_heads=4, mlp_width=96, patch_size=14, image_size=112),
    language=presets.LanguageConfig(vocab_size=512, width=80, num_layers=2, num_heads=5, num_kv_heads=1, mlp_width=112),
)


@pytest.mark.parametrize("num_tiles", [0, 1, 3])
def test_model_flops_are_those_of_the_products(num_tiles):
    """Against the traced program, whose attention forms the masked half of the logits too."""
    num_tokens, language = num_tiles * CONFIG.image_tokens_per_tile + 40, CONFIG.language
    batch = workload.random_batch(CONFIG, [(num_tiles, num_tokens)], (num_tiles, num_tokens), 0)
    params = jax.eval_shape(lambda: internvl.init(CONFIG, jax.random.key(0)))
    with roofline.as_an_accelerator():  # a CPU's attention skips part of them, in blocks
        program = jax.make_jaxpr(internvl.apply, static_argnums=0)(CONFIG, params, batch)
    masked = language.num_layers * 2 * num_tokens**2 * language.width
    matrices, heads = roofline.products(program.jaxpr)
    assert step.forward_flops(CONFIG, num_tiles, num_tokens) == matrices + heads - masked
    assert step.attention_flops(CONFIG, num_tiles, num_tokens) == heads - masked


def test_a_bilevel_iteration_is_a_training_step_and_a_meta_gradient():
    flops = {
        program: step.model_flops(CONFIG, step.Setting(program, 4, 1, num_inner_steps), 40)
        for program, num_inner_steps in (("training", 1), ("bilevel", 1), ("scoring", 1))
    }
    assert flops["training"] == 3 * flops["scoring"] == 12 * step.forward_flops(CONFIG, 1, 40)
    assert flops["bilevel"] == 2 * flops["training"]
    assert step.model_flops(CONFIG, step.Setting("bilevel", 4, 1, 3), 40) == 4 * flops["training"]


def test_step_writes_a_line_for_every_program(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(workload.SIZES, "wide", CONFIG)
    path = tmp_path / "step.json"
    arguments = ["step", "--batch-sizes", "2", "--rounds", "1", "--programs", "training,scoring", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(step, "matrix_rate", lambda dtype: 1e9)
    peaks = iter([1.5, 2.5])
    monkeypatch.setattr(step, "device_peak", lambda: next(peaks))
    step.main()
    found = json.loads(path.read_text())
    assert [row["program"] for row in found["rows"]] == ["training", "scoring"]
    for row in found["rows"]:
        assert row["share of matrix rate"] == pytest.approx(row["model TFLOP"] * 1e3 / (row["ms"] / 1e3))
        assert row["examples/s"] == pytest.approx(2e3 / row["ms"])
        assert row["temporary GiB"] > 0 and row["state GiB"] > 0
    assert [row["device peak GiB"] for row in found["rows"]] == [1.5, 2.5]
    assert {"device", "cores", "python", "jax", "jaxlib"} <= set(found["machine"])
    assert capsys.readouterr().out.count("\n| ") == 2 + 2


def test_step_measures_what_is_trained_in_micro_batches(monkeypatch, tmp_path):
    monkeypatch.setitem(workload.SIZES, "wide", CONFIG)
    monkeypatch.setattr(step, "matrix_rate", lambda dtype: 1e9)
    path = tmp_path / "step.json"
    arguments = (
        "--batch-sizes 2 --rounds 1 --programs training --trained adapters --micro-batch 1 --moment-dtype bfloat16"
    )
    monkeypatch.setattr(sys, "argv", ["step", *arguments.split(), "--json", str(path)])
    step.main()
    (row,) = json.loads(path.read_text())["rows"]
    setting = step.Setting("training", 2, 1, 1)
    assert row["model TFLOP"] * 1e12 == pytest.approx(step.model_flops(CONFIG, setting, row["tokens"], "adapters"))


def test_a_program_that_does_not_fit_is_not_run(monkeypatch, tmp_path):
    """One byte less than it takes, arguments and temporary memory together."""
    monkeypatch.setitem(workload.SIZES, "wide", CONFIG)
    monkeypatch.setattr(step, "matrix_rate", lambda dtype: 1e9)
    state = jax.eval_shape(lambda: step.begun(CONFIG, step.Options()))
    traced, _ = step.traced_step(CONFIG, step.Setting("scoring", 2, 1, 1), step.Options(), state)
    arguments, temporary = step.bytes_of(traced.lower().compile())
    monkeypatch.setattr(step, "device_memory", lambda: arguments + temporary - 1)
    options = ["--batch-sizes", "1,2", "--rounds", "1", "--programs", "scoring"]
    fits, does_not = run_benchmark(step, monkeypatch, tmp_path, *options)["rows"]
    assert fits["ms"] > 0 and fits["share of matrix rate"] > 0
    assert {does_not[name] for name in ("ms", "examples/s", "tokens/s", "share of matrix rate")} == {None}
    assert does_not["temporary GiB"] * 2**30 == temporary and does_not["compile s"] > 0


@pytest.mark.parametrize(
    ("backend", "forward_mode", "expected"),
    [("gpu", False, ("bfloat16", "cudnn")), ("gpu", True, ("bfloat16", "xla")), ("cpu", False, ("float32", "xla"))],
)
def test_what_a_machine_computes_in(monkeypatch, backend, forward_mode, expected):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "devices", lambda: [type("Device", (), {"compute_capability": "9.0"})()])
    config = step.computed_here(CONFIG, forward_mode)
    assert (config.compute_dtype, config.attention) == expected


def test_programs_of_one_state_train_the_same():
    cases = [step.Case(step.Setting("training", 1, 1, 1), CONFIG, step.Options(trained=what))
             for what in ("all", "adapters")]  # fmt: skip
    with pytest.raises(ValueError, match="train the same"):
        step.measure(cases, 1e9, 1)


def test_the_figures_of_a_card_in_one_command(monkeypatch, tmp_path, capsys):
    """Peers first, in a process of their own; a group that fails leaves the others, and what was done is written."""
    monkeypatch.setitem(workload.SIZES, "wide", CONFIG)
    monkeypatch.setattr(step, "matrix_rate", lambda dtype: 1e9)
    good = card.Line("bilevel", 8, "dots", 3, micro_batch=8, meta_micro_batch=4), card.Line("scoring", 1)
    monkeypatch.setattr(card, "GROUPS", {"bad": (card.Line("training", 1),), "good": good})
    measure, shares = step.measure, []

    def failing(cases, *args):
        shares.append(os.environ[card.MEMORY])
        if cases[0].setting.program == "training":
            raise RuntimeError("RESOURCE_EXHAUSTED")
        return measure(cases, *args)

    class Pool(contextlib.nullcontext):
        def __init__(self, count, mp_context):
            super().__init__(self)
            assert (count, mp_context.get_start_method()) == (1, "spawn")

        def submit(self, function, size):
            assert (function, size) == (card.peers, "wide")
            shares.append(os.environ[card.MEMORY])
            answer = Future()
            answer.set_result([{"program": "torch, as published", "ratio": 7.5}])
            return answer

    monkeypatch.setattr(step, "measure", failing)
    monkeypatch.setattr(card, "ProcessPoolExecutor", Pool)
    for name in (card.MEMORY, card.FORMER_MEMORY):
        monkeypatch.setenv(name, "0.1")
    with pytest.raises(SystemExit) as ended:
        run_benchmark(card, monkeypatch, tmp_path, "--size", "wide", "--tiles", "1", "--rounds", "1")
    found = json.loads((tmp_path / "found.json").read_text())
    names = ("program", "remat", "scan_unroll", "rows at a time", "meta rows at a time")
    rows = [tuple(row[name] for name in names) for row in found["steps"]]
    assert rows == [("bilevel (dot)", "dots", 3, 8, 4), ("scoring", None, 1, 1, None)]
    assert [(bar["at least"], bar["reached"]) for bar in found["bars"]] == [(0.45, ANY), (5.0, True)]
    assert found["peers"][0]["ratio"] == 7.5
    assert shares == [card.BESIDE_TORCH, card.ALONE, card.ALONE] and card.FORMER_MEMORY not in os.environ
    told = capsys.readouterr()
    assert ended.value.code == 1 and told.err == "error: bad: RESOURCE_EXHAUSTED\n"
    assert told.out.count("# found\n") == 3  # after the peers and each group


def test_nothing_takes_the_card_before_the_peers():
    program = (
        "from benchmarks import card\n"
        "from jax._src import xla_bridge\n"
        "def peers_apart(size):\n"
        "    print(size, xla_bridge.backends_are_initialized())\n"
        "    raise SystemExit\n"
        "card.peers_apart = peers_apart\n"
        "card.main()\n"
    )
    command = [sys.executable, "-c", program, "--size", "recorded"]
    told = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert told.stdout == "recorded False\n"


def test_a_part_that_is_none_is_refused(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_benchmark(card, monkeypatch, tmp_path, "--parts", "stepz")
    assert "--parts=stepz: choose from peers, steps" in capsys.readouterr().err


def test_bars_are_held_to_each_program_s_fastest_line():
    def row(program, batch_size, ms, share, gigabytes=38.0):
        state = 10.0
        memory = {"state GiB": state, "temporary GiB": gigabytes * 1e9 / 2**30 - state}
        return {"program": program, "B": batch_size, "ms": ms, "share of matrix rate": share, **memory}

    rows = [
        row("training", 8, 500.0, 0.41), row("training", 8, 440.0, 0.46), row("training", 1, 1.0, 0.9),
        row("bilevel (dot)", 8, 1100.0, 0.44), row("bilevel (dot)", 8, None, None),
        row("bilevel (dot)", 1, 150.0, 0.3, 38.0), row("bilevel (dot)", 1, 140.0, 0.3, 41.0),
    ]  # fmt: skip
    peers = [{"program": "ours, dot", "ratio": 1.0}, {"program": "torch, as published", "ratio": 4.9}]
    found = [(bar["what"], pytest.approx(bar["found"]), bar["reached"]) for bar in card.bars(rows, peers)]
    assert found == [
        ("training, B = 8: share of the matrix rate", 0.46, True),
        ("bilevel, B = 8: share of the matrix rate", 0.44, False),
        ("bilevel, B = 1: hours of 100,000 iterations", 140 / 36, True),
        ("bilevel, B = 1: GB of state and temporary memory", 41.0, False),
        ("bilevel, B = 1: times as fast as the published code", 4.9, False),
    ]
    assert card.bars([], []) == []


def test_the_peak_of_a_device_that_counts_and_of_one_that_does_not(monkeypatch):
    class Device:
        def memory_stats(self):
            return self.stats

    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    for stats, peak in ((None, None), ({}, None), ({"peak_bytes_in_use": 3 * 2**29}, 1.5)):
        Device.stats = stats
        assert step.device_peak() == peak


def test_an_estimator_that_cannot_take_the_inner_steps_is_refused_at_once(monkeypatch, tmp_path, capsys):
    path = tmp_path / "step.json"
    monkeypatch.setattr(sys, "argv", ["step", "--inner-steps", "1,2", "--json", str(path)])
    with pytest.raises(SystemExit):
        step.main()
    assert "--inner-steps=1,2 --estimator=dot: dot looks through one inner step" in capsys.readouterr().err
    assert not path.exists()


def test_a_report_is_the_same_as_json_and_as_markdown(tmp_path, capsys):
    table = [{"name": "a", "speed": 12.3456}, {"name": "b", "speed": None}]
    workload.report(tmp_path / "found.json", {"rows": 2}, {"rate": 0.5, "lines": table})
    found = json.loads((tmp_path / "found.json").read_text())
    text = (tmp_path / "found.md").read_text()
    assert (found["lines"], found["rate"], found["options"]) == (table, 0.5, {"rows": "2"})
    assert capsys.readouterr().out == text
    assert f"jaxlib {found['machine']['jaxlib']}" in text
    assert text.endswith("## lines\n\n| name | speed |\n| --- | --- |\n| a | 12.35 |\n| b | - |\n")


def run_benchmark(module, monkeypatch, tmp_path, *arguments):
    path = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments, "--json", str(path)])
    module.main()
    return json.loads(path.read_text())


def test_the_pipeline_benchmark_measures_what_it_says(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(pipeline, "SETTINGS", ((1, 0), (2, 0)))
    monkeypatch.setattr(pipeline, "TILE_SIZE", 28)
    found = run_benchmark(pipeline, monkeypatch, tmp_path, "--rows", "12", "--seconds", "0.1", "--batch-sizes", "2")
    assert found["start"][0]["rows"] == 12
    assert all(row["rows/s"] > 0 for row in found["speed"])
    padding = [row["token padding, B = 1"] for row in found["padding"]]
    assert padding == sorted(padding, reverse=True)
    assert all(row["token padding, B = 8"] >= 0 for row in found["padding"])
    assert "| H100 rows/s |" in capsys.readouterr().out


def test_the_prepare_benchmark_reads_back_what_it_wrote(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(prepare, "NUM_IMAGES", 3)
    found = run_benchmark(prepare, monkeypatch, tmp_path, "--rows", "40", "--processes", "1")
    (row,) = found["rows"]
    assert row["rows"] == row["kept"] == 40
    assert min(row["prepared rows/s"], row["read rows/s"], row["checked rows/s"], row["worker MiB"]) >= 0
    assert row["parent MiB"] > 20
    assert "| prepared rows/s |" in capsys.readouterr().out


def test_the_scoring_benchmark_compares_equal_scores(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(workload.SIZES, "wide", CONFIG)
    monkeypatch.setattr(scoring, "PROMPT_TOKENS", 20)
    monkeypatch.setattr(scoring, "CONTINUATIONS", (6, 9))
    monkeypatch.setattr(scoring, "PART_CHAINS", 2)
    programs = ("shared", "batched", "one_by_one", "published")
    arguments = ["--size", "wide", "--candidates", "3", "--tiles", "1", "--rounds", "1", "--programs"]
    found = run_benchmark(scoring, monkeypatch, tmp_path, *arguments, ",".join(programs))
    assert [row["program"] for row in found["rows"]] == list(programs)
    for row in found["rows"]:
        assert row["difference"] < 1e-4 and row["times shared"] > 0
        assert (row["N"], row["prompt tokens"]) == (3, 20 + CONFIG.image_tokens_per_tile)
    assert "| times shared |" in capsys.readouterr().out


def test_the_computed_products_of_scoring():
    """A candidate alone shares with nobody; the more of them, the nearer to the prompt run once for all."""
    found = {count: scoring.computed(CONFIG, 1, count) for count in (1, 8, 64)}
    times = {count: {row["program"]: row["times shared"] for row in rows} for count, rows in found.items()}
    assert times[1]["one_by_one"] == pytest.approx(1)
    assert 1 < times[8]["one_by_one"] < times[64]["one_by_one"] < 64
    (alone,) = [row for row in found[1] if row["program"] == "one_by_one"]
    num_tokens = scoring.PROMPT_TOKENS + CONFIG.image_tokens_per_tile + scoring.CONTINUATIONS[0]
    others = (workload.NUM_STEPS - 1) * 2 * CONFIG.language.width * CONFIG.language.vocab_size
    assert alone["TFLOP"] * 1e12 == pytest.approx(step.forward_flops(CONFIG, 1, num_tokens) - others)
    assert all(each["published"] > each["one_by_one"] for each in times.values())


def test_the_memory_benchmark_has_a_line_for_every_setting(monkeypatch, tmp_path):
    monkeypatch.setitem(workload.SIZES, "wide", CONFIG)
    arguments = ["--size", "wide", "--tiles", "1", "--remat", "full", "--trained", "all,adapters"]
    rows = run_benchmark(memory, monkeypatch, tmp_path, *arguments, "--moment-dtypes", "bfloat16")["rows"]
    assert [(row["trained"], row["moments"], row["remat"]) for row in rows] == [
        ("all", "bfloat16", "full"), ("adapters", "bfloat16", "full"),
    ]  # fmt: skip
    for row in rows:
        assert row["tokens"] == step.TEXT_TOKENS + CONFIG.image_tokens_per_tile
        assert row["arguments GiB"] > row["state GiB"] > 0 and row["temporary GiB"] > 0
    assert rows[1]["state GiB"] < rows[0]["state GiB"]


def test_the_computed_table_of_memory_adds_up(monkeypatch, tmp_path):
    arguments = ["--computed", "--sizes", "internvl3_1b,internvl3_8b", "--trained", "all", "--moment-dtypes", "float32"]
    small, large = run_benchmark(memory, monkeypatch, tmp_path, *arguments)["rows"]
    parts = ("parameters", "moments", "gradient", "u", "frozen")
    assert small["sum"] == pytest.approx(sum(small[name] for name in parts))
    assert small["gradient"] < 0.7 * small["parameters"]  # kernels' part in bfloat16, and a head's of its own
    assert large["gradient"] < 0.54 * large["parameters"]
    assert small["left of 80 GB"] == pytest.approx(memory.CARD - small["sum"])
    assert large["left of 80 GB"] == "does not fit"


def test_the_startup_benchmark_ends_with_the_first_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))  # the user's own, which has no part in it
    sizes = {"pretrain": 0, "cold_start": 8, "clean": 8, "flipped": 0, "meta_questions": 4, "test_questions": 1}
    flags = [f"--config.noisy_steps.{name}={size}" for name, size in sizes.items()]
    arguments = ["--rounds", "1", "--config=configs/cold_start.py", "--config.pretrain.num_steps=0", *flags]
    found = run_benchmark(startup, monkeypatch, tmp_path, *arguments)
    fresh, kept = found["starts"]
    for row in (fresh, kept):
        stages = list(row.values())[1:6]
        assert all(seconds > 0 for seconds in stages)
        assert row["first line"] == pytest.approx(sum(stages))
        assert row["programs"] == fresh["programs"] > 5
    assert fresh["read back"] == 0 < kept["read back"]
    assert not (tmp_path / "cache").exists()
    assert [row["command"] for row in found["answers"]] == list(startup.ANSWERS)
    assert all(row["s"] > 0 and row["CPU s"] > 0 for row in found["answers"])
    assert "| first line |" in capsys.readouterr().out


def test_a_table_leaves_what_is_nested_to_the_json():
    rows = [{"program": "dot", "ms": 1234.5678, "peak": None, "collectives": {"all-reduce": 3}}]
    assert workload.markdown(rows) == "| program | ms | peak |\n| --- | --- | --- |\n| dot | 1235 | - |"
