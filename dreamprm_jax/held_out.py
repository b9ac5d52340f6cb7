"""Meta rows that no step sees, and the loss on them: by it the best checkpoint of a run is told."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from contextlib import closing
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dreamprm_jax import bilevel, sharding
from dreamprm_jax.data import batches, shapes
from dreamprm_jax.data.choice import held_out_keys
from dreamprm_jax.data.dataset import Dataset
from dreamprm_jax.data.example import HUMAN, Example
from dreamprm_jax.data.formats.prompts import FIRST_STEP_HEADING
from dreamprm_jax.errors import InputError
from dreamprm_jax.inner import Problem
from dreamprm_jax.types import Batch, BilevelState, PyTree

LOSS = "held_out_loss"
"""What the loss is called wherever it is written down."""


class HeldOut(NamedTuple):
    """What a phase is measured by at its checkpoints."""

    loss: Callable[[BilevelState], float]
    num_rows: int
    rows_digest: str  # of the rows: losses on others cannot be compared


def question_key(example: Example) -> str:
    """What the rows of one question have in common: the pictures, to the byte; without any the text before its steps.

    Several questions about one picture share a key: what is known of a picture must not help on the other side either.
    Where no heading parts question and first step, a row without a picture stands for itself.
    """
    if not example.images:
        first = next(turn.text for turn in example.turns if turn.role == HUMAN)
        return "text " + first.partition(FIRST_STEP_HEADING)[0].strip()
    contents = (image if isinstance(image, bytes) else image.read_bytes() for image in example.images)
    return "images " + " ".join(hashlib.sha256(content).hexdigest() for content in contents)


def part(meta: Dataset, share: float, seed: int, max_shapes: int) -> tuple[Dataset, Dataset]:
    """The meta set without the rows that are held out, and those: about `share` of the questions, each question whole.

    A function of the rows and the seed alone, whatever the order of the rows.

    Args:
      meta: checked rows.
      share: in (0, 1).
      seed: of the choice.
      max_shapes: padded shapes that each side may have.

    Raises:
      InputError: a side without rows.
    """
    keys = [question_key(meta.examples[row]) for row in meta.rows]
    chosen = held_out_keys(keys, share, seed)
    if chosen.all() or not chosen.any():
        raise InputError(
            f"--config.meta.held_out={share}: of the {len(keys)} meta rows, which are {len(set(keys))} questions, "
            f"seed {seed} holds {chosen.sum()} out; both sides need some: give another share"
        )
    rest, held_out = (_of_rows(meta, meta.rows[side], max_shapes) for side in (~chosen, chosen))
    return rest, held_out


def _of_rows(dataset: Dataset, rows: np.ndarray, max_shapes: int) -> Dataset:
    padded = shapes.choose(dataset.num_tokens[rows], dataset.num_tiles[rows], max_shapes)
    return dataclasses.replace(dataset, rows=rows, padded=padded)


def measured_on(
    dataset: Dataset,
    problem_of: Callable[[PyTree], Problem],
    batch_size: int,
    reading: batches.Reading,
    mesh: Mesh | None,
) -> HeldOut:
    """The problem's meta loss of the parameters that score, mean over the data set's usable rows.

    Args:
      dataset: the rows that are held out.
      problem_of: the frozen parameters -> the problem. Its meta loss is a mean over the real rows of a batch.
      batch_size: rows at a time, a multiple of what `mesh` divides rows into.
      reading: threads and processes.
      mesh: devices of the state; None: one.
    """
    share = sharding.share_of_process(mesh)

    @jax.jit
    def of_batch(params: PyTree, frozen: PyTree, batch: Batch) -> tuple[jax.Array, jax.Array]:
        loss, _ = problem_of(frozen).meta_loss(params, batch)
        return sharding.everywhere(mesh, (loss, jnp.sum(batch.example_mask)))

    def loss(state: BilevelState) -> float:
        params, found = bilevel.scoring_params(state), []
        with closing(batches.ordered_batches(dataset, batch_size, reading, share)) as stream:
            for batch in stream:
                found.append(jax.device_get(of_batch(params, state.frozen, sharding.place_rows(mesh, batch))))
        losses, counts = np.array(found, np.float64).T
        return float(np.average(losses, weights=counts))

    keys = sorted(question_key(dataset.examples[row]) for row in dataset.rows)
    return HeldOut(loss, len(dataset.rows), hashlib.sha256("\n".join(keys).encode()).hexdigest())
