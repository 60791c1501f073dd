"""Tensors on disk, one at a time: where each lies in a checkpoint's files, and files written piece by piece.

In: a checkpoint's directory or hub name, safetensors or `.bin`. Out: a place for each tensor, read with plain reads, so that
no file stays mapped; and safetensors of at most 2 GB, filled in any order. Used by step 11.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.utils import cached_file

from qlora_moderation.errors import CheckpointError, brief
from qlora_moderation.metadata import read_json, write_json

FILE_BYTES = 2 * 10**9
"""Most bytes of tensors in one written file."""

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_PIECE = 64 * 2**20


class OnlyWholeError(Exception):
    """A checkpoint that cannot be read tensor by tensor, only by transformers; says why."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor that lies in a file, contiguous and little-endian from byte `offset` on."""

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> torch.Tensor:
        """Read the tensor.

        Raises:
            CheckpointError: the file cannot be read, or ends too early.
        """
        tensor = torch.empty(self.shape, dtype=self.dtype)
        if not tensor.numel():
            return tensor
        view = _bytes_of(tensor)
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.offset)
                done = 0
                while done < len(view):
                    count = file.readinto(view[done : done + _PIECE])
                    if not count:
                        raise CheckpointError(f"{self.path}: ends too early; download the checkpoint again")
                    done += count
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read ({error.strerror})") from None
        return tensor


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous tensor."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # numpy's stubs differ


def find_tensors(name: str, revision: str | None = None) -> dict[str, StoredTensor]:
    """Return the place of every tensor of a checkpoint; nothing of the tensors themselves is read.

    Args:
        name: directory or hub name.
        revision: of a hub name.

    Raises:
        CheckpointError: a file is missing or damaged.
        OnlyWholeError: the files are of a kind that has no such places.
    """

    def fetch(file: str) -> Path | None:
        try:
            found = cached_file(
                name,
                file,
                revision=revision,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{name}: {file} cannot be fetched ({' '.join(str(error).split())[:200]})") from None
        return None if found is None else Path(found)

    for single, find in (("model.safetensors", _find_in_safetensors), ("pytorch_model.bin", _find_in_bin)):
        path = fetch(single)
        index = None if path is not None else fetch(f"{single}.index.json")
        if path is not None:
            return find(path)
        if index is None:
            continue
        values = read_json(index)
        where = values.get("weight_map") if isinstance(values, dict) else None
        if not isinstance(where, dict) or not where or not all(isinstance(file, str) for file in where.values()):
            raise CheckpointError(f"{index}: names no tensors; download the checkpoint again")
        places: dict[str, StoredTensor] = {}
        for file in sorted(set(where.values())):
            part = fetch(file)
            if part is None:
                raise CheckpointError(f"{name}: {file} is missing; download the checkpoint again")
            places |= find(part)
        lost = sorted(set(where) - set(places))
        if lost:
            raise CheckpointError(f"{name}: {where[lost[0]]} lacks {lost[0]}; download the checkpoint again")
        return places
    raise OnlyWholeError("it has neither model.safetensors nor pytorch_model.bin")


def _find_in_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Read the header: its length in 8 bytes, then JSON (https://github.com/huggingface/safetensors, "Format")."""
    size = path.stat().st_size
    places = {}
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if 0 < length <= size - 8 else {"": {}}
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            if entry["dtype"] not in _DTYPES:
                raise OnlyWholeError(f"{path.name} holds {name} as {entry['dtype']}")
            place = StoredTensor(path, 8 + length + begin, _DTYPES[entry["dtype"]], tuple(entry["shape"]))
            if 8 + length + end > size or place.size_bytes != end - begin:
                raise ValueError
            places[name] = place
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path}: is truncated or no safetensors file; download the checkpoint again") from None
    return places


def _find_in_bin(path: Path) -> dict[str, StoredTensor]:
    """Unpickle the structure only, without code and without data (torch's "fake tensors" know their offset in the file)."""
    if path.open("rb").read(4) != b"PK\x03\x04":
        raise OnlyWholeError(f"{path.name} is in the format of torch before 1.6")
    try:
        with FakeTensorMode():
            state = torch.load(path, weights_only=True)
    except Exception as error:  # pickle, zip and torch errors
        raise CheckpointError(f"{path}: is damaged, or holds more than tensors ({brief(error)})") from None
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path}: holds no mapping of names to tensors; download the checkpoint again")
    size = path.stat().st_size
    places = {}
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor) or tensor.dtype not in _NAMES or not tensor.is_contiguous():
            raise OnlyWholeError(f"{path.name} holds {name}, which is no plain contiguous tensor")
        start: Any = tensor.untyped_storage()._checkpoint_offset
        offset = start + int(tensor.storage_offset()) * tensor.dtype.itemsize
        places[name] = StoredTensor(path, offset, tensor.dtype, tuple(tensor.shape))
        if offset + places[name].size_bytes > size:
            raise CheckpointError(f"{path}: is truncated; download the checkpoint again")
    return places


