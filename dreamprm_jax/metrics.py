"""Where a run's numbers go: metrics.jsonl, TensorBoard, and a progress bar on stderr."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

METRICS_FILE = "metrics.jsonl"


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
    temporary.write_bytes(content)
    os.replace(temporary, path)


def write_json_lines(path: Path, rows: list[dict]) -> None:
    """One JSON object per line, all or nothing."""
    write_text(path, "".join(json.dumps(to_json(row)) + "\n" for row in rows))


def read_json_lines(path: Path) -> list[dict]:
    """The rows of a file of JSON lines; a last line cut off by a kill is left out."""
    return [
        json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")
    ]


def read_metrics(workdir: Path) -> list[dict]:
    """The lines of metrics.jsonl, none before there is one."""
    path = workdir / METRICS_FILE
    return read_json_lines(path) if path.is_file() else []


class MetricsWriter:
    """Writes each step once: on resuming, lines at or after `first_step` are taken back first."""

    def __init__(self, workdir: Path, first_step: int, num_steps: int):
        from tensorboardX import SummaryWriter  # loads PyTorch where that is installed: a second or two

        kept = [row for row in read_metrics(workdir) if row["step"] < first_step]
        write_json_lines(workdir / METRICS_FILE, kept)
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
        row = to_json(row)
        self._lines.write(json.dumps(row) + "\n")
        self._lines.flush()
        for name, value in row.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and name != "step":
                self._board.add_scalar(f"{row['phase']}/{name}", value, row["step"])
        if "instance_weights" in row:
            self._board.add_histogram("instance_weights", np.asarray(row["instance_weights"]), row["step"])

    def close(self) -> None:
        """Flushes and closes everything."""
        self._lines.close()
        self._board.close()
        self._bar.close()
