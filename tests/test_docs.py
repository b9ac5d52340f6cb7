"""Code in the docs runs as it stands, and its commands are commands."""

import importlib
import re
from pathlib import Path

import pytest
from jax.sharding import AbstractMesh

import run
from configs import ranges
from dreamprm_jax import sharding, steps

DOCS = Path(__file__).parent.parent / "docs"
BLOCKS = [
    pytest.param(block, id=f"{path.name} {number}")
    for path in sorted(DOCS.glob("*.md"))
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL))
]


@pytest.mark.parametrize("code", BLOCKS)
def test_python_in_the_docs_runs(code, capsys):
    exec(compile(code, "docs", "exec"), {})
    assert capsys.readouterr().out


COMMANDS = [
    pytest.param(command, id=f"{path.name} {number}")
    for path in sorted(DOCS.glob("*.md"))
    for number, command in enumerate(
        line
        for block in re.findall(r"```bash\n(.*?)```", path.read_text(), re.DOTALL)
        for line in block.replace("\\\n", " ").splitlines()
        if "run.py" in line
    )
]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_in_the_docs_build_their_config(command):
    """With the values that they give; rows go round the devices, and the workdir is a path."""
    name, arguments = re.search(r"python run.py +--config=configs/(\w+)\.py(?::(\S+))?", command).groups()
    cfg = importlib.import_module(f"configs.{name}").get_config(*filter(None, [arguments]))
    fields = dict(re.findall(r"--config\.([\w.]+)=(\S+)", command))
    assert fields.keys() <= set(run.field_names(cfg))
    cfg.update_from_flattened_dict({field: value_of(text) for field, text in fields.items()})
    ranges.validate(cfg)
    if cfg.task == "train":
        steps.check_rows(cfg, AbstractMesh(tuple(cfg.mesh[axis] for axis in sharding.AXES), sharding.AXES))
    assert "://" not in command.partition("--workdir=")[2]


def value_of(text):
    """A flag's value: a number, a list of them, a truth, or else text."""
    if "," in text:
        return tuple(map(value_of, text.split(",")))
    return int(text) if text.isdecimal() else {"true": True, "false": False}.get(text.lower(), text)


TESTS_NAMED = [
    pytest.param(*found, id=f"{path.name} {' '.join(found)}")
    for path in sorted(DOCS.glob("*.md"))
    for found in dict.fromkeys(re.findall(r"pytest (tests/\w+\.py)(?: -k (\w+))?", path.read_text()))
]


@pytest.mark.parametrize(("file", "word"), TESTS_NAMED)
def test_a_test_that_the_docs_name_is_there(file, word):
    names = re.findall(r"^def (test_\w+)", (DOCS.parent / file).read_text(), re.MULTILINE)
    assert any(word in name for name in names)


@pytest.mark.parametrize(
    "name",
    sorted({name for path in DOCS.glob("*.md") for name in re.findall(r"-m (benchmarks\.\w+)", path.read_text())}),
)
def test_a_benchmark_that_the_docs_name_is_there(name):
    assert (DOCS.parent / f"{name.replace('.', '/')}.py").is_file()
