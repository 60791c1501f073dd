"""The files of a training run other than its models.

In: a configuration and records. Out: `config.yaml`, `environment.json`, `status.json`, `metrics.jsonl`, `audit.json`.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
from pathlib import Path
from typing import Any

from qlora_moderation.config import TrainConfig
from qlora_moderation.errors import CheckpointError
from qlora_moderation.metadata import write_json, write_text
from qlora_moderation.options import dump_options

PACKAGES = (
    "qlora-moderation", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "tokenizers",
    "safetensors", "scikit-learn", "numpy",
)  # fmt: skip


def describe_environment() -> dict[str, Any]:
    """Return Python's, the system's and the packages' versions."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"python": platform.python_version(), "system": platform.platform(), "packages": versions}


class RunDirectory:
    """One training run's directory.

    Args:
        config: names the directory.

    Raises:
        CheckpointError: it holds something already and may not be replaced, or it cannot be written.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.path = Path(config.output_dir)
        try:
            if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
                self._make_way(config)
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(self.path / "config.yaml", dump_options(config))
        except OSError as error:
            raise CheckpointError(f"--output_dir {self.path}: cannot be written ({error.strerror})") from None
        write_json(self.path / "environment.json", describe_environment())
        self.set_status("starting")
        self._metrics = (self.path / "metrics.jsonl").open("w", encoding="utf-8")

    def _make_way(self, config: TrainConfig) -> None:
        if not config.overwrite_output_dir:
            raise CheckpointError(
                f"--output_dir {self.path}: is not empty; give another directory, or --overwrite_output_dir True"
            )
        if not (self.path / "status.json").is_file():
            raise CheckpointError(
                f"--output_dir {self.path}: is not a run directory; remove it by hand, or give another"
            )
        shutil.rmtree(self.path)

    def set_status(self, state: str, **facts: Any) -> None:
        """Write `status.json`."""
        write_json(self.path / "status.json", {"state": state, **facts})

    def record(self, values: dict[str, Any]) -> None:
        """Append one line to `metrics.jsonl`."""
        self._metrics.write(json.dumps(values) + "\n")
        self._metrics.flush()

    def records(self) -> list[dict[str, Any]]:
        """Read `metrics.jsonl` back."""
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]

    def close(self) -> None:
        """Close the files that are open for writing."""
        self._metrics.close()
