"""Errors that a user can mend.

Each message says what was given, what is allowed and the edit that mends it. The command line prints the message without
a traceback and exits with code 2; anything else that escapes is a fault of this library.
"""

import re
import reprlib
import signal
from typing import Any

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict, _SHORT.maxstring, _SHORT.maxother = 2, 4, 4, 80, 80


def show(value: Any) -> str:
    """Return a value for a message, shortened before it is written out: YAML's aliases can make it larger than memory."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python writes no number of thousands of digits
        return "a number of thousands of digits"


def printable(text: str) -> str:
    """Return a text as one line that a terminal can show, with escapes for line ends, controls and lone surrogates."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def brief(error: BaseException) -> str:
    """Return another library's message on one line: short enough for a log, without bold type and without passwords in URLs."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    text = re.sub(r"(?<=://)[^/\s@]+@", "", text)
    return " ".join(text.split())[:240] or type(error).__name__


class ModerationError(Exception):
    """Base of all errors that name a place and a remedy; each line of a message is printable, whatever it quotes."""

    def __init__(self, message: str = "") -> None:
        super().__init__("\n".join(map(printable, message.split("\n"))))


class ConfigError(ModerationError):
    """A configuration key, flag or combination of them that cannot be used."""


class DataError(ModerationError):
    """A row, file or data set that cannot be used."""


class CheckpointError(ModerationError):
    """A model, adapter or run directory that cannot be read or written."""


class SaidByMainError(ModerationError):
    """Another rank has met the error and reports it; this one only stops."""


class Interrupted(Exception):
    """A run stopped on request and can go on.

    Attributes:
        exit_code: 128 plus the signal: 143 for SIGTERM, 130 for SIGINT.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.exit_code = 128 + signal_number
