"""Does the meta-gradient predict the meta loss? Predicted beside real changes after small outer steps, as a table.

Run as `python -m benchmarks.prediction --cold-start runs/compare/seed0/cold_start`. From that cold start
configs/table.py trains on the embedded benchmark; every so many iterations the weights of the batch's rows are moved a
little, along the outer step itself and along random directions, the inner step is taken again and the meta loss read.
Formulas between the exact gradient and the published one tell what makes the difference:

    exact              -<u, grad l_i(params)>    u = (dU/dg)^T v, v = grad L_meta(params')
    at the new point   -<u, grad l_i(params')>   the optimizer's derivative, the published evaluation point
    no optimizer       -<v, grad l_i(params)>    the published direction, the exact evaluation point
    identity           -<v, grad l_i(params')>   the published formula without its noise

Slope: least squares through 0, predicted against real; 1 is exact. All but the first two lack the optimizer's scale, so
theirs is after scaling to the exact gradient's norm. Parameters, moments and gradients are float64, the model's
activations float32.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from configs import table
from dreamprm_jax import bilevel, build, hypergradient, steps
from dreamprm_jax.inner import Problem, inner_gradient, inner_steps
from dreamprm_jax.loading import load_model
from dreamprm_jax.types import Batch, BilevelState, PyTree

NUM_DIRECTIONS = 4  # random ones at each point
STEP = 1e-2  # root mean square of a move, in units of weight


def formulas(problem: Problem, state: BilevelState, batch: Batch, meta_batch: Batch) -> dict[str, jax.Array]:
    """d L_meta / d w_i [B] by each formula, for a table of weights."""
    train = state.train
    grads, _ = inner_gradient(problem, train.params, state.meta_params, batch)
    change, pull, _ = jax.vjp(
        lambda grads: problem.inner_tx.update(grads, train.opt_state, train.params), grads, has_aux=True
    )
    params = optax.apply_updates(train.params, change)
    v = jax.grad(lambda params: problem.meta_loss(params, meta_batch)[0])(params)
    (u,) = pull(v)

    def slopes(at: PyTree, along: PyTree) -> jax.Array:
        losses = lambda params: problem.losses(params, batch)[0]  # noqa: E731
        return jax.jvp(losses, (at,), (along,))[1] / batch.example_id.size

    found = {"exact": slopes(train.params, u), "at the new point": slopes(params, u)}
    for name, at in (("no optimizer", train.params), ("identity", params)):
        without = -slopes(at, v)  # descent: U = -g
        found[name] = without * (jnp.linalg.norm(found["exact"]) / jnp.linalg.norm(without))
    return found


def real_change(problem: Problem, state: BilevelState, batch: Batch, meta_batch: Batch, move: jax.Array) -> jax.Array:
    """L_meta after the inner step with weights moved by `move` [B], less the same without."""

    def meta_loss(table: jax.Array) -> jax.Array:
        train, _ = inner_steps(problem, state.train, {"table": table}, batch)
        return problem.meta_loss(train.params, meta_batch)[0]

    weights = state.meta_params["table"]
    return meta_loss(weights.at[batch.example_id].add(move)) - meta_loss(weights)


def compare(
    problem: Problem, state: BilevelState, batch: Batch, meta_batch: Batch, key: jax.Array
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Predicted changes by formula, and real ones, [1 + NUM_DIRECTIONS] each: the first along the sign of the
    gradient, which is the outer step's first, the others random."""
    found = formulas(problem, state, batch, meta_batch)
    random = jax.random.normal(key, (NUM_DIRECTIONS, batch.example_id.size))
    moves = STEP * jnp.concatenate([-jnp.sign(found["exact"])[None], random])
    real = jax.lax.map(lambda move: real_change(problem, state, batch, meta_batch, move), moves)
    return {name: moves @ gradient for name, gradient in found.items()}, real


def samples(cold_start: str, seed: int, num_steps: int, every: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """All predicted changes by formula, and the real ones, along a training from `cold_start`."""
    cfg = table.get_config()
    with cfg.unlocked():
        cfg.seed, cfg.num_steps, cfg.model.checkpoint = seed, num_steps, cold_start
        cfg.pretrain.num_steps = cfg.cold_start.num_steps = 0
    model = load_model(cfg.model, cfg.seed)
    model = model._replace(params=_double(model.params))
    data = build.training_data(cfg, model)
    weighting, levels = build.instance_weighting(cfg, data.train, model), steps.levels(cfg)
    problem = build.prm_problem(cfg, model, weighting.apply, levels.inner_tx)
    state = _double(bilevel.init_state(levels.inner_tx, levels.meta_tx, weighting, model.params))
    train, meta = build.stream_of(cfg, "train", data.train)(0), build.stream_of(cfg, "meta", data.meta)(0)
    look = jax.jit(lambda *arguments: compare(problem, *arguments))
    step = jax.jit(
        lambda *arguments: bilevel.bilevel_step(problem, hypergradient.tangent, levels.meta_tx, weighting, *arguments)[
            0
        ]
    )
    predicted: dict[str, list] = {}
    real = []
    for iteration in tqdm(range(num_steps), file=sys.stderr, mininterval=5):
        batch, meta_batch = next(train), next(meta)
        if iteration % every == every // 2:
            found, changes = look(state, batch, meta_batch, jax.random.key(iteration))
            real.append(changes)
            for name, values in found.items():
                predicted.setdefault(name, []).append(values)
        state = step(state, batch, meta_batch)
    return {name: np.concatenate(values) for name, values in predicted.items()}, np.concatenate(real)


def _double(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float64) if leaf.dtype == jnp.float32 else leaf, tree)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cold-start", required=True, help="workdir of configs/cold_start.py")
    parser.add_argument("--seed", type=int, default=0, help="of that cold start")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--every", type=int, default=20, help="iterations between looks")
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    predicted, real = samples(arguments.cold_start, arguments.seed, arguments.steps, arguments.every)
    print(f"{len(real)} changes of the meta loss, root mean square {np.sqrt(np.mean(real**2)):.2e}\n")
    print("| formula | correlation | slope |\n|---|---|---|")
    for name in ("exact", "at the new point", "no optimizer", "identity"):  # jit gives a dict back in sorted order
        values = predicted[name]
        correlation = np.corrcoef(values, real)[0, 1]
        print(f"| {name} | {correlation:.4f} | {values @ real / (values @ values):.4f} |")


if __name__ == "__main__":
    main()
