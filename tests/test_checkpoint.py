"""A run goes on where it stopped, or says why it does not."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import make_config
from kills import without_times
from safetensors import safe_open
from safetensors.torch import load_file

from qlora_moderation.checkpoint import find_checkpoints
from qlora_moderation.errors import CheckpointError
from qlora_moderation.loop import Loop
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


def test_save_total_limit_keeps_the_newest(llama, rows_file, tmp_path):
    train(make_config(llama, rows_file, tmp_path / "run", **options(save_total_limit=2)), silent)
    assert [path.name for path in find_checkpoints(tmp_path / "run")] == ["step-000004", "step-000006"]
    with safe_open(next((tmp_path / "run/checkpoints/step-000006").glob("*.safetensors")), "pt") as file:
        assert len(file.keys()) > 20 and all("lora" in name or "score" in name for name in file.keys())  # noqa: SIM118


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
    import shutil

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
