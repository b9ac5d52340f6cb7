"""The rooms and their order (docs/architecture.md): each knows the ones before it and nothing of those after."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dreamprm_jax"
FILES = sorted(PACKAGE.rglob("*.py"))

# Rooms of one line do not know each other unless the line says so; a room may import from the lines above it.
ORDER = [
    {"errors", "types"},
    {"data"},
    {"models"},
    {"losses", "weighting", "optimizers"},
    {"hypergradient"},
    {"bilevel"},
    {"metrics"},
    {"checkpoint"},
    {"build", "train"},
    {"scoring"},
    {"evaluate", "report"},
    {"experiment"},
]
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
BARE = ("errors", "types", "models", "losses", "weighting", "optimizers", "hypergradient", "bilevel")
BARE_LIBRARIES = {"jax", "flax", "optax", "numpy", "ml_dtypes"}  # ml_dtypes: a part of jax


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(file: Path, top_level_only: bool = False) -> set[str]:
    """Modules that a file imports, dotted; `from dreamprm_jax import x` counts as dreamprm_jax.x."""
    tree = ast.parse(file.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def rooms_used(file: Path) -> set[str]:
    return {name.split(".")[1] for name in imports(file) if name.startswith("dreamprm_jax.")}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_room_knows_only_the_rooms_before_it(file):
    room = room_of(file)
    if room == "__init__":
        return
    assert room in LEVEL, f"{file}: a new room needs its place in ORDER, here and in docs/architecture.md"
    late = {used for used in rooms_used(file) if used != room and LEVEL[used] >= LEVEL[room]}
    assert not late, f"{file} imports {late}, which come after {room}"


@pytest.mark.parametrize("room", ["losses", "weighting", "optimizers", "hypergradient", "bilevel"])
def test_the_mathematics_receives_functions_and_knows_no_model(room):
    assert not rooms_used(PACKAGE / f"{room}.py") & {"models", "data"}


def test_data_workers_never_import_jax_and_flax_stays_in_models():
    for file in FILES:
        tops = {name.split(".")[0] for name in imports(file)}
        if room_of(file) in ("data", "types", "errors"):
            at_run_time = {name.split(".")[0] for name in imports(file, top_level_only=True)}
            assert not at_run_time & {"jax", "flax", "optax"}, file
        if room_of(file) != "models":
            assert "flax" not in tops, file


def test_reading_data_does_not_load_jax():
    code = "import sys; from dreamprm_jax.data import records, noisy_steps; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_core_runs_on_a_bare_accelerator_machine():
    """Every import at the top of the core's files is of jax, flax, optax, numpy, the standard library or the core."""
    for file in FILES:
        if room_of(file) not in BARE:
            continue
        for name in imports(file, top_level_only=True):
            top = name.split(".")[0]
            if top == "dreamprm_jax":
                assert name.split(".")[1] in BARE, f"{file} imports {name}"
            else:
                assert top in BARE_LIBRARIES | sys.stdlib_module_names, f"{file} imports {name}"


@pytest.mark.parametrize("file", [*FILES, ROOT / "run.py"], ids=lambda file: file.name)
def test_house_rules(file):
    text = file.read_text()
    tree = ast.parse(text)
    assert text.count("\n") <= 500, "split the file"
    assert file.name != "utils.py"
    assert not any(isinstance(node, ast.Assert) for node in ast.walk(tree)), "raise an exception that says more"
    names = {name.split(".")[0] for name in imports(file)}
    assert not names & {"pickle", "dill", "cloudpickle", "torch"}
    assert "trust_remote_code" not in text
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name} is too long"
