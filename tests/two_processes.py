"""Run by test_sharding.py as process NUMBER of two, PORT of the first: what they agree on, and what they need not."""

import sys

import numpy as np

from dreamprm_jax import sharding
from dreamprm_jax.errors import InputError

NUMBERS = (80 * 2**30 + 5, 80 * 2**30 + 3)  # bytes of a card


def main() -> None:
    port, number = sys.argv[1], int(sys.argv[2])
    sharding.join(f"localhost:{port}", 2, number)
    found = sharding.least(NUMBERS[number])
    if found != min(NUMBERS):
        raise SystemExit(f"process {number} decides by {found}, not by {min(NUMBERS)}")
    unseen = {"rows": np.full(3, np.nan, np.float32)}  # compared, NaN would differ from itself
    mesh = sharding.make_mesh(sharding.Layout(data=2))
    np.testing.assert_array_equal(sharding.fetch(mesh, sharding.place(mesh, unseen))["rows"], unseen["rows"])
    sharding.check_same("one and the same")
    try:
        sharding.check_same(f"--config.seed={number}")
    except InputError as error:
        if f"process {number} has another config than {1 - number}:" in str(error):
            return
    raise SystemExit("two configs were taken for one")


if __name__ == "__main__":
    main()
