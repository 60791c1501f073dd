"""What `predict` keeps beside its parts, and whether a file of it is what was written.

In: JSON that a run has left. Out: which summary was asked for, or an error that names the file.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from qlora_moderation.errors import CheckpointError
from qlora_moderation.metadata import read_json


@dataclasses.dataclass(frozen=True)
class Asked:
    """Which summary is asked for; the rows' bytes do not depend on it.

    Attributes:
        group_by: columns whose values get a flagged proportion each.
        replicates: draws for the intervals.
    """

    group_by: tuple[str, ...]
    replicates: int

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready mapping."""
        return {"group_by": list(self.group_by), "replicates": self.replicates}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Asked:
        """Read what `to_dict` gave."""
        return cls(tuple(values["group_by"]), values["replicates"])

    @classmethod
    def read(cls, path: Path) -> Asked:
        """Read a file.

        Raises:
            CheckpointError: it is damaged.
        """
        values = read_json(path)
        if not is_asked(values):
            raise damaged(path)
        return cls.from_dict(values)


def damaged(path: Path) -> CheckpointError:
    """Return the error on a damaged file among the parts of a run."""
    return CheckpointError(f"{path}: is damaged; remove {path.parent}, and score its blocks again")


def is_asked(values: Any) -> bool:
    """Say whether these say which summary was asked for."""
    return (
        isinstance(values, dict)
        and isinstance(values.get("group_by"), list)
        and all(isinstance(column, str) for column in values["group_by"])
        and isinstance(values.get("replicates"), int)
        and values["replicates"] >= 0
    )


def is_run(facts: Any) -> bool:
    """Say whether these may be the facts of a run; whether they are is said by their fingerprint."""
    return isinstance(facts, dict) and all(
        isinstance(facts.get(name), kind) for name, kind in (("inputs", list), ("options", dict))
    )


def is_summary(found: Any) -> bool:
    """Say whether a `summary.json` is one that a run has written."""
    return (
        isinstance(found, dict)
        and is_run(found.get("run"))
        and isinstance(found.get("outputs"), dict)
        and all(isinstance(facts, dict) and "bytes" in facts for facts in found["outputs"].values())
        and is_asked(found.get("summary"))
    )
