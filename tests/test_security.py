"""What the source may not do (docs/security.md): run what a file says, unpack archives, ask the network elsewhere."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from chat_server import serving
from generating import (
    KEY,
    answer_right,
    configured,
    everything_written,
    key,  # noqa: F401 - a fixture
    questions,  # noqa: F401 - a fixture
)

ROOT = Path(__file__).parent.parent
FILES = sorted(file for name in ("dreamprm_jax", "benchmarks", "configs") for file in (ROOT / name).rglob("*.py"))
FILES.append(ROOT / "run.py")

RUN_CODE = {
    "pickle",
    "dill",
    "cloudpickle",
    "marshal",
    "shelve",
    "joblib",
    "code",
    "codeop",
    "runpy",
    "yaml",
    "msgpack",
}
UNPACK = {"zipfile", "tarfile", "rarfile", "py7zr"}
NETWORK = {"socket", "urllib", "http", "ftplib", "requests", "httpx", "httpx2", "aiohttp", "openai", "huggingface_hub"}
CALLS = re.compile(
    r"(?:builtins\.)?(?:eval|exec|compile|__import__)|os\.(?:system|popen|exec\w+|spawn\w+|posix_spawn\w*)|torch\.load"
    r"|shutil\.unpack_archive|subprocess\.getoutput|subprocess\.getstatusoutput|pickle\.\w+|(?:\w+\.)*extractall"
)
PERMITTED = {
    "dreamprm_jax/endpoint.py": {"openai", "httpx2"},
    "dreamprm_jax/models/hub.py": {"huggingface_hub"},
    "dreamprm_jax/upload.py": {"huggingface_hub"},
    "dreamprm_jax/model_card.py": {"huggingface_hub"},  # the head of a card; what lies in the cache
    "benchmarks/startup.py": {"subprocess"},  # the program itself, timed
    "benchmarks/prepare.py": {"subprocess"},
}


def dotted(node):
    """The name that is called, such as os.system."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def offences(source):
    """What is done that may not be, as (line, what)."""
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            if name.split(".")[0] in RUN_CODE | UNPACK | NETWORK | {"subprocess"}:
                yield node.lineno, name.split(".")[0]
            if CALLS.fullmatch(name):
                yield node.lineno, name
        if isinstance(node, ast.Call):
            yield from calls(node)
        if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "shell", "weights_only"):
            yield node.lineno, node.arg


def calls(node):
    name = dotted(node.func)
    options = {keyword.arg: keyword.value for keyword in node.keywords}
    if CALLS.fullmatch(name):
        yield node.lineno, name
    if name in ("np.load", "numpy.load"):
        permits = options.get("allow_pickle")
        if not (isinstance(permits, ast.Constant) and permits.value is False):
            yield node.lineno, f"{name} without allow_pickle=False"
    elif "allow_pickle" in options:
        yield node.lineno, "allow_pickle"
    if name.endswith("Image.open") and "formats" not in options:
        yield node.lineno, "Image.open without formats"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_file_does_what_a_strangers_file_could_steer(file):
    permitted = PERMITTED.get(str(file.relative_to(ROOT)), set())
    found = [(line, what) for line, what in offences(file.read_text()) if what not in permitted]
    assert not found, f"{file.relative_to(ROOT)}: {found}: docs/security.md"


@pytest.mark.parametrize(
    "source",
    [
        *("import pickle", "from pickle import loads", "import yaml", "import zipfile", "import urllib.request"),
        *("eval('1')", "exec('1')", "compile('1', 'x', 'exec')", "import os; os.system('ls')", "from os import popen"),
        *("import torch; torch.load(x)", "np.load(x)", "np.load(x, allow_pickle=True)", "archive.extractall(x)"),
        *(
            "f(trust_remote_code=True)",
            "run('ls', shell=True)",
            "import subprocess",
            "Image.open(x)",
            "__import__('x')",
        ),
    ],
)
def test_the_rule_sees(source):
    assert list(offences(source))


@pytest.mark.parametrize(
    "source", ["model.eval()", "np.load(x, allow_pickle=False)", "ast.literal_eval(x)", "re.compile(x)"]
)
def test_the_rule_lets_pass(source):
    assert not list(offences(source))


