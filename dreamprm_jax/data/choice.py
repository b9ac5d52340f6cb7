"""Which rows of a large set are taken: a seeded sample, balanced over strata, whatever the order of the rows."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


def sample_key(seed: int, content_id: str) -> int:
    """Where a row stands in the random order of `seed`: uint64, from what the row says alone."""
    digest = hashlib.sha256(f"{seed}:{content_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def held_out_keys(keys: Sequence[str] | np.ndarray, share: float, seed: int = 0) -> np.ndarray:
    """Which rows are held out, bool [K]: those whose key's hash lies in the lowest `share` of all hashes.

    Rows of one key are on one side, and a larger share holds the smaller one.
    """
    return np.array([sample_key(seed, key) / 2**64 < share for key in keys])


def quotas(sizes: np.ndarray, total: int) -> np.ndarray:
    """How many rows each stratum gives, int [K]: equal shares, and what a small stratum lacks comes from the others.

    Args:
      sizes: rows of each stratum, int [K].
      total: rows wanted. Where they cannot be shared equally, the first strata give one more.
    """
    given = np.zeros_like(sizes)
    left = min(total, int(sizes.sum()))
    while left:
        (open_ones,) = np.nonzero(given < sizes)
        share = max(left // len(open_ones), 1)
        for stratum in open_ones[:left] if left < len(open_ones) else open_ones:
            taken = min(share, int(sizes[stratum] - given[stratum]))
            given[stratum] += taken
            left -= taken
    return given


def choose(keys: np.ndarray, strata: np.ndarray, sample: int | None) -> np.ndarray:
    """The rows taken, by position, ascending: int [min(N, sample)].

    Args:
      keys: `sample_key` of each row, uint64 [N]; the lowest of a stratum are taken.
      strata: each row's stratum, int [N], numbered from 0 in the order in which they are to share.
      sample: rows wanted; None for all.
    """
    if sample is None or len(keys) <= sample:
        return np.arange(len(keys))
    sizes = np.bincount(strata)
    order = np.lexsort((keys, strata))  # stable: of equal keys the first row
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    taken = [order[start : start + n] for start, n in zip(starts, quotas(sizes, sample), strict=True)]
    return np.sort(np.concatenate(taken))


def first_of_each(values: np.ndarray) -> np.ndarray:
    """Whether each value is the first of its kind: bool [N]."""
    found = np.zeros(len(values), bool)
    found[np.unique(values, return_index=True)[1]] = True
    return found
