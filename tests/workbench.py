"""A folder to do damage in, and the table that kinds of bad input are entered into.

Each kind is a function that makes the damage and returns the command line that meets it; `CASES` maps its name to (the part it
belongs to, the function, what the answer must hold).
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest


class Bench:
    """A folder to do damage in, and command lines that would work without it.

    Args:
        folder: empty.
        rows: labelled rows.
        llama: directory of a small backbone.
        adapters: method -> directory of trained weights.
        monkeypatch: undone behind the case.
    """

    def __init__(
        self, folder: Path, rows: list[dict], llama: Path, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.folder, self.rows, self.llama, self.adapters = folder, rows, llama, adapters
        self.monkeypatch = monkeypatch
        self.at_end = contextlib.ExitStack()

    def write(self, name: str, content: bytes | str) -> Path:
        """Write a file into the folder."""
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def lines(self, change: Callable[[dict[str, Any]], Any] | None = None) -> str:
        """Return eight rows as JSON Lines, the third of them changed."""
        rows = json.loads(json.dumps(self.rows[:8]))
        if change is not None:
            change(rows[2])
        return "".join(map(self.as_line, rows))

    @staticmethod
    def as_line(row: dict[str, Any]) -> str:
        """Return a row as a line of JSON Lines."""
        return json.dumps(row) + "\n"

    def data(self, content: bytes | str | None = None, name: str = "rows.jsonl") -> Path:
        """Write rows."""
        return self.write(name, self.lines() if content is None else content)

    def train(self, data: object = None, model: object = None, **flags: object) -> list[str]:
        """Return the command line of a short run."""
        settings = {
            "model_name_or_path": model or self.llama, "train_data_name_or_path": data or self.data(), "max_steps": 1,
            "max_length": 128, "output_dir": self.folder / "out", "use_cpu": True, "eval_strategy": "no", "cache_dir": "none",
        }  # fmt: skip
        return ["train", *_flags(settings | flags)]

    def evaluate(self, model: object = None, data: object = None, **flags: object) -> list[str]:
        """Return the command line of an evaluation."""
        settings = {"model_path": model or self.adapters["lora"], "eval_dataset": data or self.data()}
        return ["evaluate", *_flags(settings | {"output_dir": self.folder / "out", "use_cpu": True} | flags)]

    def predict(self, data: object = None, **flags: object) -> list[str]:
        """Return the command line of a prediction."""
        settings = {"model_path": self.adapters.get("lora"), "input": data or self.data()}
        return ["predict", *_flags(settings | {"output_dir": self.folder / "out", "use_cpu": True} | flags)]

    def tune(self, model: object, data: object) -> list[str]:
        """Return the command line of a tuning."""
        return ["tune", *_flags({"model_path": model, "eval_dataset": data, "use_cpu": True})]

    def merge(self, adapter: Path | None = None, **flags: object) -> list[str]:
        """Return the command line of a merge."""
        settings = {
            "adapter_path": adapter or self.adapters["lora"],
            "output_dir": self.folder / "out",
            "use_cpu": True,
        }
        return ["merge", *_flags(settings | flags)]

    def config(self, text: str, **flags: object) -> list[str]:
        """Return the command line of a run with a YAML file."""
        return self.train(config=self.write("run.yaml", text), **flags)

    def backbone(self) -> Path:
        """Return a copy of the backbone to be damaged."""
        return Path(shutil.copytree(self.llama, self.folder / "backbone"))

    def model(self, method: str = "lora") -> Path:
        """Return a copy of trained weights to be damaged."""
        return Path(shutil.copytree(self.adapters[method], self.folder / "model"))


def _flags(settings: dict[str, object]) -> list[str]:
    return [word for name, value in settings.items() if value is not None for word in (f"--{name}", str(value))]


class Case(NamedTuple):
    """One kind of bad input: `words` stand in the answer, where `{folder}` is the folder of the bench."""

    part: str
    damage: Callable[[Bench], list[str]]
    words: tuple[str, ...]


CASES: dict[str, Case] = {}


def case(*words: str) -> Callable[[Callable[[Bench], list[str]]], Callable[[Bench], list[str]]]:
    """Enter a function into the table; its part is what its module is called after `bad_`."""

    def enter(damage: Callable[[Bench], list[str]]) -> Callable[[Bench], list[str]]:
        name, part = damage.__name__.replace("_", " "), damage.__module__.removeprefix("bad_").replace("_", " ")
        assert name not in CASES, name
        CASES[name] = Case(part, damage, words)
        return damage

    return enter
