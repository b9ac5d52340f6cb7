"""Orbax checkpoints of a whole run, and the one place where a model is loaded from wherever it lies.

A checkpoint holds the state of both levels and the number of the next step, of which every batch is a function: what
a killed run needs to go on bit for bit. What is frozen is in every one: less than the moments that a whole model would
have, and a checkpoint suffices by itself. A workdir also keeps the model's config and tokenizer, so that it can be
loaded alone.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from orbax.checkpoint import checkpoint_managers

from dreamprm_jax import sharding
from dreamprm_jax.data import noisy_steps
from dreamprm_jax.data.tokens import PRMTokenizer, load_tokenizer, wrap
from dreamprm_jax.errors import InputError
from dreamprm_jax.metrics import write_text
from dreamprm_jax.models import config_json, convert, internvl, presets, trained
from dreamprm_jax.models.layers import choose_attention
from dreamprm_jax.types import BilevelState, PyTree

CHECKPOINTS, MODEL = "checkpoints", "model"


class Snapshot(NamedTuple):
    """What is saved: everything but the config."""

    state: BilevelState
    progress: dict[str, Any]  # JSON: the phase, its next step, seconds so far


class Checkpoints:
    """The checkpoints of one workdir, by the run's step (cold start included)."""

    def __init__(self, workdir: Path, keep: int):
        self._manager = ocp.CheckpointManager(
            (workdir / CHECKPOINTS).absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.LatestN(keep),
                # Saved in place: the next step donates the buffers that a background save would still read.
                enable_async_checkpointing=False,
            ),
        )

    def save(self, step: int, snapshot: Snapshot) -> None:
        """Writes a snapshot, atomically; saving a step again is a no-op."""
        progress = {**snapshot.progress, "averaged": bool(snapshot.state.ema)}  # which parameters score
        arrays = ocp.args.StandardSave(snapshot.state)
        self._manager.save(step, args=ocp.args.Composite(arrays=arrays, progress=ocp.args.JsonSave(progress)))

    def latest_progress(self) -> dict[str, Any] | None:
        """The progress of the newest snapshot; None where there is none."""
        step = self._manager.latest_step()
        if step is None:
            return None
        return self._manager.restore(step, args=ocp.args.Composite(progress=ocp.args.JsonRestore()))["progress"]

    def restore_latest(self, template: BilevelState) -> BilevelState:
        """The newest snapshot's state, shaped and placed as `template` says, arrays or shapes."""
        arrays = ocp.args.StandardRestore(template)
        return self._manager.restore(self._manager.latest_step(), args=ocp.args.Composite(arrays=arrays))["arrays"]

    def close(self) -> None:
        """Waits for what is being written."""
        self._manager.close()


class Model(NamedTuple):
    """A process reward model: its shape, its parameters, its tokenizer."""

    config: presets.InternVLConfig
    params: PyTree
    tokenizer: PRMTokenizer


def save_model_card(workdir: Path, config: presets.InternVLConfig, tokenizer: PRMTokenizer) -> None:
    """Keeps the model's config and tokenizer beside the checkpoints, so that the workdir can be loaded alone."""
    (workdir / MODEL).mkdir(parents=True, exist_ok=True)
    write_text(workdir / MODEL / "config.json", config_json.config_to_json(config, "original"))
    write_text(workdir / MODEL / "tokenizer.json", tokenizer.tokenizer.to_str())


def load_model(cfg: Any, seed: int, forward_mode: bool = False, mesh: Mesh | None = None) -> Model:
    """Loads what `cfg` (the config's `model`) names, and applies its compute settings.

    Args:
      cfg: `checkpoint` is a directory in either InternVL layout, a Hub id, a workdir of ours, or None for a
        fresh tiny model with the embedded benchmark's tokenizer.
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
        tokenizer = load_tokenizer(cfg.tokenizer or Path(cfg.checkpoint) / MODEL)
    else:
        directory = convert.checkpoint_directory(cfg.checkpoint)
        tokenizer = load_tokenizer(cfg.tokenizer or directory)
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
    """The newest parameters of a run of ours, whole, whatever of them it trains; on that mesh, whichever it ran on.

    Raises:
      InputError: no finished checkpoint in it.
    """
    config = config_json.config_from_json(workdir / MODEL / "config.json")
    handlers = {"arrays": ocp.PyTreeCheckpointHandler(), "progress": ocp.JsonCheckpointHandler()}
    with ocp.CheckpointManager((workdir / CHECKPOINTS).absolute(), item_handlers=handlers) as manager:
        step = manager.latest_step()
        if step is None:
            raise InputError(f"{workdir / CHECKPOINTS}: holds no finished checkpoint; let the run reach its first save")
        # Only the parameters that score: moments and table of a 1B run are three times their size.
        progress = manager.restore(step, args=ocp.args.Composite(progress=ocp.args.JsonRestore()))["progress"]
        averaged = progress.get("averaged", False)
        saved = manager.item_metadata(step)["arrays"].tree
        moved = {"ema": saved["ema"]} if averaged else {"train": {"params": saved["train"]["params"]}}
        wanted = sharding.shapes(mesh, {**moved, "frozen": saved.get("frozen", {})})
        arguments = ocp.checkpoint_utils.construct_restore_args(wanted)
        restore = ocp.args.PyTreeRestore(wanted, restore_args=arguments, partial_restore=True)
        arrays = manager.restore(step, args=ocp.args.Composite(arrays=restore))["arrays"]
    return config, trained.whole(arrays["ema"] if averaged else arrays["train"]["params"], arrays["frozen"])
