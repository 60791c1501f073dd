"""What a model carries with its weights: taxonomy, lengths, base, quantisation, training data.

In and out: `moderation_config.json` beside the weights, which every later stage reads. Thresholds have a file of their own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import glob
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args, get_origin, get_type_hints

from qlora_moderation.errors import CheckpointError, ConfigError, show
from qlora_moderation.taxonomy import Taxonomy

METADATA_FILE = "moderation_config.json"


@dataclasses.dataclass(frozen=True)
class Quantization:
    """NF4 settings that an adapter was trained against.

    `weights_dtype` is the type in which the base weights were read before rounding: the same base rounded from another
    type gives other weights. They come back in the compute type.
    """

    double_quant: bool = True
    weights_dtype: Literal["float32", "bfloat16", "float16"] = "float32"


@dataclasses.dataclass(frozen=True)
class ModelMetadata:
    """The meaning of a classifier's outputs and where the classifier comes from."""

    taxonomy: Taxonomy
    max_length: int
    method: Literal["lora", "qlora", "full"]
    kind: Literal["adapter", "full", "merged"]
    base_model: str
    base_revision: str | None = None
    pad_token: str | None = None
    quantization: Quantization | None = None
    long_text: Literal["window", "truncate"] = "window"
    training: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def base_name(self) -> str:
        """The base model's name on the hub, or of its directory, without the place of that on a disk."""
        return Path(self.base_model).name if Path(self.base_model).is_absolute() else self.base_model

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready mapping; only an adapter has to find its base again."""
        base = self.base_model if self.kind == "adapter" else self.base_name
        return {**dataclasses.asdict(self), "taxonomy": self.taxonomy.to_dict(), "base_model": base}

    def save(self, directory: Path) -> None:
        """Write `moderation_config.json` into `directory`."""
        write_json(directory / METADATA_FILE, self.to_dict())


def load_metadata(directory: Path) -> ModelMetadata | None:
    """Read `moderation_config.json`; None where there is none (a model that another project made).

    Raises:
        CheckpointError: the file is there and cannot be understood.
    """
    path = directory / METADATA_FILE
    if not os.path.lexists(path):
        return None
    values = read_json(path)
    try:
        quantization = values.pop("quantization")
        taxonomy = Taxonomy.from_dict(values.pop("taxonomy"), source=str(path))
        found = ModelMetadata(
            taxonomy=taxonomy, quantization=Quantization(**quantization) if quantization else None, **values
        )
        _check_types(found)
        return found
    except (ConfigError, KeyError, TypeError, AttributeError, UnicodeEncodeError) as error:
        raise CheckpointError(f"{path}: is not readable as model metadata ({error}); copy it again") from None


def _check_types(found: ModelMetadata) -> None:
    """Refuse, before a model is loaded, what would fail after it.

    Raises:
        TypeError: a value is of another kind than its field.
        UnicodeEncodeError: a text is none.
    """
    fields: list[tuple[Any, str, Any]] = [(found, name, hint) for name, hint in get_type_hints(type(found)).items()]
    if found.quantization is not None:
        fields += [(found.quantization, name, hint) for name, hint in get_type_hints(Quantization).items()]
    for owner, name, hint in fields:
        value = getattr(owner, name)
        if get_origin(hint) is Literal:
            fits = value in get_args(hint)
        else:
            fits = isinstance(value, get_origin(hint) if get_origin(hint) is dict else hint)
        if not fits or (hint is int and (isinstance(value, bool) or value < 1)):
            raise TypeError(f"{name} is {show(value)}")
    json.dumps(found.to_dict(), ensure_ascii=False).encode()


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        CheckpointError: it is missing, truncated or no JSON.
    """
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path}: is no file; put the file back")
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not valid JSON ({error}); copy it again") from None


def write_json(path: Path, values: Any) -> None:
    """Write a JSON file whole: beside its place first, then renamed."""
    text = json.dumps(values, indent=2, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, as JSON and file names may hold it, has an escape of its own
        text = json.dumps(values, indent=2)
    write_text(path, text + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file whole: beside its place first, then renamed. A pipe or a device stays what it is."""
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    with written_whole(path) as file:
        file.write(text.encode("utf-8"))


@contextlib.contextmanager
def written_whole(path: Path, tidy: bool = True) -> Iterator[BinaryIO]:
    """Yield a file beside `path` that takes its place, on the disk, when the block has ended without an error.

    Args:
        path: in a directory that is made where it is missing.
        tidy: remove first what killed writers of the same file have left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*") if tidy else ():
        if is_abandoned(left):
            left.unlink(missing_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield file
            file.flush()
            os.fsync(file.fileno())
            beside.replace(path)  # still under the lock, so that nobody takes it for abandoned
    finally:
        beside.unlink(missing_ok=True)


def is_abandoned(path: Path) -> bool:
    """Say whether a file is what a killed writer left beside its place: it has such a name, and nobody holds its lock."""
    if not re.fullmatch(r"\..+\.\d+", path.name):
        return False
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