def plan_files(sizes: Mapping[str, int], file_bytes: int = FILE_BYTES) -> dict[str, list[str]]:
    """Deal tensors to files in their order, each file at most `file_bytes` where one tensor does not exceed it.

    Returns:
        File name, as stock loaders expect it -> names of its tensors.
    """
    files: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if files[-1] and filled + size > file_bytes:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += size
    if len(files) == 1:
        return {"model.safetensors": files[0]}
    return {f"model-{i + 1:05d}-of-{len(files):05d}.safetensors": names for i, names in enumerate(files)}


def write_index(directory: Path, files: Mapping[str, Sequence[str]], total_bytes: int) -> None:
    """Write the index that stock loaders read where there is more than one file."""
    if len(files) > 1:
        where = {name: file for file, names in files.items() for name in names}
        write_json(
            directory / "model.safetensors.index.json", {"metadata": {"total_size": total_bytes}, "weight_map": where}
        )


class TensorWriter(contextlib.AbstractContextManager["TensorWriter"]):
    """Safetensors files whose tensors are written in any order and in pieces, from any thread.

    Args:
        directory: exists.
        tensors: name -> (shape, dtype); decides what stands where before anything is written.
        file_bytes: see `plan_files`.

    Raises:
        CheckpointError: the disk has not enough room.
    """

    def __init__(
        self,
        directory: Path,
        tensors: Mapping[str, tuple[Sequence[int], torch.dtype]],
        file_bytes: int = FILE_BYTES,
    ) -> None:
        sizes = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in tensors.items()}
        total, free = sum(sizes.values()), shutil.disk_usage(directory).free
        if total > free:
            raise CheckpointError(
                f"{directory.parent}: the weights take {total / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free; make "
                "room or give another directory"
            )
        self.files = plan_files(sizes, file_bytes)
        self.places: dict[str, StoredTensor] = {}
        self._handles: dict[Path, io.FileIO] = {}
        for file, names in self.files.items():
            # wide types first: every tensor then starts at a multiple of its element's size
            ordered = sorted(names, key=lambda name: -tensors[name][1].itemsize)
            header: dict[str, object] = {"__metadata__": {"format": "pt"}}
            offset, begins = 0, {}
            for name in ordered:
                shape, dtype = tensors[name]
                begins[name], offset = offset, offset + sizes[name]
                header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begins[name], offset]}
            text = json.dumps(header).encode()
            text += b" " * (-len(text) % 8)
            path = directory / file
            handle = path.open("wb", buffering=0)
            self._handles[path] = handle
            handle.write(len(text).to_bytes(8, "little") + text)
            handle.truncate(8 + len(text) + offset)
            for name in ordered:
                shape, dtype = tensors[name]
                self.places[name] = StoredTensor(path, 8 + len(text) + begins[name], dtype, tuple(shape))
        write_index(directory, self.files, total)

    def write(self, name: str, start: int, values: torch.Tensor) -> None:
        """Write `values` of the planned type from element `start` of a tensor on."""
        place = self.places[name]
        assert values.dtype == place.dtype, name
        view = _bytes_of(values.contiguous())
        offset = place.offset + start * place.dtype.itemsize
        while view:
            done = os.pwrite(self._handles[place.path].fileno(), view, offset)
            view, offset = view[done:], offset + done

    def __exit__(self, *_: object) -> None:
        try:
            for handle in self._handles.values():
                os.fsync(handle.fileno())
        finally:
            for handle in self._handles.values():
                handle.close()


def describe_names(names: Iterable[str]) -> str:
    """Return names on one line, with the numbers of layers folded into one entry."""
    folded: dict[str, int] = {}
    for name in names:
        key = ".".join("*" if part.isdigit() else part for part in name.split("."))
        folded[key] = folded.get(key, 0) + 1
    return ", ".join(key if count == 1 else f"{key} ({count})" for key, count in folded.items())
