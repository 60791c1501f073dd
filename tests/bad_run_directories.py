"""Bad run directories: places that hold other things, take no files, or are in use."""

from __future__ import annotations

import fcntl
from pathlib import Path

from workbench import Bench, case


@case("--output_dir {folder}/out: is no run directory and not empty; give another directory")
def a_run_directory_that_holds_other_things(bench):
    (bench.folder / "out").mkdir()
    bench.write("out/thesis.txt", "years of work")
    return bench.train()


@case("--output_dir {folder}/out: ", "give another directory")
def a_run_directory_that_is_a_file(bench):
    bench.write("out", "")
    return bench.train()


@case("--output_dir /proc/run: cannot be ")
def a_run_directory_on_a_disk_that_takes_no_files(bench):
    return bench.train(output_dir="/proc/run")


@case("--output_dir {folder}/out: cannot be written (no permission in {folder})")
def a_run_directory_without_permission(bench):
    bench.monkeypatch.setattr("qlora_moderation.start.os.access", lambda place, mode: False)  # root may write anywhere
    return bench.train()


@case("--output_dir {folder}/out: cannot be written (", "make room, and give the same command again")
def a_run_directory_on_a_full_disk(bench):
    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    bench.monkeypatch.setattr("qlora_moderation.run_directory.write_text", full)
    return bench.train()


def _hold(bench: Bench, lock: Path) -> None:
    lock.parent.mkdir(parents=True)
    fcntl.flock(bench.at_end.enter_context(lock.open("w")), fcntl.LOCK_EX)


@case("--output_dir {folder}/out: another run is writing here; give another directory")
def a_run_directory_that_a_live_run_holds(bench):
    _hold(bench, bench.folder / "out" / ".lock")
    return bench.train()


@case("--output_dir {folder}/out: another run is writing here; give another directory")
def an_output_that_a_live_prediction_holds(bench):
    _hold(bench, bench.folder / "out" / "parts" / ".writer-1-of-1")
    return bench.predict()


@case("--resume {folder}/out/checkpoints/step-000007: is neither auto nor never nor a directory under checkpoints/")
def a_checkpoint_that_is_not_there(bench):
    return bench.train(resume=bench.folder / "out" / "checkpoints" / "step-000007")


@case("--output_dir {folder}/out: exists; give another directory, or --overwrite")
def a_merge_over_something(bench):
    (bench.folder / "out").mkdir()
    return bench.merge()


@case("--output_dir {folder}/out: holds other files than an evaluation's; give another directory")
def an_evaluation_over_something(bench):
    (bench.folder / "out").mkdir()
    bench.write("out/thesis.txt", "years of work")
    return bench.evaluate()


@case("{folder}/loop", "give another")
def a_link_that_leads_to_itself(bench):
    (bench.folder / "loop").symlink_to("loop")
    return bench.predict(output_dir=bench.folder / "loop")


@case("--output_dir: is empty, as where a shell's variable is not set; give where one file for each input goes")
def an_output_without_a_name(bench):
    return bench.predict(output_dir="")


@case("--input: is empty, as where a shell's variable is not set; give files")
def an_input_without_a_name(bench):
    return bench.predict(input="")
