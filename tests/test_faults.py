"""Faults of the machine under every job: a kill, a full disk, no memory left, a hub that goes; nothing lost or half-written."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from fake_hub import Hub
from job_kills import campaign, list_jobs, read_files
from workbench import Bench

from qlora_moderation.cli import main
from qlora_moderation.sample import write_sample


@pytest.fixture(scope="module")
def new_rows(tmp_path_factory):
    """Rows that no model here was trained on."""
    return write_sample(tmp_path_factory.mktemp("new"), seed=1)["combinations"]


@pytest.mark.parametrize("name", ["merge", "evaluate", "tune"])
def test_a_killed_job_leaves_whole_files_and_ends_as_ever(name, runs, new_rows, tmp_path):
    tally = campaign(list_jobs(new_rows)[name], runs["lora"].weights, 2, tmp_path, seed=3)
    assert tally.kills == 2 and tally.while_writing and tally.runs >= 1


def test_what_a_kill_left_beside_a_result_is_cleared_away(bench, new_rows):
    left = bench.folder / ".out.unfinished"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half of it")
    assert main(list_commands(bench, new_rows)["merge"]) == 0
    assert not left.exists() and not (bench.folder / "out" / ".out.unfinished").exists()


def test_what_a_killed_writer_left_beside_a_file_is_cleared_away_and_in_nobodys_way(bench, new_rows):
    commands, out = list_commands(bench, new_rows), bench.folder / "out"
    for job, name in (("merge", ".thresholds.json.7"), ("evaluate", ".report.md.7")):
        assert main(commands[job]) == 0
        (out / name).write_bytes(b"half of it")
        assert main([*commands[job], *(["--overwrite", "True"] if job == "merge" else [])]) == 0
        assert not (out / name).exists()
        shutil.rmtree(out) if job == "merge" else None
    left, busy = out / ".report.md.7", out / ".report.md.8"
    left.touch()
    with busy.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert main(["report", "--evaluation_dir", str(out)]) == 0
        assert busy.exists() and not left.exists()


@contextlib.contextmanager
def full_disk(room: int):
    """Let no file of this process grow beyond some bytes, as a quota would."""
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


def list_commands(bench: Bench, new_rows: Path) -> dict[str, list[str]]:
    """Return a command line of each job that writes; combine has two shards to put together."""
    few = bench.data("".join(new_rows.read_text(encoding="utf-8").splitlines(keepends=True)[:48]), "new.jsonl")
    model = bench.model()
    return {
        "train": bench.train(few, max_steps=2, save_strategy="steps", save_steps=1),
        "merge": bench.merge(model),
        "evaluate": bench.evaluate(model, few, bootstrap_replicates=20),
        "tune": [*bench.tune(model, few), "--min_positives", "1"],
        "predict": bench.predict(few, block_size=8, bootstrap_replicates=20),
        "combine": ["combine", "--output_dir", str(bench.folder / "out")],
        "report": ["report", "--evaluation_dir", str(bench.folder / "out")],
        "audit": ["audit", "--train_data_name_or_path", str(few), "--output_dir", str(bench.folder / "out")],
        "backbone": [
            *("backbone", "--train_data_name_or_path", str(few), "--output_dir", str(bench.folder / "out")),
            *("--steps", "0", "--hidden_size", "64", "--num_layers", "1", "--vocab_size", "512"),
        ],
    }


JOBS = ("train", "merge", "evaluate", "tune", "predict", "combine")
SMALL_JOBS = ("report", "audit", "backbone")


def prepare(job: str, bench: Bench, commands: dict[str, list[str]], again: bool) -> None:
    """Run what a job needs before it, or the job itself, so that there is an earlier result."""
    earlier = [commands["evaluate"]] if job == "report" else []
    if job == "combine":
        earlier = [[*commands["predict"], "--shard", shard] for shard in ("1/2", "2/2")]
    for command in [*earlier, *([commands[job]] if again else [])]:
        assert main(command) == 0


@pytest.fixture
def bench(rows, llama, runs, tmp_path, monkeypatch):
    return Bench(tmp_path, rows, llama, {"lora": runs["lora"].weights}, monkeypatch)


@pytest.mark.parametrize("room", [0, 2000, 30_000])
@pytest.mark.parametrize("job", [*JOBS, *SMALL_JOBS])
def test_a_full_disk_is_named_and_the_same_command_ends_as_ever_once_there_is_room(job, room, bench, new_rows, capsys):
    """Over nothing, or over the job's own earlier result where it replaces that."""
    commands = list_commands(bench, new_rows)
    command = [*commands[job], *(["--overwrite", "True"] if job == "merge" else [])]
    prepare(job, bench, commands, again=job in ("merge", "evaluate", "tune", "report", "audit") and room != 2000)
    before = read_files(bench.folder)
    capsys.readouterr()
    with full_disk(room):
        code = main(command)
    error = capsys.readouterr().err
    if code:  # the small results of some jobs find room
        words = r"cannot be written \(File too large\); make room, and give the same command again"
        assert code == 2 and re.fullmatch(rf"error: [^\n]*{re.escape(str(bench.folder))}[^\n]*{words}\n", error), error
    assert code == 2 or room
    found = read_files(bench.folder)
    assert all(found.get(name) == content for name, content in before.items()) or code == 0
    assert main(command) == 0, capsys.readouterr().err
    assert not [
        name for name in read_files(bench.folder) if ".unfinished" in name or re.search(r"/\.[^/]*\.\d+$", name)
    ]


