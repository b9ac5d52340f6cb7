"""The command line: a user's mistake is one `error:` line with the place, and exit status 2."""

import fcntl
import importlib
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from PIL import Image

import run
from configs import base, ranges, score
from dreamprm_jax import scoring
from dreamprm_jax.data import noisy_steps, sharing
from dreamprm_jax.errors import InputError
from dreamprm_jax.experiment import run_training
from dreamprm_jax.models import convert, internvl, presets
from dreamprm_jax.scoring import run_scoring
from dreamprm_jax.workdir import files_of_process

ROOT = Path(__file__).parent.parent
TABLE = "--config=configs/table.py"


def call(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "run.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def refused(*arguments) -> str:
    """The one line on stderr."""
    done = call(*arguments)
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return errors[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--config is missing"),
        (("--config=configs/tabel.py",), "configs/tabel.py: no such file"),
        ((TABLE + ":interlvl3_1b",), "'interlvl3_1b' is not known; choose from internvl3_1b"),
        ((TABLE + ":paper,corrected",), "are both a recipe"),
        ((TABLE, "--config.inner.lrr=1"), "inner.lrr is not a field of the config; the nearest is --config.inner.lr"),
        ((TABLE, "--config.batchsize=1"), "the nearest is --config.batch_size"),
        ((TABLE, "--config.batch_size=many"), "--config.batch_size=many"),
        ((TABLE, "--config.batch_size=0"), "--config.batch_size=0: must be at least 1"),
        ((TABLE, "--config.seed=-1"), "--config.seed=-1: must be at least 0"),
        ((TABLE, "--config.aggregate=median"), "--config.aggregate=median: must be one of mean"),
        ((TABLE, "--wrokdir=x"), "wrokdir"),
        ((TABLE, "stray"), "unexpected argument 'stray'"),
        ((TABLE, "--config.seed=1", "--config=configs/score.py"), "--config is given 2 times"),
        ((TABLE, "--workdir=gs://bucket/table"), "--workdir=gs://bucket/table: must be a path"),
        ((TABLE, "--config.distributed.process_id=1"), "distributed.coordinator is missing"),
        (
            (TABLE, "--config.distributed.coordinator=localhost:1", "--config.distributed.num_processes=2",
             "--config.distributed.process_id=2"),
            "process_id=2: must be below num_processes (2)",
        ),
    ],
)  # fmt: skip
def test_wrong_flags(arguments, message):
    assert message in refused(*arguments)


def test_flags_may_come_before_the_config():
    assert "--config.batch_size=0" in refused("--config.batch_size=0", TABLE)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nothing_here", "config.py line 1: ModuleNotFoundError: No module named 'nothing_here'"),
        ("\ndef get_config(:", "config.py line 2: SyntaxError: invalid syntax"),
        ("def get_config():\n    return undefined", "config.py line 2: NameError: name 'undefined' is not defined"),
        ("\ndef get_config():\n    return 1 / 0", "config.py line 3: ZeroDivisionError: division by zero"),
    ],
)
def test_a_config_of_the_users_own_that_does_not_run_is_named(tmp_path, text, message):
    (tmp_path / "config.py").write_text(text)
    assert message in refused(f"--config={tmp_path / 'config.py'}")


def test_an_interrupt_is_no_traceback(tmp_path):
    (tmp_path / "config.py").write_text("raise KeyboardInterrupt")  # where control-C comes does not matter
    done = call(f"--config={tmp_path / 'config.py'}")
    assert done.returncode == 130
    assert done.stderr.strip() == "interrupted; the same command resumes what it began"


def test_help_needs_no_config():
    done = call("--help")
    assert done.returncode == 0
    assert "--config.FIELD=VALUE" in done.stdout


@pytest.mark.parametrize("argument", ["--help", "--wrokdir=x", "--config.batch_size=0"])
def test_an_answer_to_the_command_line_needs_no_jax(argument):
    """Loading it takes longer than all the rest."""
    code = (
        "import run, sys\n"
        "status = run.main(['run.py', *sys.argv[1:]])\n"
        "print(sorted({'jax', 'flax', 'orbax', 'matplotlib', 'scipy', 'grain'} & set(sys.modules)))\n"
        "sys.exit(status)\n"
    )
    command = [sys.executable, "-c", code, TABLE, argument]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == (0 if argument == "--help" else 2)
    assert done.stdout.splitlines()[-1] == "[]"


