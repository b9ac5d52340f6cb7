"""A workdir belongs to one run: config.json says which. So does a file that a run appends to."""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from dreamprm_jax.errors import InputError
from dreamprm_jax.metrics import write_text

LOCK = "run.lock"
"""The file that the run at work in a workdir holds (`open_alone`)."""

_NOT_COPIED = ("checkpoints", "damaged", "tensorboard", "wandb", "*.tmp")
"""What no process of a run decides by."""


def make_workdir(workdir: Path) -> None:
    """Creates it where it does not exist.

    Raises:
      InputError: it cannot be created.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{workdir}: cannot be written ({error}); give another --workdir") from error


def claim_workdir(
    workdir: Path, record: dict[str, Any], *, resumes: bool = True, force: bool | None = None
) -> list[str]:
    """Makes `workdir` this run's own, or checks that it already is: config.json holds `record`.

    Args:
      workdir: created where it does not exist.
      record: the config, and a fingerprint of each data file.
      resumes: False for a task that keeps nothing to go on from; it may follow itself with another config,
        and only a workdir of another task is refused.
      force: let another config or other data be; nothing is written then (`record_forced`). None: the task has no such
        thing as --config.resume=force.

    Returns:
      What has changed by force, such as "config.inner.lr: 5e-05, now 1e-05".

    Raises:
      InputError: the workdir belongs to a run with another config or other data (names the first difference), holds
        a config.json that no run wrote, or cannot be written.
    """
    path = workdir / "config.json"
    record, differences = json.loads(json.dumps(record)), []
    if path.is_file():
        old = _read_record(path)
        new = record if resumes else {**old, "config": {**old["config"], "task": record["config"]["task"]}}
        differences = list(_differences({name: old[name] for name in ("config", "data")}, new))
        same_task = old["config"].get("task") == record["config"]["task"]
        if differences and not (force and same_task):
            name, was, now = differences[0]
            hint = ", or go on all the same with --config.resume=force" if force is not None and same_task else ""
            raise InputError(
                f"{path}: was begun with {name}={was}, now {name}={now}"
                + (f" (and {len(differences) - 1} more differences)" if len(differences) > 1 else "")
                + f"; give another --workdir, or remove this one to start over{hint}"
            )
        if resumes and differences:
            return [f"{name}: {was}, now {now}" for name, was, now in differences]
        if "forced" in old:
            record["forced"] = old["forced"]
    make_workdir(workdir)
    try:
        write_text(path, json.dumps(record, indent=2))
    except OSError as error:
        raise InputError(f"{workdir}: cannot be written ({error}); give another --workdir") from error
    return []


def record_forced(workdir: Path, record: dict[str, Any], differences: list[str]) -> None:
    """Makes `record` a workdir's own in place of another, whose differences it keeps and tells on stderr."""
    path = workdir / "config.json"
    forced = [*_read_record(path).get("forced", []), differences]
    write_text(path, json.dumps({**record, "forced": forced}, indent=2))
    print(f"{path}: going on by --config.resume=force with {'; '.join(differences)}", file=sys.stderr)


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(record["config"], dict) and isinstance(record["data"], dict):
            return record
    except (OSError, ValueError, TypeError, KeyError):
        pass  # a checkpoint's own config.json, or a damaged file: neither is overwritten
    raise InputError(f"{path}: is not the record of a run; give another --workdir")


def _differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield name, old, new


def check_output(output: Path, input_path: str) -> None:
    """Whether `config.output` can be written, before hours of work; leaves no file where there was none.

    Raises:
      InputError: it cannot, or it is the input file itself.
    """
    if output.resolve() == Path(input_path).resolve():
        raise InputError(f"--config.output={output}: is the input file itself; give another file")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        written = output.exists()
        output.open("a").close()
        if not written:
            output.unlink()  # only now that it is known to be possible
    except OSError as error:
        raise InputError(f"--config.output={output}: cannot be written ({error}); give another file") from error


@contextlib.contextmanager
def files_of_process(workdir: Path, output: str | None = None, *, first: bool) -> Iterator[tuple[Path, Path | None]]:
    """Where this process is to keep the run's files, and its output where it has one.

    Several processes that share a run compute the same and write the same. The files of the first are the run's own;
    each other has a copy of what is there, so that it takes the same decisions, and its copy goes when it ends.
    """
    if first:
        yield workdir, output and Path(output)
        return
    with tempfile.TemporaryDirectory() as folder:
        own, outputs = Path(folder) / "workdir", Path(folder) / "output"  # the output may have any name
        if workdir.is_dir():
            shutil.copytree(workdir, own, ignore=shutil.ignore_patterns(*_NOT_COPIED))
        outputs.mkdir()
        if output is not None and Path(output).is_file():
            shutil.copy(output, outputs)
        yield own, output and outputs / Path(output).name


@contextlib.contextmanager
def open_alone(path: Path) -> Iterator[IO[bytes]]:
    """A file for reading and appending that no other run has open so: two would write every line twice.

    Raises:
      InputError: another run has it, or it cannot be written.
    """
    try:
        opened = path.open("a+b")
    except (PermissionError, IsADirectoryError) as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); give another --workdir") from error
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{path}: another run writes it; wait for it, or give another --workdir") from error
        except OSError:
            pass  # a disk without locks
        yield file
