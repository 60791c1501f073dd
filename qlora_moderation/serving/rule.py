"""The thresholds in use, and their change without a restart.

In: `thresholds.json` beside the weights. Out: the rule that every answer names by its version.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from qlora_moderation.errors import CheckpointError
from qlora_moderation.taxonomy import Taxonomy
from qlora_moderation.thresholds import THRESHOLDS_FILE, Thresholds, load_thresholds


@dataclasses.dataclass(frozen=True)
class Rule:
    """Thresholds with the words that an answer says of them.

    Attributes:
        thresholds: what judges.
        version: the first twelve digits of a SHA-256 over their content.
        shown: version, rule and thresholds on the calibrated scale, on which scores and risk are given.
    """

    thresholds: Thresholds
    version: str
    shown: dict[str, Any]

    @classmethod
    def of(cls, thresholds: Thresholds, taxonomy: Taxonomy) -> Rule:
        """Wrap thresholds."""
        content = thresholds.to_dict(taxonomy)
        version = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
        categories = {name: values["calibrated"] for name, values in content["categories"].items()}
        shown = {"version": version, "flagged": thresholds.flagged_threshold, "rule": thresholds.rule}
        return cls(thresholds, version, {**shown, "categories": categories})


class RuleFile:
    """`thresholds.json` of a model as it changes on disk."""

    def __init__(self, directory: Path, taxonomy: Taxonomy, thresholds: Thresholds) -> None:
        self.rule = Rule.of(thresholds, taxonomy)
        self._directory = directory
        self._taxonomy = taxonomy
        self._existed = os.path.lexists(directory / THRESHOLDS_FILE)
        self._seen = self._look()

    def has_changed(self) -> bool:
        """Say whether the file is another than at the last reading."""
        return self._look() != self._seen

    def read(self) -> bool:
        """Read the file; say whether the rule is another now.

        Raises:
            CheckpointError: the file is broken or gone; the rule stays.
        """
        self._seen = self._look()
        if self._existed and self._seen is None:
            raise CheckpointError(f"{self._directory / THRESHOLDS_FILE}: is gone; put it back")
        rule = Rule.of(load_thresholds(self._directory, self._taxonomy), self._taxonomy)
        self._existed = self._seen is not None
        changed = rule.version != self.rule.version
        self.rule = rule
        return changed

    def _look(self) -> tuple[int, int, int] | None:
        try:
            found = (self._directory / THRESHOLDS_FILE).stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino
