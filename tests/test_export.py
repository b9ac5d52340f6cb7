"""Exports: the same model in both layouts, the same scores, whole directories or none, others' files left alone."""

import importlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from exporting import checkpoint, export_config  # noqa: F401
from huggingface_hub import ModelCard
from safetensors.numpy import load_file
from test_trained_run import adapters_config

from configs import score
from dreamprm_jax import export, model_card
from dreamprm_jax.data import noisy_steps
from dreamprm_jax.errors import InputError
from dreamprm_jax.experiment import run_training
from dreamprm_jax.export import run_export
from dreamprm_jax.loading import load_model
from dreamprm_jax.models import convert
from dreamprm_jax.scoring import run_scoring

ROOT = Path(__file__).parent.parent
LAYOUTS = ("original", "hf")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run that trains adapters and scores with their moving average: what is exported stands nowhere as it is."""
    workdir = tmp_path_factory.mktemp("run") / "adapted"
    cfg = adapters_config()
    cfg.pretrain.num_steps = cfg.cold_start.num_steps = 0  # each a program to compile
    run_training(cfg, workdir)
    return workdir


@pytest.fixture(scope="module", params=LAYOUTS)
def exported(request, workdir, tmp_path_factory):
    directory = tmp_path_factory.mktemp("exports") / request.param
    run_export(export_config(workdir, layout=request.param, dtype="float32"), directory)
    return directory


def model_of(directory):
    cfg = score.get_config()
    cfg.model.checkpoint = str(directory)
    return load_model(cfg.model, seed=0)


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# ---- the model ----


def test_what_is_loaded_again_is_the_model_that_scored_to_the_bit(workdir, exported):
    expected, got = model_of(workdir), model_of(exported)
    assert (got.config.vision, got.config.language) == (expected.config.vision, expected.config.language)
    assert got.tokenizer.tokenizer.to_str() == expected.tokenizer.tokenizer.to_str()
    jax.tree.map(np.testing.assert_array_equal, got.params, expected.params)


def test_tensors_have_the_names_of_their_layout(workdir, exported):
    tensors = load_file(exported / "model.safetensors")
    assert tensors.keys() == convert.expected_tensors(model_of(workdir).config, exported.name).keys()
    marker = {"original": "vision_model.encoder.layers.0.attn.qkv.weight",
              "hf": "vision_tower.encoder.layer.0.attention.q_proj.weight"}  # fmt: skip
    assert marker[exported.name] in tensors


def test_an_export_scores_as_its_workdir(workdir, exported, tmp_path):
    """Chains of the benchmark, as `configs/score.py` scores them."""
    (tmp_path / "images").mkdir()
    rows = []
    for number, example in enumerate(noisy_steps.make(3, noisy_steps.Sizes(test_questions=1)).train[:5]):
        (tmp_path / f"images/{number}.png").write_bytes(example.images[0])
        turns = [{"from": turn.role, "value": turn.text} for turn in example.turns]
        rows.append({"id": number, "image": f"{number}.png", "conversations": turns})
    (tmp_path / "chains.json").write_text(json.dumps(rows))
    found = []
    for name, directory in (("run", workdir), ("export", exported)):
        cfg = score.get_config()
        cfg.model.checkpoint, cfg.output = str(directory), str(tmp_path / f"{name}.jsonl")
        cfg.input.path, cfg.input.images = str(tmp_path / "chains.json"), str(tmp_path / "images")
        run_scoring(cfg, tmp_path / name)
        found.append([json.loads(line)["step_scores"] for line in Path(cfg.output).read_text().splitlines()])
    assert found[0] == found[1]
    assert len({value for scores in found[0] for value in scores}) > 2


def test_bfloat16_is_the_default_and_rounds_once(checkpoint, tmp_path):
    run_export(export_config(checkpoint, layout="original"), tmp_path / "half")
    half, whole = (load_file(path / "model.safetensors") for path in (tmp_path / "half", checkpoint))
    for name, value in whole.items():
        assert half[name].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(half[name], value.astype(ml_dtypes.bfloat16))
    assert json.loads((tmp_path / "half/config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_large_weights_are_several_files_with_an_index(checkpoint, tmp_path, layout):
    run_export(export_config(checkpoint, layout=layout, dtype="float32", max_shard_gb=1e-4), tmp_path / "cut")
    files = sorted(path.name for path in (tmp_path / "cut").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert set(json.loads((tmp_path / "cut" / convert.INDEX).read_text())["weight_map"].values()) == set(files)
    assert (tmp_path / "cut" / files[0]).stat().st_mode == (tmp_path / "cut/README.md").stat().st_mode
    jax.tree.map(np.testing.assert_array_equal, model_of(tmp_path / "cut").params, model_of(checkpoint).params)


def test_an_export_is_the_same_to_the_byte(checkpoint, tmp_path):
    for name in ("one", "other"):
        run_export(export_config(checkpoint), tmp_path / name)
    assert contents(tmp_path / "one") == contents(tmp_path / "other")


# ---- the card ----


def test_the_card_has_the_runs_own_numbers(workdir, exported):
    card = ModelCard.load(exported / "README.md")
    assert card.data.pipeline_tag == "image-text-to-text"
    assert card.data.library_name == ("transformers" if exported.name == "hf" else "dreamprm_jax")
    assert (card.data.license, card.data.base_model, card.data.datasets) == (None, None, None)
    summary = json.loads((workdir / "summary.json").read_text())
    weights = [json.loads(line)["weight"] for line in (workdir / "instance_weights.jsonl").read_text().splitlines()]
    for row in (
        f"| best of N by this model | {summary['best_of_n']['prm']:.4f} |",
        f"| any candidate right | {summary['best_of_n']['oracle']:.4f} |",
        f"| meta-gradient | {summary['hypergradient']} |",
        f"| AUROC of weight against mislabelled rows | {summary['auroc']:.4f} |",
        "| parameters trained | adapters |",
        "| parameters exported | their moving average |",
        "| weighted steps | 3 |",
        f"| rows | {len(weights)} |",
        f"| mean | {np.mean(weights):.4g} |",
    ):
        assert row in card.text
    assert str(workdir.parent) not in card.text and "None" not in card.text.split("## Use")[0]
    assert ("transformers" in card.text.split("## Use")[1]) == (exported.name == "hf")


def test_the_cards_code_scores(exported, tmp_path, capsys):
    question = noisy_steps.make(0, noisy_steps.Sizes(test_questions=1)).test[0]
    (tmp_path / "board.png").write_bytes(question.examples[0].images[0])
    (code,) = re.findall(r"```python\n(from dreamprm_jax.*?)```", (exported / "README.md").read_text(), re.DOTALL)
    for name, value in (("DIRECTORY", str(exported)), ("PICTURE", str(tmp_path / "board.png")), ("QUESTION", "dice:4"),
                        ("STEP 1", "4>3"), ("STEP 2", "3>1")):  # fmt: skip
        code = code.replace(name, value)
    exec(compile(code, "card", "exec"), {})
    assert len(re.findall(r"\d\.\d+", capsys.readouterr().out)) == 2


def test_a_card_says_what_it_is_told_and_leaves_out_what_nobody_knows(checkpoint, tmp_path):
    cfg = export_config(checkpoint, license="apache-2.0", base_model="org/base", datasets="org/one,org/two")
    run_export(cfg, tmp_path / "told")
    card = ModelCard.load(tmp_path / "told/README.md")
    assert (card.data.license, card.data.base_model) == ("apache-2.0", "org/base")
    assert card.data.datasets == ["org/one", "org/two"]
    for absent in ("## Training", "## Scores", "## Instance weights", "noisy_steps", "None", str(tmp_path)):
        assert absent not in card.text
    assert "# tiny\n" in card.text and "reward model, from `org/base`:" in card.text and "was not measured" in card.text


def test_an_unfinished_run_says_so(workdir, tmp_path):
    (tmp_path / "run").mkdir()
    for path in workdir.iterdir():
        if path.name not in ("summary.json", "instance_weights.jsonl"):
            (tmp_path / "run" / path.name).symlink_to(path)
    run_export(export_config(tmp_path / "run"), tmp_path / "export")
    text = (tmp_path / "export/README.md").read_text()
    assert "| state | not finished |" in text and "was not finished" in text and "## Scores" not in text
    assert not list((tmp_path / "export").glob("weights*"))


def test_a_card_names_data_by_their_last_part_and_fingerprint():
    config = {"train": {"path": "/home/someone/train.json"}, "meta": {"path": "DATA/mmmu_pro/1.0.0"}}
    source = model_card.Source("x", None, config, {"/home/someone/train.json": "abc"}, None, None, [])
    _, table = model_card._data(source)
    assert "| train | `train.json`, sha256 `abc` |" in table and "| meta | `mmmu_pro/1.0.0` |" in table


def test_a_base_model_is_what_was_downloaded_here_and_nothing_that_looks_like_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    downloaded = {"OpenGVLab/InternVL3-1B": "/cache/config.json"}
    asked = []

    def try_to_load_from_cache(repo, filename, revision=None):
        asked.append((repo, revision))
        return downloaded.get(repo)

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", try_to_load_from_cache)
    assert model_card._started_from("OpenGVLab/InternVL3-1B@v1") == "OpenGVLab/InternVL3-1B"
    assert model_card._started_from("runs/gone") is None
    assert asked == [("OpenGVLab/InternVL3-1B", "v1"), ("runs/gone", None)]
    assert model_card._started_from(None) is None
    (tmp_path / "runs/cold/checkpoints").mkdir(parents=True)
    record = {"config": {"model": {"checkpoint": "OpenGVLab/InternVL3-1B"}}, "data": {}}
    (tmp_path / "runs/cold/config.json").write_text(json.dumps(record))
    assert model_card._started_from("runs/cold") == "OpenGVLab/InternVL3-1B"


# ---- the directory ----


@pytest.fixture
def first(checkpoint, tmp_path):
    directory = tmp_path / "export"
    run_export(export_config(checkpoint), directory)
    return directory


def refusal(cfg, directory):
    with pytest.raises(InputError) as error:
        run_export(cfg, directory)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_export_replaces_an_export(checkpoint, first):
    run_export(export_config(checkpoint, layout="original", max_shard_gb=1e-4), first)
    assert not (first / "model.safetensors").exists() and not (first / "processor_config.json").exists()
    assert [path.name for path in first.parent.iterdir()] == ["export"]
    model_of(first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: (path / "export.json").unlink(), "exists and is not an export"),
        (lambda path: (path / "notes.txt").write_text("mine"), "an export whose notes.txt was not written by it"),
        (lambda path: (path / "more").mkdir(), "an export whose more was not written by it"),
        (lambda path: (path / "README.md").write_text("mine"), "an export whose README.md was changed since"),
        (lambda path: (path / "export.json").write_text("{}"), "export.json: is not the record of an export"),
    ],
)
def test_nothing_of_others_is_replaced(checkpoint, first, change, message):
    change(first)
    before = sorted(first.iterdir())
    assert message in refusal(export_config(checkpoint), first)
    assert sorted(first.iterdir()) == before


def test_neither_a_file_nor_a_link_nor_the_checkpoint_is_an_output(checkpoint, first, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(first)
    assert "is a file" in refusal(export_config(checkpoint), tmp_path / "file")
    assert "is a link" in refusal(export_config(checkpoint), tmp_path / "link")
    assert "is the checkpoint itself" in refusal(export_config(first), first)


def test_output_is_the_directory_where_it_is_given(checkpoint, tmp_path):
    cfg = export_config(checkpoint)
    cfg.output = str(tmp_path / "there/deep")
    report = run_export(cfg, tmp_path / "here")
    assert (tmp_path / "there/deep/config.json").is_file() and not (tmp_path / "here").exists()
    assert report["directory"] == cfg.output


@pytest.mark.parametrize("limit", [2_000, 60_000])
def test_a_full_disk_leaves_the_old_export_whole(checkpoint, first, limit):
    """A file may grow to `limit` bytes: the tokenizer's does not fit, or a shard after others that did."""
    before = contents(first)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    cfg = export_config(checkpoint, dtype="float32", max_shard_gb=7e-5)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        message = refusal(cfg, first)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot be written (" in message and "File too large" in message
    assert contents(first) == before
    assert [path.name for path in first.parent.iterdir()] == ["export"]


def test_what_a_kill_left_is_cleared_or_put_back(checkpoint, first, tmp_path):
    before = contents(first)
    staging, aside = tmp_path / "export.unfinished", tmp_path / "export.replaced"
    staging.mkdir()
    (staging / "export.json").write_text("")
    (staging / "model-00001-of-00009.safetensors").write_text("half")
    first.rename(aside)  # as between the two renames
    run_export(export_config(checkpoint), first)
    assert contents(first) == before
    shutil.copytree(first, aside)  # as when the old one was going
    for name in ("config.json", "README.md"):
        (aside / name).unlink()
    run_export(export_config(checkpoint), first)
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert contents(first) == before


def test_a_killed_export_puts_the_old_one_back_before_anything_else(checkpoint, first, tmp_path):
    before = contents(first)
    first.rename(tmp_path / "export.replaced")
    refusal(export_config(tmp_path / "nowhere"), first)
    assert contents(first) == before


@pytest.mark.parametrize("name", ["export.unfinished", "export.replaced"])
def test_strangers_beside_are_left_alone(checkpoint, tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine.txt").write_text("mine")
    assert "move it away" in refusal(export_config(checkpoint), tmp_path / "export")
    assert (tmp_path / name / "mine.txt").read_text() == "mine"


def test_an_export_under_way_is_not_disturbed(checkpoint, tmp_path):
    with export._staged(tmp_path / "export") as (staging, _):
        (staging / "part").write_text("half")
        assert "another run writes it" in refusal(export_config(checkpoint), tmp_path / "export")
        assert (staging / "part").is_file()


# ---- the source and the command line ----


def test_a_run_without_a_checkpoint_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"config": {}, "data": {}}))
    assert "a run's workdir without checkpoints/" in refusal(export_config(tmp_path), tmp_path / "export")
    (tmp_path / "checkpoints").mkdir()
    assert "holds no finished checkpoint" in refusal(export_config(tmp_path), tmp_path / "export")
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--config.model.checkpoint is missing"),
        (("--config.export.layout=gguf",), "--config.export.layout=gguf: must be one of hf, original"),
        (("--config.export.dtype=float16",), "--config.export.dtype=float16: must be one of bfloat16, float32"),
        (("--config.export.max_shard_gb=0",), "--config.export.max_shard_gb=0.0: must be above 0"),
        (("--config.export.repo=name",), "--config.export.repo=name: must be a Hub id"),
        (("--config.export.base_model=../x",), "--config.export.base_model=../x: must be a Hub id"),
        (("--config.export.datasets=one",), "must be Hub ids"),
        (("--config.export.license=Apache 2",), "must be as the Hub spells it"),
    ],
)
def test_wrong_flags_are_one_line(flags, message, tmp_path):
    command = [sys.executable, "run.py", "--config=configs/export.py", f"--workdir={tmp_path / 'x'}", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert message in line and "Traceback" not in done.stderr and not (tmp_path / "x").exists()


def test_the_command_exports(checkpoint, tmp_path):
    command = [sys.executable, "run.py", "--config=configs/export.py", f"--config.model.checkpoint={checkpoint}",
               f"--workdir={tmp_path / 'export'}", "--config.export.datasets=org/one,org/two"]  # fmt: skip
    environment = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["layout"] == "hf" and report["files"] == len(list((tmp_path / "export").iterdir())) - 1
    assert "org/two" in (tmp_path / "export/README.md").read_text()


def test_the_config_has_the_tiles_of_test_time():
    assert importlib.import_module("configs.export").get_config().images.max_tiles == 12
