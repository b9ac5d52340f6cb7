"""The comparison at a small size: its parts, its figures by hand, resuming, failing, sweeps, and its pages."""

import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import base, compare, ranges
from dreamprm_jax import compare as running
from dreamprm_jax import comparison, comparison_report, page, report
from dreamprm_jax.data import noisy_steps
from dreamprm_jax.errors import InputError
from dreamprm_jax.losses import AGGREGATIONS
from dreamprm_jax.sweeps import settings
from dreamprm_jax.workers import InThisProcess

ROOT = Path(__file__).parent.parent
SIZES = {
    "pretrain": 16, "cold_start": 16, "clean": 8, "flipped": 8, "always_plus": 4, "trivial": 2, "shifted": 1,
    "meta_questions": 4, "test_questions": 6,
}  # fmt: skip
SEEDS = (0, 3)
METHODS = ("uniform", "table")
PARTS = [f"seed{seed}/{method}" for seed in SEEDS for method in ("cold_start", *METHODS)]


def small_config():
    cfg = compare.get_config()
    cfg.noisy_steps.update(SIZES)
    cfg.num_steps, cfg.cold_start.num_steps, cfg.pretrain.num_steps = 4, 3, 0
    cfg.batch_size = cfg.meta_batch_size = cfg.cold_start.batch_size = 4
    cfg.compare.seeds, cfg.compare.methods = SEEDS, METHODS
    return cfg


def run(cfg, workdir):
    return running.run_comparison(cfg, workdir, compare.part_configs(cfg))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Run once, in one worker process."""
    workdir = tmp_path_factory.mktemp("compare") / "work"
    cfg = small_config()
    cfg.compare.jobs = 1
    with pytest.MonkeyPatch.context() as patch:  # most of the time is compilation: the second seed finds it done
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("xla")))
        summary = run(cfg, workdir)
        jax.config.update("jax_compilation_cache_dir", None)
    return workdir, summary


@pytest.fixture
def results(finished):
    return json.loads((finished[0] / "results.json").read_text())


def test_every_part_is_a_run_of_its_own(finished):
    workdir, _ = finished
    assert sorted(str(path.parent.relative_to(workdir)) for path in workdir.rglob("summary.json")) == sorted(PARTS)
    for part in PARTS:
        assert {"config.json", "metrics.jsonl", "test_scores.jsonl", "report.html", "log.txt"} <= {
            path.name for path in (workdir / part).iterdir()
        }
        assert "step/s" in (workdir / part / "log.txt").read_text()
    record = json.loads((workdir / "seed3/table/config.json").read_text())["config"]
    assert (record["seed"], record["model"]["checkpoint"]) == (3, str(workdir / "seed3/cold_start"))


def test_tables_plots_and_page_are_there(finished):
    workdir, summary = finished
    names = {path.name for path in workdir.iterdir()}
    assert names == {"config.json", "results.json", "results.md", "report.html", "plots", "seed0", "seed3"}
    kept = {path.stem: path.read_bytes() for path in (workdir / "plots").iterdir()}
    assert set(kept) == {"best_of_n", "learning_curves", "scores", "weights_by_source"}
    html = (workdir / "report.html").read_text()
    for png in kept.values():
        assert page._base64(png) in html
    assert html.count("<img alt=") == 4
    assert "http" not in html.split("<body>")[1].split("<pre>")[0]
    assert "instance table" in (workdir / "results.md").read_text()
    assert summary["report"] == str(workdir / "report.html")


def best_of_8(workdir, aggregate):
    """By hand: each question's first candidate of highest score, the score from the step scores."""
    questions = {}
    for line in lines(workdir / "test_scores.jsonl"):
        questions.setdefault(line["question"], []).append((aggregate(line["step_scores"]), line["correct"]))
    right = [max(found, key=lambda pair: pair[0])[1] for found in questions.values()]
    assert len(right) == 6
    return np.array(right, float)


