"""Best-of-N scoring: what a question's candidates have in common run once, beside one candidate at a time.

    python -m benchmarks.scoring                                     # two cores: small models, with PyTorch where it is
    python -m benchmarks.scoring --size internvl3_1b --candidates 8,64      # an accelerator
    python -m benchmarks.scoring --size internvl3_1b --tiles 1,3,7,13 --computed        # products alone, nothing is run

Programs, run in turn, round after round, in one process; figures are medians over the rounds:

    shared       tiles, prompt and question once, the candidates' continuations on one axis after it
    batched      all candidates whole, as one padded batch, logits at the steps alone
    one_by_one   each candidate from its first tile to its last step, logits at the steps alone
    published    the same with the logits of every position, as the published code takes them
    torch        transformers' InternVL as the published code asks it: every candidate, full logits

Rows are random, of the shapes given; no data are read. A continuation is one step long, as its scores cost the same
wherever they stand. "difference" is the largest between a score and that of `one_by_one`, as a share of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import step, workload
from dreamprm_jax import losses
from dreamprm_jax.data import sharing
from dreamprm_jax.data.example import Encoded
from dreamprm_jax.models import config_json, convert, internvl, presets
from dreamprm_jax.models.layers import choose_attention
from dreamprm_jax.types import Batch, Prefix

PLUS = 10
PROMPT_TOKENS = 305  # system prompt and question of the published meta set, on average
# Tokens of a continuation: the eight octiles of the meta set's responses that reason (144 to 347 for half of them)
CONTINUATIONS = (100, 140, 160, 180, 200, 240, 300, 350)
PART_CHAINS = 16  # chains that go on together
PART_PADDING = 512  # their tokens are padded to a multiple: 17% of 1,670, as in the plans of real files


def candidate_rows(config: presets.InternVLConfig, num_tiles: int, count: int) -> tuple[np.ndarray, list[Encoded]]:
    """The tiles of a question, uint8 [P, height, width, 3], and its candidates' tokens, alike up to the first step."""
    rng, side = np.random.default_rng(0), config.vision.image_size
    num_images = num_tiles * config.image_tokens_per_tile
    low, high = 20, config.language.vocab_size - 20
    prefix = rng.integers(low, high, PROMPT_TOKENS + num_images, dtype=np.int32)
    is_image = np.zeros(len(prefix), bool)
    is_image[8 : 8 + num_images] = True
    prefix[is_image] = workload.IMAGE_TOKEN % config.language.vocab_size
    rows = []
    for number in range(count):
        own = rng.integers(low, high, CONTINUATIONS[number % len(CONTINUATIONS)], dtype=np.int32)
        own[0] = low + number % (high - low)  # no two go on alike
        tokens = np.concatenate([prefix, own])
        mask = np.concatenate([is_image, np.zeros(len(own), bool)])
        rows.append(Encoded(tokens, mask, np.int32([len(tokens) - 2]), np.int32([PLUS]), num_tiles))
    return rng.integers(0, 256, (num_tiles, side, side, 3), dtype=np.uint8), rows


