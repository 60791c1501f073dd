"""The parts of an output that is being written, and who may write them.

In: a run's facts. Out: `parts/<fingerprint>/` in the output directory: `run.json`, `engine.json`, and one file for each block,
whole or absent. Whoever has the same facts fills the same directory; other facts never meet in one.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from qlora_moderation.errors import CheckpointError, ModerationError
from qlora_moderation.metadata import read_json, write_json, written_whole
from qlora_moderation.refusals import refusals
from qlora_moderation.state_files import Asked, damaged, is_run
from qlora_moderation.workload import BlockId, find_differences, fingerprint_facts, list_blocks

PARTS = "parts"
RUN_FILE = "run.json"
ENGINE_FILE = "engine.json"
ASKED_FILE = "summary.json"
_ANY_PART = "[0-9]*-[0-9]*"


class Parts:
    """The parts of one run.

    Args:
        output: the output directory.
        facts: of the run.
    """

    def __init__(self, output: Path, facts: dict[str, Any]) -> None:
        self.output, self.facts = output, facts
        self.directory = output / PARTS / fingerprint_facts(facts)

    def open(self, asked: Asked) -> None:
        """Make the directory, and note which summary is asked for.

        Raises:
            CheckpointError: it cannot be made.
        """
        with writing(self.output):
            self.directory.mkdir(parents=True, exist_ok=True)
            write_json(self.directory / ASKED_FILE, asked.to_dict())
            if not (self.directory / RUN_FILE).is_file():
                write_json(self.directory / RUN_FILE, self.facts)

    @property
    def asked(self) -> Asked:
        """Which summary was asked for last.

        Raises:
            CheckpointError: the file is damaged.
        """
        return Asked.read(self.directory / ASKED_FILE)

    @property
    def engine(self) -> dict[str, Any]:
        """What scores, or has scored, the parts.

        Raises:
            CheckpointError: the file is missing or damaged.
        """
        found = read_json(self.directory / ENGINE_FILE)
        if not isinstance(found, dict):
            raise damaged(self.directory / ENGINE_FILE)
        return found

    def path_of(self, block: BlockId) -> Path:
        """Return where a block's part stands once it is written."""
        return self.directory / f"{block.table:05d}-{block.number:08d}"

    def find_missing(self) -> list[BlockId]:
        """Return the blocks that have no part yet."""
        try:
            there = {path.name for path in self.directory.iterdir()}
        except FileNotFoundError:  # not begun, or another process has just finished the run
            there = set()
        return [block for block in list_blocks(self.facts) if self.path_of(block).name not in there]

    @contextlib.contextmanager
    def write(self, block: BlockId) -> Iterator[BinaryIO]:
        """Yield the file of a block's part; it appears when the block has ended without an error.

        Raises:
            CheckpointError: the disk does not take it.
        """
        with writing(self.output), written_whole(self.path_of(block), tidy=False) as file:
            yield file

    def agree_on_engine(self, engine: dict[str, Any]) -> list[str]:
        """Note what scores, or compare it with what has scored before; return what differs without harm.

        Raises:
            CheckpointError: the parts there were scored in another type or with other categories.
        """
        path = self.directory / ENGINE_FILE
        if not path.is_file():
            with writing(self.output):
                write_json(path, engine)
        before = self.engine
        for name in ("dtype", "categories"):
            if before.get(name) != engine[name]:
                raise CheckpointError(
                    f"--output_dir {self.output}: the blocks done were scored with another {name} than here (dtype "
                    f"{before.get('dtype')}, now {engine['dtype']}); go on with such a device, or give another directory"
                )
        return [name for name in engine if before.get(name) != engine[name]]

    @contextlib.contextmanager
    def locked(self, number: int, every: int) -> Iterator[None]:
        """Hold the place of one of `every` writers.

        Raises:
            CheckpointError: that writer is at work already, or one of another number of writers is.
        """
        with contextlib.ExitStack() as stack:
            own = self.directory.parent / f".writer-{number + 1}-of-{every}"
            if not self._lock(stack, own):
                raise CheckpointError(
                    f"--output_dir {self.output}: another run is writing here; give another directory"
                )
            for path in self.directory.parent.glob(".writer-*"):
                if path != own and not path.name.endswith(f"-of-{every}") and _is_locked(path):
                    raise CheckpointError(
                        f"--output_dir {self.output}: {path.name[8:].replace('-', ' ')} writers is at work here; wait for it, "
                        "or give another directory"
                    )
            yield

    @contextlib.contextmanager
    def combining(self) -> Iterator[None]:
        """Wait until nobody else puts the parts together, and keep others from it."""
        with contextlib.ExitStack() as stack:
            self._lock(stack, self.directory.parent / ".combining", wait=True)
            yield

    def _lock(self, stack: contextlib.ExitStack, path: Path, wait: bool = False) -> bool:
        with writing(self.output):
            path.parent.mkdir(parents=True, exist_ok=True)
            return _lock(stack, path, wait)

    @contextlib.contextmanager
    def leaving_no_trace(self, made: Sequence[Path] | None) -> Iterator[None]:
        """Remove what a run has begun where it fails before its first part.

        Args:
            made: directories that it made, the deepest first; None: others may be at work beside it, so all stays.
        """
        try:
            yield
        except ModerationError:
            if made is not None and not any(self.directory.glob(_ANY_PART)):
                shutil.rmtree(self.directory, ignore_errors=True)
                if not any(path.is_dir() for path in self.directory.parent.glob("*")):
                    shutil.rmtree(self.directory.parent, ignore_errors=True)
                for path in made:
                    with contextlib.suppress(OSError):  # somebody else has put something there
                        path.rmdir()
            raise

    def remove(self) -> None:
        """Remove the parts of this run and what others have left."""
        shutil.rmtree(self.output / PARTS, ignore_errors=True)

    def remove_abandoned(self) -> None:
        """Remove the same, unless another run is at work on them."""
        locks = [*(self.output / PARTS).glob(".writer-*"), *(self.output / PARTS).glob(".combining")]
        if not any(_is_locked(path) for path in locks):
            self.remove()