# ---- secrets ----

SIZES = {
    "pretrain": 4, "cold_start": 4, "clean": 4, "flipped": 2, "always_plus": 2, "trivial": 2, "shifted": 2,
    "meta_questions": 4, "test_questions": 4,
}  # fmt: skip
SECRETS = {
    "OPENAI_API_KEY": KEY,
    "HF_TOKEN": "hf_0123456789abcdefghij",
    "WANDB_API_KEY": "wandb-0123456789abcdef",
    "AWS_SECRET_ACCESS_KEY": "aws/0123456789abcdef",
}


def run_program(tmp_path, monkeypatch, *arguments):
    """The whole program with secrets around it; its status, and all that it wrote anywhere it could."""
    home = tmp_path / "home"
    home.mkdir(exist_ok=True)
    for name, value in {**SECRETS, "HOME": str(home), "TMPDIR": str(home)}.items():
        monkeypatch.setenv(name, value)
    command = [sys.executable, "run.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=600)
    return done.returncode, done.stdout + done.stderr + everything_written(tmp_path)


@pytest.mark.parametrize("status", [200, 401])
def test_secrets_are_in_nothing_that_a_generation_writes(questions, tmp_path, monkeypatch, status):
    def behave(call, body, number):
        answer_right(call, body, number) if status == 200 else call.fail(401, call.headers["Authorization"])

    with serving(behave) as server:
        fields = configured(server, questions).generate
        arguments = [f"--config.generate.{name}={fields[name]}" for name in ("base_url", "model", "num_candidates")]
        arguments += ["--config=configs/generate.py", f"--config.input.path={questions}"]
        returncode, written = run_program(tmp_path, monkeypatch, *arguments, f"--workdir={tmp_path / 'work'}")
        assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert returncode == (0 if status == 200 else 2)
    assert b"generate" in written
    assert not [name for name, value in SECRETS.items() if value.encode() in written]


def test_secrets_are_in_nothing_that_a_training_writes(tmp_path, monkeypatch):
    """Checkpoints, TensorBoard events, report and compiled programs included."""
    steps = {"num_steps": 1, "cold_start.num_steps": 0, "pretrain.num_steps": 0, "batch_size": 4, "meta_batch_size": 4}
    arguments = [f"--config.{name}={value}" for name, value in steps.items()]
    arguments += [f"--config.noisy_steps.{name}={size}" for name, size in SIZES.items()]
    returncode, written = run_program(
        tmp_path, monkeypatch, "--config=configs/table.py", *arguments, f"--workdir={tmp_path / 'work'}"
    )
    assert returncode == 0, written[:2000]
    assert (tmp_path / "work/report.html").is_file() and (tmp_path / "work/checkpoints").is_dir()
    assert not [name for name, value in SECRETS.items() if value.encode() in written]


def test_an_address_with_a_password_is_refused_and_not_repeated(tmp_path, monkeypatch):
    returncode, written = run_program(
        tmp_path, monkeypatch, "--config=configs/generate.py", f"--config.generate.base_url=https://user:{KEY}@host/v1",
        "--config.generate.model=m", f"--config.input.path={tmp_path}", f"--workdir={tmp_path / 'work'}",
    )  # fmt: skip
    assert returncode == 2 and b"without user, password and query" in written
    assert KEY.encode() not in written


# ---- pins ----


def test_every_requirement_is_pinned_to_one_version():
    for file in ROOT.glob("requirements*.txt"):
        for line in file.read_text().splitlines():
            wanted = line.partition("#")[0].strip()
            if wanted and not wanted.startswith("-r "):
                assert re.fullmatch(r"[\w.-]+(\[\w+\])?==[\w.]+", wanted), f"{file.name}: {line}"


def test_the_page_names_tests_that_there_are():
    """docs/security.md says which test shows what."""
    page = (ROOT / "docs/security.md").read_text()
    tests = "\n".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)(?:\.py)?`", page)
    assert len(named) > 20
    for name in named:
        assert f"def {name}(" in tests or (ROOT / "tests" / f"{name}.py").is_file(), name
