"""Where a run's numbers go: metrics.jsonl, TensorBoard, a progress bar on stderr, and Weights & Biases if asked."""

from __future__ import annotations

import json
import math
import os
import secrets
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from dreamprm_jax.errors import InputError

METRICS_FILE, SKIPPED_FILE, HELD_OUT_FILE = "metrics.jsonl", "skipped_steps.jsonl", "held_out.jsonl"
WANDB_FILE = "wandb_id"


def to_json(value: Any) -> Any:
    """Arrays and numpy scalars as plain lists and numbers, in any nesting."""
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else value


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all: a kill in between leaves the old one."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """As `write_text`, for what is no text."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())  # a power cut must not leave the new name with nothing in it
    os.replace(temporary, path)


def write_json_lines(path: Path, rows: list[dict]) -> None:
    """One JSON object per line, all or nothing."""
    write_text(path, "".join(json.dumps(to_json(row)) + "\n" for row in rows))


def read_json_lines(path: Path) -> list[dict]:
    """The rows of a file of JSON lines; a last line cut off by a kill is left out."""
    return [
        json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")
    ]


def without_infinities(value: Any) -> Any:
    """Numbers that are not finite as None, in any nesting: JSON has no word for them."""
    if isinstance(value, dict):
        return {key: without_infinities(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_infinities(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(workdir: Path) -> list[dict]:
    """The lines of metrics.jsonl whose step was applied, none before there is one."""
    return [row for row in _all_metrics(workdir) if row.get("applied", True)]


def _all_metrics(workdir: Path) -> list[dict]:
    path = workdir / METRICS_FILE
    return read_json_lines(path) if path.is_file() else []


class Wandb(NamedTuple):
    """What a run at Weights & Biases is begun with."""

    project: str
    mode: str  # online | offline
    config: dict[str, Any]  # shown beside the run


class MetricsWriter:
    """Writes each step once: on resuming, lines at or after `first_step` are taken back first.

    Steps that were not applied also have a line in skipped_steps.jsonl (`skipped_path`), which is there once one was.
    Held-out losses are in held_out.jsonl, by their checkpoint's number, which is that of the step to come.
    `wandb`: also to Weights & Biases, None: not. It is to be installed (`check_wandb`).

    Raises:
      InputError: nobody is logged in there.
    """

    def __init__(self, workdir: Path, first_step: int, num_steps: int, wandb: Wandb | None = None):
        from tensorboardX import SummaryWriter  # loads PyTorch where that is installed: a second or two

        rows = _all_metrics(workdir)
        kept = [row for row in rows if row["step"] < first_step]
        # Before lines are taken back: they are what tells which steps were sent.
        self._wandb = wandb and _WandbRun(wandb, workdir, rows, kept)
        write_json_lines(workdir / METRICS_FILE, kept)
        self.skipped_path = workdir / SKIPPED_FILE
        if self.skipped_path.is_file():
            skipped = [row for row in read_json_lines(self.skipped_path) if row["step"] < first_step]
            write_json_lines(self.skipped_path, skipped)
        self._held_out_path = workdir / HELD_OUT_FILE
        if self._held_out_path.is_file():
            measured = [row for row in read_json_lines(self._held_out_path) if row["step"] <= first_step]
            write_json_lines(self._held_out_path, measured)
        self._lines = (workdir / METRICS_FILE).open("a", encoding="utf-8")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step)
        self._steps_left = num_steps - first_step
        self._bar = tqdm(
            total=num_steps, initial=first_step, unit="step", dynamic_ncols=True, file=sys.stderr,
            mininterval=1.0 if sys.stderr.isatty() else 15.0,
        )  # fmt: skip

    def advance(self, phase: str, losses: dict[str, float]) -> None:
        """Moves the progress bar by one step; it shows the losses and the rate."""
        self._steps_left -= 1
        self._bar.set_description(phase, refresh=False)
        self._bar.set_postfix({name: f"{value:.4f}" for name, value in losses.items()}, refresh=False)
        self._bar.update()

    def write(self, row: dict[str, Any]) -> None:
        """One flushed line, and the row's plain numbers to TensorBoard and Weights & Biases."""
        row = without_infinities(to_json(row))
        self._lines.write(json.dumps(row) + "\n")
        self._lines.flush()
        if self._board_lives():
            for name, value in _scalars(row).items():
                self._board.add_scalar(name, value, row["step"])
            if "instance_weights" in row and row.get("applied", True):
                self._board.add_histogram("instance_weights", np.asarray(row["instance_weights"]), row["step"])
        if self._wandb:
            self._wandb.write(row)

    def write_skipped(self, row: dict[str, Any]) -> None:
        """A step that was not applied: one flushed line, and a word on stderr."""
        with self.skipped_path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")
        self._bar.write(f"not applied, since not finite: {row}", file=sys.stderr)

    def write_held_out(self, phase: str, step: int, loss: float, num_rows: int) -> None:
        """The held-out loss of the checkpoint `step`: one line, which the disk has, and a number to TensorBoard."""
        with self._held_out_path.open("a", encoding="utf-8") as lines:
            row = without_infinities({"step": step, "held_out_loss": loss, "num_rows": num_rows})
            lines.write(json.dumps(row) + "\n")
            lines.flush()
            os.fsync(lines.fileno())
        # Where its last step's numbers are: what begins at the checkpoint's own is purged when the run goes on from it.
        if self._board_lives():
            self._board.add_scalar(f"{phase}/held_out_loss", loss, step - 1)

    def _board_lives(self) -> bool:
        """Whether TensorBoard's file is still written: its thread ends at a full disk, and then whoever hands it more
        would wait for good."""
        return self._board.file_writer.event_writer._worker.is_alive()

    def sync(self) -> None:
        """Waits until the disk has all lines."""
        os.fsync(self._lines.fileno())

    def close(self) -> None:
        """Flushes and closes everything."""
        self._lines.close()
        if self._board_lives():
            self._board.close()
        self._bar.close()
        if self._wandb:
            self._wandb.close(finished=self._steps_left == 0)


def _scalars(row: dict[str, Any]) -> dict[str, float]:
    """A line's plain numbers, by phase and name."""
    is_number = lambda value: isinstance(value, (int, float)) and not isinstance(value, bool)  # noqa: E731
    return {f"{row['phase']}/{name}": value for name, value in row.items() if name != "step" and is_number(value)}


# --- Weights & Biases. What goes wrong there is told and never ends a training.

_UPLOAD_SECONDS = 120.0  # that the end of a run waits for; what is left stays in the workdir


def check_wandb() -> None:
    """Whether Weights & Biases is installed, before hours of work.

    Raises:
      InputError: it is not.
    """
    try:
        from wandb import init  # noqa: F401 - a folder called wandb can be imported, but has no init
    except ImportError as error:
        raise InputError(
            f"--config.wandb.project: the package wandb cannot be imported ({error}); pip install -r "
            "requirements-wandb.txt, or leave the flag out"
        ) from error


class _WandbRun:
    """One run there for a workdir, whatever the number of kills, and each step once.

    The workdir keeps the run's id, with its project. A line of metrics.jsonl is written before it is sent, so what the
    file held when this process began has been sent; where the run there is new, none of it has.
    """

    def __init__(self, wandb: Wandb, workdir: Path, rows: list[dict], kept: list[dict]):
        path = workdir / WANDB_FILE
        project, _, run_id = path.read_text(encoding="utf-8").rpartition("/") if path.is_file() else ("", "", "")
        is_new = project != wandb.project
        run_id = secrets.token_hex(4) if is_new else run_id
        self._run = _open_wandb(wandb, workdir, run_id)
        sent = 0 if is_new or not rows else rows[-1]["step"] + 1
        self._next_step = max(sent, self._run.starting_step)
        for row in kept:
            self.write(row)
        write_text(path, f"{wandb.project}/{run_id}")  # last: a kill before begins another run, with all lines

    def write(self, row: dict[str, Any]) -> None:
        """Sends a line of metrics.jsonl, unless its step has been sent."""
        if row["step"] < self._next_step or self._run is None:
            return
        self._next_step = row["step"] + 1
        from wandb import Histogram

        try:
            values = _scalars(row)
            if "instance_weights" in row and row.get("applied", True):
                values["instance_weights"] = Histogram(row["instance_weights"])
            self._run.log(values, step=row["step"], commit=True)
        except Exception as error:
            self._give_up(error)

    def close(self, *, finished: bool) -> None:
        """Waits for what is on its way; a run that is not finished counts as failed there until it goes on."""
        try:
            if self._run is not None:
                self._run.finish(exit_code=0 if finished else 1)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        print(f"wandb: {error}; this process sends no more, {METRICS_FILE} goes on", file=sys.stderr)
        self._run = None


def _open_wandb(wandb: Wandb, workdir: Path, run_id: str) -> Any:
    from wandb import Settings, errors, init, teardown

    # Nothing but numbers, config and the machine's load: no console, no code, no git remote, which may hold a token.
    settings = Settings(console="off", disable_code=True, disable_git=True, finish_timeout=_UPLOAD_SECONDS)
    begin = partial(
        init, project=wandb.project, id=run_id, name=workdir.name, group=workdir.resolve().parent.name,
        dir=str(workdir), config=wandb.config, settings=settings,
    )  # fmt: skip
    if wandb.mode == "offline":
        return begin(mode="offline")
    try:
        return begin(mode="online", resume="allow")
    except (errors.AuthenticationError, errors.UsageError) as error:
        raise InputError(
            f"--config.wandb.project={wandb.project}: {error}; run `wandb login`, or set --config.wandb.mode=offline"
        ) from error
    except errors.Error as error:
        print(f"wandb: {error}; offline, `wandb sync` sends {workdir / 'wandb'} later", file=sys.stderr)
        teardown()  # the attempt holds the run's id
        return begin(mode="offline")
