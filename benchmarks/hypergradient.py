"""What a meta-gradient costs: every estimator beside a plain training step, and beside PyTorch.

    python -m benchmarks.hypergradient estimators            # ratios to a plain step, flops, temporary memory
    python -m benchmarks.hypergradient peers                 # an iteration beside two in PyTorch, recorded shapes
    python -m benchmarks.hypergradient memory                # of K inner steps, as compiled; nothing is run
    python -m benchmarks.hypergradient estimators --size internvl3_1b --batch-sizes 1,8     # on an accelerator

All programs of a table are compiled first and then run in turn, round after round, in one process; figures are
medians over the rounds. Rows are random, of the shapes given here; no data are read. Prints Markdown.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dreamprm_jax import bilevel, losses, optimizers, weighting
from dreamprm_jax.hypergradient import ESTIMATORS
from dreamprm_jax.inner import Problem, inner_steps
from dreamprm_jax.models import config_json, convert, internvl, presets
from dreamprm_jax.types import Batch, BilevelState

IMAGE_TOKEN = 151_667  # <IMG_CONTEXT> of InternVL3's tokenizer: transformers counts its places
NUM_ROWS, NUM_STEPS = 64, 4  # rows of the training set; steps of a chain (S)

# (tiles, tokens) of the 12 real rows that the published code was recorded on, at most 6 tiles plus thumbnail.
RECORDED = (
    (7, 2069), (1, 745), (1, 857), (7, 2231), (1, 736), (1, 831),
    (7, 2069), (1, 546), (1, 878), (7, 2069), (1, 722), (1, 755),
)  # fmt: skip
RECORDED_ORDER = ((0, 11, 3, 10, 7, 6, 8, 2, 4, 1, 5, 9), (7, 8, 5, 6, 9, 10, 0, 3, 2, 11, 1, 4))  # train, meta
BUCKETS = ((1, 880), (7, 2232))  # what they are padded to

# Wide enough that matrix products dominate, small enough for two cores.
WIDE = presets.InternVLConfig(
    vision=presets.VisionConfig(width=256, num_layers=2, num_heads=4, mlp_width=1024, image_size=224),
    language=presets.LanguageConfig(
        vocab_size=8192, width=512, num_layers=4, num_heads=8, num_kv_heads=2, mlp_width=2048
    ),
)
# The checkpoint that the published code was recorded with: tiny, but with the real vocabulary and tile size.
RECORDED_MODEL = presets.InternVLConfig(
    vision=presets.VisionConfig(width=64, num_layers=2, num_heads=4, mlp_width=128),
    language=presets.LanguageConfig(width=64, num_layers=2, num_heads=4, num_kv_heads=2, mlp_width=160),
)


def random_batch(
    config: presets.InternVLConfig, rows: list[tuple[int, int]], bucket: tuple[int, int], seed: int
) -> Batch:
    """Rows of (tiles, tokens) as one batch, padded to `bucket`; labels are tokens 10 and 12."""
    rng = np.random.default_rng(seed)
    (num_tiles, num_tokens), side, size = bucket, config.vision.image_size, len(rows)
    tokens = rng.integers(20, config.language.vocab_size - 20, (size, num_tokens), dtype=np.int32)
    image_mask = np.zeros((size, num_tokens), bool)
    tiles = np.zeros((size, num_tiles, side, side, 3), np.uint8)
    positions = np.zeros((size, NUM_STEPS), np.int32)
    for row, (own_tiles, own_tokens) in enumerate(rows):
        image_mask[row, 8 : 8 + own_tiles * config.image_tokens_per_tile] = True
        tokens[row, image_mask[row]] = IMAGE_TOKEN % config.language.vocab_size
        tiles[row, :own_tiles] = rng.integers(0, 256, (own_tiles, side, side, 3))
        positions[row] = own_tokens - 2 - 5 * np.arange(NUM_STEPS)[::-1]
    return Batch(
        tokens, image_mask, tiles, positions, rng.choice(np.int32([10, 12]), (size, NUM_STEPS)),
        np.ones((size, NUM_STEPS), bool), rng.integers(0, NUM_ROWS, size, dtype=np.int32), np.ones(size, bool),
    )  # fmt: skip


def prm_problem(config: presets.InternVLConfig, table: weighting.Weighting, num_inner_steps: int = 1) -> Problem:
    """The published objective on both levels, with the project's AdamW below."""

    def step_losses(params: Any, batch: Batch) -> tuple[jax.Array, dict]:
        logits = internvl.apply(config, params, batch)
        return losses.example_losses(logits, batch.labels, batch.step_mask, "mean"), {}

    def meta_loss(params: Any, batch: Batch) -> tuple[jax.Array, dict]:
        probabilities = jnp.exp(losses.label_log_probs(internvl.apply(config, params, batch), batch.labels))
        return jnp.mean(losses.meta_loss_mse(losses.masked_mean(probabilities, batch.step_mask))), {}

    inner_tx = optimizers.adamw(lambda count: 5e-5, weight_decay=0.01)
    return Problem(step_losses, table.apply, meta_loss, inner_tx, num_inner_steps=num_inner_steps)


