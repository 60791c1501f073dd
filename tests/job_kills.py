"""Kills merge, evaluate and tune again and again; what stands is whole, inputs are untouched, the next start ends as ever."""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import rank_cases
from kills import Tally, wait_for_instant
from ranks import collect, start_ranks

Content = dict[str, bytes]


class Job(NamedTuple):
    """One job.

    Attributes:
        run: function of `rank_cases`.
        options: of a run in the given place.
        result: directory that appears whole in that place; None: single files in the model's own directory.
    """

    run: Callable[[dict[str, Any]], None]
    options: Callable[[Path], dict[str, Any]]
    result: str | None


def list_jobs(rows: Path) -> dict[str, Job]:
    """Return the jobs; each works on the copy of an adapter in `model/` of its place, and on rows that are new to it."""
    scoring = {"eval_dataset": str(rows), "use_cpu": True}

    def merge(place: Path) -> dict[str, Any]:
        merged = {"output_dir": str(place / "merged"), "overwrite": True, "use_cpu": True}
        return {"adapter_path": str(place / "model")} | merged

    def evaluate(place: Path) -> dict[str, Any]:
        return {
            "model_path": str(place / "model"),
            "output_dir": str(place / "judged"),
            "bootstrap_replicates": 100,
        } | scoring

    def tune(place: Path) -> dict[str, Any]:
        return {"model_path": str(place / "model"), "min_positives": 1} | scoring

    return {
        "merge": Job(rank_cases.merge_model, merge, "merged"),
        "evaluate": Job(rank_cases.evaluate_model, evaluate, "judged"),
        "tune": Job(rank_cases.tune_thresholds, tune, None),
    }


def read_files(folder: Path) -> Content:
    """Return the bytes of every file below a folder, hidden ones as well."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def campaign(job: Job, adapter: Path, kills: int, folder: Path, seed: int, until: float = 1e18) -> Tally:
    """Kill a job `kills` times, over nothing and over an earlier result in turn.

    Every second kill falls on a random instant, every other one on one of the job's operations on files, just before it is
    done: on each of them once before any is met again.

    Args:
        job: of `list_jobs`.
        adapter: copied for every run.
        kills: how often.
        folder: where the runs go.
        seed: of the instants.
        until: `time.monotonic()` after which no more run is begun.

    Raises:
        AssertionError: something half-written stands where a result belongs, an input changed, or a run ends otherwise.
    """
    rng, tally = random.Random(seed), Tally()
    unbroken = _prepare(adapter, folder / "unbroken")
    started = time.monotonic()
    # a second run finds the first one's result
    operations = [collect(_start(job, unbroken, None))[0] for _ in range(2)]
    seconds, wanted = (time.monotonic() - started) / 2, read_files(unbroken)
    untried: list[list[int]] = [[] for _ in operations]
    while tally.kills < kills and time.monotonic() < until:
        place = _prepare(adapter, folder / f"run-{tally.runs}")
        before = read_files(place)
        for count, left in zip(operations, untried, strict=True):
            finished = False
            while not finished:
                alone, number = tally.kills >= kills, None
                if not alone and tally.kills % 2 == 0:
                    left += [] if left else rng.sample(range(count), count)
                    number = left.pop()
                ranks = _start(job, place, number)
                if not alone and number is None:
                    wait_for_instant(ranks[0][0].is_alive, time.monotonic() + rng.random() * 1.2 * seconds, None, 0)
                    ranks[0][0].kill()
                finished = not _is_killed(ranks[0][0], tally, number is not None)
                if finished:
                    collect(ranks)
                _check(job, place, before, wanted)
            before = read_files(place)
        assert read_files(place) == wanted, sorted(read_files(place).keys() ^ wanted.keys())
        tally.runs += 1
    return tally


def _prepare(adapter: Path, place: Path) -> Path:
    shutil.copytree(adapter, place / "model")
    return place


def _start(job: Job, place: Path, number: int | None) -> list[Any]:
    return start_ranks(1, rank_cases.run_until_operation, job.run, job.options(place), str(place), number)


def _is_killed(process: Any, tally: Tally, while_writing: bool) -> bool:
    """Wait for the end of a process and say whether it was a kill."""
    process.join()
    killed = process.exitcode == -signal.SIGKILL
    tally.kills += killed
    tally.while_writing += killed and while_writing
    return bool(killed)


def _check(job: Job, place: Path, before: Content, wanted: Content) -> None:
    """Look at what a kill left: every file in its place is an old or a finished one.

    Raises:
        AssertionError: one is not.
    """
    found = {name: content for name, content in read_files(place).items() if not _is_hidden(name)}
    moved = {*before.values(), *wanted.values()} if job.result is None else set()  # tune keeps what it replaces
    for name, content in found.items():
        assert content in moved or content in (before.get(name), wanted.get(name)), f"{name} is half-written"
    lost = before.keys() - found.keys()
    if lost:  # between the two renames of a replacement the old result stands beside its place, and is put back
        assert job.result is not None and all(name.startswith(f"{job.result}/") for name in lost), lost
        aside = read_files(place / f".{job.result}.old")
        assert {f"{job.result}/{name}": content for name, content in aside.items()} == {n: before[n] for n in lost}
    if job.result is not None and (place / job.result).exists():
        whole = {name for name in found if name.startswith(f"{job.result}/")}
        assert whole == {name for name in wanted if name.startswith(f"{job.result}/")}


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in Path(name).parts)