def shared(config: presets.InternVLConfig, params: Any, tiles: np.ndarray, rows: list[Encoded]) -> Callable[[], Any]:
    """Scores [C], the prefix run once, parts of up to `PART_CHAINS` chains after it."""
    differ = [row.tokens[: len(rows[0].tokens)] != rows[0].tokens[: len(row.tokens)] for row in rows[1:]]
    count = min((int(np.argmax(each)) for each in differ), default=int(rows[0].step_positions[0]))
    prefix = jax.device_put(
        Prefix(
            rows[0].tokens[None, :count],
            sharing.image_index(rows[0])[None, :count],
            tiles[None],
            np.array([count], np.int32),
        )
    )
    parts = []
    for start in range(0, len(rows), PART_CHAINS):
        chains = [(row, count) for row in rows[start : start + PART_CHAINS]]
        num_tokens = -(-sum(len(row.tokens) - count for row, _ in chains) // PART_PADDING) * PART_PADDING
        parts.append(jax.device_put(sharing.pack([chains], 1, num_tokens, len(chains), 0)))
    begin = jax.jit(partial(internvl.begin, config))

    @jax.jit
    def go_on(params: Any, past: internvl.Past, part: Any) -> jax.Array:
        return losses.step_scores(internvl.go_on(config, params, past, part)[0], PLUS)

    def run() -> np.ndarray:
        past = begin(params, prefix)
        return np.concatenate([scores[0] for scores in jax.device_get([go_on(params, past, part) for part in parts])])

    return run


def one_by_one(
    config: presets.InternVLConfig, params: Any, tiles: np.ndarray, rows: list[Encoded], full_logits: bool
) -> Callable[[], Any]:
    """Scores [C], each candidate whole; lengths are those of its own, as many programs as there are of them."""
    batches = [jax.device_put(whole(tiles, row)) for row in rows]

    @jax.jit
    def score(params: Any, batch: Batch) -> jax.Array:
        if not full_logits:
            return losses.step_scores(internvl.apply(config, params, batch), PLUS)
        every = jnp.arange(batch.tokens.shape[1], dtype=jnp.int32)[None]
        logits = internvl.apply(config, params, batch._replace(step_positions=every))
        # Behind a barrier, or XLA would form the logits that are read alone.
        logits = jax.lax.optimization_barrier(logits)
        return losses.step_scores(jnp.take_along_axis(logits, batch.step_positions[:, :, None], axis=1), PLUS)

    return lambda: np.concatenate([np.asarray(score(params, batch))[0] for batch in batches])


def batched(config: presets.InternVLConfig, params: Any, tiles: np.ndarray, rows: list[Encoded]) -> Callable[[], Any]:
    """Scores [C], all candidates side by side, padded to the longest."""
    longest = max(len(row.tokens) for row in rows)
    padded = [
        row._replace(
            tokens=np.pad(row.tokens, (0, longest - len(row.tokens))),
            image_mask=np.pad(row.image_mask, (0, longest - len(row.tokens))),
        )
        for row in rows
    ]
    batch = jax.device_put(jax.tree.map(lambda *leaves: np.concatenate(leaves), *[whole(tiles, row) for row in padded]))
    score = jax.jit(lambda params, batch: losses.step_scores(internvl.apply(config, params, batch), PLUS))
    return lambda: np.asarray(score(params, batch))[:, 0]


def whole(tiles: np.ndarray, row: Encoded) -> Batch:
    """A candidate alone as a batch."""
    one = np.ones((1, 1), bool)
    return Batch(
        row.tokens[None], row.image_mask[None], tiles[None], row.step_positions[None], row.labels[None], one,
        np.zeros(1, np.int32), one[0],
    )  # fmt: skip


def torch_peer(
    config: presets.InternVLConfig, params: Any, tiles: np.ndarray, rows: list[Encoded]
) -> Callable[[], Any]:
    """The published way in PyTorch, on the same weights."""
    import torch

    from benchmarks import torch_peers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    weights = convert.to_tensors(config, jax.device_get(params), "hf")
    source = json.loads(config_json.config_to_json(config, "hf"))
    model = torch_peers.build_model(source, dtype, device, weights=weights)
    batches = [torch_peers.peer_batch(whole(tiles, row), config.image_tokens_per_tile, device) for row in rows]

    def score(batch: Any) -> float:
        with torch.inference_mode():
            output = model(input_ids=batch.tokens, pixel_values=batch.pixels.to(dtype), use_cache=False)
            logits = output.logits[0, batch.step_positions[0]].float()
            return float(torch.softmax(logits, dim=-1)[0, PLUS])

    return lambda: np.array([score(batch) for batch in batches], np.float32)


def computed(config: presets.InternVLConfig, num_tiles: int, count: int) -> list[dict[str, Any]]:
    """One line a program: flops of its products, attention as much of it as is not masked, without padding."""
    language, prompt = config.language, PROMPT_TOKENS + num_tiles * config.image_tokens_per_tile
    lengths = [CONTINUATIONS[number % len(CONTINUATIONS)] for number in range(count)]
    at_step = 2 * language.width * language.vocab_size  # the head, for one position

    def forward(num_tokens: int, num_logits: int) -> float:
        without_head = step.forward_flops(config, num_tiles, num_tokens) - workload.NUM_STEPS * at_step
        return without_head + num_logits * at_step

    # What comes after the prompt: one more token costs what it adds to the forward pass of its own chain.
    after = sum(forward(prompt + length, 1) - forward(prompt, 0) for length in lengths)
    flops = {
        "shared": forward(prompt, 0) + after,
        "one_by_one": sum(forward(prompt + length, 1) for length in lengths),
        "published": sum(forward(prompt + length, prompt + length) for length in lengths),
    }
    return [
        {"program": name, "N": count, "tiles": num_tiles, "TFLOP": each / 1e12, "times shared": each / flops["shared"]}
        for name, each in flops.items()
    ]


def measure(
    config: presets.InternVLConfig, num_tiles: int, count: int, names: list[str], rounds: int
) -> list[dict[str, Any]]:
    """One line a program."""
    params = internvl.init(config, jax.random.key(0, impl="rbg"))
    tiles, rows = candidate_rows(config, num_tiles, count)
    made = {
        "shared": lambda: shared(config, params, tiles, rows),
        "batched": lambda: batched(config, params, tiles, rows),
        "one_by_one": lambda: one_by_one(config, params, tiles, rows, full_logits=False),
        "published": lambda: one_by_one(config, params, tiles, rows, full_logits=True),
        "torch": lambda: torch_peer(config, params, tiles, rows),
    }
    programs = {name: made[name]() for name in names}
    expected = programs["one_by_one"]()
    difference = {name: float(np.abs(run() / expected - 1).max()) for name, run in programs.items()}
    seconds = {
        name: statistics.median(times) for name, times in workload.interleave(dict(programs.items()), rounds).items()
    }
    return [
        {
            "program": name,
            "N": count,
            "tiles": num_tiles,
            "prompt tokens": len(rows[0].tokens) - CONTINUATIONS[0],
            "ms": 1e3 * seconds[name],
            "candidates/s": count / seconds[name],
            "times shared": seconds[name] / seconds["shared"],
            "difference": difference[name],
        }
        for name in names
    ]


def main() -> None:
    """Measures what the arguments ask for, and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(workload.SIZES), default="recorded")
    parser.add_argument("--candidates", default="8", help="N, comma-separated")
    parser.add_argument("--tiles", default="1,7", help="of the question, thumbnail included")
    parser.add_argument("--programs", default="shared,batched,one_by_one,published,torch")
    parser.add_argument("--computed", action="store_true", help="count the products, run nothing")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=Path("scoring.json"), help="where the figures go; .md beside it")
    args = parser.parse_args()
    names = args.programs.split(",")
    if not {"shared", "one_by_one"} <= set(names) <= {"shared", "batched", "one_by_one", "published", "torch"}:
        parser.error(f"--programs={args.programs}: shared and one_by_one are always among them")
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    attention = choose_attention(dtype, forward_mode=False)
    config = dataclasses.replace(workload.SIZES[args.size], compute_dtype=dtype, attention=attention)
    found = []
    for count in map(int, args.candidates.split(",")):
        for num_tiles in map(int, args.tiles.split(",")):
            if args.computed:
                found += computed(config, num_tiles, count)
            else:
                found += measure(config, num_tiles, count, names, args.rounds)
    workload.report(args.json, vars(args) | {"attention": attention, "dtype": dtype}, {"rows": found})


if __name__ == "__main__":
    main()
