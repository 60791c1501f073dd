"""The state of a run that can go on: complete or absent, and readable by any number of processes.

In and out: `checkpoints/step-000500/`, written beside its place and renamed. Tensors go through torch.distributed.checkpoint
into safetensors, each rank its slices; everything else is `state.json`. No pickle, and no frozen weight, is in it.
"""

from __future__ import annotations

import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from qlora_moderation.distributed import is_lost_contact, local_part, on_main, patient_group, world_size
from qlora_moderation.errors import CheckpointError
from qlora_moderation.metadata import read_json, write_json
from qlora_moderation.refusals import refused_write
from qlora_moderation.staging import replaced_whole

STATE_FILE = "state.json"
_FACTS = {
    "step": int, "optimizer": dict, "scheduler": dict, "best": dict, "identity": dict, "world_size": int, "threads": int,
    "files": dict,
}  # fmt: skip
"""What `state.json` must hold, and of which kind."""


def save_checkpoint(
    run: Path, step: int, tensors: dict[str, torch.Tensor], facts: dict[str, Any], keep: int | None, best_step: int
) -> Path:
    """Write the state of `step`, then remove the oldest complete checkpoints beyond `keep`, but never the best one.

    Raises:
        CheckpointError: it cannot be written; earlier checkpoints still stand.
    """
    directory = run / "checkpoints" / f"step-{step:06d}"
    with replaced_whole(directory) as unfinished:
        writer = dcp.HuggingFaceStorageWriter(str(unfinished), save_distributed=True)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # that there is no process group
                dcp.save(tensors, storage_writer=writer, process_group=patient_group(), no_dist=world_size() == 1)
        except (Exception, CheckpointException) as error:
            _pass_on(error)
            cause = _find_cause(error)
            refused = refused_write(directory, cause)
            raise refused or CheckpointError(f"{directory}: cannot be written ({_first_line(cause)})") from None
        on_main(lambda: _write_facts(unfinished, facts))
    on_main(lambda: _prune(run, keep, best_step))
    return directory


def _write_facts(directory: Path, facts: dict[str, Any]) -> None:
    sizes = {path.name: path.stat().st_size for path in sorted(directory.glob("*.safetensors"))}
    write_json(directory / STATE_FILE, {**facts, "files": sizes})


def _prune(run: Path, keep: int | None, best_step: int) -> None:
    if keep is None:
        return
    for old in find_checkpoints(run)[:-keep]:
        if int(old.name[5:]) != best_step:
            # a kill in the middle of a removal must not leave half a checkpoint
            shutil.rmtree(old.rename(old.with_name(f".{old.name}.removed")))


def remove_leftovers(run: Path, after: int) -> None:
    """Remove what kills have left of checkpoints, and those behind the step that a run goes on from."""
    for path in (run / "checkpoints").glob("step-*"):
        if re.fullmatch(r"step-\d+", path.name) and int(path.name[5:]) > after:
            path.rename(path.with_name(f".{path.name}.removed"))
    for path in (run / "checkpoints").glob(".step-*"):
        shutil.rmtree(path)


