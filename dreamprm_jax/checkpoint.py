"""Orbax checkpoints of a whole run, and the one place where a model is loaded from wherever it lies.

A checkpoint holds the state of both levels and the number of the next step, of which every batch is a function: what
a killed run needs to go on bit for bit. What is frozen is in every one: less than the moments that a whole model would
have, and a checkpoint suffices by itself. It also holds a sum over each array's bits, by which what is read is known to
be what was saved. A workdir also keeps the model's config and tokenizer, so that it can be loaded alone.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from orbax.checkpoint import checkpoint_managers

from dreamprm_jax import sharding
from dreamprm_jax.data import noisy_steps
from dreamprm_jax.data.tokens import PRMTokenizer, load_tokenizer, wrap
from dreamprm_jax.documents import is_bomb
from dreamprm_jax.errors import InputError
from dreamprm_jax.metrics import write_text
from dreamprm_jax.models import config_json, convert, hub, internvl, presets, trained
from dreamprm_jax.models.layers import choose_attention
from dreamprm_jax.programs import is_out_of_memory
from dreamprm_jax.types import BilevelState, PyTree

CHECKPOINTS, MODEL, DAMAGED = "checkpoints", "model", "damaged"
_SHOWN = 200  # characters of what a library says of a damaged file


class Snapshot(NamedTuple):
    """What is saved: everything but the config."""

    state: BilevelState
    progress: dict[str, Any]  # JSON: the phase, its next step, seconds so far


class Damaged(Exception):
    """A checkpoint is not what was saved; it has been set aside, so that the run can go on from the one before."""


class Checkpoints:
    """The checkpoints of one workdir, by the run's step (cold start included).

    They are written in the background, and have their name once they are whole: a kill at any moment leaves those that
    were there. Errors of a background write are raised by the next call.
    """

    def __init__(self, workdir: Path, keep: int):
        self._workdir, self._folder = workdir, (workdir / CHECKPOINTS).absolute()
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(preservation_policy=checkpoint_managers.LatestN(keep)),
            item_handlers={"arrays": ocp.StandardCheckpointHandler(), "progress": ocp.JsonCheckpointHandler()},
        )

    def save(self, step: int, snapshot: Snapshot) -> None:
        """Copies a snapshot to the host, and writes it from there; saving a step again is a no-op.

        Raises:
          InputError: the disk has no room for it, or had none for the one before.
        """
        with self._told_when_full():
            if step == self._manager.latest_step():
                return
            self.check_room(snapshot.state)
            progress = {
                **snapshot.progress,
                "averaged": bool(snapshot.state.ema),  # which parameters score
                "sums": bit_sums(snapshot.state),
            }
            arrays = ocp.args.StandardSave(snapshot.state)
            self._manager.save(step, args=ocp.args.Composite(arrays=arrays, progress=ocp.args.JsonSave(progress)))

    def check_room(self, state: BilevelState) -> None:
        """Whether the disk has room for one more checkpoint.

        Raises:
          InputError: it does not; says how much is missing.
        """
        self._manager.wait_until_finished()  # an earlier one may still be growing, or about to go
        needed, free = sum(leaf.nbytes for leaf in jax.tree.leaves(state)), shutil.disk_usage(self._workdir).free
        if free < needed:
            raise InputError(
                f"{self._folder}: a checkpoint takes {_size(needed)} and the disk has {_size(free)} left; "
                + self._goes_on()
            )

    def latest(self) -> Path | None:
        """The newest one's folder."""
        self._manager.wait_until_finished()
        step = self._manager.latest_step()
        return None if step is None else self._folder / str(step)

    def latest_progress(self) -> dict[str, Any] | None:
        """The progress of the newest snapshot; None where there is none.

        Raises:
          Damaged: it cannot be read.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        with self._set_aside_if_damaged(step):
            arguments = ocp.args.Composite(progress=ocp.args.JsonRestore())
            progress = self._manager.restore(step, args=arguments)["progress"]
            return {name: progress[name] for name in ("phase", "next_step", "seconds", "sums")}

    def restore_latest(self, template: BilevelState, sums: dict[str, int]) -> BilevelState:
        """The newest snapshot's state, shaped and placed as `template` says, arrays or shapes.

        Raises:
          Damaged: it cannot be read, or its arrays do not add up to `sums`, those of its progress.
          InputError: it is whole, and its arrays have other names or shapes: of a run with another config.
        """
        step = self._manager.latest_step()
        with self._set_aside_if_damaged(step):
            _check_shapes(self._folder / str(step), self._manager.item_metadata(step)["arrays"].tree, template)
            arrays = ocp.args.StandardRestore(template)
            state = self._manager.restore(step, args=ocp.args.Composite(arrays=arrays))["arrays"]
            check_sums(state, sums)
            return state

    def close(self) -> None:
        """Waits for what is being written.

        Raises:
          InputError: the disk had no room for it.
        """
        with self._told_when_full():
            self._manager.close()

    @contextmanager
    def _set_aside_if_damaged(self, step: int) -> Iterator[None]:
        try:
            yield
        except (InputError, PermissionError):
            raise
        except Exception as error:  # whatever a reader makes of bytes that nobody wrote
            if is_out_of_memory(error) or is_full(error):
                raise
            damaged, kept = self._folder / str(step), self._workdir / DAMAGED / str(step)
            if sharding.is_first():
                kept.parent.mkdir(exist_ok=True)
                shutil.rmtree(kept, ignore_errors=True)
                damaged.rename(kept)
            sharding.meet(f"damaged {step}")
            raise Damaged(f"{damaged}: is damaged ({_line_of(error)}), and now in {kept}") from error

    @contextmanager
    def _told_when_full(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not is_full(error):
                raise
            raise InputError(f"{self._folder}: the disk is full; {self._goes_on()}") from error

    def _goes_on(self) -> str:
        step = self._manager.latest_step()
        return "free some space, and the same command goes on from " + (
            "the beginning" if step is None else f"step {step}, the last one saved"
        )


def is_full(error: BaseException) -> bool:
    """Whether a disk or a quota had no room, as the system says it or as text in a library's error."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT))