def jitted(problem: Problem, table: weighting.Weighting, name: str) -> Callable[..., Any]:
    """A whole iteration, state donated; "plain" is the inner step alone."""
    meta_tx = optimizers.per_entry_rmsprop(lambda count: 5e-3)

    def step(state: BilevelState, batch: Batch, meta_batch: Batch) -> tuple[BilevelState, jax.Array]:
        if name == "plain":
            train, metrics = inner_steps(problem, state.train, state.meta_params, batch)
            return state._replace(train=train), metrics["inner_loss"]
        state, metrics = bilevel.bilevel_step(problem, ESTIMATORS[name], meta_tx, table, state, batch, meta_batch)
        return state, metrics["inner_loss"]

    return jax.jit(step, donate_argnums=0)


def fresh_state(problem: Problem, table: weighting.Weighting, params: Any) -> BilevelState:
    """Both levels at `params` (copied: the step donates)."""
    meta_tx = optimizers.per_entry_rmsprop(lambda count: 5e-3)
    return bilevel.init_state(problem.inner_tx, meta_tx, table, jax.tree.map(jnp.copy, params))


def interleave(programs: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each program in each round, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(rounds + 1):
        for name, run in programs.items():
            began = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def estimators(
    config: presets.InternVLConfig, batch_size: int, names: list[str], rounds: int, bucket: tuple
) -> list[dict]:
    """One row per program: seconds, ratio to the plain step, flops and temporary memory as compiled.

    All programs share one state in turn, so that a card need not hold one each.
    """
    table = weighting.instance_table(NUM_ROWS, "projected", 0.0, 3.0)
    problem = prm_problem(config, table)
    batch, meta_batch = (random_batch(config, [bucket] * batch_size, bucket, seed) for seed in (0, 1))
    batch, meta_batch = jax.device_put((batch, meta_batch))
    params = internvl.init(config, jax.random.key(0, impl="rbg"))
    state = fresh_state(problem, table, params)
    del params
    found, programs, holder = [], {}, {"state": state}

    def run(compiled: Any) -> None:
        holder["state"], loss = compiled(holder["state"], batch, meta_batch)
        jax.block_until_ready(loss)

    for name in names:
        began = time.perf_counter()
        compiled = jitted(problem, table, name).lower(state, batch, meta_batch).compile()
        found.append({"program": name, **analysis(compiled), "compile_seconds": time.perf_counter() - began})
        programs[name] = partial(run, compiled)
    seconds = interleave(programs, rounds)
    plain = statistics.median(seconds["plain"])
    for row in found:
        median = statistics.median(seconds[row["program"]])
        row |= {"batch_size": batch_size, "seconds": median, "ratio": median / plain}
    return found


def analysis(compiled: Any) -> dict[str, float]:
    """Flops and temporary bytes, as XLA counts them (a loop's body counts once)."""
    cost = compiled.cost_analysis()
    return {
        "gflops": cost.get("flops", 0.0) / 1e9,
        "temporary_mib": compiled.memory_analysis().temp_size_in_bytes / 2**20,
    }


def inner_step_memory(config: presets.InternVLConfig, bucket: tuple[int, int], counts: tuple[int, ...]) -> list[dict]:
    """Temporary memory of K inner steps, `mixed` against reverse over reverse; compiled, not run."""
    table = weighting.instance_table(NUM_ROWS, "projected", 0.0, 3.0)
    found = []
    for count in counts:
        problem = prm_problem(config, table, count)
        state = jax.eval_shape(lambda problem=problem: bilevel.init_state(
            problem.inner_tx, optax.identity(), table, internvl.init(config, jax.random.key(0))
        ))  # fmt: skip
        one, meta_batch = (random_batch(config, [bucket], bucket, seed) for seed in (0, 1))
        batch = Batch(*[np.stack([leaf] * count) for leaf in one]) if count > 1 else one

        def temporary(name: str, problem=problem, state=state, batch=batch, meta_batch=meta_batch) -> float:
            estimate = jax.jit(lambda train, meta: ESTIMATORS[name](problem, train, meta, batch, meta_batch)[:2])
            return analysis(estimate.lower(state.train, state.meta_params).compile())["temporary_mib"]

        mib = {name: temporary(name) for name in ("mixed", "unrolled")}
        found.append({"inner_steps": count, **mib, "share": mib["mixed"] / mib["unrolled"]})
    return found


def recorded_pairs(config: presets.InternVLConfig) -> list[tuple[Batch, Batch]]:
    """(batch, meta_batch) of the 12 recorded iterations, in their order."""

    def batches(side: int) -> list[Batch]:
        rows = [RECORDED[row] for row in RECORDED_ORDER[side]]
        return [random_batch(config, [row], BUCKETS[row[0] > 1], 2 * at + side) for at, row in enumerate(rows)]

    return list(zip(batches(0), batches(1), strict=True))


def torch_steps(
    config: presets.InternVLConfig, params: Any, device: str, published: bool
) -> dict[str, Callable[..., Any]]:
    """The peers' iterations, each on a model of its own with our weights; on a GPU they compute in bfloat16."""
    import torch

    from benchmarks import torch_peers

    source = json.loads(config_json.config_to_json(config, "hf"))
    weights = convert.to_tensors(config, jax.device_get(params), "hf")
    low = torch.bfloat16 if device == "cuda" else torch.float32
    settings = torch_peers.Settings()
    model = partial(torch_peers.build_model, source, device=device, weights=weights)
    autocast = low if device == "cuda" else None
    steps = {"torch, tuned": torch_peers.tuned(model(torch.float32, attention="sdpa"), NUM_ROWS, settings, autocast)}
    if published:
        steps["torch, as published"] = torch_peers.published(model(low, attention="eager"), NUM_ROWS, settings)
    return steps


def peers(config: presets.InternVLConfig, rounds: int, device: str, published: bool = True) -> list[dict]:
    """An iteration of ours (`dot`, B = 1) beside PyTorch's: the same weights, rows and order; seconds an iteration."""
    import torch

    from benchmarks import torch_peers

    table = weighting.instance_table(NUM_ROWS, "projected", -1.0, 3.0)
    problem = prm_problem(config, table)
    params = internvl.init(config, jax.random.key(0, impl="rbg"))
    step, holder = jitted(problem, table, "dot"), {"state": fresh_state(problem, table, params)}
    steps = torch_steps(config, params, device, published)
    del params

    def ours(batch: Batch, meta_batch: Batch) -> jax.Array:
        holder["state"], loss = step(holder["state"], batch, meta_batch)
        return loss

    def for_torch(batch: Batch) -> Any:
        num_tokens = int(batch.step_positions.max()) + 2  # without what only fills a bucket
        return torch_peers.peer_batch(batch, config.image_tokens_per_tile, device, num_tokens)

    pairs = recorded_pairs(config)
    torch_pairs = [tuple(map(for_torch, pair)) for pair in pairs]
    iterations = {"ours, dot": (ours, jax.device_put(pairs))}
    iterations |= {name: (lambda *pair, run=run: run(*pair).inner_loss, torch_pairs) for name, run in steps.items()}
    first_losses: dict[str, float] = {}

    def run(name: str) -> None:
        iterate, inputs = iterations[name]
        losses = [iterate(*pair) for pair in inputs]
        first_losses.setdefault(name, float(losses[0]))
        float(losses[-1])  # of ours the whole program is done by then; torch may still be at its meta level
        if device == "cuda":
            torch.cuda.synchronize()

    seconds = interleave({name: partial(run, name) for name in iterations}, rounds)
    medians = {name: statistics.median(times) / len(pairs) for name, times in seconds.items()}
    return [
        {"program": name, "seconds": value, "ratio": value / medians["ours, dot"], "first_loss": first_losses[name]}
        for name, value in medians.items()
    ]


def markdown(rows: list[dict]) -> str:
    """Rows with the same keys as a table."""
    cells = [[f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
    lines = [list(rows[0]), ["---"] * len(rows[0]), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """Parses, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("estimators", "peers", "memory"))
    parser.add_argument("--size", choices=("wide", "recorded", "internvl3_1b"), help="default: wide, peers: recorded")
    parser.add_argument("--batch-sizes", default="1,4")
    parser.add_argument("--names", default=",".join(ESTIMATORS), help="estimators, comma-separated")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--remat", default="none", choices=presets.REMAT_POLICIES)
    parser.add_argument("--without-published", action="store_true", help="leave the slow peer out")
    args = parser.parse_args()
    unknown = set(args.names.split(",")) - set(ESTIMATORS)
    if unknown:
        parser.error(f"no such estimator: {', '.join(unknown)}; choose from {', '.join(ESTIMATORS)}")
    sizes = {"wide": WIDE, "recorded": RECORDED_MODEL, "internvl3_1b": presets.PRESETS["internvl3_1b"]}
    size = args.size or ("recorded" if args.what == "peers" else "wide")
    on_gpu = jax.default_backend() == "gpu"
    config = dataclasses.replace(sizes[size], remat=args.remat, compute_dtype="bfloat16" if on_gpu else "float32")
    bucket = (1, 512) if size == "wide" else BUCKETS[1]
    print(
        f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {platform.machine()}, {size}, {config.compute_dtype}"
    )
    rows = "the 12 recorded rows" if args.what == "peers" else f"rows of {bucket[0]} tiles and {bucket[1]} tokens"
    how = "compiled, not run" if args.what == "memory" else f"median of {args.rounds} round(s)"
    print(f"remat {args.remat}, {rows}, {how}\n")
    if args.what == "peers":
        print(markdown(peers(config, args.rounds, "cuda" if on_gpu else "cpu", not args.without_published)))
    elif args.what == "memory":
        print(markdown(inner_step_memory(config, bucket, (1, 2, 8))))
    else:
        for batch_size in map(int, args.batch_sizes.split(",")):
            names = args.names.split(",")
            print(markdown(estimators(config, batch_size, ["plain", *names], args.rounds, bucket)) + "\n", flush=True)


if __name__ == "__main__":
    main()
