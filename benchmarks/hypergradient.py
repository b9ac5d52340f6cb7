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
import optax

from benchmarks.workload import (
    BUCKETS,
    NUM_ROWS,
    RECORDED,
    RECORDED_ORDER,
    SIZES,
    TABLE,
    analysis,
    fresh_state,
    interleave,
    jitted,
    markdown,
    prm_problem,
    random_batch,
    stacked,
)
from dreamprm_jax import bilevel, weighting
from dreamprm_jax.hypergradient import ESTIMATORS
from dreamprm_jax.models import config_json, convert, internvl, presets
from dreamprm_jax.types import Batch


def estimators(
    config: presets.InternVLConfig, batch_size: int, names: list[str], rounds: int, bucket: tuple
) -> list[dict]:
    """One row per program: seconds, ratio to the plain step, flops and temporary memory as compiled.

    All programs share one state in turn, so that a card need not hold one each.
    """
    problem = prm_problem(config, TABLE)
    batch, meta_batch = (random_batch(config, [bucket] * batch_size, bucket, seed) for seed in (0, 1))
    batch, meta_batch = jax.device_put((batch, meta_batch))
    params = internvl.init(config, jax.random.key(0, impl="rbg"))
    state = fresh_state(problem, TABLE, params)
    del params
    found, programs, holder = [], {}, {"state": state}

    def run(compiled: Any) -> None:
        holder["state"], loss = compiled(holder["state"], batch, meta_batch)
        jax.block_until_ready(loss)

    for name in names:
        began = time.perf_counter()
        compiled = jitted(partial(prm_problem, config, TABLE), TABLE, name).lower(state, batch, meta_batch).compile()
        found.append({"program": name, **analysis(compiled), "compile_seconds": time.perf_counter() - began})
        programs[name] = partial(run, compiled)
    seconds = interleave(programs, rounds)
    plain = statistics.median(seconds["plain"])
    for row in found:
        median = statistics.median(seconds[row["program"]])
        row |= {"batch_size": batch_size, "seconds": median, "ratio": median / plain}
    return found


def inner_step_memory(config: presets.InternVLConfig, bucket: tuple[int, int], counts: tuple[int, ...]) -> list[dict]:
    """Temporary memory of K inner steps, `mixed` against reverse over reverse; compiled, not run."""
    found = []
    for count in counts:
        problem = prm_problem(config, TABLE, num_inner_steps=count)
        state = jax.eval_shape(lambda problem=problem: bilevel.init_state(
            problem.inner_tx, optax.identity(), TABLE, internvl.init(config, jax.random.key(0))
        ))  # fmt: skip
        one, meta_batch = (random_batch(config, [bucket], bucket, seed) for seed in (0, 1))
        batch = stacked(one, count)

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
    step = jitted(partial(prm_problem, config, table), table, "dot")
    holder = {"state": fresh_state(problem, table, params)}
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


def main() -> None:
    """Parses, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("estimators", "peers", "memory"))
    parser.add_argument("--size", choices=("wide", "recorded", "internvl3_1b"), help="default: wide, peers: recorded")
    parser.add_argument("--batch-sizes", default="1,4")
    parser.add_argument("--names", default=",".join(ESTIMATORS), help="estimators, comma-separated")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--remat", default="none", choices=presets.REMAT_POLICIES)
    parser.add_argument("--attention", default="xla", choices=presets.ATTENTIONS, help="cudnn: dot and recompute only")
    parser.add_argument("--without-published", action="store_true", help="leave the slow peer out")
    args = parser.parse_args()
    unknown = set(args.names.split(",")) - set(ESTIMATORS)
    if unknown:
        parser.error(f"no such estimator: {', '.join(unknown)}; choose from {', '.join(ESTIMATORS)}")
    size = args.size or ("recorded" if args.what == "peers" else "wide")
    on_gpu = jax.default_backend() == "gpu"
    dtype = "bfloat16" if on_gpu else "float32"
    config = dataclasses.replace(SIZES[size], remat=args.remat, attention=args.attention, compute_dtype=dtype)
    bucket = (1, 512) if size == "wide" else BUCKETS[1]
    print(
        f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {platform.machine()}, {size}, {config.compute_dtype}"
    )
    rows = "the 12 recorded rows" if args.what == "peers" else f"rows of {bucket[0]} tiles and {bucket[1]} tokens"
    how = "compiled, not run" if args.what == "memory" else f"median of {args.rounds} round(s)"
    print(f"remat {args.remat}, attention {args.attention}, {rows}, {how}\n")
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