def bit_sums(tree: PyTree) -> dict[str, int]:
    """The sum of each leaf's bits, by its path, in 32 bits: no matter how the leaf is divided among devices.

    Each entry counts by its place, so that two that have changed places are told, and by an odd number, so that no
    change of a single one goes unseen.
    """
    leaves = {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    return {name: int(total) for name, total in jax.device_get(_sums_of(leaves)).items()}


@jax.jit
def _sums_of(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    def total(leaf: jax.Array) -> jax.Array:
        width = min(leaf.dtype.itemsize, 4)
        bits = jax.lax.bitcast_convert_type(leaf, f"uint{8 * width}").astype(jnp.uint32)
        place = jnp.zeros(bits.shape, jnp.uint32)
        for axis, size in enumerate(bits.shape):
            place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)

    return jax.tree.map(total, leaves)


def check_sums(tree: PyTree, sums: dict[str, int]) -> None:
    """Whether all leaves are those that `sums` is of.

    Raises:
      ValueError: names the first that is not.
    """
    wrong = [name for name, found in bit_sums(tree).items() if sums.get(name) != found]
    if wrong:
        raise ValueError(f"{wrong[0]} is not what was saved, {len(wrong)} of {len(sums)} arrays are not")


def _check_shapes(folder: Path, saved: PyTree, template: PyTree) -> None:
    found, wanted = (
        {_name(path): (tuple(leaf.shape), str(jnp.dtype(leaf.dtype))) for path, leaf in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (saved, template))
    )
    for name in sorted({*found, *wanted}):
        if found.get(name) != wanted.get(name):
            raise InputError(
                f"{folder}: {name} is {found.get(name, 'missing')} there, by the config {wanted.get(name, 'missing')}: "
                "what is trained, averaged or counted cannot change within a run; give another --workdir"
            )


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _line_of(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:_SHOWN]}"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**28 else f"{num_bytes / 2**20:.1f} MiB"


class Model(NamedTuple):
    """A process reward model: its shape, its parameters, its tokenizer."""

    config: presets.InternVLConfig
    params: PyTree
    tokenizer: PRMTokenizer


