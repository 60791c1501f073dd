"""Kills a training run again and again and lets it go on, until it has finished; then compares it with an unbroken run."""

from __future__ import annotations

import dataclasses
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rank_cases
import torch
from ranks import collect, start_ranks
from safetensors.torch import load_file

from qlora_moderation.checkpoint import find_damage

STARTING = 0.5  # seconds before which a run has nothing to lose


@dataclasses.dataclass
class Tally:
    """What a campaign did."""

    kills: int = 0
    while_writing: int = 0
    runs: int = 0


def campaign(
    options: Callable[[Path], dict[str, Any]], processes: int, kills: int, folder: Path, seed: int, until: float = 1e18
) -> Tally:
    """Kill runs of `processes` processes `kills` times, at random instants and in the middle of writing.

    Args:
        options: the configuration of a run in the given directory.
        processes: W.
        kills: how often.
        folder: where the runs go.
        seed: of the instants.
        until: `time.monotonic()` after which no more run is begun.

    Raises:
        AssertionError: a checkpoint cannot be read, or a run ends otherwise than the unbroken one.
    """
    rng, tally = random.Random(seed), Tally()
    unbroken = folder / "unbroken"
    started = time.monotonic()
    collect(start_ranks(processes, rank_cases.learn, options(unbroken)))
    seconds = time.monotonic() - started
    while tally.kills < kills and time.monotonic() < until:
        run = folder / f"run-{tally.runs}"
        finished = False
        while not finished:
            ranks = start_ranks(processes, rank_cases.learn, options(run))
            # the last attempt of a campaign is left alone
            finished = tally.kills >= kills or not _kill_once(ranks, run, seconds, rng, tally)
            if finished:
                collect(ranks)
            for process, _ in ranks:
                process.join()
            check_checkpoints(run)
        compare(unbroken, run)
        tally.runs += 1
    return tally


def _kill_once(ranks: list[Any], run: Path, seconds: float, rng: random.Random, tally: Tally) -> bool:
    """Kill all ranks at a random instant, or some instant into the writing of something; say whether they were alive."""
    deadline = time.monotonic() + STARTING + rng.random() * seconds
    is_writing = (lambda: any(run.glob("**/.*.unfinished"))) if rng.random() < 0.5 else None
    writing = wait_for_instant(ranks[0][0].is_alive, deadline, is_writing, rng.random() * 0.02)
    if not all(process.is_alive() for process, _ in ranks):
        return False
    for process, _ in rng.sample(ranks, len(ranks)):
        process.kill()
    tally.kills += 1
    tally.while_writing += writing
    return True


def wait_for_instant(
    is_alive: Callable[[], bool], deadline: float, is_writing: Callable[[], bool] | None, delay: float
) -> bool:
    """Wait until a deadline, or until some seconds into the writing of something; say whether that was met."""
    while time.monotonic() < deadline and is_alive():
        if is_writing is not None and is_writing():
            time.sleep(delay)
            return True
        time.sleep(0.0005)
    return False


def check_checkpoints(run: Path) -> None:
    """Read every checkpoint that stands: none may be damaged.

    Raises:
        AssertionError: one is.
    """
    for directory in (run / "checkpoints").glob("step-*"):
        assert find_damage(directory) is None, directory
        for path in directory.glob("*.safetensors"):
            assert load_file(path), path


def compare(unbroken: Path, run: Path) -> None:
    """Compare weights bit for bit, and records but for the times.

    Raises:
        AssertionError: they differ.
    """
    for weights in [*unbroken.glob("adapter/*.safetensors"), *unbroken.glob("model/*.safetensors")]:
        one, other = load_file(weights), load_file(run / weights.relative_to(unbroken))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one), run
    assert without_times(unbroken) == without_times(run)


def without_times(run: Path) -> list[dict[str, Any]]:
    """Return the records of a run without the fields that hold times."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key != "elapsed_seconds"} for record in records]
