"""docs/tutorial.md: what it says runs here does, in its order; its downloads are commands of the Hub's client."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from test_extending import SMALL

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "tutorial.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]


def test_every_step_says_what_it_writes_and_what_runs_here():
    steps = re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]
    numbers = [int(step.partition(".")[0]) for step in steps if step[0].isdigit()]
    assert numbers == list(range(1, len(numbers) + 1))
    for step in steps[:6]:
        assert "**Writes**" in step and "**Here**" in step, step[:40]


def test_what_a_command_reads_an_earlier_one_has_written():
    """Each workdir, set and file of candidates stands in the output of a command above."""
    written = set()
    for command in COMMANDS:
        if command.startswith("hf download"):
            written.add(re.search(r"--local-dir (\S+)", command)[1])
            continue
        fields = dict(re.findall(r"--config\.([\w.]+)=(\S+)", command))
        for field in ("model.checkpoint", "train.path", "meta.path", "candidates.path", "prepare.exclude",
                      "prepare.responses", "prepare.source", "input.path"):  # fmt: skip
            value = fields.get(field, "").strip('"')
            assert not value or any(value.startswith(folder) for folder in written), (field, command)
        written |= set(re.findall(r"--workdir=(\S+)", command))
        builder = re.search(r"prepare\.py:(\w+)", command)
        if builder:
            written.add(f"{fields['prepare.output']}/{builder[1]}/1.0.0")


def test_downloads_are_pinned_commands_of_the_client():
    hf = Path(sys.executable).parent / "hf"
    told = subprocess.run([hf, "download", "--help"], capture_output=True, text=True, timeout=120, check=True).stdout
    downloads = [command for command in COMMANDS if command.startswith("hf ")]
    assert len(downloads) == 5
    for command in downloads:
        assert "--revision REVISION" in command
        for option in re.findall(r" (--[\w-]+)", command):
            assert re.search(rf"{option}\b", told), option


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """The workdirs after the embedded commands of steps 4 to 6, a few steps of each."""
    runs = tmp_path_factory.mktemp("runs")
    commands = [command for command in COMMANDS if "--workdir=runs/embedded/" in command]
    for command in commands:
        given = re.findall(r"--config\.[\w.]+=", command)
        # Some questions are held out for the threshold.
        small = [flag.replace("test_questions=2", "test_questions=30") for flag in SMALL]
        if "evaluate.py" in command:
            small = [flag for flag in small if "test_questions" in flag]
        if "cold_start.py" in command:
            small = [flag for flag in small if "config.num_steps" not in flag]
        flags = [flag for flag in small if not any(flag.startswith(field) for field in given)]
        arguments = shlex.split(command.replace("runs/embedded/", f"{runs}/"))[1:]
        done = subprocess.run(
            [sys.executable, *arguments, *flags], cwd=ROOT, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr
    return runs


def test_the_embedded_commands_run_one_after_the_other(embedded):
    phases = {
        name: [json.loads(line)["phase"] for line in (embedded / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("cold_start", "table")
    }
    assert phases == {"cold_start": ["pretrain", "cold_start"], "table": ["bilevel"] * 20}
    promised = re.search(r"## 6\. .*?\*\*Writes\*\* (.*?) with every question", TEXT, re.DOTALL)[1]
    names = re.findall(r"`([\w.]+)`", promised)
    assert len(names) == 5
    for name in names:
        assert (embedded / "best_of_n" / name).is_file(), name