def test_figures_are_those_of_the_parts_files(finished, results):
    workdir = finished[0]
    (found,) = results["settings"].values()
    assert results["aggregate"] == "product"
    for method in ("cold_start", *METHODS):
        figures = found["methods"][method]
        for name, aggregate in (("product", np.prod), ("mean", np.mean), ("min", min), ("last", lambda s: s[-1])):
            values = [best_of_8(workdir / f"seed{seed}/{method}", aggregate).mean() for seed in SEEDS]
            assert figures["aggregations"][name]["values"] == pytest.approx(values)
        assert set(figures["aggregations"]) == set(AGGREGATIONS)
        assert figures["prm"] == figures["aggregations"]["product"]
        summaries = [json.loads((workdir / f"seed{seed}/{method}/summary.json").read_text()) for seed in SEEDS]
        assert figures["prm"]["values"] == [summary["best_of_n"]["prm"] for summary in summaries]
        assert figures["step_auroc"]["values"] == [summary["steps"]["step_auroc"] for summary in summaries]
        first, second = figures["seconds"]["values"]
        assert figures["seconds"]["mean"] == pytest.approx((first + second) / 2)
        assert figures["seconds"]["standard_error"] == pytest.approx(abs(first - second) / 2)  # of two values
    for rule in ("pass_at_1", "majority", "oracle"):
        assert found["references"][rule]["values"] == [summary["best_of_n"][rule] for summary in summaries]


def by_hand(rows, is_before):
    """Share of (corrupted, clean) pairs that are in order, a tie half."""
    pairs = [(a, b) for a in rows if a["corrupted"] for b in rows if not b["corrupted"]]
    return np.mean([is_before(a, b) for a, b in pairs]) if pairs else None


def test_aurocs_and_weights_by_source(finished, results):
    (found,) = results["settings"].values()
    rows = [lines(finished[0] / f"seed{seed}/table/instance_weights.jsonl") for seed in SEEDS]
    table, cold = found["methods"]["table"], found["methods"]["cold_start"]

    def lighter(a, b):
        return (a["weight"] < b["weight"]) + (a["weight"] == b["weight"]) / 2

    assert table["auroc"]["values"] == pytest.approx([by_hand(of_seed, lighter) for of_seed in rows])
    for source, stat in table["auroc_by_source"].items():
        of_source = [[row for row in of_seed if row["dataset"] == source] for of_seed in rows]
        assert stat["values"] == pytest.approx([by_hand(of_seed, lighter) for of_seed in of_source])
    for source, stat in table["weight_by_source"].items():
        source, _, corrupted = source.partition(", ")
        kinds = [
            [row["weight"] for row in of_seed if (row["dataset"], row["corrupted"], row["visits"] > 0) == kind]
            for of_seed in rows
            for kind in [(source, bool(corrupted), True)]
        ]
        assert stat["values"] == pytest.approx([np.mean(weights) for weights in kinds])
    assert {"clean", "trivial", "shifted"} <= set(table["weight_by_source"])
    losses = [lines(finished[0] / f"seed{seed}/cold_start/instance_weights.jsonl") for seed in SEEDS]
    assert cold["loss_auroc"]["values"] == pytest.approx(
        [by_hand(of_seed, lambda a, b: (a["loss"] > b["loss"]) + (a["loss"] == b["loss"]) / 2) for of_seed in losses]
    )
    assert "auroc" not in found["methods"]["uniform"] and "auroc" not in cold


def test_gains_are_paired_question_by_question(finished, results):
    workdir = finished[0]
    (found,) = results["settings"].values()

    def right(method):
        return [best_of_8(workdir / f"seed{seed}/{method}", np.prod) for seed in SEEDS]

    for ours, theirs in (("table", "uniform"), ("table", "cold_start"), ("uniform", "cold_start")):
        differences = np.concatenate(right(ours)) - np.concatenate(right(theirs))
        assert found["gains"][ours][theirs]["mean"] == pytest.approx(differences.mean())
    majority = found["methods"]["table"]["prm"]["mean"] - found["references"]["majority"]["mean"]
    gain = found["gains"]["table"]["majority"]
    assert gain["low"] <= gain["mean"] == pytest.approx(majority) and gain["mean"] <= gain["high"]
    assert set(found["gains"]["table"]) == {"uniform", "cold_start", "majority"}
    assert found["intervals"]["table"]["mean"] == pytest.approx(found["methods"]["table"]["prm"]["mean"])


def test_a_method_is_compared_with_its_published_formula():
    def part(right):
        outcome = {rule: np.array(right) for rule in ("prm", "majority")}
        return [comparison.Part({}, outcome)]

    parts = {"cold_start": part([0.0] * 4), "net": part([1.0, 1, 1, 0]), "net_identity": part([1.0, 0, 0, 0])}
    found = comparison.gains("net", parts)
    assert found["net_identity"]["mean"] == 0.5
    assert set(comparison.gains("net_identity", parts)) == {"cold_start", "majority"}


