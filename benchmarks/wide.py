"""Wide Qwen2 blocks, ours beside transformers': forward and gradient, interleaved, as a Markdown table.

Run as `python -m benchmarks.wide`, or as `taskset -c 1 python -m benchmarks.wide` for one core. The same weights in
both, float32, transformers with its fused attention. Where other jobs run, CPU time on one core is the one to read.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import Qwen2Config, Qwen2Model

from dreamprm_jax.models.presets import InternVLConfig, LanguageConfig
from dreamprm_jax.models.qwen2 import Qwen2
from dreamprm_jax.types import PyTree

LANGUAGE = LanguageConfig(num_layers=4, vocab_size=8)  # 896 wide, MLP 4,864 wide; no head is used
FROM_WIDTH = ("q", "k", "v", "gate", "up")  # projections out of the residual stream; the others lead into it
NUM_TOKENS = 1024
NUM_RUNS = 5  # of each case, after one that is not counted

Cases = dict[str, Callable[[], Any]]


def ours(params: PyTree, x: np.ndarray) -> Cases:
    """The mean cube of the normalised states, and its gradient in parameters and input."""
    blocks = Qwen2(InternVLConfig(language=LANGUAGE))
    positions = jnp.arange(NUM_TOKENS)[None]

    def loss(params: PyTree, x: jax.Array) -> jax.Array:
        states = blocks.apply({"params": params}, x, positions, method="hidden_states")
        return jnp.mean(states**3)

    forward, gradient = jax.jit(loss), jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    x = jnp.asarray(x)
    return {
        "forward": lambda: jax.block_until_ready(forward(params, x)),
        "gradient": lambda: jax.block_until_ready(gradient(params, x))[0],
    }


def torch_blocks(params: PyTree, x: np.ndarray) -> Cases:
    """The same with transformers' Qwen2, given our parameters."""
    config = Qwen2Config(
        vocab_size=LANGUAGE.vocab_size,
        hidden_size=LANGUAGE.width,
        intermediate_size=LANGUAGE.mlp_width,
        num_hidden_layers=LANGUAGE.num_layers,
        num_attention_heads=LANGUAGE.num_heads,
        num_key_value_heads=LANGUAGE.num_kv_heads,
        rms_norm_eps=LANGUAGE.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": LANGUAGE.rope_theta},
        attn_implementation="sdpa",
    )
    model = Qwen2Model(config)
    model.load_state_dict(dict(torch_parameters(params)), strict=False)
    inputs = torch.tensor(x, requires_grad=True)

    def loss() -> torch.Tensor:
        return model(inputs_embeds=inputs, use_cache=False).last_hidden_state.pow(3).mean()

    def gradient() -> torch.Tensor:
        model.zero_grad()
        inputs.grad = None
        value = loss()
        value.backward()
        return value.detach()

    return {"forward": torch.no_grad()(loss), "gradient": gradient}


def torch_parameters(params: PyTree) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and values of transformers' weights; norms and biases are 1 and 0 in a fresh model of either."""
    names = {name: f"self_attn.{name}_proj" for name in "qkv"} | {"out": "self_attn.o_proj"}
    names |= {name: f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    for ours, theirs in names.items():
        for layer in range(LANGUAGE.num_layers):
            kernel = np.asarray(params["layers"][ours]["kernel"][layer])
            value = kernel.reshape((LANGUAGE.width, -1) if ours in FROM_WIDTH else (-1, LANGUAGE.width)).T
            yield f"layers.{layer}.{theirs}.weight", torch.tensor(value)


def measure(cases: Cases) -> dict[str, np.ndarray]:
    """Medians of wall and CPU seconds of each case, one run of each after the other."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for _ in range(1 + NUM_RUNS):
        for name, case in cases.items():
            wall, cpu = time.perf_counter(), time.process_time()
            case()
            seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {name: np.median(rows[1:], axis=0) for name, rows in seconds.items()}


def main() -> None:
    num_cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(num_cores)
    x = np.random.default_rng(0).normal(size=(1, NUM_TOKENS, LANGUAGE.width)).astype(np.float32)
    params = jax.jit(Qwen2(InternVLConfig(language=LANGUAGE)).init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    mine, theirs = ours(params["params"], x), torch_blocks(params["params"], x)
    np.testing.assert_allclose(float(mine["gradient"]()), float(theirs["gradient"]()), rtol=1e-3)
    print(f"{LANGUAGE.num_layers} blocks {LANGUAGE.width} wide, {NUM_TOKENS:,} tokens, float32, {num_cores} core(s)\n")
    print("| | ours, wall | torch, wall | ratio | ours, CPU | torch, CPU | ratio |\n|---|---|---|---|---|---|---|")
    for name in ("forward", "gradient"):
        medians = measure({"ours": mine[name], "torch": theirs[name]})
        cells = [f"{a:.2f} s | {b:.2f} s | {a / b:.2f}" for a, b in zip(medians["ours"], medians["torch"], strict=True)]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
