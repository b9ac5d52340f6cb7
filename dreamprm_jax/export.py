"""`task=export`: a model from wherever it lies -> a directory that others load, and a repository of the Hub.

The directory is written beside its place and renamed when it is whole: a full disk or a kill leaves what was there. It
replaces what an earlier export wrote, file by file the same as then, and nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from dreamprm_jax import upload
from dreamprm_jax.errors import InputError
from dreamprm_jax.loading import Model, load_model
from dreamprm_jax.metrics import write_text
from dreamprm_jax.model_card import Source, model_card, read_source
from dreamprm_jax.models import convert
from dreamprm_jax.transformers_files import companion_files
from dreamprm_jax.weight_files import write_weights
from dreamprm_jax.workdir import open_alone

RECORD = upload.RECORD
"""What tells a directory of ours: the source, the options, and the sha256 of every other file."""


def run_export(cfg: Any, workdir: Path) -> dict[str, Any]:
    """Exports the model that the config's `model` names.

    Args:
      cfg: its `model`, `export`, `images.max_tiles` and `output` are read.
      workdir: the directory, where `output` is None.

    Returns:
      directory, layout, dtype, number of files and bytes, and `hub` after an upload.

    Raises:
      InputError: no checkpoint there, a directory that is not ours, a full disk, an upload that failed.
    """
    if cfg.model.checkpoint is None:
        raise InputError("--config.model.checkpoint is missing: give a run's workdir, a checkpoint or a Hub id")
    directory = Path(os.path.abspath(cfg.output or workdir))  # a link stays one
    _settle(directory)
    _check_replaceable(directory, cfg.model.checkpoint)
    if cfg.export.repo is not None:
        upload.check_token()
    source = read_source(cfg.model.checkpoint)
    model = load_model(cfg.model, cfg.seed)
    with _full_disk_named(directory), _staged(directory) as (staging, record_file):
        _write(cfg, source, model, staging)
        record = _record(cfg, staging)
        record_file.write(json.dumps(record, indent=2).encode())
    files = record["files"]
    report = {"directory": str(directory), "layout": cfg.export.layout, "dtype": cfg.export.dtype}
    report |= {"files": len(files), "bytes": sum(file["bytes"] for file in files.values())}
    if cfg.export.repo is None:
        return report
    print(f"uploading {directory} to {cfg.export.repo}", file=sys.stderr)
    done = upload.upload(directory, cfg.export.repo, _message(source, cfg), private=cfg.export.private)
    write_text(directory / RECORD, json.dumps({**record, "hub": done}, indent=2))
    return {**report, "hub": done}


def _write(cfg: Any, source: Source, model: Model, directory: Path) -> None:
    """Every file of an export but its record."""
    options, tokenizer = cfg.export, model.tokenizer
    for name, text in companion_files(model.config, tokenizer, options.layout, cfg.images.max_tiles).items():
        (directory / name).write_text(text, encoding="utf-8")
    (directory / "README.md").write_text(
        model_card(source, options, model.config, cfg.images.max_tiles), encoding="utf-8"
    )
    if source.weights:
        write_weights(directory, source.weights)
    convert.save_checkpoint(
        model.config,
        model.params,
        directory,
        layout=options.layout,
        dtype=options.dtype,
        max_shard_bytes=int(options.max_shard_gb * 1e9),
        image_token_id=tokenizer.image_context_id,
    )
    for path in directory.glob("*.safetensors"):  # which its library lets the owner alone read
        shutil.copymode(directory / "README.md", path)


def _record(cfg: Any, directory: Path) -> dict[str, Any]:
    files = {}
    for path in sorted(directory.iterdir()):
        if path.name != RECORD:
            files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    return {"source": cfg.model.checkpoint, "export": cfg.export.to_dict(), "files": files}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _message(source: Source, cfg: Any) -> str:
    """Of the commit."""
    steps = f", step {source.progress['step']}" if source.progress else ""
    return f"{source.name}{steps}: {cfg.export.layout} layout, {cfg.export.dtype}"


# ---- the directory ----


def _beside(directory: Path, what: str) -> Path:
    return directory.with_name(f"{directory.name}.{what}")


def _settle(directory: Path) -> None:
    """Ends what a kill cut short while one export replaced another: the old one is put back, or goes.

    Raises:
      InputError: what has the name of an old export is none.
    """
    aside = _beside(directory, "replaced")
    if not os.path.lexists(aside):
        return
    if not (aside / RECORD).is_file():
        raise InputError(f"{aside}: has the name of an export that is being replaced, and is none; move it away")
    if directory.exists():
        _remove(aside)
    else:
        aside.rename(directory)


def _remove(export: Path) -> None:
    """Removes an export's own files, its record last, and the directory where nothing else is in it."""
    for name in _recorded_files(export / RECORD):
        (export / name).unlink(missing_ok=True)
    (export / RECORD).unlink()
    with contextlib.suppress(OSError):
        export.rmdir()


def _check_replaceable(directory: Path, checkpoint: str) -> None:
    """Checks that an export may take the place of what is there.

    Raises:
      InputError: it is no directory, not an export, one that was changed since, or the checkpoint itself.
    """
    if not os.path.lexists(directory):
        return
    if directory.is_symlink() or not directory.is_dir():
        raise InputError(f"{directory}: is {'a link' if directory.is_symlink() else 'a file'}; give another directory")
    if Path(checkpoint).exists() and Path(checkpoint).samefile(directory):
        raise InputError(f"{directory}: is the checkpoint itself (model.checkpoint); give another directory")
    names = {path.name for path in directory.iterdir()}
    if not names:
        return
    other = "give another --workdir or --config.output, or move it away"
    if RECORD not in names:
        raise InputError(f"{directory}: exists and is not an export ({RECORD} is missing); {other}")
    files = _recorded_files(directory / RECORD)
    for name in sorted(names - {RECORD}):
        path = directory / name
        if name not in files or not path.is_file() or _sha256(path) != files[name]:
            why = "was changed since" if name in files else "was not written by it"
            raise InputError(f"{directory}: an export whose {name} {why}; {other}")


def _recorded_files(path: Path) -> dict[str, str]:
    """The sha256 of each file of an export, by name."""
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        return {Path(name).name: files[name]["sha256"] for name in files}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{path}: is not the record of an export; give another --workdir or --config.output"
        ) from error


@contextlib.contextmanager
def _staged(directory: Path) -> Iterator[tuple[Path, IO[bytes]]]:
    """An empty directory to write an export into, and its record's file; the body over, it takes its place.

    What a killed export left there is cleared; one that is under way is not touched. An error clears it too.
    """
    staging, aside = _beside(directory, "unfinished"), _beside(directory, "replaced")
    try:
        staging.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{staging}: cannot be made ({error.strerror}); give another --workdir") from error
    left = [path for path in staging.iterdir() if path.name != RECORD]
    if left and not (staging / RECORD).is_file():
        raise InputError(f"{staging}: exists and is no export under way; move it away")
    with open_alone(staging / RECORD) as record_file:
        for path in left:
            path.unlink()
        record_file.truncate(0)
        try:
            yield staging, record_file
            record_file.flush()
        except BaseException:
            shutil.rmtree(staging)
            raise
        is_replaced = (directory / RECORD).is_file()
        if is_replaced:
            directory.rename(aside)
        staging.rename(directory)
    if is_replaced:
        _remove(aside)


@contextlib.contextmanager
def _full_disk_named(directory: Path) -> Iterator[None]:
    """A write that fails is the disk's fault, and says what is left."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"{directory}: cannot be written ({reason}); what was there is as it was. Make room, or give another "
            "--workdir or --config.output"
        ) from error
