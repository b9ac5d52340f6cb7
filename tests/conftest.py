"""What every test needs: a CPU, strict broadcasting, and the recorded data where it is at hand."""

import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the suite's time is compilation, and programs are small and run a few times only: LLVM's optimiser off, the
# older and quicker code generator for fusions, one module each.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
    " --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture
def float64():
    """Arrays are float64 by default: `pytestmark = pytest.mark.usefixtures("float64")`."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def compilation_cache(tmp_path_factory):
    """Every run jits its own functions; the second one of a kind should not compile again. The folder."""
    folder = tmp_path_factory.mktemp("xla")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    yield folder
    jax.config.update("jax_compilation_cache_dir", None)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Recorded outputs, real images and the real tokenizer, kept beside the repository."""
    folder = REPOSITORY.parent / "shared"
    if not (folder / "golden").is_dir():
        pytest.skip("needs the recorded data in ../shared")
    return folder


@pytest.fixture(scope="session")
def seed0_checkpoint(shared, tmp_path_factory) -> Path:
    """The random checkpoint that the recorded scores and runs were made with: original layout, 79 MB."""
    folder = tmp_path_factory.mktemp("checkpoint") / "seed0"
    command = [sys.executable, shared / "make_tiny_checkpoint.py", folder, "--seed", "0"]
    subprocess.run(command, check=True, capture_output=True)
    return folder
