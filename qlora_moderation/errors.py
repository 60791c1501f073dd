"""Errors that a user can mend.

Each message says what was given, what is allowed and the edit that mends it. The command line prints the message without
a traceback and exits with code 2; anything else that escapes is a fault of this library.
"""


class ModerationError(Exception):
    """Base of all errors that name a place and a remedy."""


class ConfigError(ModerationError):
    """A configuration key, flag or combination of them that cannot be used."""


class DataError(ModerationError):
    """A row, file or data set that cannot be used."""


class CheckpointError(ModerationError):
    """A model, adapter or run directory that cannot be read or written."""
