"""What the input pipeline gives, beside what a training step takes; padding and shapes. No accelerator is used.

    python -m benchmarks.pipeline                                          # generated rows and photographs
    python -m benchmarks.pipeline --path DATA/visualprm400k/1.0.0 --tokenizer CHECKPOINT     # a prepared set
    python -m benchmarks.pipeline --path meta.json --images IMAGES --tokenizer CHECKPOINT    # a JSON file

Every row is checked once (rows/s of the start), then batches are drawn in a run's own order with every setting of
threads and worker processes. A step's appetite is rows over seconds of docs/performance.md, measured on an H100; an
H200 has the same matrix rate and more memory bandwidth, so it takes at most the ratio of the bandwidths more.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import random
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from absl import flags
from PIL import Image

from benchmarks.raw_rows import visualprm_raw_row
from benchmarks.workload import report
from dreamprm_jax.data import batches, prepared, records, shapes, tokens
from dreamprm_jax.data.conversation import CONTROL_TOKENS
from dreamprm_jax.data.dataset import Dataset, ImageSpec, encode_all
from dreamprm_jax.data.example import Example
from dreamprm_jax.data.formats import visualprm
from dreamprm_jax.data.formats.rules import rules_for

SETTINGS = ((1, 0), (2, 0), (4, 0), (1, 1), (1, 2))  # threads, workers
TILE_SIZE, TOKENS_PER_TILE, CONTEXT = 448, 256, 32_768  # InternVL3

APPETITES = {  # rows a second on an H100 (docs/performance.md): rows of one step / its seconds
    "bilevel, B = 1": 2 / 0.183,
    "bilevel, B = 8": 16 / 1.402,
    "training, B = 8": 8 / 0.523,
    "scoring, B = 8": 8 / 0.140,
}
H200_OVER_H100 = 4.8 / 3.35  # TB/s of memory, the most that a step can gain; the matrix rates are the same


def byte_tokenizer() -> tokens.PRMTokenizer:
    """Every byte a token: longer than a trained vocabulary's, so the work is not made small."""
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={char: number for number, char in enumerate(sorted(alphabet))}, merges=[])
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(list(CONTROL_TOKENS))
    return tokens.wrap(tokenizer)


