"""The state of a run that can go on: complete or absent.

In and out: `checkpoints/step-000500/state.pt`, written beside its place and renamed. Frozen weights are never in it.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import torch

from qlora_moderation.classifier import replaced_whole
from qlora_moderation.errors import CheckpointError

STATE_FILE = "state.pt"


def save_checkpoint(run: Path, step: int, state: dict[str, Any], keep: int | None) -> Path:
    """Write the state of `step`, then remove the oldest checkpoints beyond `keep`.

    Raises:
        CheckpointError: it cannot be written; earlier checkpoints still stand.
    """
    directory = run / "checkpoints" / f"step-{step:06d}"
    with replaced_whole(directory) as unfinished:
        torch.save(state, unfinished / STATE_FILE)
    if keep is not None:
        for old in find_checkpoints(run)[:-keep]:
            shutil.rmtree(old)
    return directory


def find_checkpoints(run: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    found = [path for path in (run / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted((path for path in found if (path / STATE_FILE).is_file()), key=lambda path: int(path.name[5:]))


def load_checkpoint(directory: Path) -> dict[str, Any]:
    """Read a state, on the CPU.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    path = directory / STATE_FILE
    if not path.is_file():
        raise CheckpointError(f"{directory}: holds no {STATE_FILE}; give a directory under checkpoints/")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, zip and pickle raise many kinds
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{path}: cannot be read ({reason}); remove {directory} to go on from an earlier one"
        ) from None
