"""The one place where a model is loaded from wherever it lies.

A workdir keeps its model's config and tokenizer beside the checkpoints, so that it can be loaded alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dreamprm_jax import sharding
from dreamprm_jax.checkpoint import CHECKPOINTS, name_of, reading, scoring_params
from dreamprm_jax.data import noisy_steps
from dreamprm_jax.data.tokens import PRMTokenizer, load_tokenizer, wrap
from dreamprm_jax.documents import is_bomb
from dreamprm_jax.errors import InputError
from dreamprm_jax.metrics import write_text
from dreamprm_jax.models import config_json, convert, hub, internvl, presets, trained
from dreamprm_jax.models.layers import choose_attention
from dreamprm_jax.types import PyTree

MODEL = "model"


class Model(NamedTuple):
    """A process reward model: its shape, its parameters, its tokenizer."""

    config: presets.InternVLConfig
    params: PyTree
    tokenizer: PRMTokenizer


def fingerprint_of_model(checkpoint: str) -> str:
    """What a run keeps to know the model it began from again: a hash of all files that are read of it.

    Args:
      checkpoint: as `load_model` takes it. Of a workdir of ours the checkpoint counts that is loaded.

    Raises:
      InputError: there is none, or it is damaged.
    """
    folder = Path(checkpoint) / CHECKPOINTS
    if not folder.is_dir():
        return convert.fingerprint(checkpoint)
    with reading(Path(checkpoint)) as (_, step):
        loaded = folder / str(step)
    hashes = {}
    for path in sorted((*loaded.rglob("*"), Path(checkpoint) / MODEL / "config.json")):
        if path.is_file():
            with path.open("rb") as file:
                hashes[str(path.relative_to(checkpoint))] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


def save_model_card(workdir: Path, config: presets.InternVLConfig, tokenizer: PRMTokenizer) -> None:
    """Keeps the model's config and tokenizer beside the checkpoints, so that the workdir can be loaded alone."""
    (workdir / MODEL).mkdir(parents=True, exist_ok=True)
    write_text(workdir / MODEL / "config.json", config_json.config_to_json(config, "original"))
    write_text(workdir / MODEL / "tokenizer.json", tokenizer.tokenizer.to_str())


def load_model(cfg: Any, seed: int, forward_mode: bool = False, mesh: Mesh | None = None) -> Model:
    """Loads what `cfg` (the config's `model`) names, and applies its compute settings.

    Args:
      cfg: `checkpoint` is a directory in either InternVL layout, a Hub id, a workdir of ours, or None for a
        fresh tiny model with the embedded benchmark's tokenizer; `tokenizer` a directory or a Hub id, where it is not
        beside the weights.
      seed: of fresh parameters.
      forward_mode: whether the model will be pushed forward or differentiated twice: what `attention=auto` may take.
      mesh: devices that it is divided among; None: one.

    Raises:
      InputError: names what is missing or does not fit.
    """
    attention = _attention(cfg, forward_mode)
    if cfg.checkpoint is None:
        tokenizer = wrap(noisy_steps.tokenizer())
        config = presets.tiny(tokenizer.vocab_size)
        # XLA's own generator: the default one takes three times as long to compile for this many arrays.
        params = internvl.init(config, jax.random.key(seed, impl="rbg"))
    elif (Path(cfg.checkpoint) / CHECKPOINTS).is_dir():
        config, params = load_workdir(Path(cfg.checkpoint), mesh)
        tokenizer = load_tokenizer(_tokenizer_directory(cfg.tokenizer) or Path(cfg.checkpoint) / MODEL)
    else:
        if (Path(cfg.checkpoint) / "config.json").is_file():
            _refuse_unsaved_run(Path(cfg.checkpoint))
        directory = hub.checkpoint_directory(cfg.checkpoint)
        tokenizer = load_tokenizer(_tokenizer_directory(cfg.tokenizer) or directory)
        config, params = convert.load_checkpoint(directory)
    if tokenizer.vocab_size > config.language.vocab_size:
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but the model's embedding {config.language.vocab_size} "
            "rows: set model.tokenizer to the checkpoint's own"
        )
    _check_heads(config, mesh)
    config = dataclasses.replace(
        config,
        remat=cfg.remat,
        compute_dtype=cfg.compute_dtype,
        attention=attention,
        scan_unroll=cfg.scan_unroll or config.scan_unroll,
        mesh=mesh,
    )
    params = jax.tree.map(lambda leaf: leaf.astype(cfg.param_dtype), params)
    if cfg.checkpoint is not None:  # before it is on the device; a fresh model is trained as a whole first
        params = trained.as_kept(params, cfg.trained, cfg.compute_dtype)
    return Model(config, sharding.place(mesh, params), tokenizer)


