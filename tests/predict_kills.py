"""Kills runs of predict again and again and starts them again; in the end their bytes must be an unbroken run's."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import rank_cases
from kills import STARTING, Tally, wait_for_instant
from ranks import collect, start_ranks

from qlora_moderation.combine import combine
from qlora_moderation.prediction_config import CombineConfig

SETTINGS = {"one process": (1, None), "two processes": (2, None), "two shards": (1, ("1/2", "2/2"))}
"""Processes of torchrun, and shards that run beside each other."""


def write_inputs(rows: list[dict[str, Any]], folder: Path) -> Path:
    """Write rows with their numbers as JSON Lines, an array, and Parquet."""
    folder.mkdir()
    rows = [{"id": i, "prompt": row["prompt"], "response": f"{row['response']} {i}"} for i, row in enumerate(rows * 4)]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "b.json").write_text(json.dumps(rows[:200], indent=1), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(rows[:400]), folder / "c.parquet", row_group_size=150)
    return folder


def campaign(setting: str, options: dict[str, Any], kills: int, folder: Path, seed: int, until: float = 1e18) -> Tally:
    """Kill runs `kills` times, at random instants and while a file is being written.

    Args:
        setting: of `SETTINGS`.
        options: of predict, without the output directory.
        kills: how often.
        folder: where the outputs go.
        seed: of the instants.
        until: `time.monotonic()` after which no more run is begun.

    Raises:
        AssertionError: a run ends with other bytes than the unbroken one.
    """
    rng, tally = random.Random(seed), Tally()
    unbroken = folder / "unbroken"
    started = time.monotonic()
    collect(start_ranks(1, rank_cases.predict_rows, options | {"output_dir": str(unbroken)}))
    seconds = time.monotonic() - started
    while tally.kills < kills and time.monotonic() < until:
        run = folder / f"run-{tally.runs}"
        settings = options | {"output_dir": str(run)}
        finished = False
        while not finished:
            groups = _start(setting, settings)
            ranks = [rank for group in groups for rank in group]
            finished = tally.kills >= kills or not _kill_some(ranks, run, seconds, rng, tally)
            if finished:
                for group in groups:
                    collect(group)
            for process, _ in ranks:
                process.join()
        if SETTINGS[setting][1]:
            combine(CombineConfig(str(run)), rank_cases.silent)
        compare(unbroken, run)
        tally.runs += 1
    return tally


def _start(setting: str, options: dict[str, Any]) -> list[list[Any]]:
    processes, shards = SETTINGS[setting]
    if shards is None:
        return [start_ranks(processes, rank_cases.predict_rows, options)]
    return [start_ranks(1, rank_cases.predict_rows, options | {"shard": shard}) for shard in shards]


def _kill_some(ranks: list[Any], run: Path, seconds: float, rng: random.Random, tally: Tally) -> bool:
    """Kill all processes, or one of them first, at a random instant; say whether one was alive."""
    deadline = time.monotonic() + STARTING + rng.random() * seconds

    def is_writing() -> bool:
        return time.monotonic() > deadline - seconds / 2 and any(run.glob("parts/*/.[0-9o]*"))

    def is_alive() -> bool:
        return any(process.is_alive() for process, _ in ranks)

    chosen = is_writing if rng.random() < 0.5 else None
    writing = wait_for_instant(is_alive, deadline, chosen, rng.random() * 0.003)
    alive = [process for process, _ in ranks if process.is_alive()]
    for process in rng.sample(alive, len(alive)):
        process.kill()
        time.sleep(rng.choice([0, 0.02]))
    tally.kills += bool(alive)
    tally.while_writing += writing and bool(alive)
    return bool(alive)


def compare(unbroken: Path, run: Path) -> None:
    """Compare every file but the figure, and look for what should not be there.

    Raises:
        AssertionError: they differ.
    """
    names = sorted(str(path.relative_to(run)) for path in run.rglob("*"))
    assert names == sorted(str(path.relative_to(unbroken)) for path in unbroken.rglob("*")), names
    for path in unbroken.rglob("*"):
        if path.is_file() and path.suffix != ".png":
            assert path.read_bytes() == (run / path.relative_to(unbroken)).read_bytes(), path.name
