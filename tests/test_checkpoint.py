"""A run goes on where it stopped, or says why it does not."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_config
from kills import compare, without_times
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qlora_moderation.best import Best
from qlora_moderation.checkpoint import find_checkpoints
from qlora_moderation.errors import CheckpointError
from qlora_moderation.loop import Loop
from qlora_moderation.staging import replaced_whole
from qlora_moderation.taxonomy import Taxonomy
from qlora_moderation.train import train


class Killed(BaseException):
    """Stands for a kill: nothing in the library catches it."""


def silent(_: str) -> None:
    pass


def options(**more):
    return {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 3} | more


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_a_killed_run_ends_like_one_that_was_never_killed(method, llama, rows_file, tmp_path, monkeypatch):
    more = options(method=method, lora_dropout=0.1)
    unbroken = train(make_config(llama, rows_file, tmp_path / "unbroken", **more), silent)
    config = make_config(llama, rows_file, tmp_path / "killed", **more)
    whole_step = Loop.take_step
    for fatal in (4, 6):
        monkeypatch.setattr(
            Loop, "take_step", lambda self, step, fatal=fatal: _kill() if step == fatal else whole_step(self, step)
        )
        with pytest.raises(Killed):
            train(config, silent)
    monkeypatch.setattr(Loop, "take_step", whole_step)
    log: list[str] = []
    resumed = train(config, log.append)
    assert any("going on from step-000004" in line for line in log)
    name = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    one, other = load_file(unbroken / name), load_file(resumed / name)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert without_times(unbroken.parent) == without_times(resumed.parent)
    assert train(config, log.append) == resumed and "finished already" in log[-1]


def _kill():
    raise Killed


def test_every_byte_of_a_directory_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    told, sync, rename = [], os.fsync, Path.rename

    def sync_and_tell(handle):
        told.append(str(Path(f"/proc/self/fd/{handle}").readlink()))
        sync(handle)

    def rename_and_tell(self, target):
        told.append(f"{self.name} -> {target.name}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", sync_and_tell)
    monkeypatch.setattr(Path, "rename", rename_and_tell)
    with replaced_whole(tmp_path / "step") as unfinished:
        (unfinished / "deep").mkdir()
        (unfinished / "deep" / "weights").write_bytes(b"1")
    place = tmp_path / ".step.unfinished"
    first = [str(each) for each in (place / "deep" / "weights", place / "deep", place)]
    assert sorted(told[:3]) == sorted(first) and told[3:] == [f"{place.name} -> step", str(tmp_path)]


def test_save_total_limit_keeps_the_newest(llama, rows_file, tmp_path):
    train(make_config(llama, rows_file, tmp_path / "run", **options(save_total_limit=2)), silent)
    assert [path.name for path in find_checkpoints(tmp_path / "run")] == ["step-000004", "step-000006"]
    with safe_open(next((tmp_path / "run/checkpoints/step-000006").glob("*.safetensors")), "pt") as file:
        assert len(file.keys()) > 20 and all("lora" in name or "score" in name for name in file.keys())  # noqa: SIM118


def test_save_total_limit_never_removes_the_best(llama, rows_file, tmp_path, monkeypatch):
    def judge(self, step):
        if step == 2:
            self.save(step)
        return dict.fromkeys(("micro/average_precision", "flagged/f1", "log_loss"), 0.5), step == 2

    monkeypatch.setattr(Best, "judge", judge)
    train(make_config(llama, rows_file, tmp_path / "run", **options(save_total_limit=1, eval_steps=2)), silent)
    assert [path.name for path in find_checkpoints(tmp_path / "run")] == ["step-000002", "step-000006"]


def test_a_run_directory_is_never_lost_by_accident(llama, rows_file, tmp_path):
    config = make_config(llama, rows_file, tmp_path / "run")
    train(config, silent)
    with pytest.raises(CheckpointError, match=r"other learning_rate, seed; .*--overwrite_output_dir"):
        train(make_config(llama, rows_file, tmp_path / "run", seed=7, learning_rate=1e-3), silent)
    with pytest.raises(CheckpointError, match="--resume never"):
        train(make_config(llama, rows_file, tmp_path / "run", resume="never"), silent)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match="is no run directory"):
            train(make_config(llama, rows_file, tmp_path / "mine", overwrite_output_dir=overwrite), silent)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    train(make_config(llama, rows_file, tmp_path / "run", seed=7, overwrite_output_dir=True), silent)


def test_a_damaged_checkpoint_is_named_and_an_earlier_one_serves(llama, rows_file, tmp_path):
    config = make_config(llama, rows_file, tmp_path / "run", **options())
    weights = train(config, silent)
    unbroken = load_file(weights / "adapter_model.safetensors")
    checkpoints = find_checkpoints(tmp_path / "run")
    file = next(checkpoints[-1].glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:1000])
    (tmp_path / "run" / "status.json").write_text('{"state": "running"}')
    named = make_config(llama, rows_file, tmp_path / "run", **options(resume=str(checkpoints[-1])))
    with pytest.raises(CheckpointError, match=r"step-000006: .*has 1000 bytes instead of \d+; remove it"):
        train(named, silent)
    log: list[str] = []
    train(config, log.append)
    assert any("step-000006 is damaged" in line and "going on from" in line for line in log)
    resumed = load_file(weights / "adapter_model.safetensors")
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)
    (tmp_path / "run" / "status.json").write_text('{"state": "running"}')
    for directory in checkpoints:
        (directory / "state.json").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint is left; start over with --overwrite_output_dir"):
        train(config, silent)


def test_starting_over_removes_what_a_run_wrote_and_nothing_else(llama, rows_file, tmp_path):
    run = tmp_path / "run"
    weights = train(make_config(llama, rows_file, run, method="full", max_steps=1), silent)
    (run / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"starting over would remove .*model, which this run reads"):
        train(make_config(weights, rows_file, run, overwrite_output_dir=True), silent)
    shutil.copy(rows_file, run / "validation.jsonl")
    with pytest.raises(CheckpointError, match=r"starting over would remove .*validation\.jsonl"):
        train(make_config(llama, run / "validation.jsonl", run, overwrite_output_dir=True), silent)
    assert (weights / "model.safetensors").is_file()
    train(make_config(llama, rows_file, run, overwrite_output_dir=True, max_steps=1), silent)
    assert (run / "notes.txt").read_text() == "mine" and not weights.exists() and (run / "adapter").is_dir()


def test_an_interrupted_run_without_checkpoints_keeps_its_weights(llama, rows_file, tmp_path, monkeypatch):
    config = make_config(llama, rows_file, tmp_path / "run", **options(save_strategy="no"))
    whole_step = Loop.take_step
    monkeypatch.setattr(Loop, "take_step", lambda self, step: _interrupt() if step == 5 else whole_step(self, step))
    with pytest.raises(KeyboardInterrupt):
        train(config, silent)
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "interrupted"
    with pytest.raises(CheckpointError, match="holds adapter/ of a run that stopped without a checkpoint"):
        train(config, silent)
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def _interrupt():
    raise KeyboardInterrupt


def test_a_wrong_resume_and_a_damaged_run_directory_are_named(llama, rows_file, tmp_path):
    with pytest.raises(CheckpointError, match="--resume atuo: is neither auto nor never nor a directory"):
        train(make_config(llama, rows_file, tmp_path / "run", resume="atuo"), silent)
    assert not (tmp_path / "run").exists()
    config = make_config(llama, rows_file, tmp_path / "run", max_steps=1)
    train(config, silent)
    (tmp_path / "run" / "config.yaml").write_text("")
    with pytest.raises(CheckpointError, match=r"config\.yaml: is damaged"):
        train(config, silent)


def test_a_run_directory_may_be_moved(llama, rows_file, tmp_path):
    train(make_config(llama, rows_file, tmp_path / "run", **options()), silent)
    (tmp_path / "run").rename(tmp_path / "moved")
    log: list[str] = []
    train(make_config(llama, rows_file, tmp_path / "moved", **options()), log.append)
    assert "finished already" in log[-1]


def stop_at(monkeypatch, fatal: int) -> None:
    """Let the next run die before `fatal`; `monkeypatch.undo()` heals it."""
    whole_step = Loop.take_step
    monkeypatch.setattr(Loop, "take_step", lambda self, step: _kill() if step == fatal else whole_step(self, step))


def begin(llama, rows_file, run, monkeypatch, fatal=5, **more):
    """A run that was killed before step `fatal`, with its configuration."""
    config = make_config(llama, rows_file, run, **options(**more))
    stop_at(monkeypatch, fatal)
    with pytest.raises(Killed):
        train(config, silent)
    monkeypatch.undo()
    return config


def test_going_back_to_an_older_checkpoint_forgets_the_newer_ones(llama, rows_file, tmp_path, monkeypatch):
    more = options(max_steps=8, save_total_limit=3)
    whole = train(make_config(llama, rows_file, tmp_path / "whole", **more), silent)
    config = begin(llama, rows_file, tmp_path / "run", monkeypatch, fatal=8, **more)
    oldest = find_checkpoints(tmp_path / "run")[0]
    assert oldest.name == "step-000002"
    begin(llama, rows_file, tmp_path / "run", monkeypatch, fatal=5, **more, resume=str(oldest))
    assert [path.name for path in find_checkpoints(tmp_path / "run")] == ["step-000002", "step-000004"]
    train(config, silent)
    compare(tmp_path / "whole", tmp_path / "run")
    assert whole.is_dir()


def test_eight_bit_moments_are_saved_and_taken_up(llama, rows_file, tmp_path, monkeypatch):
    more = options(method="full", optim="adamw_8bit")
    train(make_config(llama, rows_file, tmp_path / "whole", **more), silent)
    config = begin(llama, rows_file, tmp_path / "run", monkeypatch, **more)
    train(config, silent)
    compare(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("what", ["taxonomy", "base model", "validation data", "training data"])
def test_what_a_run_depends_on_may_not_change_before_it_goes_on(what, llama, rows_file, tmp_path, monkeypatch):
    backbone, data, judged, taxonomy = (
        tmp_path / name for name in ("base", "rows.jsonl", "judged.jsonl", "taxonomy.yaml")
    )
    shutil.copytree(llama, backbone)
    shutil.copy(rows_file, data)
    shutil.copy(rows_file, judged)
    taxonomy.write_text(yaml.safe_dump(Taxonomy().to_dict()))
    more = {"eval_data_name_or_path": str(judged), "taxonomy": str(taxonomy)}
    config = begin(backbone, data, tmp_path / "run", monkeypatch, **more)
    if what == "taxonomy":
        changed = Taxonomy().to_dict() | {"template": "Q: {question} A: {answer}"}
        taxonomy.write_text(yaml.safe_dump(changed))
    elif what == "base model":
        weights = load_file(backbone / "model.safetensors")
        save_file(
            {name: tensor + 0.01 for name, tensor in weights.items()}, backbone / "model.safetensors", {"format": "pt"}
        )
    else:
        path = judged if what == "validation data" else data
        path.write_text("\n".join(path.read_text().splitlines()[:-20]) + "\n")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*.*")}
    with pytest.raises(CheckpointError, match=rf"step-000004: the {what} changed since; start anew"):
        train(config, silent)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*.*")}, "nothing was written"


def test_missing_best_weights_are_asked_for(llama, rows_file, tmp_path, monkeypatch):
    config = begin(llama, rows_file, tmp_path / "run", monkeypatch)
    shutil.rmtree(tmp_path / "run" / "adapter")
    with pytest.raises(CheckpointError, match="adapter: is missing, which holds the best weights, of step 3"):
        train(config, silent)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("status.json", "[]", r"status\.json: is damaged; restore it"),
        ("status.json", "", r"status\.json: is not valid JSON"),
        ("environment.json", "[]", r"environment\.json: is damaged; restore it"),
        ("environment.json", "{}", r"environment\.json: is of an older version; give another --output_dir"),
        ("environment.json", None, r"environment\.json: cannot be read"),
        ("config.yaml", "[]", r"config\.yaml: is damaged"),
        ("metrics.jsonl", "{broken\n", r"metrics\.jsonl: is damaged .*start over with --overwrite_output_dir"),
    ],
)
def test_damaged_files_of_a_run_are_named(name, content, message, llama, rows_file, tmp_path, monkeypatch):
    config = begin(llama, rows_file, tmp_path / "run", monkeypatch, fatal=3)
    path = tmp_path / "run" / name
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(CheckpointError, match=message):
        train(config, silent)


@pytest.mark.parametrize("damage", ["[]", '{"files": []}', '{"files": {}}', "no best", "header", "missing"])
def test_auto_takes_an_earlier_checkpoint_where_the_newest_is_damaged(damage, llama, rows_file, tmp_path, monkeypatch):
    config = begin(llama, rows_file, tmp_path / "run", monkeypatch)
    newest = find_checkpoints(tmp_path / "run")[-1]
    state, tensors = newest / "state.json", next(newest.glob("*.safetensors"))
    if damage == "header":
        content = bytearray(tensors.read_bytes())
        content[8:40] = b"x" * 32
        tensors.write_bytes(content)
    elif damage == "missing":
        tensors.unlink()
    elif damage == "no best":
        state.write_text(
            json.dumps({key: value for key, value in json.loads(state.read_text()).items() if key != "best"})
        )
    else:
        state.write_text(damage)
    log: list[str] = []
    train(config, log.append)
    assert any("step-000004 is damaged" in line for line in log) and any(
        "going on from step-000002" in line for line in log
    )


def test_a_scratch_disk_behind_a_link_is_kept(llama, rows_file, tmp_path, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(scratch)
    (tmp_path / "run" / "status.json").write_text('{"state": "failed"}')
    (tmp_path / "run" / "config.yaml").write_text("{}")
    begin(llama, rows_file, tmp_path / "run", monkeypatch, overwrite_output_dir=True)
    shutil.move(tmp_path / "run" / "checkpoints", scratch / "checkpoints")
    (tmp_path / "run" / "checkpoints").symlink_to(scratch / "checkpoints")
    train(
        make_config(llama, rows_file, tmp_path / "run", **options(resume=f"{tmp_path}/run/checkpoints/step-000002")),
        silent,
    )


def test_a_run_killed_in_its_first_moments_starts_again(llama, rows_file, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for name in (".config.yaml.123", ".lock"):
        (run / name).write_text("")
    (run / "config.yaml").write_text("half of it")
    train(make_config(llama, rows_file, run, max_steps=1), silent)
    with pytest.raises(CheckpointError, match="is no run directory and not empty"):
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / ".bashrc").write_text("")
        train(make_config(llama, rows_file, tmp_path / "other", max_steps=1), silent)


def test_two_runs_in_one_directory_are_refused(llama, rows_file, tmp_path, monkeypatch):
    config = make_config(llama, rows_file, tmp_path / "run", max_steps=2)
    said: list[str] = []
    whole_step = Loop.take_step

    def meanwhile(self, step):
        if not said:
            said.append("")
            with pytest.raises(CheckpointError, match="another run is writing here") as error:
                train(dataclasses.replace(config, eval_strategy="steps", eval_steps=1), silent)
            said.append(str(error.value))
        return whole_step(self, step)

    monkeypatch.setattr(Loop, "take_step", meanwhile)
    monkeypatch.setattr(
        Loop, "evaluate", lambda self, step, run, say: said.append((run.path / "status.json").read_text()) or {}
    )
    train(dataclasses.replace(config, eval_strategy="steps", eval_steps=1), silent)
    assert len(said) == 4 and '"running"' in said[2], "the second one leaves no trace"


def test_a_disk_that_takes_nothing_more_is_named(llama, rows_file, tmp_path, monkeypatch):
    import resource
    import signal

    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    whole_step = Loop.take_step

    def limited(self, step):
        if step == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        return whole_step(self, step)

    monkeypatch.setattr(Loop, "take_step", limited)
    config = make_config(llama, rows_file, tmp_path / "run", **options())
    try:
        with pytest.raises(
            CheckpointError, match=r"--output_dir .*run: cannot be written \(File too large\); make room"
        ):
            train(config, silent)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        signal.signal(signal.SIGXFSZ, before)
    monkeypatch.undo()
    log: list[str] = []
    train(config, log.append)
    assert any("going on from step-000004" in line for line in log)