def _tokenizer_directory(source: str | Path | None) -> Path | None:
    """Where `model.tokenizer` lies; a Hub id's tokenizer.json is downloaded, and nothing else of it."""
    return None if source is None else hub.checkpoint_directory(source, ("tokenizer.json",))


def _refuse_unsaved_run(directory: Path) -> None:
    """Raises an InputError where a directory is a workdir of ours, which holds no checkpoint as yet."""
    if {"config", "data"} <= config_json.read_config_json(directory / "config.json").keys():
        raise InputError(
            f"{directory}: a run's workdir without {CHECKPOINTS}/; let the run reach its first save, or give the model "
            "that it was run with"
        )


def _check_heads(config: presets.InternVLConfig, mesh: Mesh | None) -> None:
    """Heads are whole on a device.

    Raises:
      InputError: the mesh's `tensor` does not divide the heads of both towers.
    """
    ways, heads = mesh.shape["tensor"] if mesh else 1, (config.vision.num_heads, config.language.num_heads)
    if any(number % ways for number in heads):
        fitting = [n for n in range(1, min(heads) + 1) if not any(number % n for number in heads)]
        raise InputError(
            f"--config.mesh.tensor={ways}: does not divide the {heads[0]} heads of the vision tower and the {heads[1]} "
            f"of the language model; choose from {', '.join(map(str, fitting))}"
        )


def _attention(cfg: Any, forward_mode: bool) -> str:
    """`attention` of the config's `model`, `auto` resolved; the arguments are those of `load_model`.

    Raises:
      InputError: "cudnn" is asked for where it cannot serve.
    """
    best = choose_attention(cfg.compute_dtype, forward_mode)
    if cfg.attention == "cudnn" and best != "cudnn":
        raise InputError(
            "--config.model.attention=cudnn: needs an NVIDIA GPU (Ampere or later), --config.model.compute_dtype="
            "bfloat16, and an estimator without forward mode (dot, recompute, published_fd); take auto or xla"
        )
    return best if cfg.attention == "auto" else cfg.attention


def load_workdir(workdir: Path, mesh: Mesh | None = None) -> tuple[presets.InternVLConfig, PyTree]:
    """The parameters of a run of ours, whole, whatever of them it trains; on that mesh, whichever it ran on.

    They are those of the best checkpoint where rows are held out, else of the newest.

    Raises:
      InputError: no finished checkpoint in it, one of another model than its config.json says, or the one that is taken
        is damaged.
    """
    config = config_json.config_from_json(workdir / MODEL / "config.json")
    with reading(workdir) as (manager, step):
        check = partial(_check_stored, workdir / CHECKPOINTS / str(step), config)
        return config, scoring_params(manager, step, mesh, check)


def _check_stored(folder: Path, config: presets.InternVLConfig, wanted: tuple[PyTree, PyTree]) -> None:
    """Looks at the shapes (trained, frozen) before memory is taken: an array may be declared without being stored.

    Raises:
      InputError: other parameters than the model's, or more of them than the files can hold.
    """
    leaves = jax.tree_util.tree_leaves_with_path(jax.eval_shape(trained.whole, *wanted))
    found = {name_of(path): leaf for path, leaf in leaves}
    shapes = convert.parameter_shapes(config)
    other = [
        name for name in sorted(found.keys() | shapes) if name not in found or shapes.get(name) != found[name].shape
    ]
    other += [name for name, leaf in found.items() if leaf.dtype not in (jnp.float32, jnp.bfloat16)]
    if other:
        raise InputError(f"{folder}: {other[0]} is not as {MODEL}/config.json has it; give another checkpoint")
    declared = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(wanted))
    stored = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if is_bomb(declared, stored):
        raise InputError(
            f"{folder}: declares parameters of {declared} bytes, but has files of {stored}; give another checkpoint"
        )
