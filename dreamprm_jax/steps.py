"""From a config to what a loop drives: the optimizers of both levels, and the jitted steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from dreamprm_jax import bilevel, hypergradient, optimizers, sharding
from dreamprm_jax.bilevel import Step
from dreamprm_jax.errors import InputError
from dreamprm_jax.hypergradient import ESTIMATORS, EXACT, REVERSE_ONLY
from dreamprm_jax.inner import Problem, inner_steps
from dreamprm_jax.types import SUPERVISED, Batch, BilevelState, PyTree
from dreamprm_jax.weighting import Weighting, uniform

ProblemOf = Callable[[PyTree], Problem]
"""The frozen parameters -> the problem in the trained ones; a step calls it inside its jit, on its own argument."""


class Levels(NamedTuple):
    """The two optimizers of the bilevel phase, and their learning rates by step."""

    inner_tx: optax.GradientTransformation
    inner_rate: optimizers.Schedule  # by inner steps
    meta_tx: optax.GradientTransformation
    meta_rate: optimizers.Schedule  # by iterations


def levels(cfg: Any) -> Levels:
    """The optimizers, each with its own schedule over the phase."""
    inner_rate = schedule(cfg.inner, cfg.inner.lr, cfg.num_steps * cfg.num_inner_steps)
    meta_rate = schedule(cfg.outer, cfg.outer.lr, cfg.num_steps)
    return Levels(
        inner_tx=inner_optimizer(cfg.inner, cfg.inner, inner_rate, clip_of_weighted(cfg), cfg.model.moment_dtype),
        inner_rate=inner_rate,
        meta_tx=outer_optimizer(cfg, meta_rate, inner_rate),
        meta_rate=meta_rate,
    )


def schedule(level: Any, peak: float, num_steps: int) -> optimizers.Schedule:
    """The learning rate of `level` (the config's `inner` or `outer`) over a phase of `num_steps`."""
    return optimizers.SCHEDULES[level.schedule](peak, num_steps, level.warmup)


def supervised(
    cfg: Any, phase: Any, problem_of: ProblemOf, mesh: Mesh | None
) -> tuple[Step, optax.GradientTransformation]:
    """The jitted step of a phase of plain supervised training, and its optimizer.

    `phase` is the config's `pretrain` or `cold_start`; all weights are 1, whatever weighting the problem has.
    """
    rate = schedule(cfg.inner, phase.lr, phase.num_steps)
    tx = inner_optimizer(cfg.inner, phase, rate, phase.clip_norm, cfg.model.moment_dtype)

    def plain(frozen: PyTree) -> Problem:
        return problem_of(frozen)._replace(
            weights=uniform().apply, inner_tx=tx, num_inner_steps=1, detached=True, example_clip_norm=None
        )

    return plain_step(plain, rate, phase.clip_norm, cfg.ema_decay, mesh), tx


def check_rows(cfg: Any, mesh: Mesh | None) -> None:
    """Every batch of the run is divided evenly among the devices, and each device's part into its micro batches.

    Raises:
      InputError: names the field that is not a multiple.
    """
    shards = sharding.num_row_shards(mesh)
    fields = {f"{phase}.batch_size": cfg[phase].batch_size for phase in SUPERVISED if cfg[phase].num_steps}
    micro = dict.fromkeys(fields, cfg.micro_batch_size)
    if cfg.num_steps:
        fields["batch_size"], micro["batch_size"] = cfg.batch_size, cfg.micro_batch_size
    if cfg.num_steps and (cfg.weighting.name != "uniform" or cfg.meta.held_out):
        fields["meta_batch_size"], micro["meta_batch_size"] = cfg.meta_batch_size, cfg.meta_micro_batch_size
    for name, size in fields.items():
        on_device = size // shards
        if size % shards:
            raise InputError(
                f"--config.{name}={size}: must be a multiple of {shards}, since mesh.data times mesh.fsdp devices "
                "divide its rows"
            )
        if micro[name] and on_device > micro[name] and on_device % micro[name]:
            raise InputError(
                f"--config.{name}={size}: gives each device {on_device} rows, which it cannot take {micro[name]} at a "
                "time (micro_batch_size, meta_micro_batch_size)"
            )


def relief(cfg: Any, phase: str, mesh: Mesh | None) -> str:
    """What to set so that a phase takes less of a device's memory, of what is not set so yet; the cheapest first."""
    shards, supervised = sharding.num_row_shards(mesh), phase in SUPERVISED
    rows = {"micro_batch_size": cfg[phase].batch_size if supervised else cfg.batch_size}
    if phase == "bilevel":
        rows["meta_micro_batch_size"] = cfg.meta_batch_size
    found = [f"{name}=1" for name, size in rows.items() if (cfg[name] or size // shards) > 1]
    wanted = {"remat": "full", "moment_dtype": "bfloat16", "trained": "language"}
    found += [f"model.{name}={value}" for name, value in wanted.items() if cfg.model[name] != value]
    found += [f"images.max_tiles={cfg.images.max_tiles // 2}"] if cfg.images.max_tiles > 1 else []
    return "lower what it takes with one of " + ", ".join(
        f"--config.{each}" for each in (*found, "mesh.fsdp=2 (devices)")
    )


def clip_of_weighted(cfg: Any) -> float | None:
    """The clip of the weighted gradient, which is the optimizer's; one per example is the problem's."""
    return cfg.inner.clip_norm if cfg.inner.clip_place == "after" else None


def inner_optimizer(
    inner: Any, phase: Any, rate: optimizers.Schedule, clip_norm: float | None, moment_dtype: str | None = None
) -> optax.GradientTransformation:
    """`inner.optimizer` with the eps and the decay of `phase`, behind the clip of the weighted gradient.

    At batch size 1 an active clip makes the update independent of the weight: the meta-gradient is truly 0 there.
    """
    if inner.optimizer == "hf_adamw":
        adam = optimizers.hf_adamw(rate, weight_decay=phase.weight_decay, eps=phase.eps, moment_dtype=moment_dtype)
    else:
        adam = optimizers.adamw(
            rate,
            weight_decay=phase.weight_decay,
            eps=phase.eps,
            decay_all=inner.decay == "all",
            moment_dtype=moment_dtype,
        )
    # The same tree with and without a clip: a run's phases may differ in it, and their states share a checkpoint.
    clip = optax.identity() if clip_norm is None else optimizers.clip_by_global_norm(clip_norm)
    return optax.chain(clip, adam)


def outer_optimizer(
    cfg: Any, meta_rate: optimizers.Schedule, inner_rate: optimizers.Schedule
) -> optax.GradientTransformation:
    """`outer.optimizer` behind the clip; an exact meta-gradient is divided by the inner rate first."""
    outer = cfg.outer
    optimizer = {
        "per_entry": optimizers.per_entry_rmsprop,
        "adamw": optax.adamw,
        "hf_adamw": optimizers.hf_adamw,
    }[outer.optimizer](meta_rate, weight_decay=outer.weight_decay)
    steps = [optimizer]
    if outer.clip_norm is not None:
        steps.insert(0, optimizers.clip_by_global_norm(outer.clip_norm))
    if cfg.hypergradient == "auto" or cfg.hypergradient in EXACT:
        steps.insert(0, optimizers.divide_by_inner_rate(inner_rate, cfg.num_inner_steps))
    return optax.chain(*steps)


def needs_forward_mode(cfg: Any) -> bool:
    """Whether the run pushes the model forward or differentiates it twice, which fused attention cannot."""
    if not cfg.num_steps or cfg.weighting.name == "uniform":
        return False
    if cfg.hypergradient != "auto":
        return cfg.hypergradient not in REVERSE_ONLY or cfg.identity_cosine_every > 0
    return cfg.num_inner_steps > 1 or not cfg.weighting.detached or cfg.identity_cosine_every > 0


def gradients_that_fit(problem: Problem, params: PyTree, frozen: PyTree, mesh: Mesh | None, memory: int) -> int:
    """How many gradients of the trained parameters `dot` may keep beside all else; one a device where its memory,
    in bytes, is not known (0).

    The state takes three of the size that a device keeps and the look back three; with the activations of one row at a
    time it was under 8 for InternVL3-1B (docs/performance.md). A row's gradient is on the devices that have the row,
    not divided by fsdp. Above 16 rows a device, so small a model is better served by rows side by side.
    """
    kept = 8 * sharding.bytes_on_device(mesh, params) + sharding.bytes_on_device(mesh, frozen)
    computed = jax.tree.leaves(jax.eval_shape(problem.cast_to_compute, params))
    gradient = sum(leaf.size * leaf.dtype.itemsize for leaf in computed) // (mesh.shape["tensor"] if mesh else 1)
    return sharding.num_row_shards(mesh) * min(16, max(1, (memory - kept) // gradient))


def resolve_estimator(cfg: Any, problem: Problem, forward_mode: bool, fit: int) -> str:
    """The estimator's name; `auto` becomes the cheapest exact one.

    `forward_mode`: whether the attention has it. `fit`: `gradients_that_fit`.

    Raises:
      InputError: the one asked for cannot serve this problem.
    """
    try:
        if cfg.hypergradient == "auto":
            return hypergradient.choose(
                problem,
                cfg.batch_size,
                forward_mode=forward_mode,
                remat=cfg.model.remat != "none",
                gradients_that_fit=fit,
            )
        hypergradient.check_estimator(problem, cfg.hypergradient)
    except ValueError as error:
        raise InputError(f"--config.hypergradient={cfg.hypergradient}: {error}") from error
    return cfg.hypergradient


def plain_step(
    problem_of: ProblemOf,
    rate: optimizers.Schedule,
    clip_norm: float | None,
    ema_decay: float | None,
    mesh: Mesh | None,
) -> Step:
    """The jitted step of supervised training: the inner steps alone, whatever weights the problem has."""

    @partial(jax.jit, donate_argnums=0)
    def step(state: BilevelState, batch: Batch) -> tuple[BilevelState, dict[str, jax.Array]]:
        count = state.train.step
        train, metrics = inner_steps(problem_of(state.frozen), state.train, {}, batch)
        del metrics["instance_weights"], metrics["effective_sample_size"]
        state = bilevel.track_ema(state._replace(train=train), ema_decay)
        return sharding.settle(mesh, state, _for_the_log({**metrics, "lr": rate(count)}, batch, clip_norm))

    return step


def weighted_step(
    cfg: Any, problem_of: ProblemOf, estimator: str, rates: Levels, weights: Weighting, mesh: Mesh | None
) -> Step:
    """The jitted bilevel step."""
    estimate = ESTIMATORS[estimator]

    @partial(jax.jit, donate_argnums=0)
    def step(state: BilevelState, batch: Batch, meta_batch: Batch) -> tuple[BilevelState, dict[str, jax.Array]]:
        before, problem = state, problem_of(state.frozen)
        state, metrics = bilevel.bilevel_step(problem, estimate, rates.meta_tx, weights, state, batch, meta_batch)
        count = before.train.step
        metrics |= {"meta_example_id": meta_batch.example_id, "meta_example_mask": meta_batch.example_mask}
        metrics |= {"lr": rates.inner_rate(count), "meta_lr": rates.meta_rate(count // cfg.num_inner_steps)}
        if cfg.identity_cosine_every:
            due = (count // cfg.num_inner_steps) % cfg.identity_cosine_every == 0
            cosine = lambda: _identity_cosine(problem, before, metrics["meta_grad"], batch, meta_batch)  # noqa: E731
            metrics["identity_cosine"] = jax.lax.cond(due, cosine, lambda: jnp.nan)
        meta_grad = metrics.pop("meta_grad")
        if cfg.log_meta_grad:
            of_rows = cfg.weighting.name == "table"
            metrics["meta_grad"] = meta_grad["table"][batch.example_id] if of_rows else meta_grad
        state = bilevel.track_ema(state, cfg.ema_decay)
        return sharding.settle(mesh, state, _for_the_log(metrics, batch, clip_of_weighted(cfg)))

    return step


def _identity_cosine(
    problem: Problem, state: BilevelState, meta_grad: PyTree, batch: Batch, meta_batch: Batch
) -> jax.Array:
    """Between the meta-gradient and the published formula without its noise; 0 where one of them is 0."""
    other, _, _ = hypergradient.identity(problem, state.train, state.meta_params, batch, meta_batch)
    norms = optimizers.norm(meta_grad) * optimizers.norm(other)
    return optax.tree.vdot(meta_grad, other) / jnp.where(norms > 0, norms, 1.0)


def _for_the_log(metrics: dict[str, jax.Array], batch: Batch, clip_norm: float | None) -> dict[str, jax.Array]:
    del metrics["losses"]
    metrics |= {"example_id": batch.example_id, "example_mask": batch.example_mask}  # a process may have some of them
    norms = metrics["grad_norm"]  # [] or [K]: a clip is active where it is in any of the inner steps
    metrics["clip_active"] = jnp.any(norms > clip_norm) if clip_norm is not None else jnp.array(False)
    return metrics | {"grad_norm": jnp.mean(norms)}
