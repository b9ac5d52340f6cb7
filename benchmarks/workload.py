"""What the benchmarks run: random rows of given shapes, models, the problem, how programs are timed, what is written.

Nothing is read: no data, no weights.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from dreamprm_jax import bilevel, losses, optimizers, weighting
from dreamprm_jax.hypergradient import ESTIMATORS
from dreamprm_jax.inner import Problem, inner_steps, micro_batched
from dreamprm_jax.models import internvl, presets, trained
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
TABLE = weighting.instance_table(NUM_ROWS, "projected", 0.0, 3.0)
SIZES = {"wide": WIDE, "recorded": RECORDED_MODEL, "internvl3_1b": presets.PRESETS["internvl3_1b"]}


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


def stacked(batch: Batch, count: int) -> Batch:
    """The same batch for each of `count` inner steps: leaves [K, B, ...], or as it is for a single one."""
    return batch if count == 1 else jax.tree.map(lambda leaf: np.stack([leaf] * count), batch)


def prm_problem(
    config: presets.InternVLConfig,
    table: weighting.Weighting,
    frozen: Any = None,
    *,
    num_inner_steps: int = 1,
    micro_batch: int | None = None,
    meta_micro_batch: int | None = None,
    moment_dtype: str | None = None,
) -> Problem:
    """The published objective on both levels, with the project's AdamW below; `frozen`: parameters beside `params`."""

    def step_losses(params: Any, batch: Batch) -> tuple[jax.Array, dict]:
        params = trained.merge(params, frozen)
        logits = internvl.apply(config, params, batch)
        return losses.example_losses(losses.label_log_probs(logits, batch.labels), batch.step_mask, "mean"), {}

    def meta_loss(params: Any, batch: Batch) -> tuple[jax.Array, dict]:
        params = trained.merge(params, frozen)
        probabilities = jnp.exp(losses.label_log_probs(internvl.apply(config, params, batch), batch.labels))
        return jnp.mean(losses.meta_loss_mse(losses.masked_mean(probabilities, batch.step_mask))), {}

    inner_tx = optimizers.adamw(lambda count: 5e-5, weight_decay=0.01, moment_dtype=moment_dtype)
    cast = partial(internvl.cast_to_compute, config)
    if meta_micro_batch is not None:
        meta_loss = micro_batched(meta_loss, meta_micro_batch, cast)
    return Problem(
        step_losses,
        table.apply,
        meta_loss,
        inner_tx,
        num_inner_steps=num_inner_steps,
        micro_batch_size=micro_batch,
        cast_to_compute=cast,
    )


def jitted(problem_of: Callable[[Any], Problem], table: weighting.Weighting, name: str) -> Callable[..., Any]:
    """A whole iteration, state donated; "plain" is the inner step alone. `problem_of`: of the frozen parameters."""
    meta_tx = optimizers.per_entry_rmsprop(lambda count: 5e-3)

    def step(state: BilevelState, batch: Batch, meta_batch: Batch) -> tuple[BilevelState, jax.Array]:
        problem = problem_of(state.frozen)
        if name == "plain":
            train, metrics = inner_steps(problem, state.train, state.meta_params, batch)
            return state._replace(train=train), metrics["inner_loss"]
        state, metrics = bilevel.bilevel_step(problem, ESTIMATORS[name], meta_tx, table, state, batch, meta_batch)
        return state, metrics["inner_loss"]

    return jax.jit(step, donate_argnums=0)


def fresh_state(problem: Problem, table: weighting.Weighting, params: Any, frozen: Any = None) -> BilevelState:
    """Both levels at `params` (copied, as `frozen` is: the step donates)."""
    meta_tx = optimizers.per_entry_rmsprop(lambda count: 5e-3)
    params, frozen = jax.tree.map(jnp.copy, (params, frozen or {}))
    return bilevel.init_state(problem.inner_tx, meta_tx, table, params, frozen=frozen)


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


def analysis(compiled: Any) -> dict[str, float]:
    """Flops and temporary bytes, as XLA counts them (a loop's body counts once)."""
    cost = compiled.cost_analysis()
    return {
        "gflops": cost.get("flops", 0.0) / 1e9,
        "temporary_mib": compiled.memory_analysis().temp_size_in_bytes / 2**20,
    }


def markdown(rows: list[dict]) -> str:
    """Rows with the same keys as a table; None is a dash, and what is nested is left to the JSON."""
    rows = [{name: value for name, value in row.items() if not isinstance(value, dict)} for row in rows]
    cells = [[_cell(value) for value in row.values()] for row in rows]
    lines = [list(rows[0]), ["---"] * len(rows[0]), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def machine() -> dict[str, Any]:
    """Where figures come from."""
    return {
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
    }


def report(path: Path, options: dict[str, Any], figures: dict[str, Any]) -> None:
    """Machine, options and figures as JSON at `path` and as Markdown, which is printed too, beside it.

    Args:
      path: of the JSON; the Markdown has the ending .md.
      options: what the run was told and what it chose.
      figures: numbers, and tables as lists of rows with the same keys.
    """
    options = {name: str(value) for name, value in options.items()}
    path.write_text(json.dumps({"machine": machine(), "options": options, **figures}, indent=2) + "\n")
    tables = {name: value for name, value in figures.items() if isinstance(value, list)}
    numbers = {name: _cell(value) for name, value in figures.items() if name not in tables}
    lines = [
        f"- {what}: " + ", ".join(f"{name} {value}" for name, value in parts.items())
        for what, parts in (("machine", machine()), ("options", options), ("figures", numbers))
        if parts
    ]
    parts = ["\n".join(lines), *(f"## {name}\n\n{markdown(table)}" for name, table in tables.items())]
    text = f"# {path.stem}\n\n" + "\n\n".join(parts) + "\n"
    path.with_suffix(".md").write_text(text)
    print(text, end="")