def find_runs(output: Path) -> list[dict[str, Any]]:
    """Return the facts of every run that has parts in an output directory; one that scored nothing is none."""
    paths = [path for path in sorted((output / PARTS).glob(f"*/{RUN_FILE}")) if any(path.parent.glob(_ANY_PART))]
    found = {path: read_json(path) for path in paths}
    for path, facts in found.items():
        if not is_run(facts) or path.parent.name != fingerprint_facts(facts):
            raise damaged(path)
    return list(found.values())


def remove_others(output: Path, facts: dict[str, Any]) -> None:
    """Remove the parts of runs with other facts; those of this very run are what it would write again.

    Raises:
        CheckpointError: such a run is at work.
    """
    parts = output / PARTS
    own = fingerprint_facts(facts)
    others = [path for path in parts.glob("*") if path.is_dir() and path.name != own] if parts.is_dir() else []
    if others and any(_is_locked(path) for path in parts.glob(".writer-*")):
        raise CheckpointError(f"--output_dir {output}: another run is writing here; give another directory")
    for path in others:
        shutil.rmtree(path, ignore_errors=True)


def refuse_others(output: Path, facts: dict[str, Any]) -> None:
    """Refuse a directory with the parts of another run.

    Raises:
        CheckpointError: names what differs.
    """
    for other in find_runs(output):
        if other != facts:
            raise_other(output, other, facts)


def raise_other(output: Path, other: dict[str, Any], facts: dict[str, Any]) -> None:
    """Say how a run that stands in the output directory differs.

    Raises:
        CheckpointError: always.
    """
    raise CheckpointError(
        f"--output_dir {output}: holds a run with another {', '.join(find_differences(other, facts))}; give another "
        "directory, or --overwrite True to replace it"
    )


def writing(output: Path) -> contextlib.AbstractContextManager[None]:
    """Turn what the system refuses to write into one line, see `refusals`."""
    return refusals(f"--output_dir {output}")


def _lock(stack: contextlib.ExitStack, path: Path, wait: bool = False) -> bool:
    """Lock a file until the stack is left; a file system without locks locks nothing."""
    file = stack.enter_context(path.open("w", encoding="utf-8"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _is_locked(path: Path) -> bool:
    with contextlib.ExitStack() as stack:
        return not _lock(stack, path)
