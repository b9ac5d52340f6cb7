"""From a config to the pieces of a run: data sets, the weighting, the bilevel problem."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dreamprm_jax import held_out, losses, weighting
from dreamprm_jax.data import batches, noisy_steps, prepared, raw, records
from dreamprm_jax.data.bad_rows import OnError
from dreamprm_jax.data.dataset import Dataset, ImageSpec, encode_all, first_rows, with_shapes
from dreamprm_jax.data.example import Example
from dreamprm_jax.data.shapes import Shape
from dreamprm_jax.errors import InputError
from dreamprm_jax.inner import Problem, micro_batched
from dreamprm_jax.loading import Model, fingerprint_of_model
from dreamprm_jax.models import convert, internvl, presets, trained
from dreamprm_jax.sharding import num_row_shards, table_length
from dreamprm_jax.types import SUPERVISED, WHOLE, Batch, PyTree, Share


class TrainingData(NamedTuple):
    """The data sets of a training run; those of the embedded benchmark alone are None or empty elsewhere."""

    pretrain: Dataset | None
    cold_start: Dataset
    train: Dataset
    meta: Dataset | None
    questions: tuple[noisy_steps.Question, ...]
    test: Dataset | None
    held_out: Dataset | None = None  # rows of the meta set's file that are not in `meta`


def record(cfg: Any) -> dict[str, Any]:
    """What a workdir keeps in config.json: the config, and the sha256 of every data file and model that it names.

    It tells them from others of the same name. Which devices and processes do the work and who watches is left out: a
    run may go on with others.

    Raises:
      InputError: a file that cannot be read.
    """
    paths = (
        *(cfg.train.path, cfg.train.order, cfg.meta.path, cfg.meta.order, cfg.weighting.init, cfg.input.path),
        *(cfg.candidates.path, cfg.candidates.scores, cfg.benchmark.path, cfg.benchmark.scores),
    )
    data = {path: _fingerprint(path) for path in paths if path is not None}
    if cfg.model.checkpoint is not None:
        data[cfg.model.checkpoint] = fingerprint_of_model(cfg.model.checkpoint)
    left_out = ("mesh", "distributed", "wandb", "resume")
    config = {name: value for name, value in cfg.to_dict().items() if name not in left_out}
    return {"config": config, "data": data}


def _fingerprint(path: str) -> str:
    try:
        if prepared.is_prepared(path) or path.endswith(prepared.UNFINISHED):
            return prepared.fingerprint(path)
        if Path(path).is_file():
            return _sha256(Path(path))
        files = {name: _sha256(file) for name, file in raw.find_files(path).items()}
        return hashlib.sha256(json.dumps(files).encode()).hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); the config names it") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def image_spec(cfg: Any, config: presets.InternVLConfig) -> ImageSpec:
    """Tiling as the config asks and the model needs."""
    size, tokens = config.vision.image_size, config.image_tokens_per_tile
    return ImageSpec(cfg.images.max_tiles, size, tokens, cfg.images.tile_budget)


def read_file(
    source: Any, field: str, *, outcome_required: bool = False, labels_required: bool = True
) -> Sequence[Example | InputError]:
    """The rows of a config's file or prepared directory (`train`, `meta`, `input`); `field` names it in messages.

    Raises:
      InputError: the path is missing, or cannot be read.
    """
    if source.path is None:
        raise InputError(f"--config.{field}.path is missing: give a .json or .jsonl file, or a prepared directory")
    if Path(source.path).is_dir():
        return prepared.PreparedExamples(source.path)
    root = source.images or Path(source.path).parent
    return records.read_rows(source.path, root, outcome_required=outcome_required, labels_required=labels_required)


def reading(cfg: Any) -> batches.Reading:
    """How batches are read ahead."""
    return batches.Reading(cfg.data.threads, cfg.data.workers)


def encoder(cfg: Any, model: Model) -> Callable[..., Dataset]:
    """`encode_all` as the config asks and the model needs: rows in, checked data set out."""
    return partial(
        encode_all,
        tokenizer=model.tokenizer,
        images=image_spec(cfg, model.config),
        context=model.config.language.max_positions,
        on_error=OnError(cfg.data.on_error, cfg.data.max_bad_share),
        max_shapes=cfg.data.max_shapes,
    )


def is_embedded(cfg: Any) -> bool:
    """Whether the run is on the embedded benchmark: it is meant to be, and names no file of its own."""
    return cfg.data.source == "embedded" and cfg.train.path is None and cfg.meta.path is None


def training_data(cfg: Any, model: Model) -> TrainingData:
    """Reads and checks every row of every data set of the run.

    Raises:
      InputError: the first row, image or field that cannot be used.
    """
    encode = encoder(cfg, model)
    if is_embedded(cfg):
        splits = noisy_steps.make(cfg.seed, noisy_steps.Sizes(**cfg.noisy_steps))
        test = [example for question in splits.test for example in question.examples]
        meta, apart = _parted(cfg, encode(splits.meta, outcome_targets=True))
        cold_start, train = encode([*splits.pretrain, *splits.cold_start]), encode(splits.train)
        pretrain = None
        if cfg.pretrain.num_steps:
            pretrain = first_rows(cold_start, len(splits.pretrain), cfg.data.max_shapes)
        return TrainingData(pretrain, cold_start, train, meta, tuple(splits.test), encode(test), apart)
    train = encode(read_file(cfg.train, "train"), soft_labels=cfg.soft_labels)
    meta = apart = None
    needs_meta = cfg.weighting.name != "uniform" or cfg.meta.held_out
    if cfg.num_steps and (needs_meta or cfg.meta.path is not None):
        meta = encode(read_file(cfg.meta, "meta", outcome_required=True), outcome_targets=True)
        meta, apart = _parted(cfg, meta)
        train, meta = with_shapes([train, meta], cfg.data.max_shapes)
    return TrainingData(None, train, train, meta, (), None, apart)


def _parted(cfg: Any, meta: Dataset) -> tuple[Dataset, Dataset | None]:
    """What the steps see of the meta set, and what is held out."""
    if not (cfg.meta.held_out and cfg.num_steps):
        return meta, None
    return held_out.part(meta, cfg.meta.held_out, cfg.seed, cfg.data.max_shapes)


def plan_of(cfg: Any, stream: str, dataset: Dataset) -> batches.Plan:
    """The rows of every batch of a data stream: "pretrain", "cold_start", "train" or "meta".

    The cold start of a file run is on the training rows, in their order; each stream has a seed of its own.
    """
    path = cfg["meta" if stream == "meta" else "train"].order
    if stream in SUPERVISED and is_embedded(cfg):
        path = None  # they have rows of their own
    sizes = {  # of a batch, and their number
        "pretrain": (cfg.pretrain.batch_size, cfg.pretrain.num_steps),
        "cold_start": (cfg.cold_start.batch_size, cfg.cold_start.num_steps),
        "train": (cfg.batch_size * cfg.num_inner_steps, cfg.num_steps),
        "meta": (cfg.meta_batch_size, cfg.num_steps),
    }
    batch_size, num_batches = sizes[stream]
    return batches.make_plan(
        dataset,
        batch_size=batch_size,
        num_batches=num_batches,
        seed=len(sizes) * cfg.seed + list(sizes).index(stream),
        order=None if path is None else batches.read_order(path, dataset),
    )


def stream_of(cfg: Any, stream: str, dataset: Dataset, share: Share = WHOLE) -> Callable[[int], Iterator[Batch]]:
    """What opens a data stream (`plan_of`) at the batch of a step, for the rows that this process reads."""
    return partial(
        batches.training_batches,
        dataset,
        plan_of(cfg, stream, dataset),
        num_inner_steps=cfg.num_inner_steps if stream == "train" else 1,
        reading=reading(cfg),
        share=share,
    )


def shapes_met(cfg: Any, datasets: dict[str, Dataset]) -> Callable[[int], Iterator[tuple[Shape, ...]]]:
    """What tells the padded shapes that the batches of several data streams, by name, have together from a step on."""
    streams = [(dataset, plan_of(cfg, stream, dataset)) for stream, dataset in datasets.items()]
    return partial(batches.shapes_met, streams)


def instance_weighting(cfg: Any, train: Dataset, model: Model) -> weighting.Weighting:
    """The weighting that the config names, started from `weighting.init` where that is given.

    Raises:
      InputError: a row without a domain, or an init file that does not fit.
    """
    chosen = cfg.weighting
    if chosen.name == "uniform":
        return weighting.uniform()
    if chosen.name == "table":
        made = weighting.instance_table(table_length(len(train)), chosen.activation, chosen.minimum, chosen.maximum)
    elif chosen.name == "domain":
        domains = domain_names(train)
        numbers = {name: number for number, name in enumerate(domains)}
        # A row that is skipped has no domain and is never looked up.
        made = weighting.domain_table([numbers.get(name, 0) for name in train.domains], len(domains))
    else:
        widths = {"label_probs": 2, "hidden": model.config.language.width}
        num_inputs = sum(widths.get(feature, 1) for feature in chosen.features)
        key = jax.random.key(cfg.seed)
        made = weighting.instance_net(
            chosen.features, num_inputs, chosen.activation, key, chosen.hidden, chosen.zero_output, chosen.steps
        )
    if chosen.init is None:
        return made
    fresh = made.init()
    read = read_meta_params(chosen.init, trimmed(fresh, len(train)))
    # Only a table that was rounded up is longer than what a file holds of it.
    meta_params = made.project({name: fresh[name].at[: len(leaf)].set(leaf) for name, leaf in read.items()})
    return made._replace(init=lambda: meta_params)


def trimmed(meta_params: PyTree, num_rows: int) -> PyTree:
    """What is kept of meta_params: of a table that was rounded up (`sharding.table_length`) the rows' entries."""
    rounded = table_length(num_rows)
    is_rounded = {name: name == "table" and len(leaf) == rounded for name, leaf in meta_params.items()}
    return {name: leaf[:num_rows] if is_rounded[name] else leaf for name, leaf in meta_params.items()}