def find_checkpoints(run: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    found = [path for path in (run / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    complete = (path for path in found if find_damage(path) is None)
    return sorted(complete, key=lambda path: int(path.name[5:]))


def find_damage(directory: Path) -> str | None:
    """Say what is wrong with a checkpoint's files, None where they are as they were written."""
    try:
        facts = read_json(directory / STATE_FILE)
    except CheckpointError:
        facts = None
    if not isinstance(facts, dict) or not all(isinstance(facts.get(key), kind) for key, kind in _FACTS.items()):
        return f"{STATE_FILE} is missing or damaged"
    if not {"value", "metrics", "step"} <= facts["best"].keys() or "_last_lr" not in facts["scheduler"]:
        return f"{STATE_FILE} is missing or damaged"
    for name, size in facts["files"].items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        try:
            with safe_open(path, framework="pt"):
                pass
        except Exception:  # safetensors has errors of its own
            return f"{name} is no safetensors file any more"
    return None


def read_facts(directory: Path) -> dict[str, Any]:
    """Return what `state.json` holds.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    damage = find_damage(directory)
    if damage is not None:
        raise CheckpointError(
            f"{directory}: {damage}; remove it to go on from an earlier one, or give that with --resume"
        )
    return read_json(directory / STATE_FILE)


def collect_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, Any]]]:
    """Return trainable parameters and optimiser state by name, and those parts of the latter that are no tensors."""
    tensors: dict[str, torch.Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    seen: set[int] = set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensors[f"model.{name}"] = parameter.detach()
            for key, value in optimizer.state[parameter].items():
                if isinstance(value, torch.Tensor):
                    # bitsandbytes shares its tables between all parameters, which safetensors refuses
                    place = local_part(value).data_ptr()
                    tensors[f"optimizer.{name}.{key}"] = value.clone() if place in seen else value
                    seen.add(place)
                else:
                    plain.setdefault(name, {})[key] = value
    return tensors, plain


def restore_tensors(
    directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer, plain: dict[str, dict[str, Any]]
) -> None:
    """Put a checkpoint's tensors into a model and its fresh optimiser, however either is sharded.

    Raises:
        CheckpointError: they cannot be read, or belong to another model.
    """
    own = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    try:
        reader = dcp.HuggingFaceStorageReader(str(directory))
        stored: dict[str, Any] = reader.read_metadata().state_dict_metadata
        shapes = {key.removeprefix("model."): tuple(entry.size) for key, entry in stored.items() if key[:6] == "model."}
        if shapes != {name: tuple(parameter.shape) for name, parameter in own.items()}:
            raise CheckpointError(f"{directory}: belongs to another model; start anew in another directory")
        targets: dict[str, torch.Tensor] = {f"model.{name}": parameter.detach() for name, parameter in own.items()}
        fused = any(group.get("fused") for group in optimizer.param_groups)
        states: dict[str, dict[str, Any]] = {name: dict(plain.get(name, {})) for name in own}
        for key, entry in stored.items():
            if key.startswith("optimizer."):
                name, _, part = key.removeprefix("optimizer.").rpartition(".")
                targets[key] = states[name][part] = _make_room(own[name], entry, fused)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            dcp.load(targets, storage_reader=reader, process_group=patient_group(), no_dist=world_size() == 1)
    except CheckpointError:
        raise
    except (Exception, CheckpointException) as error:
        _pass_on(error)
        raise CheckpointError(
            f"{directory}: cannot be read ({_first_line(_find_cause(error))}); remove it to go on from an earlier one"
        ) from None
    for name, parameter in own.items():
        if states[name]:
            optimizer.state[parameter] = states[name]


def _make_room(parameter: torch.Tensor, entry: Any, fused: bool) -> torch.Tensor:
    """Return an empty tensor for a part of the optimiser's state: laid out as the parameter where it has its shape."""
    dtype = entry.properties.dtype
    if entry.size == parameter.shape:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    # a number is AdamW's count of steps, which lies on the CPU unless its kernel is fused
    device = parameter.device if len(entry.size) or fused else torch.device("cpu")
    return torch.empty(entry.size, dtype=dtype, device=device)


def _find_cause(error: BaseException) -> BaseException:
    """Return what a rank said inside torch's bundle of failures."""
    return next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _pass_on(error: BaseException) -> None:
    """Raise what says nothing about the files: a rank that has gone, or memory that ran out.

    Raises:
        Exception: the given one.
    """
    causes = [error]
    if isinstance(error, CheckpointException):
        causes += [failure[0] for failure in error.failures.values()]
    if any(is_lost_contact(cause) or isinstance(cause, torch.OutOfMemoryError | MemoryError) for cause in causes):
        raise causes[-1]
