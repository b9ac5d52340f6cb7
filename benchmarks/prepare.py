"""Raw VisualPRM-400K files of any number of rows, made up, through `configs/prepare.py` and back: rows/s and memory.

    python -m benchmarks.prepare --rows 100000
    python -m benchmarks.prepare --rows 10000,100000 --processes 2     # does memory grow with the rows?

Texts are as long as the published ones (2 to 12 steps), images few and small, so that what is measured is the rows.
Every size is prepared in a process of its own, then read: at random, row by row (no pixel is decoded), and checked as a
training run checks it at its start.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.pipeline import CONTEXT, TILE_SIZE, TOKENS_PER_TILE, byte_tokenizer, photograph
from benchmarks.raw_rows import visualprm_raw_row
from benchmarks.workload import report
from dreamprm_jax.data import tokens
from dreamprm_jax.data.dataset import ImageSpec, encode_all
from dreamprm_jax.data.prepared import PreparedExamples

ROOT = Path(__file__).parent.parent
NUM_FILES, NUM_IMAGES = 4, 200


def write_raw(folder: Path, num_rows: int) -> None:
    """Annotation files and images as they are downloaded."""
    rng, pixels = random.Random(0), np.random.default_rng(0)
    for name in ("annotations", "images"):
        (folder / name).mkdir(parents=True)
    for number in range(NUM_IMAGES):
        size = rng.randint(100, 300), rng.randint(100, 300)
        (folder / f"images/{number}.jpg").write_bytes(photograph(pixels, *size))
    for number in range(NUM_FILES):
        with (folder / f"annotations/source{number}_extracted.jsonl").open("w") as file:
            for _ in range(num_rows // NUM_FILES):
                file.write(json.dumps(visualprm_raw_row(rng, f"images/{rng.randrange(NUM_IMAGES)}.jpg")) + "\n")


def prepare(folder: Path, processes: int) -> dict[str, float | str]:
    """Runs the command; its summary, and the most memory that one of its processes took."""
    code = (
        "import resource, runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path('run.py', run_name='__main__')\n"
        "finally:\n"
        "    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):\n"
        "        print(resource.getrusage(who).ru_maxrss / 1024, file=sys.stderr)\n"
    )
    command = [
        *(sys.executable, "-c", code, "run.py", "--config=configs/prepare.py:visualprm400k"),
        *(f"--config.prepare.source={folder / 'annotations'}", f"--config.prepare.images={folder}"),
        *(f"--config.prepare.output={folder / 'data'}", f"--config.prepare.processes={processes}"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    parent, worker = map(float, done.stderr.splitlines()[-2:])
    return {**json.loads(done.stdout[done.stdout.index("{") :]), "parent MiB": parent, "worker MiB": worker}


def read_back(directory: str, tokenizer: tokens.PRMTokenizer) -> dict[str, float]:
    """Rows a second at random, and as a run's start checks them; what that adds to this process's memory."""
    examples = PreparedExamples(directory)
    rows = np.random.default_rng(0).integers(0, len(examples), 5000).tolist()
    began = time.perf_counter()
    for row in rows:
        examples[row]
    at_random = len(rows) / (time.perf_counter() - began)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    dataset = encode_all(examples, tokenizer, ImageSpec(6, TILE_SIZE, TOKENS_PER_TILE), CONTEXT, max_shapes=11)
    checked = len(dataset) / (time.perf_counter() - began)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"read rows/s": at_random, "checked rows/s": checked, "checking adds MiB": grown}


def main() -> None:
    """Measures what the arguments ask for, and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="100000", help="comma-separated")
    parser.add_argument("--processes", type=int, default=0, help="0: as many as cores")
    parser.add_argument("--tokenizer", default=None, help="directory with tokenizer.json; default: bytes")
    parser.add_argument("--json", type=Path, default=Path("prepare.json"), help="where the figures go; .md beside it")
    args = parser.parse_args()
    tokenizer = tokens.load_tokenizer(args.tokenizer) if args.tokenizer else byte_tokenizer()
    table = []
    for num_rows in map(int, args.rows.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            write_raw(Path(folder), num_rows)
            summary = prepare(Path(folder), args.processes)
            table.append({
                "rows": summary["read"],
                "kept": summary["kept"],
                "GB": summary["bytes"] / 1e9,
                "prepared rows/s": summary["read"] / summary["seconds"],
                **{name: summary[name] for name in ("parent MiB", "worker MiB")},
                **read_back(summary["directory"], tokenizer),
            })  # fmt: skip
    report(args.json, vars(args), {"rows": table})


if __name__ == "__main__":
    main()
