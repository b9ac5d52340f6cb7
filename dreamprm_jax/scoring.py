"""Step scores of chains: P("+") at every step, over the full vocabulary and over the two labels."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from dreamprm_jax import build, losses
from dreamprm_jax.checkpoint import Model, load_model
from dreamprm_jax.data import batches
from dreamprm_jax.data.dataset import Dataset
from dreamprm_jax.data.example import GPT, PLUS, Example
from dreamprm_jax.errors import InputError
from dreamprm_jax.metrics import METRICS_FILE, write_json_lines
from dreamprm_jax.models import internvl
from dreamprm_jax.types import Batch, PyTree
from dreamprm_jax.workdir import claim_workdir


class ChainScores(NamedTuple):
    """The scores of one chain of S steps."""

    full: np.ndarray  # float32 [S]: P("+") over the full vocabulary
    two_token: np.ndarray  # float32 [S]: P("+") over {"+", "-"}
    response: float  # `full`, aggregated


def score_dataset(
    model: Model, dataset: Dataset, *, batch_size: int, aggregate: str, reading: batches.Reading = batches.READING
) -> list[ChainScores]:
    """Scores every usable chain, in the data set's order.

    Chains of like length share a batch, so that padding stays small; neither the batch nor the padding
    changes a score beyond float rounding.
    """
    plus, minus = model.tokenizer.plus_id, model.tokenizer.minus_id

    @jax.jit
    def scores(params: PyTree, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        logits = internvl.apply(model.config, params, batch)
        full = losses.step_scores(logits, plus)
        response = losses.AGGREGATIONS[aggregate](full, batch.step_mask)
        return full, losses.step_scores_two_token(logits, plus, minus), response

    results: dict[int, ChainScores] = {}
    with (
        tqdm(total=len(dataset.rows), unit="chain", desc="score", mininterval=1.0) as bar,
        closing(batches.ordered_batches(dataset, batch_size, reading)) as stream,
    ):
        for batch in stream:
            arrays = jax.device_get(scores(model.params, batch))
            for slot in np.flatnonzero(batch.example_mask):
                full, two_token, response = (array[slot] for array in arrays)
                real = batch.step_mask[slot]
                results[int(batch.example_id[slot])] = ChainScores(full[real], two_token[real], float(response))
            bar.update(int(batch.example_mask.sum()))
    return [results[row] for row in dataset.rows]


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
        "row": row,
        "id": example.id,
        "num_tiles": dataset.num_tiles[row],
        "num_tokens": dataset.num_tokens[row],
        "step_scores": scores.full,
        "step_scores_two_token": scores.two_token,
        "score": scores.response,
    }
    return line if example.true_false is None else {**line, "true_false": example.true_false}


def run_scoring(cfg: Any, workdir: Path) -> dict[str, Any]:
    """`task=score`: reads and checks all rows, scores them, writes one JSON line per chain.

    The workdir gets config.json and metrics.jsonl, and the scores where `output` names no other place.

    Raises:
      InputError: before anything is compiled, the first row that cannot be scored, or an output that cannot be written.
    """
    judged = cfg.score.history == "plus"
    examples = build.read_file(cfg.input, "input", labels_required=not judged)
    if judged:
        examples = list(map(_judged, examples)) if isinstance(examples, list) else _JudgedOnDisk(examples)
    model = load_model(cfg.model, cfg.seed)
    dataset = build.encoder(cfg, model)(examples)
    output = Path(cfg.output) if cfg.output else workdir / "scores.jsonl"
    if output.resolve() == Path(cfg.input.path).resolve():
        raise InputError(f"--config.output={output}: is the input file itself; give another file")
    claim_workdir(workdir, build.record(cfg), resumes=False)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.open("a").close()  # scores of hours must not be lost to a wrong path
    except OSError as error:
        raise InputError(f"--config.output={output}: cannot be written ({error}); give another file") from error
    began = time.perf_counter()
    reading = build.reading(cfg)
    scores = score_dataset(model, dataset, batch_size=cfg.batch_size, aggregate=cfg.aggregate, reading=reading)
    lines = [score_line(dataset, *scored) for scored in zip(dataset.rows.tolist(), scores, strict=True)]
    write_json_lines(output, lines)
    result = {"num_chains": len(lines), "mean_score": float(np.mean([s.response for s in scores]))}
    rate = {"chains_per_second": len(lines) / (time.perf_counter() - began)}
    write_json_lines(workdir / METRICS_FILE, [{"step": 0, "phase": "score", **result, **rate}])
    return {"output": str(output), **result}