def photograph(rng: np.random.Generator, width: int, height: int) -> bytes:
    """A JPEG with structure at all scales, so that it is as large and as slow to decode as a photograph."""
    pixels = sum(
        np.asarray(Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).resize((width, height)), float)
        for side in (4, 16, 64, 256)
    )
    buffer = io.BytesIO()
    Image.fromarray((pixels / 4).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def generated_rows(count: int, seed: int = 0) -> list[Example]:
    """Chains as long as VisualPRM-400K's about photographs of many shapes, 16 of them in all."""
    rng, pixels = random.Random(seed), np.random.default_rng(seed)
    pictures = [photograph(pixels, rng.randint(400, 1600), rng.randint(400, 1600)) for _ in range(16)]
    rows = []
    for row in range(count):
        raw = visualprm_raw_row(rng, "picture")
        found = visualprm.parse({**raw, "image": None, "question": raw["question"].replace("<image>", "")}, row,
                                f"generated row {row}", rules_for(None))  # fmt: skip
        rows.append(found._replace(id=row, images=(rng.choice(pictures),)))
    return rows


def peak_mebibytes() -> float:
    """Of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def padding_table(dataset: Dataset) -> list[dict[str, Any]]:
    """Padding against the number of shapes, of rows and of batches of 8 as they are drawn."""
    num_tokens, num_tiles = dataset.num_tokens[dataset.rows], dataset.num_tiles[dataset.rows]
    found = []
    for count in (1, 2, 3, 5, 8, 11):
        chosen = shapes.choose(num_tokens, num_tiles, count)
        padded = np.zeros(2)
        plan = batches.make_plan(
            _with(dataset, chosen), batch_size=8, num_batches=max(1, len(dataset.rows) // 8), seed=0
        )
        for number in range(len(plan)):
            rows = plan[number]
            padded += 8 * np.array(
                shapes.fitting(chosen.shapes, dataset.num_tokens[rows].max(), dataset.num_tiles[rows].max())
            )
        drawn = np.concatenate([plan[number] for number in range(len(plan))])
        found.append({
            "shapes": len(chosen.shapes),
            "token padding, B = 1": chosen.padding,
            "tile padding, B = 1": chosen.tile_padding,
            "token padding, B = 8": 1 - dataset.num_tokens[drawn].sum() / padded[0],
            "tile padding, B = 8": 1 - dataset.num_tiles[drawn].sum() / max(padded[1], 1),
        })  # fmt: skip
    return found


def _with(dataset: Dataset, chosen: shapes.Shapes) -> Dataset:
    return dataclasses.replace(dataset, padded=chosen)


def speed_table(dataset: Dataset, batch_size: int, seconds: float) -> list[dict[str, Any]]:
    """Rows a second of a run's batches for each setting of threads and workers."""
    found = []
    for threads, workers in SETTINGS:
        plan = batches.make_plan(dataset, batch_size=batch_size, num_batches=100_000, seed=0)
        stream = batches.training_batches(dataset, plan, reading=batches.Reading(threads, workers, ahead=4))
        for _ in range(4 + 4 * workers):  # what was read ahead while the processes started
            next(stream)
        count, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds:
            count += len(next(stream).tokens)
        rate = count / (time.perf_counter() - began)
        stream.close()
        found.append({"B": batch_size, "threads": threads, "workers": workers, "rows/s": rate})
    return found


def main() -> None:
    """Measures what the arguments ask for, and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", default=None, help=".json, .jsonl or prepared directory; default: generated rows")
    parser.add_argument("--images", default=None, help="image root of a JSON file; default: its directory")
    parser.add_argument("--tokenizer", default=None, help="directory with tokenizer.json; default: bytes")
    parser.add_argument("--rows", type=int, default=1000, help="generated rows")
    parser.add_argument("--max-tiles", type=int, default=6)
    parser.add_argument("--batch-sizes", default="1,8")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--json", type=Path, default=Path("pipeline.json"), help="where the figures go; .md beside it")
    args = parser.parse_args()
    flags.FLAGS.mark_as_parsed()  # Grain's workers are told them
    tokenizer = tokens.load_tokenizer(args.tokenizer) if args.tokenizer else byte_tokenizer()
    began = time.perf_counter()
    examples = read(args)
    read_seconds = time.perf_counter() - began
    images = ImageSpec(args.max_tiles, TILE_SIZE, TOKENS_PER_TILE)
    began = time.perf_counter()
    dataset = encode_all(examples, tokenizer, images, CONTEXT, max_shapes=11)
    start = {
        "rows": len(dataset),
        "read s": read_seconds,
        "checked rows/s": len(dataset) / (time.perf_counter() - began),
        "mean tokens": float(dataset.num_tokens.mean()),
        "mean tiles": float(dataset.num_tiles.mean()),
        "peak MiB": peak_mebibytes(),
    }
    speed = [row for size in args.batch_sizes.split(",") for row in speed_table(dataset, int(size), args.seconds)]
    appetite = [
        {"step at 1B": name, "H100 rows/s": rate, "H200 rows/s, at most": rate * H200_OVER_H100}
        for name, rate in APPETITES.items()
    ]
    padding = padding_table(dataset)
    report(args.json, vars(args), {"start": [start], "speed": speed, "appetite": appetite, "padding": padding})


def read(args: argparse.Namespace) -> Any:
    """The rows that the arguments ask for."""
    if args.path is None:
        return generated_rows(args.rows)
    if Path(args.path).is_dir():
        return prepared.PreparedExamples(args.path)
    return records.read_examples(args.path, args.images or Path(args.path).parent, outcome_required=False)


if __name__ == "__main__":
    main()
