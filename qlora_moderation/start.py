"""Whether a run starts, goes on, has ended, or must not touch a directory.

In: a configuration and what `output_dir` holds. Out: a `Start`, or an error with the remedy; nothing is written.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from qlora_moderation.checkpoint import STATE_FILE, find_checkpoints, find_damage
from qlora_moderation.config import TrainConfig
from qlora_moderation.errors import CheckpointError
from qlora_moderation.metadata import read_json
from qlora_moderation.options import dump_options
from qlora_moderation.run_directory import LOCK, OWN
from qlora_moderation.staging import recover

_MAY_DIFFER = {
    "output_dir", "resume", "overwrite_output_dir", "dry_run", "save_strategy", "save_steps", "save_total_limit", "report_to",
    "max_tokens_per_micro_batch", "per_device_eval_batch_size", "gradient_checkpointing", "sharding", "fsdp",
    "fsdp_transformer_layer_cls_to_wrap", "fsdp_cpu_offload", "per_device_train_batch_size", "gradient_accumulation_steps",
    "cache_dir",
}  # fmt: skip
"""Options that change neither what a run learns nor what it reports; pairs a step are compared as their product."""


@dataclasses.dataclass(frozen=True)
class Start:
    """How a run begins.

    Attributes:
        checkpoint: where it goes on from; None: at the first step.
        is_finished: the directory holds the finished run of this very configuration; nothing is left to do.
        notes: lines for the log.
    """

    checkpoint: Path | None = None
    is_finished: bool = False
    notes: tuple[str, ...] = ()


def decide_start(config: TrainConfig, pairs_per_step: int) -> Start:
    """Look at `output_dir` and decide whether the run starts, goes on, has ended, or must not touch it.

    Nothing is written; weights that a kill left beside their place are put back.

    Args:
        config: names the directory, and says what happens to what it holds.
        pairs_per_step: of all processes together.

    Raises:
        CheckpointError: the directory holds something else, or cannot be written.
    """
    path = Path(config.output_dir)
    named = None if config.resume in ("auto", "never") else Path(config.resume)
    if named is not None and not (named / STATE_FILE).is_file():
        raise CheckpointError(
            f"--resume {config.resume}: is neither auto nor never nor a directory under checkpoints/ with {STATE_FILE}"
        )
    if named is not None and named.parent.resolve() != (path / "checkpoints").resolve():
        raise CheckpointError(
            f"--resume {named}: belongs to another run; copy that run's directory and give the copy as --output_dir"
        )
    place = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not os.access(place, os.W_OK):
        raise CheckpointError(f"--output_dir {path}: cannot be written (no permission in {place})")
    if place == path and path.is_dir():
        for weights in ("adapter", "model"):
            recover(path / weights)
    if place != path or (path.is_dir() and _holds_nothing(path)):
        return Start()
    remedy = "give another directory, or --overwrite_output_dir True"
    status = path / "status.json"
    if not path.is_dir() or not status.is_file() or not (path / "config.yaml").is_file():
        raise CheckpointError(f"--output_dir {path}: is no run directory and not empty; give another directory")
    if config.overwrite_output_dir:
        _refuse_own_inputs(config)
        return Start()
    if config.resume == "never":
        raise CheckpointError(f"--output_dir {path}: holds a run, and --resume never does not touch it; {remedy}")
    differing = _find_differences(config, pairs_per_step)
    if differing:
        raise CheckpointError(f"--output_dir {path}: holds a run with other {', '.join(differing)}; {remedy}")
    if named is not None:
        return Start(named)
    if _read_mapping(status).get("state") == "finished":
        return Start(is_finished=True)
    found = find_checkpoints(path)
    if found:
        return Start(found[-1], notes=tuple(_describe_damage(path, found[-1])))
    damaged = list(_describe_damage(path, None))
    if damaged:
        raise CheckpointError(f"{damaged[0]}; no checkpoint is left; start over with --overwrite_output_dir True")
    saved = [name for name in ("adapter", "model") if (path / name).exists()]
    if saved:
        raise CheckpointError(
            f"--output_dir {path}: holds {saved[0]}/ of a run that stopped without a checkpoint and cannot go on; "
            "start over with --overwrite_output_dir True, and add --save_strategy steps to be able to go on"
        )
    _refuse_own_inputs(config)
    return Start()


def _holds_nothing(path: Path) -> bool:
    """Say whether a directory is empty, or holds only what a run killed in its very first moments left."""
    names = {entry.name for entry in path.iterdir()}
    first = {"config.yaml", "environment.json", "status.json", "metrics.jsonl"}
    begun = {name for name in names if name.startswith(".") or name in first}
    return names == begun and not {"config.yaml", "status.json"} <= names and all(map(_is_own, names))


def _is_own(name: str) -> bool:
    return name in OWN or name == LOCK or any(name.startswith(f".{own}.") for own in OWN)


def _read_mapping(path: Path) -> dict[str, Any]:
    values = read_json(path)
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: is damaged; restore it, or give another --output_dir")
    return values


def _describe_damage(path: Path, newest: Path | None) -> Iterator[str]:
    for directory in sorted((path / "checkpoints").glob("step-*")):
        damage = find_damage(directory)
        if damage is not None and (newest is None or directory.name > newest.name):
            yield f"{directory} is damaged ({damage})"


def _refuse_own_inputs(config: TrainConfig) -> None:
    """Refuse to start over in a directory that the run itself reads from."""
    root = Path(config.output_dir)
    specs = (config.model_name_or_path, config.train_data_name_or_path, config.eval_data_name_or_path, config.taxonomy)
    inputs = [Path(part).resolve() for spec in specs if spec for part in {spec, *spec.split("+")}]
    for own in (root.resolve() / name for name in OWN):
        if any(path == own or own in path.parents for path in inputs):
            raise CheckpointError(f"--output_dir {root}: starting over would remove {own}, which this run reads")


def _find_differences(config: TrainConfig, pairs_per_step: int) -> list[str]:
    path = Path(config.output_dir) / "config.yaml"
    try:
        stored = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        stored = None
    if not isinstance(stored, dict):
        raise CheckpointError(f"{path}: is damaged; restore it, or give another --output_dir")
    own = yaml.safe_load(dump_options(config))
    differing = [name for name in own if name not in _MAY_DIFFER and own[name] != stored.get(name)]
    before = _read_mapping(path.with_name("environment.json")).get("pairs_per_step")
    if before is None:
        raise CheckpointError(
            f"{path.with_name('environment.json')}: is of an older version; give another --output_dir"
        )
    if before != pairs_per_step:
        each, rest = divmod(before * config.per_device_train_batch_size, pairs_per_step)
        advice = f": for {before} give --per_device_train_batch_size {each}" if each and not rest else ""
        differing.append(
            f"number of pairs a step ({before}, now {pairs_per_step} = per_device_train_batch_size x "
            f"gradient_accumulation_steps x processes{advice})"
        )
    return differing