def test_the_same_command_again_runs_nothing(finished, monkeypatch, capsys):
    workdir, summary = finished
    before = (workdir / "results.json").read_bytes()
    monkeypatch.setattr(running, "_workers", lambda width: pytest.fail("started workers"))
    assert run(small_config(), workdir) == summary
    assert (workdir / "results.json").read_bytes() == before
    assert "6/6" in capsys.readouterr().err


def test_fewer_seeds_and_methods_of_the_same_comparison_may_be_asked_for(finished, tmp_path, monkeypatch):
    workdir = tmp_path / "work"
    shutil.copytree(finished[0], workdir)
    monkeypatch.setattr(running, "is_finished", lambda job: True)
    cfg = small_config()
    cfg.compare.seeds, cfg.compare.methods = (3,), ("uniform",)
    run(cfg, workdir)
    results = json.loads((workdir / "results.json").read_text())
    (found,) = results["settings"].values()
    assert (results["seeds"], list(found["methods"])) == ([3], ["cold_start", "uniform"])
    assert found["methods"]["uniform"]["prm"]["standard_error"] is None


def test_another_comparison_in_the_same_workdir_is_refused(finished):
    cfg = small_config()
    cfg.inner.lr = 0.5
    place = re.escape(f"{finished[0]}/config.json")
    with pytest.raises(InputError, match=f"{place}: was begun with config.inner.lr=.* now config.inner.lr=0.5"):
        run(cfg, finished[0])


def test_a_finished_part_of_another_config_is_refused(finished):
    cfg = small_config()
    configs = compare.part_configs(cfg)
    configs["table"].outer.lr = 0.7
    with pytest.raises(InputError, match="seed0/table/config.json: was begun with config.outer.lr=.* now"):
        running.run_comparison(cfg, finished[0], configs)


# Parts and their configs.


def test_a_part_is_its_methods_own_config():
    parts = compare.part_configs(compare.get_config())
    assert list(parts) == ["cold_start", *base.COMPARED]
    weightings = {name: (part.weighting.name, part.hypergradient) for name, part in parts.items()}
    assert weightings == {
        "cold_start": ("uniform", "auto"), "uniform": ("uniform", "auto"), "clean": ("uniform", "auto"),
        "domain": ("domain", "auto"), "table": ("table", "auto"), "net": ("net", "auto"),
        "table_identity": ("table", "identity"), "net_identity": ("net", "identity"),
    }  # fmt: skip
    assert [name for name, part in parts.items() if part.noisy_steps.drop_corrupted] == ["clean"]
    for name, part in parts.items():
        assert (part.cold_start.num_steps > 0) == (part.num_steps == 0) == (name == "cold_start")
        assert (part.pretrain.num_steps > 0) == (name == "cold_start")
    for name in ("table", "net"):
        assert parts[f"{name}_identity"].outer.lr == parts[name].outer.lr
        own = compare._TRAINED[name].get_config()
        assert (parts[name].inner.lr, parts[name].outer.lr) == (own.inner.lr, own.outer.lr)


def test_flags_set_a_field_for_every_part_and_the_budget_is_shared():
    cfg = compare.get_config()
    cfg.noisy_steps.flip_rate, cfg.num_steps, cfg.inner.clip_norm, cfg.compare.jobs = 0.3, 50, 2.0, 3
    cfg.cold_start.num_steps = 70
    for name, part in compare.part_configs(cfg).items():
        assert (part.noisy_steps.flip_rate, part.inner.clip_norm, part.compare.jobs) == (0.3, 2.0, 0)
        assert part.num_steps * part.num_inner_steps == (0 if name == "cold_start" else 50)
        assert part.cold_start.num_steps == (70 if name == "cold_start" else 0)


