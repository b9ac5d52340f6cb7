"""The exception for a user's mistake, the one for a run that was asked to end, and strangers' text made fit to show."""

import errno
import os
import signal


def printable(text: str) -> str:
    """The text with all that is no visible character spelled out: escape sequences, line ends, marks of direction."""
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def is_full(error: BaseException) -> bool:
    """Whether a disk or a quota had no room, as the system says it or as text in a library's error."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT))


class InputError(ValueError):
    """A flag, a file, a row or an image that cannot be used as given.

    The message names the file, the row (0-based), the field and the value, and says what to do. It is one line without
    control characters, whatever it quotes: names of files and tensors, fields and answers are what others wrote.
    `run.py` turns it into exit status 2 and one `error:` line; any other exception is a bug of ours.

    kind: what is wrong with a row, in a word, where errors are counted: the field, "JSON" or "length".
    """

    def __init__(self, message: str, *, kind: str = "row"):
        super().__init__(printable(message))
        self.kind = kind


class Stopped(Exception):
    """A signal has asked the run to end, and it has saved what it had; `run.py` exits with 128 + its number."""

    def __init__(self, number: int, message: str):
        super().__init__(f"stopped by {signal.Signals(number).name}: {message}; the same command goes on")
        self.number = number
