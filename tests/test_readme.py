"""README is a promise: its commands run, its files exist, its fields are fields."""

import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import run
from configs import base, ranges
from dreamprm_jax.data import noisy_steps

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
SMALL = [
    "--config.cold_start.num_steps=2", "--config.num_steps=2", "--config.cold_start.batch_size=2",
    "--config.batch_size=2", "--config.meta_batch_size=2", "--config.noisy_steps.test_questions=2",
    "--config.pretrain.num_steps=2", "--config.pretrain.batch_size=2",
]  # fmt: skip


def command_with(text: str) -> str:
    (found,) = [command for command in COMMANDS if text in command and "venv" in command]
    return found


def test_both_commands_set_everything_up_from_nothing():
    for text, requirements in (("run.py", "requirements.txt"), (".venv/bin/pytest", "requirements-dev.txt")):
        command = command_with(text)
        assert command.startswith(f"python -m venv .venv && .venv/bin/pip install -r {requirements} && ")
    assert (ROOT / ".ci/run").read_text().count("readme_command") == 3


def test_every_file_and_field_that_readme_names_exists():
    for name in re.findall(r"(?:configs/\w+\.py|requirements[\w-]*\.txt|docs/\w+\.md|dreamprm_jax/\w+\.py)", README):
        assert (ROOT / name).is_file(), name
    fields = run.field_names(base.get_config())
    for name in re.findall(r"--config\.([\w.]+)=", README):
        assert name in fields or name == "FIELD", name


def test_every_command_is_one_of_ours_and_its_config_builds():
    for command in filter(None, COMMANDS):
        assert command.startswith(("python -m venv .venv && .venv/bin/pip install -r ", "python run.py --config=")), (
            command
        )
        for flag in re.findall(r"(--[\w.]+)=", command):
            assert flag in ("--config", "--workdir") or flag.startswith("--config."), flag
        for name, arguments in re.findall(r"--config=configs/(\w+)\.py(?::(\S+))?", command):
            ranges.validate(importlib.import_module(f"configs.{name}").get_config(arguments))


def test_the_papers_scale_on_a_cpu_says_so_loudly():
    cfg = importlib.import_module("configs.table").get_config("internvl3_1b")
    with pytest.warns(UserWarning, match="NO ACCELERATOR FOUND"):
        run.log_machine(cfg)


def test_requirements_are_pinned_exactly():
    for path in ROOT.glob("requirements*.txt"):
        for line in path.read_text().splitlines():
            package = line.partition("#")[0].strip()
            assert not package or package.startswith("-r ") or re.fullmatch(r"[\w\[\]-]+==[\w.]+", package), line


def launch(arguments):
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """The README's first command, a few steps of it."""
    folder = tmp_path_factory.mktemp("readme") / "run"
    arguments = shlex.split(command_with("run.py").split(" && ")[-1])[1:]
    launch([*arguments, f"--workdir={folder}", *SMALL])
    return folder


def test_the_first_command_writes_what_readme_lists(workdir):
    promised = re.findall(r"^\| (`.*?) \|", README, re.MULTILINE)
    names = [name.strip("`/ ") for cell in promised for name in cell.split(",")]
    assert len(names) == 9
    for name in names:
        assert (workdir / name).exists(), name


def test_the_score_command_scores_with_that_workdir(workdir, tmp_path):
    (command,) = [command for command in COMMANDS if "configs/score.py" in command]
    example = noisy_steps.make(0, noisy_steps.Sizes(test_questions=1)).train[0]
    (tmp_path / "board.png").write_bytes(example.images[0])
    turns = [{"from": turn.role, "value": turn.text} for turn in example.turns]
    row = {"id": 7, "image": "board.png", "conversations": turns}
    (tmp_path / "chains.json").write_text(json.dumps([row]))
    arguments = command.replace("CHECKPOINT", str(workdir)).replace("IMAGES", str(tmp_path))
    arguments = re.sub(r"(\w+\.jsonl?)", lambda match: str(tmp_path / match[0]), arguments)
    launch([*shlex.split(arguments)[1:], f"--workdir={tmp_path / 'work'}"])
    line = json.loads((tmp_path / "scores.jsonl").read_text())
    assert line["id"] == 7
    promised = re.search(r"from `score`: `\{(.*?)\}`", README, re.DOTALL)[1]
    assert list(line) == [name for name in re.findall(r'"(\w+)"', promised) if name != "true_false"]


@pytest.mark.parametrize(
    ("mesh", "num_devices", "expected"),
    [((1, 1, 1), 1, ""), ((8, 1, 1), 8, ""), ((0, 2, 2), 8, ""), ((1, 1, 1), 8, "the run takes 1 "),
     ((0, 3, 1), 8, "the run takes 6 "), ((16, 1, 1), 8, "")],
)  # fmt: skip
def test_devices_that_a_run_leaves_idle_are_told(mesh, num_devices, expected):
    cfg = base.get_config()
    cfg.mesh.data, cfg.mesh.fsdp, cfg.mesh.tensor = mesh
    told = run.unused(cfg, num_devices)
    assert expected in told and bool(told) == bool(expected)