def test_a_flag_holds_for_every_part_also_where_it_says_the_default():
    cfg = compare.get_config()
    assert cfg.weighting.steps == "all" != compare.part_configs(cfg)["net"].weighting.steps
    assert compare.part_configs(cfg, {"weighting.steps"})["net"].weighting.steps == "all"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "weighting.features has relative_loss, which compares the rows of a batch"),
        (("--config.weighting.features=('loss','prob','label')",), "no training row is corrupted"),
    ],
)
def test_the_command_line_hands_such_a_flag_on(flags, message, tmp_path):
    """A batch of one is refused for the net's own features alone; past that, a sweep without noise is."""
    flags = (*flags, "--config.batch_size=1", f"--workdir={tmp_path / 'work'}", "--config.compare.sweep=corruption")
    flags += ("--config.noisy_steps.flipped=0", "--config.noisy_steps.always_plus=0")
    command = [sys.executable, "run.py", "--config=configs/compare.py", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert message in done.stderr


def test_a_field_that_makes_the_part_is_refused_as_a_flag():
    for field, value in (("seed", 4), ("model.checkpoint", "x"), ("weighting.name", "net"), ("train.path", "x.json")):
        cfg = compare.get_config()
        cfg.update_from_flattened_dict({field: value})
        with pytest.raises(InputError, match=f"--config.{field}: the comparison sets it for each part; leave it out"):
            compare.part_configs(cfg)


def test_a_value_that_one_part_cannot_have_is_named_with_it():
    cfg = compare.get_config()
    cfg.weighting.activation = "softmax"
    with pytest.raises(InputError, match=r"weighting.activation=softmax: .*\(in the part table\)"):
        compare.part_configs(cfg)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("seeds", (), "one or more whole numbers"),
        ("seeds", (1, 1), "one or more whole numbers"),
        ("seeds", (1, -1), "one or more whole numbers"),
        ("methods", ("uniform", "tabel"), "one or more of uniform, domain, table"),
        ("methods", (), "one or more of uniform"),
        ("sweep", "sizes", "one of none, corruption, meta_size"),
        ("jobs", -1, "at least 0"),
    ],
)
def test_values_of_compare_that_cannot_be(field, value, message):
    cfg = compare.get_config()
    cfg.compare[field] = value
    with pytest.raises(ValueError, match=message):
        ranges.validate(cfg)


def test_a_part_without_the_cold_starts_rows_has_the_same_others():
    part = compare.part_configs(small_config())["table"]
    own = noisy_steps.make(1, noisy_steps.Sizes(**part.noisy_steps))
    whole = noisy_steps.make(1, noisy_steps.Sizes(**SIZES))
    assert (own.train, own.meta, own.test) == (whole.train, whole.meta, whole.test)
    assert len(own.pretrain) + len(own.cold_start) == 1


def test_the_plan_goes_seed_by_seed_and_a_cold_start_serves_all_settings(tmp_path):
    cfg = small_config()
    cfg.compare.sweep = "corruption"
    points = settings("corruption", noisy_steps.Sizes(**cfg.noisy_steps))
    workdirs = {point.name: running._workdirs(cfg, tmp_path, point, ("uniform",)) for point in points}
    jobs = running.plan(workdirs, points, SEEDS, compare.part_configs(cfg))
    names = ["0%", "15%", "30%", "45%", "60%"]
    for seed, of_seed in zip(SEEDS, (jobs[:6], jobs[6:]), strict=True):
        cold_start, others = of_seed[0], of_seed[1:]
        assert (cold_start.workdir, cold_start.after) == (tmp_path / f"seed{seed}/cold_start", None)
        assert [job.workdir for job in others] == [tmp_path / name / f"seed{seed}/uniform" for name in names]
        for job, point in zip(others, points, strict=True):
            assert job.after == cold_start.workdir == type(tmp_path)(job.cfg.model.checkpoint)
            assert job.cfg.seed == cold_start.cfg.seed == seed
            assert point.changes.items() <= job.cfg.noisy_steps.to_dict().items()


# Running.


def job(tmp_path, name, after=None):
    return running.Job(tmp_path / name, None, None if after is None else tmp_path / after)


def summary_of(cfg, workdir):
    return {"best_of_n": {"prm": 0.5, "num_candidates": 8}, "auroc": 0.75, "seconds": 3.2}


def test_a_part_that_fails_lets_the_others_finish_and_is_named(tmp_path, monkeypatch):
    def train(cfg, workdir):
        print(f"about {workdir.name}")
        if workdir.name == "bad":
            raise RuntimeError("no such luck")
        return summary_of(cfg, workdir)

    monkeypatch.setattr(running, "run_training", train)
    jobs = [job(tmp_path, "bad"), job(tmp_path, "after_bad", "bad"), job(tmp_path, "good")]
    jobs.append(job(tmp_path, "after_good", "good"))
    told = {}
    with pytest.raises(InputError) as error:
        running.run_jobs(jobs, InThisProcess(), 1, lambda job, outcome: told.update({job.workdir.name: outcome}))
    assert told == {
        "bad": "RuntimeError: no such luck",
        "good": "best of 8 0.500, AUROC 0.750, 3 s",
        "after_good": "best of 8 0.500, AUROC 0.750, 3 s",
    }
    for text in (
        "1 of 4 parts failed",
        f"{tmp_path}/bad: RuntimeError: no such luck ({tmp_path}/bad/log.txt)",
        "1 parts",
    ):
        assert text in str(error.value)
    log = (tmp_path / "bad/log.txt").read_text()
    assert "about bad" in log and 'raise RuntimeError("no such luck")' in log


