"""From a config to the pieces of a run: data sets, optimizers, the bilevel problem, jitted steps."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from safetensors import SafetensorError
from safetensors.numpy import load_file

from dreamprm_jax import bilevel, losses, optimizers, weighting
from dreamprm_jax.bilevel import Step
from dreamprm_jax.checkpoint import Model
from dreamprm_jax.data import batches, noisy_steps, records
from dreamprm_jax.data.example import Example
from dreamprm_jax.errors import InputError
from dreamprm_jax.hypergradient import ESTIMATORS, Problem, inner_step
from dreamprm_jax.models import internvl, presets
from dreamprm_jax.types import Batch, BilevelState, PyTree


class TrainingData(NamedTuple):
    """The data sets of a training run; `questions` only where the benchmark brings a best-of-N test."""

    cold_start: batches.Dataset
    train: batches.Dataset
    meta: batches.Dataset | None
    questions: tuple[noisy_steps.Question, ...]
    test: batches.Dataset | None


class Levels(NamedTuple):
    """The two optimizers of the bilevel phase, the cold start's, and their learning rates by step."""

    inner_tx: optax.GradientTransformation
    inner_rate: optimizers.Schedule
    meta_tx: optax.GradientTransformation
    meta_rate: optimizers.Schedule
    cold_tx: optax.GradientTransformation
    cold_rate: optimizers.Schedule


def record(cfg: Any) -> dict[str, Any]:
    """What a workdir keeps in config.json: the config, and the sha256 of every data file that it names.

    The files have been read before; this only tells them from others of the same name.
    """
    paths = (cfg.train.path, cfg.train.order, cfg.meta.path, cfg.meta.order, cfg.weighting.init, cfg.input.path)
    data = {path: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths if path is not None}
    return {"config": cfg.to_dict(), "data": data}


def image_spec(cfg: Any, config: presets.InternVLConfig) -> batches.ImageSpec:
    """Tiling as the config asks and the model needs."""
    return batches.ImageSpec(cfg.images.max_tiles, config.vision.image_size, config.image_tokens_per_tile)


def read_file(source: Any, field: str, *, outcome_required: bool = False) -> list[Example]:
    """The rows of a config's file (`train`, `meta`, `input`); `field` names it in messages.

    Raises:
      InputError: the path is missing, or a row is not in order.
    """
    if source.path is None:
        raise InputError(f"--config.{field}.path is missing: give a .json or .jsonl file")
    root = source.images or Path(source.path).parent
    return records.read_examples(source.path, root, outcome_required=outcome_required)


def training_data(cfg: Any, model: Model) -> TrainingData:
    """Reads and checks every row of every data set of the run.

    Raises:
      InputError: the first row, image or field that cannot be used.
    """
    encode = partial(
        batches.encode_all,
        tokenizer=model.tokenizer,
        images=image_spec(cfg, model.config),
        context=model.config.language.max_positions,
    )
    if cfg.train.path is None and cfg.meta.path is None and cfg.model.checkpoint is None:
        splits = noisy_steps.make(cfg.seed, noisy_steps.Sizes(**cfg.noisy_steps))
        test = [example for question in splits.test for example in question.examples]
        meta = batches.with_outcome_targets(encode(splits.meta), model.tokenizer)
        cold_start = [*splits.pretrain, *splits.cold_start]
        return TrainingData(encode(cold_start), encode(splits.train), meta, tuple(splits.test), encode(test))
    train = encode(read_file(cfg.train, "train"))
    meta = None
    if cfg.num_steps:
        meta = encode(read_file(cfg.meta, "meta", outcome_required=True))
        meta = batches.with_outcome_targets(meta, model.tokenizer)
    return TrainingData(train, train, meta, (), None)


def rows_of(cfg: Any, stream: str, dataset: batches.Dataset) -> Any:
    """The rows of every batch of a data stream: "cold_start", "train" or "meta".

    The cold start of a file run is on the training rows, in their order; each stream has a seed of its own.
    """
    level = "meta" if stream == "meta" else "train"
    path = cfg[level].order
    sizes = {"cold_start": cfg.cold_start.batch_size, "train": cfg.batch_size, "meta": cfg.meta_batch_size}
    return batches.training_order(
        len(dataset),
        batch_size=sizes[stream],
        num_batches=cfg.cold_start.num_steps if stream == "cold_start" else cfg.num_steps,
        seed=3 * cfg.seed + list(sizes).index(stream),
        order=None if path is None else batches.read_order(path, len(dataset)),
    )


