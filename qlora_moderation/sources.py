"""Where the rows of a data set lie.

In: a data spec. Out: its sources: files, or splits of hub sets, checked as far as that goes without reading them. Start of
step 2.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import re
import stat
from pathlib import Path
from typing import Any, Literal

from qlora_moderation.errors import DataError, brief

FILE_ENDINGS = (".json", ".jsonl", ".csv", ".parquet")
BEAVERTAILS = "PKU-Alignment/BeaverTails"
_PACKED = {
    "gzip": rb"\x1f\x8b",
    "bzip2": rb"BZh[1-9]1A",
    "xz": rb"\xfd7zXZ\0",
    "zstd": rb"\x28\xb5\x2f\xfd",
    "zip": rb"PK\x03\x04",
}
"""What packs files, and what the first bytes of such a file match."""
_ORIGINAL_SPLITS = {"train": "30k_train", "test": "30k_test"}


@dataclasses.dataclass(frozen=True)
class Source:
    """One part of a data spec: a file, or one split of a hub set."""

    name: str
    split: str | None = None
    revision: str | None = None
    note: str | None = None

    def __str__(self) -> str:
        return self.name if self.split is None else f"{self.name}:{self.split}"

    @functools.cached_property
    def hub_set(self) -> Any:
        """The split of the hub set, opened once.

        Raises:
            DataError: it cannot be loaded.
        """
        import datasets

        try:
            return datasets.load_dataset(self.name, split=self.split, revision=self.revision)
        except Exception as error:  # datasets raises many kinds: no network, no such set, no such split, gated
            raise DataError(
                f"{self}: cannot be loaded from the hub ({type(error).__name__}: {brief(error)}); check name, split and "
                "network, or download the file and give its path"
            ) from None

    def fingerprint(self) -> str | None:
        """Return what changes with the content: a SHA-256 of the file, or what `datasets` knows a hub set by; None: nothing.

        Raises:
            DataError: the source cannot be read.
        """
        if self.split is not None:
            return getattr(self.hub_set, "_fingerprint", None)
        try:
            with Path(self.name).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise unreadable(self.name, error) from None


def parse_spec(spec: str) -> list[Source]:
    """Split `a+b` into its sources; each is a file or `hub/name:split[@revision]`.

    Raises:
        DataError: a file that does not exist, or a hub name without a split.
    """
    if find_kind(Path(spec)) == "file":
        return [_parse_source(spec)]
    return [_parse_source(part.strip()) for part in spec.split("+")]


def find_kind(path: Path) -> Literal["file", "directory", "other"] | None:
    """Return what stands at a path; None: nothing, or the system takes it for no path, as one of several names joined."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return None
    return "file" if stat.S_ISREG(mode) else "directory" if stat.S_ISDIR(mode) else "other"


def _parse_source(part: str) -> Source:
    path = Path(part)
    kind = find_kind(path)
    if path.suffix.lower() in FILE_ENDINGS:
        if kind != "file":
            raise DataError(
                f"{part}: {'is a directory' if kind == 'directory' else 'no such file'}; give the path of a file"
            )
        return Source(part)
    if kind == "file":
        with contextlib.suppress(OSError):
            refuse_packed(path)
    match = re.fullmatch(r"(?P<name>[\w.-]+(?:/[\w.-]+)?):(?P<split>[^@\s]+)(?:@(?P<revision>\S+))?", part)
    if match is None or kind is not None:
        raise DataError(
            f"{part or '(nothing)'}: is neither a file ending in {', '.join(FILE_ENDINGS)} nor `hub/name:split[@revision]`, "
            f"for example {BEAVERTAILS}:330k_train"
        )
    name, split, revision = match["name"], match["split"], match["revision"]
    if name == BEAVERTAILS and split in _ORIGINAL_SPLITS:
        full = _ORIGINAL_SPLITS[split]
        return Source(name, full, revision, f"{name}:{split} means its split {full}, as in the original recipe")
    return Source(name, split, revision)


def stamp(path: Path) -> tuple[int, int]:
    """Return what changes when a file is written to: its size, and the time in nanoseconds."""
    state = path.stat()
    return state.st_size, state.st_mtime_ns


def refuse_packed(path: Path) -> None:
    """Refuse a packed file, whatever its name.

    Raises:
        DataError: names what packed it.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(6)
    for tool, magic in _PACKED.items():
        if re.match(magic, start):
            raise DataError(f"{path}: is packed with {tool}; unpack it, and give the path of what comes out")


def unreadable(path: Path | str, error: OSError) -> DataError:
    """Return what to raise where a file does not open, or stops being readable."""
    return DataError(f"{path}: cannot be read ({error.strerror or error})")