# Mistakes in files, shown on a tiny checkpoint of our own with the embedded benchmark's tokenizer.

SIZES = noisy_steps.Sizes(pretrain=1, cold_start=1, clean=3, flipped=0, always_plus=0, trivial=0, test_questions=1)
CHAIN = next(row for row in noisy_steps.make(0, SIZES).train if row.num_steps >= 2)
STEPS = [turn.text.replace("<image>", "") for turn in CHAIN.turns if turn.role == "human"]


def conversation(*labels, first=STEPS[0]):
    turns = []
    for step, label in zip([first, *STEPS[1:]], labels, strict=False):
        turns += [{"from": "human", "value": step}, {"from": "gpt", "value": label}]
    return turns


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = noisy_steps.tokenizer()
    config = presets.tiny(tokenizer.get_vocab_size())
    convert.save_checkpoint(config, internvl.init(config, jax.random.key(0, impl="rbg")), folder, "original")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def rows(tmp_path):
    Image.new("RGB", (28, 28), (9, 99, 199)).save(tmp_path / "a.png")
    return [{"id": i, "image": "a.png", "conversations": conversation("+"), "true_false": True} for i in range(3)]


def score_config(checkpoint, tmp_path, rows):
    path = tmp_path / "rows.json"
    path.write_text(rows if isinstance(rows, str) else json.dumps(rows))
    cfg = score.get_config()
    cfg.model.checkpoint, cfg.input.path, cfg.output = str(checkpoint), str(path), str(tmp_path / "out.jsonl")
    return cfg


def scores_of(checkpoint, tmp_path, rows, history="plus", work="work"):
    cfg = score_config(checkpoint, tmp_path, rows)
    cfg.score.history = history
    if work != "work":
        cfg.output = str(tmp_path / f"{work}.jsonl")
    run_scoring(cfg, tmp_path / work)
    return [json.loads(line) for line in Path(cfg.output).read_text().splitlines()]


def test_a_good_file_is_scored_in_order(checkpoint, tmp_path, rows):
    rows[1] = {**rows[1], "conversations": conversation("+", "+")}
    rows[2] = {**rows[2], "true_false": False}
    lines = scores_of(checkpoint, tmp_path, rows)
    assert [line["row"] for line in lines] == [line["id"] for line in lines] == [0, 1, 2]
    assert [len(line["step_scores"]) for line in lines] == [1, 2, 1]
    assert list(lines[0]) == [
        "row", "id", "num_tiles", "num_tokens", "step_scores", "step_scores_two_token", "score", "true_false",
    ]  # fmt: skip
    assert lines[0]["score"] == pytest.approx(lines[2]["score"]) == pytest.approx(lines[0]["step_scores"][0])
    assert [line["true_false"] for line in lines] == [True, True, False]


