"""The exception for a user's mistake, and the one for a run that was asked to end."""

import signal


class InputError(ValueError):
    """A flag, a file, a row or an image that cannot be used as given.

    The message names the file, the row (0-based), the field and the value, and says what to do.
    `run.py` turns it into exit status 2 and one `error:` line; any other exception is a bug of ours.

    kind: what is wrong with a row, in a word, where errors are counted: the field, "JSON" or "length".
    """

    def __init__(self, message: str, *, kind: str = "row"):
        super().__init__(message)
        self.kind = kind


class Stopped(Exception):
    """A signal has asked the run to end, and it has saved what it had; `run.py` exits with 128 + its number."""

    def __init__(self, number: int, message: str):
        super().__init__(f"stopped by {signal.Signals(number).name}: {message}; the same command goes on")
        self.number = number
