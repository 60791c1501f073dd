"""Trains the same steps in many ways and measures how far they differ: processes, sharding, token budget, recomputation."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

import numpy as np
import rank_cases
from conftest import make_config
from ranks import run_ranks

from qlora_moderation.classifier import load_classifier
from qlora_moderation.scoring import score_pairs

GLOBAL_BATCH = 16
PLACES = ((1, "none"), (2, "ddp"), (2, "fsdp"), (4, "ddp"), (4, "fsdp"))
BUDGETS = (128, 512, 4096)
METHODS = ("lora", "qlora", "full")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One way to compute a step."""

    processes: int
    sharding: str
    budget: int
    recompute: bool

    @property
    def name(self) -> str:
        return f"{self.processes}-{self.sharding}-{self.budget}-{'recompute' if self.recompute else 'keep'}"


REFERENCE = Cell(1, "none", 4096, False)
FULL_GRID = [
    Cell(*place, budget, recompute) for place, budget, recompute in itertools.product(PLACES, BUDGETS, (False, True))
]
COVERING = [  # every pair of (processes and sharding, budget, recomputation), beside the reference
    Cell(*place, budget, bool((i + j) % 2))
    for (i, place), (j, budget) in itertools.product(enumerate(PLACES[1:]), enumerate(BUDGETS))
]
ONCE = [  # each (processes and sharding), with every budget and with and without recomputation somewhere
    Cell(*place, BUDGETS[i % len(BUDGETS)], bool(i % 2)) for i, place in enumerate(PLACES[1:])
]


def options(backbone: Path, data: Path, output: Path, processes: int, **more) -> dict:
    """The settings of `make_config`, with the same pairs a step for any number of processes."""
    settings = {"per_device_train_batch_size": GLOBAL_BATCH // processes, "max_steps": 10} | more
    return dataclasses.asdict(make_config(backbone, data, output, **settings))


def losses(run: Path) -> list[float]:
    """Return the losses of a run, step by step."""
    return _column(run, "loss")


def norms(run: Path) -> list[float]:
    """Return the gradient norms of a run, step by step: AdamW hides a gradient that is too large by a factor, they do not."""
    return _column(run, "grad_norm")


def _column(run: Path, key: str) -> list[float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record[key] for record in records if key in record]


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far a cell is from the reference: relative for a step's loss and gradient norm, absolute for a logit."""

    loss: float
    norm: float
    logit: float

    ALLOWED: ClassVar[dict[str, float]] = {"loss": 1e-5, "norm": 1e-4, "logit": 1e-4}

    @property
    def fails(self) -> bool:
        return any(not getattr(self, name) <= limit for name, limit in self.ALLOWED.items())


def measure(
    method: str,
    cells: Iterable[Cell],
    backbone: Path,
    data: Path,
    texts: tuple[list[str], list[str]],
    folder: Path,
    steps: int,
    until: float = 1e18,
) -> tuple[dict[str, Difference], list[str]]:
    """Train every cell and compare it with `REFERENCE`.

    Returns:
        The largest differences of each cell, logits being those of `texts` after the last step. Then the cells that `until` (a
        `time.monotonic()`) left no time for.
    """
    waiting = [REFERENCE, *(cell for cell in cells if cell != REFERENCE)]
    done: list[Cell] = []
    for processes in sorted({cell.processes for cell in waiting}):
        group = [cell for cell in waiting if cell.processes == processes]
        while group and time.monotonic() < until:
            share, group = group[:3], group[3:]
            cases = []
            for cell in share:
                how = {"sharding": cell.sharding, "max_tokens_per_micro_batch": cell.budget, "method": method}
                how |= {"gradient_checkpointing": cell.recompute, "max_steps": steps, "learning_rate": 1e-3}
                cases.append(("learn", {"options": options(backbone, data, folder / cell.name, processes, **how)}))
            run_ranks(processes, rank_cases.run_all, cases, timeout=600.0)
            done += share
    weights = "model" if method == "full" else "adapter"

    def read(cell: Cell) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        run = folder / cell.name
        logits = score_pairs(load_classifier(run / weights), *texts).logits
        return np.array(losses(run)), np.array(norms(run)), logits

    loss, norm, logits = read(REFERENCE)
    differences = {}
    for cell in done:
        own = read(cell)
        relative = [float((np.abs(a - b) / b).max()) for a, b in zip(own[:2], (loss, norm), strict=True)]
        differences[cell.name] = Difference(*relative, float(np.abs(own[2] - logits).max()))
    return differences, [cell.name for cell in waiting if cell not in done]