@pytest.mark.parametrize(
    "error", [MemoryError("16 GiB"), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")]
)
@pytest.mark.parametrize("job", JOBS[:-1])
def test_memory_that_runs_out_is_said_in_a_line(job, error, bench, new_rows, monkeypatch, capsys):
    def fail(*arguments: Any, **options: Any) -> None:
        raise error

    command = list_commands(bench, new_rows)[job]
    before = read_files(bench.folder)
    with monkeypatch.context() as patch:
        patch.setattr("qlora_moderation.model.ModerationModel.forward", fail)
        assert main(command) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r"error: [^\n]*ran out of memory[^\n]*\n", said), said
    found = read_files(bench.folder)
    assert all(found.get(name) == content for name, content in before.items())
    assert not (bench.folder / "out").exists() or job == "predict"  # which has noted what it was going to do
    assert main(command) == 0, capsys.readouterr().err


def test_a_download_that_breaks_off_is_named_and_the_next_start_has_it_whole(llama, bench, monkeypatch, capsys):
    """And so is a file of the hub's cache that was damaged later: never another model instead."""
    constants = huggingface_hub.constants
    cache = bench.folder / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    with Hub(llama).running() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        command = bench.train(model="someone/tiny", dry_run=True)
        hub.cuts = True
        assert main(command) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: someone/tiny: its weights cannot be loaded (peer closed connection")
        assert error.endswith("check the network, and give the same command again")
        hub.cuts = False
        assert main(command) == 0
        (weights,) = [path for path in cache.rglob("blobs/*") if path.stat().st_size > 100_000]
        assert weights.read_bytes() == (llama / "model.safetensors").read_bytes()
        assert not list(cache.rglob("*.incomplete"))
        weights.write_bytes(weights.read_bytes()[:-1000])
        capsys.readouterr()
        assert main(command) == 2
        error = capsys.readouterr().err
        assert (
            "error: someone/tiny: its weights cannot be loaded (" in error and "once $HF_HOME/hub lacks them" in error
        )
        shutil.rmtree(cache)
        assert main(command) == 0
    assert not (bench.folder / "out").exists()


@pytest.fixture
def usual_signals():
    """Let signals do what they do in a terminal: a shell's background jobs, and what they start, ignore SIGINT."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("number", "code", "said"), [(signal.SIGTERM, 143, "stopped by SIGTERM"), (signal.SIGINT, 130, "interrupted")]
)
@pytest.mark.parametrize(
    ("job", "place"),
    [("merge", "merge.prove_merge"), ("evaluate", "evaluate.write_predictions"), ("tune", "tune.tune")],
)
def test_a_signal_ends_a_job_that_leaves_nothing_behind(
    job, place, number, code, said, bench, new_rows, usual_signals, monkeypatch, capsys
):
    def signalled(*arguments: Any, **options: Any) -> None:
        os.kill(os.getpid(), number)
        time.sleep(10)

    command = list_commands(bench, new_rows)[job]
    before, handler = read_files(bench.folder), signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(f"qlora_moderation.{place}", signalled)
    assert main(command) == code
    assert capsys.readouterr().err == f"{said}\n"
    assert read_files(bench.folder) == before and not (bench.folder / "out").exists()
    assert not list(bench.folder.glob(".*")) and signal.getsignal(signal.SIGTERM) is handler
