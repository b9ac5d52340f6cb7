"""Step scores of chains: P("+") at every step, over the full vocabulary and over the two labels.

What chains have in common at their beginning, of a question's candidates the prompt, the images and the question, runs
through the model once (`data/sharing.py`); the rest of them goes on from its keys and values, many chains at a time.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from dreamprm_jax import build, losses, sharding
from dreamprm_jax.data import batches, sharing
from dreamprm_jax.data.dataset import Dataset
from dreamprm_jax.data.example import GPT, PLUS, Example
from dreamprm_jax.errors import InputError
from dreamprm_jax.loading import Model, load_model
from dreamprm_jax.metrics import METRICS_FILE, read_json_lines, to_json, write_json_lines
from dreamprm_jax.models import internvl, presets
from dreamprm_jax.programs import is_out_of_memory
from dreamprm_jax.types import Continuations, Prefix, PyTree
from dreamprm_jax.workdir import check_output, claim_workdir, files_of_process, open_alone


class ChainScores(NamedTuple):
    """The scores of one chain of S steps."""

    full: np.ndarray  # float32 [S]: P("+") over the full vocabulary
    two_token: np.ndarray  # float32 [S]: P("+") over {"+", "-"}
    response: float  # one of the two, aggregated


@partial(jax.jit, static_argnums=0)
def begin(config: presets.InternVLConfig, params: PyTree, prefix: Prefix) -> internvl.Past:
    """`internvl.begin`, compiled."""
    return internvl.begin(config, params, prefix)


@partial(jax.jit, static_argnums=(0, 1, 2))
def go_on(
    config: presets.InternVLConfig,
    plus_id: int,
    minus_id: int,
    params: PyTree,
    past: internvl.Past,
    part: Continuations,
) -> tuple[jax.Array, jax.Array, internvl.KeysValues]:
    """Both scores at the step positions of a part, [B, S] each; and its keys and values."""
    logits, keys_values = internvl.go_on(config, params, past, part)
    scores = losses.step_scores(logits, plus_id), losses.step_scores_two_token(logits, plus_id, minus_id)
    return *sharding.everywhere(config.mesh, scores), keys_values


@partial(jax.jit, static_argnums=(0, 1, 2))
def score_part(*arguments: Any) -> tuple[jax.Array, jax.Array]:
    """`go_on` where nothing goes on from the part: no memory is taken for its keys and values."""
    return go_on(*arguments)[:2]


def score_dataset(
    model: Model,
    dataset: Dataset,
    *,
    batch_size: int,
    aggregate: str,
    reading: batches.Reading = batches.READING,
    progress: bool = True,
) -> list[ChainScores]:
    """Scores every usable chain, in the data set's order; arguments as those of `score_windows`."""
    windows = score_windows(
        model, dataset, batch_size=batch_size, aggregate=aggregate, reading=reading, progress=progress
    )
    return [scores for window in windows for _, scores in window]


