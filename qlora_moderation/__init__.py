"""Question-answer moderation classifiers: train, merge, evaluate, use.

Shapes in docstrings: C categories (14 by default), N pairs, S texts of a micro-batch, T tokens, L tokens of a padded row,
H hidden size, W processes.
"""

from __future__ import annotations

import logging
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from qlora_moderation.errors import CheckpointError, ConfigError, DataError, ModerationError

if TYPE_CHECKING:
    from qlora_moderation.moderation import QAModeration

# At import bitsandbytes advises a package for its CPU kernel, which this library switches off (see backbone.py).
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

try:
    __version__ = version("qlora-moderation")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0.0.0"

__all__ = ["CheckpointError", "ConfigError", "DataError", "ModerationError", "QAModeration", "__version__"]


def __getattr__(name: str) -> Any:
    """Import `QAModeration`, and torch with it, only when it is asked for."""
    if name == "QAModeration":
        from qlora_moderation.moderation import QAModeration

        return QAModeration
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
