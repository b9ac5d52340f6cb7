"""Where a run's numbers go: metrics.jsonl, TensorBoard, and a progress bar on stderr."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

METRICS_FILE, SKIPPED_FILE = "metrics.jsonl", "skipped_steps.jsonl"


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


class MetricsWriter:
    """Writes each step once: on resuming, lines at or after `first_step` are taken back first.

    Steps that were not applied also have a line in skipped_steps.jsonl (`skipped_path`), which is there once one was.
    """

    def __init__(self, workdir: Path, first_step: int, num_steps: int):
        from tensorboardX import SummaryWriter  # loads PyTorch where that is installed: a second or two

        kept = [row for row in _all_metrics(workdir) if row["step"] < first_step]
        write_json_lines(workdir / METRICS_FILE, kept)
        self.skipped_path = workdir / SKIPPED_FILE
        if self.skipped_path.is_file():
            skipped = [row for row in read_json_lines(self.skipped_path) if row["step"] < first_step]
            write_json_lines(self.skipped_path, skipped)
        self._lines = (workdir / METRICS_FILE).open("a", encoding="utf-8")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step)
        self._bar = tqdm(
            total=num_steps, initial=first_step, unit="step", dynamic_ncols=True, file=sys.stderr,
            mininterval=1.0 if sys.stderr.isatty() else 15.0,
        )  # fmt: skip

    def advance(self, phase: str, losses: dict[str, float]) -> None:
        """Moves the progress bar by one step; it shows the losses and the rate."""
        self._bar.set_description(phase, refresh=False)
        self._bar.set_postfix({name: f"{value:.4f}" for name, value in losses.items()}, refresh=False)
        self._bar.update()

    def write(self, row: dict[str, Any]) -> None:
        """One flushed line, and the row's plain numbers to TensorBoard."""
        row = without_infinities(to_json(row))
        self._lines.write(json.dumps(row) + "\n")
        self._lines.flush()
        for name, value in row.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and name != "step":
                self._board.add_scalar(f"{row['phase']}/{name}", value, row["step"])
        if "instance_weights" in row and row.get("applied", True):
            self._board.add_histogram("instance_weights", np.asarray(row["instance_weights"]), row["step"])

    def write_skipped(self, row: dict[str, Any]) -> None:
        """A step that was not applied: one flushed line, and a word on stderr."""
        with self.skipped_path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")
        self._bar.write(f"not applied, since not finite: {row}", file=sys.stderr)

    def sync(self) -> None:
        """Waits until the disk has all lines."""
        os.fsync(self._lines.fileno())

    def close(self) -> None:
        """Flushes and closes everything."""
        self._lines.close()
        self._board.close()
        self._bar.close()
