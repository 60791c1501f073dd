"""Trains the same steps in many ways and measures how far they differ: processes, sharding, token budget, recomputation."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Iterable
from pathlib import Path

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


def options(backbone: Path, data: Path, output: Path, processes: int, **more) -> dict:
    """The settings of `make_config`, with the same pairs a step for any number of processes."""
    settings = {"per_device_train_batch_size": GLOBAL_BATCH // processes, "max_steps": 10} | more
    return dataclasses.asdict(make_config(backbone, data, output, **settings))


def losses(run: Path) -> list[float]:
    """Return the losses of a run, step by step."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


def measure(
    method: str,
    cells: Iterable[Cell],
    backbone: Path,
    data: Path,
    texts: tuple[list[str], list[str]],
    folder: Path,
    steps: int,
    until: float = 1e18,
) -> tuple[dict[str, tuple[float, float]], list[str]]:
    """Train every cell and compare it with `REFERENCE`.

    Returns:
        By cell: the largest relative difference of a step's loss, and the largest difference of a logit of `texts` after the
        last step. Then the cells that `until` (a `time.monotonic()`) left no time for.
    """
    waiting = [REFERENCE, *(cell for cell in cells if cell != REFERENCE)]
    done: list[Cell] = []
    for processes in sorted({cell.processes for cell in waiting}):
        group = [cell for cell in waiting if cell.processes == processes]
        while group and time.monotonic() < until:
            share, group = group[:6], group[6:]
            cases = []
            for cell in share:
                how = {"sharding": cell.sharding, "max_tokens_per_micro_batch": cell.budget, "method": method}
                how |= {"gradient_checkpointing": cell.recompute, "max_steps": steps, "learning_rate": 1e-3}
                cases.append(("learn", {"options": options(backbone, data, folder / cell.name, processes, **how)}))
            run_ranks(processes, rank_cases.run_all, cases, timeout=600.0)
            done += share
    weights = "model" if method == "full" else "adapter"

    def read(cell: Cell) -> tuple[np.ndarray, np.ndarray]:
        classifier = load_classifier(folder / cell.name / weights)
        return np.array(losses(folder / cell.name)), score_pairs(classifier, *texts).logits

    expected_losses, expected_logits = read(REFERENCE)
    differences = {}
    for cell in done:
        own_losses, own_logits = read(cell)
        relative = np.abs(own_losses - expected_losses) / expected_losses
        differences[cell.name] = float(relative.max()), float(np.abs(own_logits - expected_logits).max())
    return differences, [cell.name for cell in waiting if cell not in done]
