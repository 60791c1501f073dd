"""The files of a training run other than its models.

In: a configuration and records. Out: `config.yaml`, `environment.json`, `status.json`, `metrics.jsonl`, `audit.json`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
from pathlib import Path
from typing import Any, TextIO

from qlora_moderation.checkpoint import remove_leftovers
from qlora_moderation.config import TrainConfig
from qlora_moderation.distributed import is_main, on_main
from qlora_moderation.environment import describe_environment
from qlora_moderation.errors import CheckpointError
from qlora_moderation.metadata import write_json, write_text
from qlora_moderation.options import dump_options
from qlora_moderation.refusals import refusals
from qlora_moderation.staging import check_shared

OWN = (
    "checkpoints", "adapter", "model", "metrics.jsonl", "audit.json", "validation.jsonl", "curves.png", "environment.json",
    "config.yaml", "status.json",
)  # fmt: skip
"""What a run writes; starting over removes these and nothing else, and last what tells that this is a run's directory."""

LOCK = ".lock"


class RunDirectory:
    """One training run's directory; rank 0 writes, on the other ranks nothing happens.

    Args:
        config: names the directory.

    Every method raises a `CheckpointError` where the disk does not take what is to be written.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.path = Path(config.output_dir)
        self._config = config
        self._metrics: TextIO | None = None
        self._lock: TextIO | None = None

    def open(self, checkpoint: Path | None, processes: dict[str, Any]) -> None:
        """Begin to write: clear what an earlier run left, or go on behind a checkpoint's step. Called by all ranks.

        Args:
            checkpoint: where the run goes on from; None: it starts.
            processes: facts about the processes, for `environment.json`.
        """
        try:
            on_main(lambda: self._open(checkpoint, processes))
            check_shared(self.path)
        except BaseException:
            self.close()
            raise

    def _open(self, checkpoint: Path | None, processes: dict[str, Any]) -> None:
        with self.writing():
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            if checkpoint is None:
                for own in (self.path / name for name in OWN):
                    shutil.rmtree(own) if own.is_dir() and not own.is_symlink() else own.unlink(missing_ok=True)
            step = 0 if checkpoint is None else int(checkpoint.name[5:])
            remove_leftovers(self.path, step)
            write_text(self.path / "config.yaml", dump_options(self._config))
            write_json(self.path / "environment.json", describe_environment() | processes)
            self.set_status("starting")
            if (self.path / "metrics.jsonl").is_file():
                kept = [record for record in self.records() if record["step"] <= step]
                write_text(self.path / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in kept))
            self._metrics = (self.path / "metrics.jsonl").open("a", encoding="utf-8")

    def _take_lock(self) -> None:
        lock = (self.path / LOCK).open("w", encoding="utf-8")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise CheckpointError(
                f"--output_dir {self.path}: another run is writing here; give another directory"
            ) from None
        except OSError:  # a file system without locks
            lock.close()
            return
        self._lock = lock

    def writing(self) -> contextlib.AbstractContextManager[None]:
        """Turn what the system refuses to write here into one line, see `refusals`."""
        return refusals(f"--output_dir {self.path}")

    def set_status(self, state: str, **facts: Any) -> None:
        """Write `status.json`."""
        self.write("status.json", {"state": state, **facts})

    def write(self, name: str, content: Any) -> None:
        """Write a JSON file."""
        if is_main():
            with self.writing():
                write_json(self.path / name, content)

    def record(self, values: dict[str, Any]) -> None:
        """Append one line to `metrics.jsonl`."""
        if self._metrics is not None:
            with self.writing():
                self._metrics.write(json.dumps(values) + "\n")
                self._metrics.flush()

    def records(self) -> list[dict[str, Any]]:
        """Read `metrics.jsonl` back; a last line that a kill cut off does not count."""
        path = self.path / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        try:
            return [json.loads(line) for line in lines]
        except ValueError as error:
            raise CheckpointError(
                f"{path}: is damaged ({error}); start over with --overwrite_output_dir True"
            ) from None

    def close(self) -> None:
        """Close the files that are open for writing, and let others write here."""
        for file in (self._metrics, self._lock):
            if file is not None:
                with contextlib.suppress(OSError):
                    file.close()
        self._metrics = self._lock = None