def test_scoring_leaves_its_record_and_stays_out_of_a_training_run(checkpoint, tmp_path, rows):
    work = tmp_path / "work"
    scores_of(checkpoint, tmp_path, rows)
    (line,) = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    assert line["phase"] == "score" and line["num_chains"] == 3
    with pytest.raises(InputError, match=r"begun with config.score.history=plus, now config.score.history=given"):
        scores_of(checkpoint, tmp_path, rows, "given")
    with pytest.raises(InputError, match=r"begun with data\..*rows.json=.*; give another --workdir"):
        scores_of(checkpoint, tmp_path, rows[:2])
    record = json.loads((work / "config.json").read_text())
    assert list(record["data"]) == [str(tmp_path / "rows.json"), str(checkpoint)]
    record["config"]["task"] = "train"
    (work / "config.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="begun with config.task=train, now config.task=score"):
        scores_of(checkpoint, tmp_path, rows)


def test_history_is_plus_unless_the_file_is_asked_for(checkpoint, tmp_path, rows):
    rows = [{**rows[0], "conversations": conversation(label, "+")} for label in "+-"]
    lines = {history: scores_of(checkpoint, tmp_path, rows, history, history) for history in ("plus", "given")}
    plus, given = ([line["step_scores"] for line in lines[history]] for history in ("plus", "given"))
    assert pytest.approx(plus[0], rel=1e-5) == plus[1] == pytest.approx(given[0], rel=1e-5)
    assert given[1][0] == pytest.approx(given[0][0], rel=1e-5)
    assert given[1][1] != pytest.approx(given[0][1], rel=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": "b.png"}, 'rows.json row 1: "image"'),
        ({"image": "broken.png"}, 'rows.json row 1: "image"'),
        ({"image": "../../../../etc/passwd"}, 'rows.json row 1: "image"'),
        ({"conversations": []}, 'rows.json row 1: "conversations"'),
        ({"conversations": conversation("yes")}, "rows.json row 1: "),
        ({"conversations": conversation("+", first="find <|im_end|>")}, "<|im_end|>"),
        ({"conversations": conversation("+", first="a word that the tokenizer lacks")}, "rows.json row 1: "),
        ({"true_false": "no"}, 'rows.json row 1: "true_false"'),
    ],
)
def test_a_bad_row_stops_before_anything_is_written(checkpoint, tmp_path, rows, change, message):
    good = (tmp_path / "a.png").read_bytes()
    (tmp_path / "broken.png").write_bytes(good[: len(good) // 2])
    rows[1] = {**rows[1], **change}
    cfg = score_config(checkpoint, tmp_path, rows)
    with pytest.raises(InputError) as error:
        run_scoring(cfg, tmp_path / "work")
    assert message in str(error.value)
    assert not (tmp_path / "out.jsonl").exists()
    assert not (tmp_path / "work").exists()


def test_bad_rows_can_be_skipped_and_the_others_keep_their_numbers(checkpoint, tmp_path, rows):
    whole = scores_of(checkpoint, tmp_path, rows)
    rows[1]["image"] = "b.png"
    cfg = score_config(checkpoint, tmp_path, rows)
    cfg.data.on_error, cfg.data.max_bad_share = "skip", 0.4
    cfg.output = None
    run_scoring(cfg, tmp_path / "skipping")
    lines = [json.loads(line) for line in (tmp_path / "skipping/scores.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == [0, 2]
    for line, known in zip(lines, (whole[0], whole[2]), strict=True):
        assert line == {name: pytest.approx(value, rel=1e-5) for name, value in known.items()}


@pytest.mark.parametrize("weights", ["table", "net", "domain"])
def test_a_run_on_files_goes_on_without_its_bad_rows(checkpoint, tmp_path, rows, weights):
    rows = [{**row, "dataset": "ab"[row["id"] % 2], "true_false": row["id"] == 0} for row in rows]
    bad = {**rows[1], "id": 7, "conversations": []}
    (tmp_path / "train.json").write_text(json.dumps([rows[0], bad, rows[1]]))
    (tmp_path / "meta.json").write_text(json.dumps(rows))
    cfg = importlib.import_module(f"configs.{weights}").get_config("corrected")
    cfg.data.source, cfg.data.on_error, cfg.data.max_bad_share = "files", "skip", 0.4
    cfg.model.checkpoint, cfg.pretrain.num_steps, cfg.cold_start.num_steps = str(checkpoint), 0, 0
    cfg.train.path, cfg.meta.path = str(tmp_path / "train.json"), str(tmp_path / "meta.json")
    cfg.num_steps, cfg.num_inner_steps, cfg.batch_size, cfg.meta_batch_size = 3, 1, 2, 3
    summary = run_training(cfg, tmp_path / "work")
    assert summary["skipped_rows"] == {"train": {"conversations": 1}, "meta": {}}
    lines = [json.loads(line) for line in (tmp_path / "work/instance_weights.jsonl").read_text().splitlines()]
    assert [(line["example_id"], line["id"], line["visits"]) for line in lines] == [(0, 0, 3), (2, 1, 3)]
    drawn = [json.loads(line)["example_ids"] for line in (tmp_path / "work/metrics.jsonl").read_text().splitlines()]
    assert all(sorted(rows) == [0, 2] for rows in drawn)


def test_uniform_weights_on_files_need_no_meta_set(checkpoint, tmp_path, rows):
    (tmp_path / "train.json").write_text(json.dumps(rows))
    cfg = importlib.import_module("configs.uniform").get_config("corrected")
    cfg.data.source, cfg.train.path = "files", str(tmp_path / "train.json")
    cfg.model.checkpoint, cfg.pretrain.num_steps, cfg.cold_start.num_steps = str(checkpoint), 0, 0
    cfg.num_steps, cfg.batch_size = 2, 2
    run_training(cfg, tmp_path / "work")
    phases = [json.loads(line)["phase"] for line in (tmp_path / "work/metrics.jsonl").read_text().splitlines()]
    assert phases == ["uniform"] * 2
    cfg.meta.held_out = 0.5
    with pytest.raises(InputError, match=r"--config.meta.path is missing"):
        run_training(cfg, tmp_path / "other")


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.input.path=nowhere.json", "nowhere.json"),
        ("--config.model.checkpoint=no where", "no where"),
        ("--config.model.tokenizer=configs", "tokenizer.json"),
        ("--config.input.images=nowhere", "nowhere"),
    ],
)
def test_missing_files(checkpoint, tmp_path, rows, flag, message):
    cfg = score_config(checkpoint, tmp_path, rows)
    field, value = flag.removeprefix("--config.").split("=")
    cfg.update_from_flattened_dict({field: value})
    with pytest.raises(InputError) as error:
        run_scoring(cfg, tmp_path / "work")
    assert message in str(error.value)


def test_an_output_that_cannot_be_written_costs_no_scores(checkpoint, tmp_path, rows, monkeypatch):
    monkeypatch.setattr(scoring, "score_windows", lambda *a, **k: pytest.fail("scored for nothing"))
    cfg = score_config(checkpoint, tmp_path, rows)
    with pytest.raises(InputError, match="rows.json: cannot be written"):
        run_scoring(cfg, tmp_path / "rows.json")
    cfg.output = str(tmp_path)
    with pytest.raises(InputError, match=r"--config.output=.*: cannot be written"):
        run_scoring(cfg, tmp_path / "work")


def test_the_input_is_never_written_over(checkpoint, tmp_path, rows):
    cfg = score_config(checkpoint, tmp_path, rows)
    (tmp_path / "link.json").symlink_to(tmp_path / "rows.json")
    for output in ("rows.json", "link.json"):
        cfg.output = str(tmp_path / output)
        with pytest.raises(InputError, match=r"--config.output=.*: is the input file itself; give another file"):
            run_scoring(cfg, tmp_path / "work")
    assert json.loads((tmp_path / "rows.json").read_text()) == rows
    assert not (tmp_path / "work").exists()


def test_a_row_error_reaches_the_command_line(checkpoint, tmp_path, rows):
    rows[2]["image"] = "b.png"
    cfg = score_config(checkpoint, tmp_path, rows)
    flags = [f"--config.model.checkpoint={cfg.model.checkpoint}", f"--config.input.path={cfg.input.path}"]
    assert 'rows.json row 2: "image"' in refused("--config=configs/score.py", *flags)


def test_another_process_has_copies_of_the_runs_files(tmp_path):
    workdir, output = tmp_path / "run", tmp_path / "workdir"
    workdir.mkdir()
    (workdir / "config.json").write_text("{}")
    output.write_text("scores")
    with files_of_process(workdir, str(output), first=False) as (own, copy):
        assert ((own / "config.json").read_text(), copy.read_text()) == ("{}", "scores")
        copy.write_text("more")
        assert copy.resolve() != output and own.resolve() != workdir
    assert output.read_text() == "scores" and not own.exists()
    with files_of_process(workdir, str(output), first=True) as found:
        assert found == (workdir, output)


def test_every_config_builds_and_passes_its_own_checks():
    for path in sorted((ROOT / "configs").glob("*.py")):
        if path.stem in ("__init__", "base", "ranges"):
            continue
        module = importlib.import_module(f"configs.{path.stem}")
        without_scale = {name: [""] for name in ("score", "compare", "generate", "export")} | {
            "prepare": base.BUILDERS,
            "evaluate": ["", "published", "paper", "corrected"],
        }
        arguments = without_scale.get(path.stem, ["", "internvl3_1b", "corrected,internvl3_1b", "paper"])
        for argument in arguments:
            cfg = module.get_config(argument)
            ranges.validate(cfg)
            assert cfg.is_locked


def test_every_field_is_read_by_something():
    """A field that no code reads is a promise that nobody keeps."""
    source = "\n".join(path.read_text() for path in [*(ROOT / "dreamprm_jax").rglob("*.py"), ROOT / "run.py"])
    unread = [
        name
        for name in run.field_names(base.get_config())
        if not name.startswith("noisy_steps.") and f".{name.rsplit('.', 1)[-1]}" not in source
    ]
    assert not unread


def test_a_killed_scoring_goes_on_to_the_same_bytes(checkpoint, tmp_path, rows, monkeypatch):
    """Lines are written window by window; what stands after the last whole window is done again."""
    monkeypatch.setattr(sharing, "WINDOW", 2)
    rows = [{**rows[0], "id": n, "conversations": conversation("+", first=STEPS[n % len(STEPS)])} for n in range(7)]
    cfg = score_config(checkpoint, tmp_path, rows)
    result = run_scoring(cfg, tmp_path / "work")
    path = tmp_path / "out.jsonl"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for left in (b"", lines[0], b"".join(lines[:2]), b"".join(lines[:5]) + lines[5][:9], whole):
        path.write_bytes(left)
        asked = []
        windows = scoring.score_windows

        def noted(*args, asked=asked, windows=windows, **options):
            for window in windows(*args, **options):
                asked.extend(row for row, _ in window)
                yield window

        with monkeypatch.context() as patch:
            patch.setattr(scoring, "score_windows", noted)
            again = run_scoring(cfg, tmp_path / "work")
        assert path.read_bytes() == whole
        assert asked == list(range(7 if left == whole else left.count(b"\n") // 2 * 2, 7))
        assert again == result


def test_a_kill_between_scores_and_metrics_costs_nothing(checkpoint, tmp_path, rows):
    cfg = score_config(checkpoint, tmp_path, rows)
    result = run_scoring(cfg, tmp_path / "work")
    (tmp_path / "work/metrics.jsonl").unlink()
    assert run_scoring(cfg, tmp_path / "work") == result
    (line,) = [json.loads(line) for line in (tmp_path / "work/metrics.jsonl").read_text().splitlines()]
    assert line["num_chains"] == 3


def test_rows_that_can_be_used_again_are_not_left_out(checkpoint, tmp_path, rows, monkeypatch):
    """An image that was missing is there when the run goes on: line n is of another row than before."""
    monkeypatch.setattr(sharing, "WINDOW", 2)
    rows = [{**rows[0], "id": number} for number in range(6)]
    rows[1]["image"] = "b.png"
    cfg = score_config(checkpoint, tmp_path, rows)
    cfg.data.on_error, cfg.data.max_bad_share = "skip", 0.4
    run_scoring(cfg, tmp_path / "work")
    path = tmp_path / "out.jsonl"
    kept = b"".join(path.read_bytes().splitlines(keepends=True)[:3])
    path.write_bytes(kept)
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes())
    with pytest.raises(InputError, match=r"out.jsonl line 2: is not the scores of row 1; the rows .* have changed"):
        run_scoring(cfg, tmp_path / "work")
    assert path.read_bytes() == kept
    path.unlink()
    assert run_scoring(cfg, tmp_path / "work")["num_chains"] == 6


@pytest.mark.parametrize("text", ["mine\n", "[1]\n", '{"row": 1}\n', '{"row": 0}\n' * 4])
def test_what_something_else_wrote_is_not_cut_off(checkpoint, tmp_path, rows, text):
    """Also where the workdir is this run's own."""
    cfg = score_config(checkpoint, tmp_path, rows)
    run_scoring(cfg, tmp_path / "work")
    (tmp_path / "out.jsonl").write_text(text)
    with pytest.raises(InputError, match=r"out.jsonl line \d: is not the scores of "):
        run_scoring(cfg, tmp_path / "work")
    assert (tmp_path / "out.jsonl").read_text() == text


def test_two_runs_do_not_write_one_file(checkpoint, tmp_path, rows):
    cfg = score_config(checkpoint, tmp_path, rows)
    with (tmp_path / "out.jsonl").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="out.jsonl: another run writes it"):
            run_scoring(cfg, tmp_path / "work")
    assert run_scoring(cfg, tmp_path / "work")["num_chains"] == 3


def test_a_file_of_someone_elses_is_not_scored_into(checkpoint, tmp_path, rows):
    cfg = score_config(checkpoint, tmp_path, rows)
    (tmp_path / "out.jsonl").write_text("mine\n")
    for _ in range(2):  # the first refusal must not make it this run's own
        with pytest.raises(InputError, match="out.jsonl: exists already"):
            run_scoring(cfg, tmp_path / "work")
    assert (tmp_path / "out.jsonl").read_text() == "mine\n"