def domain_names(train: Dataset) -> list[str]:
    """The training rows' sources, sorted: the order of the domain table.

    Raises:
      InputError: a row that names none.
    """
    for row in train.rows:
        if train.domains[row] is None:
            place = train.examples[row].place
            raise InputError(f'{place}: "dataset" is missing; weighting.name=domain needs every row\'s source')
    return sorted({train.domains[row] for row in train.rows})


def read_meta_params(path: str, shapes: PyTree) -> PyTree:
    """Initial meta_params from a safetensors file.

    Raises:
      InputError: the file's tensors are not those of `shapes`, by name and shape.
    """
    wanted = {name: leaf.shape for name, leaf in shapes.items()}
    tensors = convert.read_tensors(Path(path), wanted, "(weighting.init)")
    for name, tensor in tensors.items():
        bad = np.argwhere(~np.isfinite(tensor))
        if len(bad):
            place = tuple(int(i) for i in bad[0])
            raise InputError(
                f"{path}: {name}{list(place)} is {tensor[place]}; every value must be finite (weighting.init)"
            )
    return {name: jnp.asarray(tensor, jnp.float32) for name, tensor in tensors.items()}


def prm_problem(cfg: Any, model: Model, weights: Any, inner_tx: Any, frozen: PyTree = None) -> Problem:
    """The bilevel problem of a process reward model; docs/bilevel.md has the objective and both meta targets.

    `frozen`: parameters beside those that the problem's functions are given, such as a jitted step's own argument;
    None: there are none.
    """
    aggregate, meta_loss = losses.AGGREGATIONS[cfg.aggregate], losses.META_LOSSES[cfg.meta_loss]
    plus, minus = model.tokenizer.plus_id, model.tokenizer.minus_id
    as_torch = cfg.vocabulary_sum == "torch_cpu" and jax.default_backend() == "cpu"
    over_vocabulary = losses.log_sum_exp_as_torch if as_torch else losses.log_sum_exp
    is_net = cfg.weighting.name == "net"
    needed = weighting.outputs_read(cfg.weighting.features, cfg.weighting.steps) if is_net else set()

    def step_losses(params: PyTree, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        params = trained.merge(params, frozen)
        hidden = internvl.step_hidden_states(model.config, params, batch)
        logits = internvl.head(model.config, params, hidden)
        if batch.soft_labels is None:
            log_probs = losses.label_log_probs(logits, batch.labels, over_vocabulary)
        else:
            log_probs = losses.soft_label_log_probs(logits, batch.soft_labels, plus, minus, over_vocabulary)
        outputs = {}
        if "label_logits" in needed:
            outputs["label_logits"] = jnp.stack([logits[..., plus], logits[..., minus]], axis=-1)
        if "step_losses" in needed:
            outputs["step_losses"] = -log_probs
        if "label_is_plus" in needed:
            outputs["label_is_plus"] = (batch.labels == plus).astype(jnp.float32)
        if "hidden" in needed:
            outputs["hidden"] = hidden.astype(jnp.float32)
        return losses.example_losses(log_probs, batch.step_mask, cfg.step_loss), outputs

    def outcome_loss(params: PyTree, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        params = trained.merge(params, frozen)
        logits = internvl.apply(model.config, params, batch)
        if cfg.meta_target == "both":
            # [B, S], of "+" or "-" by outcome
            probabilities = jnp.exp(losses.label_log_probs(logits, batch.labels, over_vocabulary))
            response_score = aggregate(probabilities, batch.step_mask)  # [B]
        else:
            score = aggregate(losses.step_scores(logits, plus), batch.step_mask)  # [B]
            response_score = jnp.where(batch.labels[:, 0] == plus, score, 1.0 - score)
        loss = losses.masked_mean(meta_loss(response_score), batch.example_mask)
        return loss, {"meta_prediction": losses.masked_mean(response_score, batch.example_mask)}

    size, mesh = cfg.meta_micro_batch_size, model.config.mesh
    cast = partial(internvl.cast_to_compute, model.config)
    return Problem(
        step_losses,
        weights,
        outcome_loss if size is None else micro_batched(outcome_loss, size * num_row_shards(mesh), cast),
        inner_tx,
        num_inner_steps=cfg.num_inner_steps,
        detached=cfg.weighting.detached,
        example_clip_norm=cfg.inner.clip_norm if cfg.inner.clip_place == "per_example" else None,
        micro_batch_size=cfg.micro_batch_size,
        mesh=mesh,
        cast_to_compute=cast,
    )