def fingerprint_of_model(checkpoint: str) -> str:
    """What a run keeps to know the model it began from again: a hash of all files that are read of it.

    Args:
      checkpoint: as `load_model` takes it. Of a workdir of ours its newest checkpoint counts.

    Raises:
      InputError: there is none.
    """
    folder = Path(checkpoint) / CHECKPOINTS
    if not folder.is_dir():
        return convert.fingerprint(checkpoint)
    steps = [path for path in folder.iterdir() if path.name.isdecimal()]
    if not steps:
        raise InputError(f"{folder}: holds no finished checkpoint; let the run reach its first save")
    newest = max(steps, key=lambda path: int(path.name))
    hashes = {}
    for path in sorted((*newest.rglob("*"), Path(checkpoint) / MODEL / "config.json")):
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
    """The newest parameters of a run of ours, whole, whatever of them it trains; on that mesh, whichever it ran on.

    Raises:
      InputError: no finished checkpoint in it, a damaged one, or one of another model than its config.json says.
    """
    config = config_json.config_from_json(workdir / MODEL / "config.json")
    with _reading(workdir) as (manager, step):
        return config, _scoring_params(manager, workdir / CHECKPOINTS / str(step), config, mesh)


def _scoring_params(
    manager: ocp.CheckpointManager, folder: Path, config: presets.InternVLConfig, mesh: Mesh | None
) -> PyTree:
    """Of a checkpoint only the parameters that score: moments and table of a 1B run are three times their size."""
    step = int(folder.name)
    progress = manager.restore(step, args=ocp.args.Composite(progress=ocp.args.JsonRestore()))["progress"]
    averaged, saved = progress["averaged"], manager.item_metadata(step)["arrays"].tree
    moved = {"ema": saved["ema"]} if averaged else {"train": {"params": saved["train"]["params"]}}
    wanted = sharding.shapes(mesh, {**moved, "frozen": saved["frozen"]})
    part = lambda tree: tree["ema"] if averaged else tree["train"]["params"]  # noqa: E731
    _check_stored(folder, config, wanted, jax.eval_shape(trained.whole, part(wanted), wanted["frozen"]))
    arguments = ocp.checkpoint_utils.construct_restore_args(wanted)
    restore = ocp.args.PyTreeRestore(wanted, restore_args=arguments, partial_restore=True)
    arrays = manager.restore(step, args=ocp.args.Composite(arrays=restore))["arrays"]
    check_sums(arrays, progress["sums"])
    return trained.whole(part(arrays), arrays["frozen"])


def saved_progress(workdir: Path) -> dict[str, Any]:
    """What a run's newest checkpoint says of itself: `step` of the run, its `phase`, `next_step` there, `averaged`.

    Raises:
      InputError: no finished checkpoint in it, or the newest is damaged.
    """
    with _reading(workdir) as (manager, step):
        progress = manager.restore(step, args=ocp.args.Composite(progress=ocp.args.JsonRestore()))["progress"]
        return {name: progress[name] for name in ("phase", "next_step", "averaged")} | {"step": step}


@contextmanager
def _reading(workdir: Path) -> Iterator[tuple[ocp.CheckpointManager, int]]:
    """The checkpoints of a run that is over or elsewhere, and the newest one's step."""
    folder = workdir / CHECKPOINTS
    handlers = {"arrays": ocp.PyTreeCheckpointHandler(), "progress": ocp.JsonCheckpointHandler()}
    try:
        with ocp.CheckpointManager(folder.absolute(), item_handlers=handlers) as manager:
            step = manager.latest_step()
            if step is None:
                raise InputError(f"{folder}: holds no finished checkpoint; let the run reach its first save")
            folder = folder / str(step)
            yield manager, step
    except InputError:
        raise
    except Exception as error:  # Orbax and TensorStore raise errors of many types on damaged files
        if is_out_of_memory(error):
            raise
        raise InputError(
            f"{folder}: is damaged ({_line_of(error)}); the command of its run sets it aside and goes on from the one "
            "before"
        ) from error


def _check_stored(folder: Path, config: presets.InternVLConfig, wanted: PyTree, whole: PyTree) -> None:
    """Looks at the shapes before memory is taken for them: an array may be declared without being stored.

    Raises:
      InputError: other parameters than the model's, or more of them than the files can hold.
    """
    leaves = jax.tree_util.tree_leaves_with_path(whole)
    found = {_name(path): leaf for path, leaf in leaves}
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
