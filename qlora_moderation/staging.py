"""A directory appears whole or not at all.

In: a place, and a block that fills a directory beside it, on one rank or on all. Out: the directory in its place.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from qlora_moderation.distributed import is_main, on_main, raise_together, rank, world_size
from qlora_moderation.errors import CheckpointError, ModerationError
from qlora_moderation.refusals import refusals, refused_write


@contextlib.contextmanager
def replaced_whole(directory: Path) -> Iterator[Path]:
    """Yield a fresh directory beside `directory` that takes its place when the block has ended without an error everywhere.

    All ranks enter and leave together; any of them may write.

    Raises:
        CheckpointError: the directory cannot be written; what stood in its place still stands.
    """
    directory = directory.resolve()  # a link's target is replaced, and `.` has a name
    unfinished = _beside(directory, "unfinished")
    on_main(lambda: _prepare(unfinished, directory))
    try:
        failure: Exception | None = None
        try:
            yield unfinished
        except ModerationError as error:
            failure = error
        except Exception as error:
            failure = refused_write(directory, error) or error
        raise_together(failure)
        on_main(lambda: _swap(unfinished, directory))
    finally:
        if is_main():
            shutil.rmtree(unfinished, ignore_errors=True)


def check_shared(directory: Path) -> None:
    """Check that all ranks see the same directory.

    Raises:
        CheckpointError: one of them does not.
    """
    if world_size() == 1:
        return
    mark = on_main(lambda: directory / f".seen-by-all-{secrets.token_hex(8)}")
    on_main(mark.touch)
    missing = None
    if not mark.exists():
        missing = CheckpointError(
            f"{directory}: must lie on a disk that all machines share, and rank {rank()} sees another"
        )
    try:
        raise_together(missing)
    finally:
        if is_main():
            mark.unlink(missing_ok=True)


def recover(directory: Path) -> None:
    """Put back what a kill between the two renames of a replacement left beside its place."""
    old = _beside(directory, "old")
    if old.is_dir() and not directory.exists():
        old.rename(directory)


def _beside(directory: Path, state: str) -> Path:
    return directory.with_name(f".{directory.name}.{state}")


def _prepare(unfinished: Path, directory: Path) -> None:
    with refusals(directory):
        recover(directory)
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)


def _swap(unfinished: Path, directory: Path) -> None:
    old = _beside(directory, "old")
    with refusals(directory):
        # first the bytes, then the name: after a power cut the name could else stand there without them
        for path in [*unfinished.rglob("*"), unfinished]:
            _settle(path)
        shutil.rmtree(old, ignore_errors=True)
        if directory.exists():
            directory.rename(old)
        unfinished.rename(directory)
        _settle(directory.parent)
        shutil.rmtree(old, ignore_errors=True)


def _settle(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # some file systems do not do this for directories
            raise
    finally:
        os.close(handle)
