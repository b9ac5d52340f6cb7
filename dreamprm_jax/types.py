"""The pytrees that travel between rooms, and the shape legend.

Shape legend, used in every docstring and comment:
  B examples    T text tokens   D width       N query heads   K kv heads   H head width   F hidden width
  V vocabulary  L layers        P image tiles I image tokens per tile      S steps        C candidates

This file imports neither jax nor flax at run time, so that data workers can build a `Batch`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import jax
    import numpy as np

    Array = jax.Array | np.ndarray

PyTree = Any

SUPERVISED = ("pretrain", "cold_start")
"""Phases of plain training before the weights, in order: their names in the config and in metrics.jsonl."""


class Batch(NamedTuple):
    """Padded examples. Rows are independent: no value of one row reaches another.

    Text is padded on the right, so causal attention alone keeps padding out of every real position.
    `step_mask` says *what* is supervised; how much it counts is the weighting's business.
    """

    tokens: Array  # [B, T] int32
    image_mask: Array  # [B, T] bool: the n-th true position of a row takes the row's n-th image feature
    tiles: Array  # [B, P, height, width, 3] uint8
    step_positions: Array  # [B, S] int32: the position whose next token is the label
    labels: Array  # [B, S] int32: token id of the label
    step_mask: Array  # [B, S] bool
    example_id: Array  # [B] int32: the row's index in its data set
    example_mask: Array  # [B] bool: false for rows that only fill up the batch
    soft_labels: Array | None = None  # [B, S] float32: probability that the label is "+", where the loss is to use it


class Share(NamedTuple):
    """What a process reads of every batch: of its rows, in `count` equal parts of neighbours, those in `own`."""

    own: tuple[int, ...] = (0,)
    count: int = 1

    def of(self, rows: Sequence[Any]) -> list[Any]:
        """The rows to be read here.

        Raises:
          ValueError: the rows cannot be divided evenly.
        """
        if len(rows) % self.count:
            raise ValueError(f"a batch of {len(rows)} rows cannot be divided into {self.count} equal parts")
        size = len(rows) // self.count
        return [row for part in self.own for row in rows[part * size : (part + 1) * size]]


WHOLE = Share()
"""Everything: a single process."""


class Prefix(NamedTuple):
    """What chains have in common at their beginning (a question and its images), padded on the right.

    A row is a group of chains that begin alike.
    """

    tokens: Array  # [B, T] int32
    image_index: Array  # [B, T] int32: which of the row's image features stands here; -1: the token itself
    tiles: Array  # [B, P, height, width, 3] uint8
    length: Array  # [B] int32: tokens that are no padding


class Continuations(NamedTuple):
    """How a row's chains go on after their prefix: one after the other on one axis, padded at its end.

    Each token sees the prefix and what comes before it in its own chain.
    """

    tokens: Array  # [B, T] int32
    image_index: Array  # [B, T] int32: as in `Prefix`; counts all of the row's features
    chain: Array  # [B, T] int32: which of the row's chains; -1: padding
    positions: Array  # [B, T] int32: in the chain, its prefix included
    step_positions: Array  # [B, S] int32: of all chains, on this axis


class TrainState(NamedTuple):
    """The inner (lower) level: what a plain training step reads and writes."""

    step: Array  # [] int32: inner steps taken
    params: PyTree
    opt_state: PyTree


class BilevelState(NamedTuple):
    """Both levels; everything that a resumed run needs besides the data order."""

    train: TrainState
    meta_params: PyTree
    meta_opt_state: PyTree
    ema: PyTree  # moving average of params, for scoring; {} where none is kept
    last_weights: PyTree  # {"rows": [N]}: each training row's weight when last seen, NaN before; {} if not asked for
    frozen: PyTree  # parameters that no step moves and every step reads; {} where everything is trained