def score_windows(
    model: Model,
    dataset: Dataset,
    *,
    batch_size: int,
    aggregate: str,
    step_score: str = "full",
    reading: batches.Reading = batches.READING,
    num_done: int = 0,
    progress: bool = True,
) -> Iterator[list[tuple[int, ChainScores]]]:
    """Scores every usable chain, a window of rows at a time: (row, scores), in the data set's order.

    Neither what a chain shares, nor its batch, nor the padding changes a score beyond float rounding; a chain that
    repeats another one has its very scores.

    Args:
      model: scores at the steps of every chain as they stand.
      dataset: the chains.
      batch_size: chains at a time.
      aggregate: how the step scores become the response score, of `losses.AGGREGATIONS`.
      step_score: which ones do, "full" or "two_token".
      reading: threads and processes.
      num_done: rows that are scored already, whole windows. They are planned with the others, since padding is chosen
        from all rows: the scores of the others are then the same to the last bit.
      progress: show a bar.
    """
    max_shapes = max(1, len(dataset.padded.shapes) // 2)
    mesh = model.config.mesh
    shards, share = sharding.num_row_shards(mesh), sharding.share_of_process(mesh)
    windows = sharing.plan(dataset, batch_size, max_shapes, shards)[num_done // sharing.WINDOW :]
    plans = [batch for window in windows for batch in window.batches]
    total = sum(len(group.rows) for batch in plans for group in batch.groups)
    total += sum(len(window.copies) for window in windows)
    with (
        tqdm(
            total=total, unit="chain", desc="score", mininterval=1.0, disable=not (progress and sharding.is_first())
        ) as bar,
        closing(batches.shared_batches(dataset, plans, reading, share)) as stream,
    ):
        for window in windows:
            found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
            for scored in _score_batches(model, stream, len(window.batches)):
                found |= scored
                bar.update(len(scored))
            found |= {row: found[first] for row, first in window.copies.items()}
            bar.update(len(window.copies))
            rows_done = sorted(found)
            which = ChainScores._fields.index(step_score)
            responses = response_scores([found[row][which] for row in rows_done], aggregate)
            pairs = zip(rows_done, responses.tolist(), strict=True)
            yield [(row, ChainScores(*found[row], response)) for row, response in pairs]


def _score_batches(
    model: Model, stream: Iterator[sharing.SharedBatch], count: int
) -> Iterator[dict[int, tuple[np.ndarray, np.ndarray]]]:
    """The next `count` batches' step scores by row; each is fetched when the one after it has been sent off."""
    plus, minus = model.tokenizer.plus_id, model.tokenizer.minus_id
    sent: list[tuple[sharing.SharedBatch, list[Any]]] = []
    for _ in range(count):
        batch = next(stream)
        with _memory_named(batch):
            prefix, conts = (sharding.place_rows(model.config.mesh, tree) for tree in (batch.prefix, batch.parts))
            past = begin(model.config, model.params, prefix)
            parts = [score_part(model.config, plus, minus, model.params, past, part) for part in conts]
            sent.append((batch, parts))
            done = _fetch(*sent.pop(0)) if len(sent) > 1 else None
        if done is not None:
            yield done
    for batch, parts in sent:
        with _memory_named(batch):
            done = _fetch(batch, parts)
        yield done


@contextmanager
def _memory_named(batch: sharing.SharedBatch) -> Iterator[None]:
    """Says which shapes did not fit the device's memory, and what takes less."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        (rows, tokens), tiles = batch.prefix.tokens.shape, batch.prefix.tiles.shape[1]
        longest = max(part.tokens.shape[1] for part in batch.parts)
        raise InputError(
            f"scoring {rows} prompts of {tokens} tokens and {tiles} tiles, with {longest} tokens of chains each: the "
            "device's memory does not suffice; lower what it takes with one of --config.images.max_tiles, "
            "--config.model.compute_dtype=bfloat16, --config.model.param_dtype=bfloat16, or divide the prompts among "
            "devices (--config.mesh.data). The same command goes on after the scores that are written"
        ) from error


def _fetch(batch: sharing.SharedBatch, parts: list[Any]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Takes the parts' arrays [B, S] apart, chain by chain."""
    found = {}
    for (full, two_token), rows, num_steps in zip(jax.device_get(parts), batch.rows, batch.num_steps, strict=True):
        for slot, (chains, counts) in enumerate(zip(rows, num_steps, strict=True)):
            ends = np.cumsum(counts)
            for row, start, end in zip(chains, ends - counts, ends, strict=True):
                found[row] = (full[slot, start:end], two_token[slot, start:end])
    return found


def response_scores(step_scores: Sequence[np.ndarray], aggregate: str) -> np.ndarray:
    """Step scores of each chain -> response scores, float32 [n], by one of `losses.AGGREGATIONS`."""
    num_steps = np.array([len(scores) for scores in step_scores])
    padded = np.zeros((len(step_scores), max(num_steps, default=1)), np.float32)
    for scores, row in zip(step_scores, padded, strict=True):
        row[: len(scores)] = scores
    mask = np.arange(padded.shape[1])[None] < num_steps[:, None]
    return np.asarray(losses.AGGREGATIONS[aggregate](jnp.asarray(padded), jnp.asarray(mask)))


def with_plus_history(example: Example) -> Example:
    """The chain as it stands when it is judged: every earlier step was accepted, so every label is "+"."""
    turns = tuple(turn._replace(text=PLUS) if turn.role == GPT else turn for turn in example.turns)
    return example._replace(turns=turns)


def _judged(row: Example | InputError) -> Example | InputError:
    return row if isinstance(row, InputError) else with_plus_history(row)


@dataclasses.dataclass(frozen=True)
class _JudgedOnDisk:
    """The rows of a prepared set `with_plus_history`, read when they are needed."""

    rows: Sequence[Example]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Example:
        return with_plus_history(self.rows[row])


def score_line(dataset: Dataset, row: int, scores: ChainScores) -> dict[str, Any]:
    """One line of the output file (README, Formats)."""
    example = dataset.examples[row]
    line = {
        "row": example.row,
        "id": example.id,
        "num_tiles": dataset.num_tiles[row],
        "num_tokens": dataset.num_tokens[row],
        "step_scores": scores.full,
        "step_scores_two_token": scores.two_token,
        "score": scores.response,
    }
    return line if example.true_false is None else {**line, "true_false": example.true_false}


def run_scoring(cfg: Any, workdir: Path) -> dict[str, Any]:
    """`task=score`: reads and checks all rows, scores them, writes one JSON line per chain as they are done.

    The workdir gets config.json and metrics.jsonl, and the scores where `output` names no other place. The same command
    goes on after a kill, to the same bytes; of a finished run it gives the result.

    Raises:
      InputError: before anything is compiled, the first row that cannot be scored, an output that cannot be written or
        that something else wrote, or a workdir of another run.
    """
    with files_of_process(workdir, cfg.output, first=sharding.is_first()) as (own, output):
        sharding.meet("files")  # before the first process changes what the others copy
        return _run_scoring(cfg, own, output or own / "scores.jsonl")


def _run_scoring(cfg: Any, workdir: Path, output: Path) -> dict[str, Any]:
    judged = cfg.score.history == "plus"
    examples = build.read_file(cfg.input, "input", labels_required=not judged)
    if judged:
        examples = list(map(_judged, examples)) if isinstance(examples, list) else _JudgedOnDisk(examples)
    model = load_model(cfg.model, cfg.seed, mesh=sharding.make_mesh(cfg.mesh))
    dataset = build.encoder(cfg, model)(examples)
    check_output(output, cfg.input.path)
    if output.exists() and output.stat().st_size and not (workdir / "config.json").is_file():
        raise InputError(f"--config.output={output}: exists already; remove it, or give another file")
    claim_workdir(workdir, build.record(cfg))
    fresh = write_scores(cfg, model, dataset, output)
    scores = [line["score"] for line in read_json_lines(output)]
    result = {"num_chains": len(scores), "mean_score": float(np.mean(scores))}
    if fresh.num_chains or not (workdir / METRICS_FILE).is_file():
        # Nothing to do, and yet no metrics: a kill came between the last line and them.
        rate = {"chains_per_second": fresh.num_chains / fresh.seconds} if fresh.num_chains else {}
        write_json_lines(workdir / METRICS_FILE, [{"step": 0, "phase": "score", **result, **rate}])
    return {"output": str(output), **result}


class Fresh(NamedTuple):
    """What `write_scores` had left to do."""

    num_chains: int
    seconds: float


def write_scores(cfg: Any, model: Model, dataset: Dataset, output: Path, *, step_score: str = "full") -> Fresh:
    """Appends what is missing of the chains' lines (`score_line`), a window of rows at a time.

    Args:
      cfg: the run's: batches, reading, and how step scores are aggregated.
      model, dataset: what scores, and the chains.
      output: a file of this run's own, or none yet.
      step_score: which step scores are aggregated, as for `score_windows`.

    Raises:
      InputError: a line of the output is not that of its row, or another run is writing it.
    """
    began = time.perf_counter()
    with open_alone(output) as file:
        done = _lines_kept(file, dataset.rows.tolist())
        if done < len(dataset.rows):
            options = {"batch_size": cfg.batch_size, "aggregate": cfg.aggregate, "step_score": step_score}
            windows = score_windows(model, dataset, reading=build.reading(cfg), num_done=done, **options)
            with closing(windows):
                for window in windows:
                    lines = [json.dumps(to_json(score_line(dataset, row, scores))) + "\n" for row, scores in window]
                    file.write("".join(lines).encode())
                    file.flush()
    return Fresh(len(dataset.rows) - done, time.perf_counter() - began)


def _lines_kept(file: IO[bytes], rows: Sequence[int]) -> int:
    """The number of lines that an earlier run has left: whole windows, so that the rest is grouped as it was to be.

    What stands after them is cut off.

    Args:
      file: open for reading and appending.
      rows: that the lines are to be of, in order.

    Raises:
      InputError: a line that is not its row's: something else wrote it, or other rows can be used now.
    """
    file.seek(0)
    whole = [line for line in file.readlines() if line.endswith(b"\n")]
    for number, line in enumerate(whole):
        if number >= len(rows) or _row_of(line) != rows[number]:
            expected = f"row {rows[number]}" if number < len(rows) else "any row"
            raise InputError(
                f"{file.name} line {number + 1}: is not the scores of {expected}; the rows that can be used have "
                "changed since, or something else wrote it: remove the file to score all rows anew"
            )
    done = len(whole) if len(whole) == len(rows) else len(whole) // sharing.WINDOW * sharing.WINDOW
    file.truncate(sum(map(len, whole[:done])))
    return done


def _row_of(line: bytes) -> int | None:
    """The row that a line of the output is about; None for what is no such line."""
    try:
        return json.loads(line)["row"]
    except (ValueError, TypeError, KeyError):
        return None
