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
    name, arguments = re.search(r"python run.py +--config=configs/(\w+)\.py(?::(\S+))?", command).groups()
    cfg = importlib.import_module(f"configs.{name}").get_config(*filter(None, [arguments]))
    fields = re.findall(r"--config\.([\w.]+)=(\S+)", command)
    assert {field for field, _ in fields} <= set(run.field_names(cfg))
    cfg.update_from_flattened_dict({field: int(value) for field, value in fields if value.isdigit()})
    ranges.validate(cfg)
    if cfg.task == "train":  # the devices that it speaks of can share the batches that it has
        steps.check_rows(cfg, AbstractMesh((cfg.mesh.data, cfg.mesh.fsdp, cfg.mesh.tensor), sharding.AXES))