class Recorded(InThisProcess):
    """Keeps what was handed over; finishes a job only when asked."""

    def __init__(self):
        self.open = {}

    def submit(self, function, job):
        self.open[job.workdir.name] = Future()
        return self.open[job.workdir.name]


def test_no_more_run_at_once_than_asked_for_and_earlier_ones_first(tmp_path, monkeypatch):
    executor, seen = Recorded(), []

    def wait(running_now, return_when):
        seen.append(sorted(executor.open))
        name = sorted(executor.open)[0]
        executor.open[name].set_result(("fine", False))
        return running.FIRST_COMPLETED and type("Done", (), {"done": {executor.open.pop(name)}})

    monkeypatch.setattr(running, "wait", wait)
    jobs = [
        job(tmp_path, "a"),
        job(tmp_path, "b", "a"),
        job(tmp_path, "c", "a"),
        job(tmp_path, "d"),
        job(tmp_path, "e"),
    ]
    running.run_jobs(jobs, executor, 2, lambda job, outcome: None)
    assert seen == [["a", "d"], ["b", "d"], ["c", "d"], ["d", "e"], ["e"]][: len(seen)]
    assert seen[0] == ["a", "d"] and seen[1] == ["b", "d"] and len(seen) == 5


def test_a_worker_has_one_core_and_none_outlives_an_error():
    workers = running._workers(1)
    executor = workers.__enter__()
    (core,) = executor.submit(os.sched_getaffinity, 0).result()
    assert core in os.sched_getaffinity(0)
    (process,) = multiprocessing.active_children()
    long = executor.submit(time.sleep, 100)
    while not long.running():
        time.sleep(0.01)
    began = time.monotonic()
    assert not workers.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert not process.is_alive()
    assert time.monotonic() - began < 60  # ended, not waited for


def test_a_sweep_has_a_table_and_a_plot_of_the_gains(finished, tmp_path, monkeypatch):
    """From copies of finished parts: no training."""
    source, workdir = finished[0], tmp_path / "work"
    for seed in SEEDS:
        shutil.copytree(source / f"seed{seed}/cold_start", workdir / f"seed{seed}/cold_start")
        for point in settings("corruption", noisy_steps.Sizes(**SIZES)):
            for method in METHODS:
                shutil.copytree(source / f"seed{seed}/{method}", workdir / point.name / f"seed{seed}/{method}")
    monkeypatch.setattr(running, "is_finished", lambda job: True)
    cfg = small_config()
    cfg.compare.sweep, cfg.compare.sweep_methods, cfg.compare.methods = "corruption", METHODS, ("clean",)
    run(cfg, workdir)
    results = json.loads((workdir / "results.json").read_text())
    original = json.loads((source / "results.json").read_text())["settings"]["default"]
    assert list(results["settings"]) == ["0%", "15%", "30%", "45%", "60%"]
    for name, found in results["settings"].items():
        assert found["value"] == float(name.strip("%")) / 100
        assert found["gains"]["table"]["uniform"] == original["gains"]["table"]["uniform"]
        assert "loss_auroc" not in found["methods"]["cold_start"]  # of the training rows of another setting
    assert [path.name for path in (workdir / "plots").iterdir()] == ["sweep.png"]
    table = comparison_report.sweep_table(results)
    assert [row[0] for row in table.rows] == list(results["settings"])
    assert table.head[-1] == "instance table: gain over uniform"
    assert table.rows[0][-1] == comparison_report.points(original["gains"]["table"]["uniform"])


def test_the_runs_page_pictures_its_extreme_rows(finished):
    folder = finished[0] / "seed0/table"
    rows = lines(folder / "instance_weights.jsonl")
    highest, lowest = report.extremes(rows)
    html = (folder / "report.html").read_text()
    top, bottom = html.split("<h2>Rows of highest weight</h2>")[1].split("<h2>Rows of lowest weight</h2>")
    for part, chosen in ((top, highest), (bottom, lowest)):
        for row in chosen:
            truth = "corrupted" if rows[row]["corrupted"] else "not corrupted"
            assert f"row {row}, {rows[row]['dataset']}, {truth}: weight {rows[row]['weight']:.3f}" in part
        assert part.count("<article") == len(chosen) > 0
    assert "Rows of highest weight" not in (finished[0] / "seed0/uniform/report.html").read_text()
