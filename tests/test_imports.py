"""The rooms and their order (docs/architecture.md): each knows the ones before it and nothing of those after."""

import ast
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dreamprm_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
ENTRY = [ROOT / "run.py", *sorted((ROOT / "configs").glob("*.py"))]

# Rooms of one line do not know each other unless the line says so; a room may import from the lines above it.
ORDER = [
    {"errors", "types"},
    {"documents"},
    {"sharding", "workers"},
    {"data"},
    {"models"},
    {"losses", "weighting", "optimizers"},
    {"inner"},
    {"hypergradient"},
    {"check"},
    {"bilevel"},
    {"metrics", "prepare", "messages", "endpoint", "programs", "held_out"},
    {"checkpoint", "workdir"},
    {"loading"},
    {"generate", "transformers_files", "upload", "weight_files"},
    {"model_card"},
    {"export"},
    {"build", "steps", "train"},
    {"scoring"},
    {"selection", "step_benchmark", "page", "prm", "sweeps"},
    {"plots", "browser", "evaluation"},
    {"report"},
    {"results"},
    {"experiment", "comparison"},
    {"comparison_report"},
    {"evaluation_report"},
    {"evaluate"},
    {"compare"},
]
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
BARE = (
    "errors",
    "types",
    "documents",
    "sharding",
    "models",
    "losses",
    "weighting",
    "optimizers",
    "inner",
    "hypergradient",
    "check",
    "bilevel",
)
BARE_LIBRARIES = {"jax", "flax", "optax", "numpy", "ml_dtypes"}  # ml_dtypes: a part of jax


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def for_type_checkers_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def statements(node: ast.AST, on_import_only: bool):
    """All nodes below; `on_import_only` leaves out the bodies of functions, which importing does not run."""
    for child in ast.iter_child_nodes(node):
        if for_type_checkers_only(child):
            continue
        if on_import_only and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        yield child
        yield from statements(child, on_import_only)


def imports(file: Path, on_import_only: bool = False) -> set[str]:
    """Modules that a file imports, dotted; `from dreamprm_jax import x` counts as dreamprm_jax.x."""
    found = set()
    for node in statements(ast.parse(file.read_text()), on_import_only):
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
    assert not {name.split(".")[0] for name in imports(file)} & {"run", "configs", "tests"}, file


def test_every_room_is_described():
    described = (ROOT / "docs" / "architecture.md").read_text()
    missing = [room for room in LEVEL if f"`{room}`" not in described and f"`{room}/`" not in described]
    assert not missing


@pytest.mark.parametrize("room", ["losses", "weighting", "optimizers", "inner", "hypergradient", "check", "bilevel"])
def test_the_mathematics_receives_functions_and_knows_no_model(room):
    assert not rooms_used(PACKAGE / f"{room}.py") & {"models", "data"}


def test_data_workers_never_import_jax_and_flax_stays_in_models():
    for file in FILES:
        tops = {name.split(".")[0] for name in imports(file)}
        if room_of(file) in ("data", "types", "errors"):
            assert not tops & {"jax", "flax", "optax"}, file
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
        for name in imports(file, on_import_only=True):
            top = name.split(".")[0]
            if top == "dreamprm_jax":
                assert name.split(".")[1] in BARE, f"{file} imports {name}"
            else:
                assert top in BARE_LIBRARIES | sys.stdlib_module_names, f"{file} imports {name}"


# flax loads orbax, msgpack and more on its own account: what counts is who asks, so __import__ looks at the importer.
GUARD = """
import builtins, importlib, pkgutil, sys
bare, allowed = set(sys.argv[1].split()), set(sys.argv[2].split()) | set(sys.stdlib_module_names)
original = builtins.__import__
def guarded(name, namespace=None, local=None, fromlist=(), level=0):
    importer = (namespace or {}).get("__name__", "")
    if importer.startswith("dreamprm_jax") and level == 0 and name.split(".")[0] not in allowed | {"dreamprm_jax"}:
        raise ImportError(f"{importer} imports {name}: a bare accelerator machine has {sorted(bare)} alone")
    return original(name, namespace, local, fromlist, level)
builtins.__import__ = guarded
for room in sorted(bare):
    module = importlib.import_module(f"dreamprm_jax.{room}")
    for inner in pkgutil.iter_modules(getattr(module, "__path__", []), module.__name__ + "."):
        importlib.import_module(inner.name)
others = {name.split(".")[1] for name in sys.modules if name.startswith("dreamprm_jax.")} - bare
sys.exit(f"the core loads {others}" if others else 0)
"""


def guard(bare: set[str], allowed: set[str]) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", GUARD, " ".join(bare), " ".join(allowed)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_the_core_is_imported_where_nothing_else_may_be():
    done = guard(set(BARE), BARE_LIBRARIES)
    assert done.returncode == 0, done.stderr
    assert "imports optax" in guard(set(BARE), BARE_LIBRARIES - {"optax"}).stderr, "the guard lets everything pass"


def test_every_library_is_pinned():
    optional = {"wandb": "requirements-wandb.txt"}  # imported where it is asked for, and may not be installed
    distributions = metadata.packages_distributions()
    used = {name.split(".")[0] for file in [*FILES, *ENTRY] for name in imports(file)}
    for top in used - sys.stdlib_module_names - {"dreamprm_jax", "configs", "run"}:
        file = optional.get(top, "requirements.txt")
        pins = (ROOT / file).read_text().lower().replace("_", "-")
        names = {name.lower().replace("_", "-") for name in distributions.get(top, [top])}
        assert any(f"\n{name}==" in pins for name in names), f"{top} is imported, but not in {file}"


@pytest.mark.parametrize("file", [*FILES, *ENTRY], ids=lambda file: str(file.relative_to(ROOT)))
def test_house_rules(file):
    text = file.read_text()
    tree = ast.parse(text)
    assert text.count("\n") <= 500, "split the file"
    assert file.name != "utils.py"
    assert not any(isinstance(node, ast.Assert) for node in ast.walk(tree)), "raise an exception that says more"
    names = {name.split(".")[0] for name in imports(file)}
    assert not names & {"pickle", "dill", "cloudpickle", "torch"}
    assert "importlib" not in names, "an import that this file cannot see"
    assert not any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(tree)), "import by full name"
    assert "trust_remote_code" not in text
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name != "get_config":  # a list of fields
            assert node.end_lineno - node.lineno < 60, f"{node.name} is too long"
