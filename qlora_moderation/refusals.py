"""What to say of a write that the system refused: one line with the place, the reason and what helps.

In: an exception. Out: a `CheckpointError`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator

from qlora_moderation.errors import CheckpointError, ModerationError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def refused_write(place: object, error: BaseException) -> CheckpointError | None:
    """Return what to raise instead of an error; None where it does not come from a write.

    Args:
        place: the option and path, or the path alone, that the line begins with.
        error: of Python, or of a library in Rust, which has kinds of its own.
    """
    if isinstance(error, OSError):
        number, reason = error.errno, error.strerror or str(error)
        if number is None:  # the words of another rank's error
            number, reason = _parse(str(error)) or (None, reason)
    elif found := _parse(str(error)):
        number, reason = found
    else:
        return None
    remedy = "make room, and give the same command again" if number in _NO_ROOM else "give another place"
    return CheckpointError(f"{place}: cannot be written ({reason}); {remedy}")


def _parse(text: str) -> tuple[int, str] | None:
    found = re.search(r"os error (\d+)|Errno (\d+)", text)
    if found is None:
        return None
    number = int(found[1] or found[2])
    return number, os.strerror(number)


@contextlib.contextmanager
def refusals(place: object) -> Iterator[None]:
    """Turn what the system refuses to write into one line.

    Raises:
        CheckpointError: instead of the error.
    """
    try:
        yield
    except ModerationError:
        raise
    except Exception as error:
        refused = refused_write(place, error)
        if refused is None:
            raise
        raise refused from None
