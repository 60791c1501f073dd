"""Experiment trackers, through accelerate's classes; `metrics.jsonl` always comes first.

In: the names of `--report_to`. Out: objects with `log` and `finish`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_moderation.config import TrainConfig
from qlora_moderation.distributed import is_main
from qlora_moderation.errors import ConfigError


def check_trackers(config: TrainConfig) -> None:
    """Refuse a tracker whose package is not installed, before anything is loaded or written.

    Raises:
        ConfigError: names the extra to install.
    """
    for name in config.report_to:
        if name != "none" and importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"--report_to {name} needs its package: pip install -c scripts/constraints.txt -e '.[{name}]'"
            )


class Trackers:
    """All trackers of a run, as one; rank 0 alone has any."""

    def __init__(self, config: TrainConfig) -> None:
        self._trackers: list[Any] = []
        names = [name for name in config.report_to if name != "none"]
        if not names or not is_main():
            return
        from accelerate import PartialState, tracking

        PartialState(cpu=config.use_cpu)
        classes = {"tensorboard": "TensorBoardTracker", "wandb": "WandBTracker", "trackio": "TrackioTracker"}
        run = Path(config.output_dir).name
        for name in names:
            arguments = {"logging_dir": config.output_dir} if name == "tensorboard" else {}
            tracker = getattr(tracking, classes[name])(run, **arguments)
            tracker.start() if hasattr(tracker, "start") else None
            settings = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in vars(config).items()}
            tracker.store_init_configuration(settings)
            self._trackers.append(tracker)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Send finite numbers to every tracker."""
        numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
        for tracker in self._trackers:
            tracker.log(numbers, step=step)

    def finish(self) -> None:
        """Close every tracker."""
        for tracker in self._trackers:
            tracker.finish()
