"""The files of a training run other than its models, and whether it starts or goes on.

In: a configuration and records. Out: `config.yaml`, `environment.json`, `status.json`, `metrics.jsonl`, `audit.json`.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
from pathlib import Path
from typing import Any

import yaml

from qlora_moderation.checkpoint import STATE_FILE, find_checkpoints
from qlora_moderation.config import TrainConfig
from qlora_moderation.errors import CheckpointError
from qlora_moderation.metadata import read_json, write_json, write_text
from qlora_moderation.options import dump_options

PACKAGES = (
    "qlora-moderation", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "tokenizers",
    "safetensors", "scikit-learn", "numpy",
)  # fmt: skip


_OWN = (
    "config.yaml", "environment.json", "status.json", "metrics.jsonl", "audit.json", "validation.jsonl", "curves.png",
    "checkpoints", "adapter", "model",
)  # fmt: skip
"""What a run writes; starting over removes these and nothing else."""

_MAY_DIFFER = {
    "output_dir", "resume", "overwrite_output_dir", "dry_run", "save_strategy", "save_steps", "save_total_limit", "report_to",
    "max_tokens_per_micro_batch", "per_device_eval_batch_size", "gradient_checkpointing",
}  # fmt: skip
"""Options that change neither what a run learns nor what it reports."""


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
        config: names the directory, and says what happens to what it holds.

    Attributes:
        checkpoint: where the run goes on from; None: it starts.
        is_finished: the directory holds the finished run of this very configuration; nothing is left to do.

    Raises:
        CheckpointError: it holds something else, or it cannot be written.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.path = Path(config.output_dir)
        self.checkpoint: Path | None = None
        self.is_finished = False
        if config.resume not in ("auto", "never"):
            self.checkpoint = Path(config.resume)
            if not (self.checkpoint / STATE_FILE).is_file():
                raise CheckpointError(
                    f"--resume {config.resume}: is neither auto nor never nor a directory under checkpoints/ with {STATE_FILE}"
                )
        try:
            if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
                self._decide(config)
            if self.is_finished:
                return
            if self.checkpoint is None and self.path.is_dir():
                self._clear(config)
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(self.path / "config.yaml", dump_options(config))
            write_json(self.path / "environment.json", describe_environment())
            self.set_status("starting")
            self._metrics = (self.path / "metrics.jsonl").open("a", encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"--output_dir {self.path}: cannot be written ({error.strerror})") from None

    def _decide(self, config: TrainConfig) -> None:
        """Go on, start over, or refuse."""
        remedy = "give another directory, or --overwrite_output_dir True"
        status = self.path / "status.json"
        if not self.path.is_dir() or not status.is_file() or not (self.path / "config.yaml").is_file():
            raise CheckpointError(
                f"--output_dir {self.path}: is no run directory and not empty; give another directory"
            )
        if config.overwrite_output_dir:
            self.checkpoint = None
            return
        if config.resume == "never":
            raise CheckpointError(
                f"--output_dir {self.path}: holds a run, and --resume never does not touch it; {remedy}"
            )
        differing = self._find_differences(config)
        if differing:
            raise CheckpointError(f"--output_dir {self.path}: holds a run with other {', '.join(differing)}; {remedy}")
        self.is_finished = read_json(status).get("state") == "finished"
        if self.checkpoint is not None:  # named by --resume
            self.is_finished = False
            return
        found = find_checkpoints(self.path)
        self.checkpoint = found[-1] if found else None
        weights = [name for name in ("adapter", "model") if (self.path / name).exists()]
        if not self.is_finished and self.checkpoint is None and weights:
            raise CheckpointError(
                f"--output_dir {self.path}: holds {weights[0]}/ of a run that stopped without a checkpoint and cannot go on; "
                "start over with --overwrite_output_dir True, and add --save_strategy steps to be able to go on"
            )

    def _clear(self, config: TrainConfig) -> None:
        """Remove what an earlier run wrote here.

        Raises:
            CheckpointError: this run would read some of it.
        """
        specs = (
            config.model_name_or_path,
            config.train_data_name_or_path,
            config.eval_data_name_or_path,
            config.taxonomy,
        )
        inputs = [Path(part).resolve() for spec in specs if spec for part in {spec, *spec.split("+")}]
        for own in (self.path.resolve() / name for name in _OWN):
            if any(path == own or own in path.parents for path in inputs):
                raise CheckpointError(
                    f"--output_dir {self.path}: starting over would remove {own}, which this run reads"
                )
        for name in _OWN:
            path = self.path / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def _find_differences(self, config: TrainConfig) -> list[str]:
        try:
            stored = yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError):
            stored = None
        if not isinstance(stored, dict):
            raise CheckpointError(f"{self.path / 'config.yaml'}: is damaged; restore it, or give another --output_dir")
        own = yaml.safe_load(dump_options(config))
        return [name for name in own if name not in _MAY_DIFFER and own[name] != stored.get(name)]

    def set_status(self, state: str, **facts: Any) -> None:
        """Write `status.json`."""
        write_json(self.path / "status.json", {"state": state, **facts})

    def record(self, values: dict[str, Any]) -> None:
        """Append one line to `metrics.jsonl`."""
        self._metrics.write(json.dumps(values) + "\n")
        self._metrics.flush()

    def records(self) -> list[dict[str, Any]]:
        """Read `metrics.jsonl` back; a last line that a kill cut off does not count."""
        lines = (self.path / "metrics.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        return [json.loads(line) for line in lines]

    def cut_records(self, step: int) -> None:
        """Forget what was recorded after `step`, so that the file equals an unbroken run's."""
        kept = [record for record in self.records() if record["step"] <= step]
        self._metrics.close()
        write_text(self.path / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in kept))
        self._metrics = (self.path / "metrics.jsonl").open("a", encoding="utf-8")

    def close(self) -> None:
        """Close the files that are open for writing."""
        self._metrics.close()
