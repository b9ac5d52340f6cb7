"""What happens to rows that cannot be used: the run ends, or goes on without a few of them and says so."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from dreamprm_jax.errors import InputError


class OnError(NamedTuple):
    """The config's `data.on_error` and `data.max_bad_share`."""

    action: str = "raise"  # raise | skip
    max_share: float = 0.0  # of the rows, where they are skipped


RAISE = OnError()


def settle(errors: Mapping[int, InputError], num_rows: int, on_error: OnError) -> dict[str, int]:
    """Decides on a data set's bad rows; those that are skipped are counted by kind, the first of each is told.

    Args:
      errors: by row.
      num_rows: of the data set, the bad ones included.
      on_error: what to do.

    Returns:
      The number of skipped rows of each kind.

    Raises:
      InputError: the first bad row's, with the number of others, where rows are not skipped or too many are bad.
    """
    if not errors:
        return {}
    by_row = [errors[row] for row in sorted(errors)]
    more = f" (and {len(by_row) - 1} more bad rows)" if len(by_row) > 1 else ""
    if on_error.action == "raise":
        raise InputError(f"{by_row[0]}{more}", kind=by_row[0].kind) from by_row[0]
    if len(by_row) == num_rows or len(by_row) / num_rows > on_error.max_share:
        raise InputError(
            f"{by_row[0]}{more}: {len(by_row)} of {num_rows} rows are bad, more than data.max_bad_share="
            f"{on_error.max_share}; correct the file, or raise the share",
            kind=by_row[0].kind,
        ) from by_row[0]
    counts = Counter(error.kind for error in by_row)
    for kind, count in sorted(counts.items()):
        first = next(error for error in by_row if error.kind == kind)
        print(f"skipped {count} bad row(s) of kind {kind}, the first: {first}", file=sys.stderr)
    return dict(counts)