def levels(cfg: Any) -> Levels:
    """The optimizers, each with a warmed-up cosine over its own phase."""
    inner_rate = optimizers.warmup_cosine(cfg.inner.lr, cfg.num_steps)
    meta_rate = optimizers.warmup_cosine(cfg.outer.lr, cfg.num_steps)
    cold_rate = optimizers.warmup_cosine(cfg.cold_start.lr, cfg.cold_start.num_steps)
    inner = partial(optimizers.adamw, clip_norm=cfg.inner.clip_norm)
    if cfg.outer.optimizer == "per_entry":
        outer = optimizers.per_entry_rmsprop(meta_rate, weight_decay=cfg.outer.weight_decay)
    else:
        outer = optax.adamw(meta_rate, weight_decay=cfg.outer.weight_decay)
    clip = optax.clip_by_global_norm(cfg.outer.clip_norm) if cfg.outer.clip_norm is not None else optax.identity()
    return Levels(
        inner_tx=inner(inner_rate, weight_decay=cfg.inner.weight_decay),
        inner_rate=inner_rate,
        meta_tx=optax.chain(optimizers.divide_by_inner_rate(inner_rate), clip, outer),
        meta_rate=meta_rate,
        cold_tx=inner(cold_rate, weight_decay=cfg.cold_start.weight_decay),
        cold_rate=cold_rate,
    )


def instance_weighting(cfg: Any, num_examples: int) -> weighting.Weighting:
    """The weighting that the config names, started from `weighting.init` where that is given."""
    if cfg.weighting.name == "uniform":
        return weighting.uniform()
    table = weighting.instance_table(num_examples, cfg.weighting.minimum, cfg.weighting.maximum)
    if cfg.weighting.init is None:
        return table
    meta_params = read_meta_params(cfg.weighting.init, jax.eval_shape(table.init))
    return table._replace(init=lambda: meta_params)


def read_meta_params(path: str, shapes: PyTree) -> PyTree:
    """Initial meta_params from a safetensors file.

    Raises:
      InputError: the file's tensors are not those of `shapes`, by name and shape.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read as safetensors ({error}) (weighting.init)") from error
    wanted = {name: leaf.shape for name, leaf in shapes.items()}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if found != wanted:
        raise InputError(f"{path}: holds {found}, but the weighting needs {wanted} (weighting.init)")
    return {name: jnp.asarray(tensor, jnp.float32) for name, tensor in tensors.items()}


def prm_problem(cfg: Any, model: Model, weights: Any, inner_tx: Any) -> Problem:
    """The bilevel problem of a process reward model; docs/bilevel.md has the objective and both meta targets."""
    aggregate, meta_loss = losses.AGGREGATIONS[cfg.aggregate], losses.META_LOSSES[cfg.meta_loss]

    def step_losses(params: PyTree, batch: Batch) -> tuple[jax.Array, jax.Array]:
        logits = internvl.apply(model.config, params, batch)
        return losses.example_losses(logits, batch.labels, batch.step_mask, cfg.step_loss), logits

    def outcome_loss(params: PyTree, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        logits = internvl.apply(model.config, params, batch)
        if cfg.meta_target == "both":
            probabilities = jnp.exp(losses.label_log_probs(logits, batch.labels))  # [B, S], of "+" or "-" by outcome
            response_score = aggregate(probabilities, batch.step_mask)  # [B]
        else:
            plus = aggregate(losses.step_scores(logits, model.tokenizer.plus_id), batch.step_mask)  # [B]
            response_score = jnp.where(batch.labels[:, 0] == model.tokenizer.plus_id, plus, 1.0 - plus)
        loss = losses.masked_mean(meta_loss(response_score), batch.example_mask)
        return loss, {"meta_prediction": losses.masked_mean(response_score, batch.example_mask)}

    return Problem(step_losses, weights, outcome_loss, inner_tx)


def plain_step(problem: Problem, rate: optimizers.Schedule, clip_norm: float | None) -> Step:
    """The jitted step of supervised training: the inner step alone, every weight 1."""

    @partial(jax.jit, donate_argnums=0)
    def step(state: BilevelState, batch: Batch) -> tuple[BilevelState, dict[str, jax.Array]]:
        train, metrics = inner_step(problem, state.train, {}, batch)
        metrics["lr"] = rate(state.train.step)
        del metrics["instance_weights"]
        return state._replace(train=train), _for_the_log(metrics, clip_norm)

    return step


def weighted_step(cfg: Any, problem: Problem, rates: Levels, weights: weighting.Weighting) -> Step:
    """The jitted bilevel step."""
    estimate = ESTIMATORS[cfg.hypergradient]

    @partial(jax.jit, donate_argnums=0)
    def step(state: BilevelState, batch: Batch, meta_batch: Batch) -> tuple[BilevelState, dict[str, jax.Array]]:
        count = state.train.step
        state, metrics = bilevel.bilevel_step(problem, estimate, rates.meta_tx, weights, state, batch, meta_batch)
        metrics |= {"lr": rates.inner_rate(count), "meta_lr": rates.meta_rate(count)}
        meta_grad = metrics.pop("meta_grad")
        if cfg.log_meta_grad:
            metrics["meta_grad"] = meta_grad["table"][batch.example_id]
        return state, _for_the_log(metrics, cfg.inner.clip_norm)

    return step


def _for_the_log(metrics: dict[str, jax.Array], clip_norm: float | None) -> dict[str, jax.Array]:
    del metrics["losses"]
    metrics["clip_active"] = metrics["grad_norm"] > clip_norm if clip_norm is not None else jnp.array(False)
    return metrics
