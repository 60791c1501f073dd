"""Scoring at scale: stopped anywhere and started again, in one process or many, the same bytes come out."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import silent

from qlora_moderation import CheckpointError, DataError, QAModeration, local_engine
from qlora_moderation import combine as combining
from qlora_moderation import predict as predicting
from qlora_moderation.block_scoring import BlockScorer
from qlora_moderation.cli import run_job
from qlora_moderation.combine import combine
from qlora_moderation.errors import Interrupted
from qlora_moderation.parts import Parts
from qlora_moderation.predict import predict
from qlora_moderation.prediction_config import CombineConfig, PredictConfig
from qlora_moderation.state_files import Asked
from qlora_moderation.verdicts import NEW_COLUMNS
from qlora_moderation.workload import build_workload


@pytest.fixture(scope="session")
def model(runs, tmp_path_factory) -> Path:
    """The full model, with a threshold that some pairs pass."""
    path = tmp_path_factory.mktemp("predict") / "model"
    shutil.copytree(runs["full"].weights, path)
    moderation = QAModeration.from_pretrained(path)
    risks = [
        found["risk"] for found in moderation.predict(question=["How?", "Why?", "a"], answer=["So.", "b " * 9, "c"])
    ]
    values = json.loads((path / "thresholds.json").read_text())
    middle = sorted(risks)[1]
    values["flagged"] = {"rule": "max", "threshold": middle, "raw": dict.fromkeys(values["flagged"]["raw"], middle)}
    (path / "thresholds.json").write_text(json.dumps(values))
    return path


@pytest.fixture(scope="session")
def inputs(rows, tmp_path_factory) -> Path:
    """60 rows as JSON Lines and half of them as Parquet."""
    folder = tmp_path_factory.mktemp("inputs")
    made = [
        {"doc": {"prompt": row["prompt"], "response": row["response"]}, "id": i, "model": "xy"[i % 2]}
        for i, row in enumerate(rows[:60])
    ]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    pq.write_table(pa.Table.from_pylist(made[:30]), folder / "b.parquet")
    return folder


@pytest.fixture
def make(model, inputs, tmp_path):
    def make_it(**options) -> PredictConfig:
        settings = {
            "model_path": str(model),
            "input": (str(inputs),),
            "output_dir": str(tmp_path / "out"),
            "block_size": 8,
        }
        settings |= {"prompt_column": "doc.prompt", "response_column": "doc.response", "use_cpu": True}
        return PredictConfig(**(settings | {"bootstrap_replicates": 100} | options))

    return make_it


def content(folder: Path, leave_out=("summary.png",)) -> dict[str, bytes]:
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: found[name] for name in found if name not in leave_out}


@pytest.fixture(scope="session")
def unbroken(model, inputs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken") / "out"
    predict(
        PredictConfig(
            model_path=str(model), input=(str(inputs),), output_dir=str(folder), block_size=8, use_cpu=True,
            prompt_column="doc.prompt", response_column="doc.response", bootstrap_replicates=100,
        ),
        silent,
    )  # fmt: skip
    return folder


def test_verdicts_are_those_of_the_python_interface(unbroken, inputs, model):
    lines = [json.loads(line) for line in (unbroken / "a.jsonl").read_text().splitlines()]
    before = [json.loads(line) for line in (inputs / "a.jsonl").read_text().splitlines()]
    assert [{key: line[key] for key in ("doc", "id", "model")} for line in lines] == before
    judged = QAModeration.from_pretrained(model, use_cpu=True).predict(
        question=[row["doc"]["prompt"] for row in before], answer=[row["doc"]["response"] for row in before]
    )
    for line, one in zip(lines, judged, strict=True):
        assert line["probabilities"] == pytest.approx(one["categories"], abs=1e-6)
        assert (
            line["risk"] == pytest.approx(one["risk"], abs=1e-6) and line["windows"] == 1 and line["truncated"] is False
        )
    threshold = json.loads((model / "thresholds.json").read_text())["flagged"]["threshold"]
    flagged = [line["flagged"] for line in lines]
    assert flagged == [line["risk"] > threshold for line in lines] and 0 < sum(flagged) < 60
    table = pq.read_table(unbroken / "b.parquet")
    assert table["id"].to_pylist() == list(range(30))
    np.testing.assert_allclose(table["risk"].to_numpy(), [line["risk"] for line in lines[:30]], atol=1e-6)
    summary = json.loads((unbroken / "summary.json").read_text())
    assert summary["rows"] == summary["judged"] == 90 and summary["run"]["inputs"][1]["rows"] == 30
    assert summary["flagged"]["rows"] == sum(flagged) + sum(flagged[:30])
    assert sorted(path.name for path in unbroken.iterdir()) == ["a.jsonl", "b.parquet", "summary.json", "summary.png"]


def test_stopped_after_any_block_it_goes_on_with_the_same_bytes(make, unbroken, tmp_path, monkeypatch):
    whole, left = Parts.write, [0]

    def write(self, block):
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("the power is gone")
        return whole(self, block)

    monkeypatch.setattr(Parts, "write", write)
    for left[0] in (0, 1, 4):
        with pytest.raises(RuntimeError, match="power"):
            predict(make(), silent)
    monkeypatch.undo()
    assert len(list((tmp_path / "out" / "parts").glob("*/[0-9]*-[0-9]*"))) == 5
    log: list[str] = []
    monkeypatch.setattr(combining, "write_summary", lambda *_: None)  # a stop between outputs and summary
    monkeypatch.setattr(Parts, "remove", lambda self: None)
    predict(make(), log.append)
    assert "90 rows in 2 tables; going on, 40 are done" in log
    monkeypatch.undo()
    monkeypatch.setattr(Parts, "remove", lambda self: None)  # and one behind the summary
    predict(make(), silent)
    monkeypatch.undo()
    predict(make(), silent)
    assert content(tmp_path / "out") == content(unbroken)


def test_signals_end_a_run_that_goes_on(make, unbroken, tmp_path, monkeypatch):
    whole = Parts.write

    def write(self, block):
        os.kill(os.getpid(), signal.SIGTERM)
        return whole(self, block)

    monkeypatch.setattr(Parts, "write", write)
    log: list[str] = []
    with pytest.raises(Interrupted) as stop:
        predict(make(), log.append)
    assert stop.value.exit_code == 143
    assert "8 of 90 rows are scored and kept" in log[-1] and "the same command goes on" in log[-1]
    monkeypatch.undo()
    predict(make(), silent)
    assert content(tmp_path / "out") == content(unbroken)


def test_shards_and_processes_give_the_bytes_of_one(make, unbroken, tmp_path, monkeypatch):
    for shard in ("3/3", "1/3"):
        assert predict(make(shard=shard), silent) is None
    with pytest.raises(CheckpointError) as caught:
        combine(CombineConfig(str(tmp_path / "out")), silent)
    assert "4 of 12 blocks are not scored yet: block 2 of a.jsonl (rows 9 to 16)" in str(caught.value)
    monkeypatch.setenv("WORLD_SIZE", "2")
    log: list[str] = []
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        assert predict(make(shard="2/3"), log.append) is None
    assert log[-1].endswith(f"all blocks are scored; then: qlora-moderation combine --output_dir {tmp_path / 'out'}")
    part = next((tmp_path / "out").glob("parts/*/00000-00000001"))
    whole = part.read_bytes()
    for piece in (whole[: whole.index(b"\n") + 1], whole[:-5]):
        part.write_bytes(piece)
        with pytest.raises((CheckpointError, DataError), match=r"00000-00000001.*damaged"):
            combine(CombineConfig(str(tmp_path / "out")), silent)
    part.write_bytes(whole)
    combine(CombineConfig(str(tmp_path / "out")), silent)
    assert content(tmp_path / "out") == content(unbroken)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        last = predict(make(output_dir=str(tmp_path / "two")), silent)
        assert (last is not None) == (rank == "1"), "the last process finishes"
    assert content(tmp_path / "two") == content(unbroken)


def test_a_finished_run_says_so_without_a_model(make, unbroken, tmp_path, monkeypatch):
    shutil.copytree(unbroken, tmp_path / "out")
    monkeypatch.setattr(local_engine, "load_classifier", None)
    log: list[str] = []
    predict(make(), log.append)
    assert log[0].endswith("the run has finished; nothing is left to score")
    assert content(tmp_path / "out") == content(unbroken)
    summary = predict(make(group_by=("model",)), silent)
    assert set(summary["groups"]["model"]) == {"x", "y"} and summary["flagged"]["interval"]
    before = content(tmp_path / "out")
    for again in (
        lambda: predict(make(group_by=("modle",)), silent),
        lambda: combine(CombineConfig(str(tmp_path / "out"), group_by=("modle",)), silent),
    ):
        with pytest.raises(DataError, match="--group_by modle: no "):
            again()
    assert content(tmp_path / "out") == before
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == json.loads(json.dumps(summary))
    again = combine(CombineConfig(str(tmp_path / "out"), ("id",)), silent)
    assert len(again["groups"]["id"]) == 60 and again["flagged"] == summary["flagged"]
    (tmp_path / "out" / "a.jsonl").write_text("")
    with pytest.raises(CheckpointError, match="was changed since the run finished"):
        predict(make(), silent)


def test_another_run_never_mixes_in(make, model, inputs, unbroken, tmp_path):
    shutil.copytree(unbroken, tmp_path / "out")
    changed, folder = tmp_path / "model", tmp_path / "in"
    shutil.copytree(model, changed)
    shutil.copytree(inputs, folder)
    assert predict(make(model_path=str(changed), input=(str(folder),)), silent), "places do not count"
    (changed / "thresholds.json").write_text((changed / "thresholds.json").read_text().replace("default", "renamed"))
    (folder / "a.jsonl").write_text((folder / "a.jsonl").read_text().replace('"id": 7', '"id": 8'))
    for options, words in (
        ({"model_path": str(changed)}, "another model or thresholds"),
        ({"input": (str(folder),)}, r"another input \(a.jsonl\)"),
        ({"block_size": 9, "prefix": "x_"}, "another --prefix, --block_size"),
    ):
        with pytest.raises(CheckpointError, match=f"holds a run with {words}; give another"):
            predict(make(**options), silent)
    assert content(tmp_path / "out") == content(unbroken)
    predict(make(shard="1/2", output_dir=str(tmp_path / "half")), silent)
    with pytest.raises(CheckpointError, match="holds a run with another --block_size"):
        predict(make(block_size=9, output_dir=str(tmp_path / "half")), silent)
    assert predict(make(input=(str(folder),), overwrite=True), silent)["rows"] == 90
    assert '"id": 7' not in (tmp_path / "out" / "a.jsonl").read_text()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.jsonl").write_text("mine")
    with pytest.raises(CheckpointError, match=r"holds a.jsonl, which is not of this run"):
        predict(make(output_dir=str(tmp_path / "other")), silent)


def test_a_result_stays_until_the_one_that_replaces_it_is_whole(make, inputs, unbroken, tmp_path, monkeypatch):
    shutil.copytree(unbroken, tmp_path / "out")
    shutil.copytree(inputs, tmp_path / "in")
    (tmp_path / "in" / "a.jsonl").rename(tmp_path / "in" / "z.jsonl")
    config = make(input=(str(tmp_path / "in"),), overwrite=True)
    with monkeypatch.context() as patch:
        patch.setattr(local_engine, "load_classifier", lambda *_, **__: (_ for _ in ()).throw(DataError("no model")))
        with pytest.raises(DataError):
            predict(config, silent)
    assert content(unbroken).items() <= content(tmp_path / "out").items()
    assert predict(make(), silent)["rows"] == 90, "the earlier result can still be used"
    for number in (0, 1):  # the disk is full, or a signal comes, while an output is put together
        whole, seen = combining.written_whole, []

        def full(path, number=number, whole=whole, seen=seen):
            if path.name.startswith("output-"):
                seen.append(path)
                if len(seen) > number:
                    raise OSError(errno.ENOSPC, "No space left on device", str(path))
            return whole(path)

        with monkeypatch.context() as patch:
            patch.setattr(combining, "written_whole", full)
            with pytest.raises(CheckpointError, match="No space left"):
                predict(config, silent)
        assert content(unbroken).items() <= content(tmp_path / "out").items()
    predict(config, silent)
    assert (tmp_path / "out" / "z.jsonl").read_bytes() == (unbroken / "a.jsonl").read_bytes()
    assert not (tmp_path / "out" / "a.jsonl").exists() and not (tmp_path / "out" / "parts").exists()


def test_a_finished_command_leaves_the_run_alone_that_replaces_its_result(
    make, inputs, unbroken, tmp_path, monkeypatch
):
    shutil.copytree(unbroken, tmp_path / "out")
    shutil.copytree(inputs, tmp_path / "in")
    (tmp_path / "in" / "a.jsonl").rename(tmp_path / "in" / "z.jsonl")
    whole = Parts.write

    def write(self, block):
        monkeypatch.setattr(Parts, "write", whole)
        assert predict(make(), silent)["rows"] == 90  # as if another process gave the earlier command again
        return whole(self, block)

    monkeypatch.setattr(Parts, "write", write)
    assert predict(make(input=(str(tmp_path / "in"),), overwrite=True), silent)["rows"] == 90
    assert (tmp_path / "out" / "z.jsonl").is_file() and not (tmp_path / "out" / "parts").exists()


def test_a_lost_output_is_scored_again_where_that_is_asked_for(make, unbroken, tmp_path):
    shutil.copytree(unbroken, tmp_path / "out")
    (tmp_path / "out" / "b.parquet").unlink()
    with pytest.raises(CheckpointError, match=r"b\.parquet: is gone or was changed .* --overwrite True"):
        predict(make(), silent)
    predict(make(overwrite=True), silent)
    assert content(tmp_path / "out") == content(unbroken)


def test_a_run_that_fails_before_its_first_part_leaves_nothing(make, tmp_path, monkeypatch):
    monkeypatch.setattr(local_engine, "load_classifier", lambda *_, **__: (_ for _ in ()).throw(DataError("no model")))
    (tmp_path / "there").mkdir()
    for name in ("out/of/folders", "there"):
        with pytest.raises(DataError):
            predict(make(output_dir=str(tmp_path / name)), silent)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there"] and not any((tmp_path / "there").iterdir())


def test_values_and_names_that_are_no_text_are_counted_and_shown(make, tmp_path, capsys):
    path = Path(os.fsdecode(bytes(tmp_path) + b"/in\xff.jsonl"))
    rows = [{"prompt": "How?", "response": "So.", "g": value} for value in ("\ud83d", "\x1b[2J\n", "plain")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"input": (str(path),), "prompt_column": "prompt", "response_column": "response", "group_by": ("g",)}
    log: list[str] = []
    summary = predict(make(**options), log.append)
    assert set(summary["groups"]["g"]) == {"\ud83d", "\x1b[2J\n", "plain"}
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["rows"] == 3
    assert not any("\x1b" in line or "\ud83d" in line for line in log)


@pytest.mark.parametrize(
    ("name", "damaged"),
    [
        ("summary.json", '{"run": 1, "outputs": [], "summary": {}}'),
        ("run.json", "[]"),
        ("run.json", "{}"),
        ("run.json", '{"inputs": [], "options": {}}'),
        ("asked", "{}"),
        ("asked", '{"group_by": ["a"], "replicates": -5}'),
        ("engine.json", "5"),
    ],
)
def test_a_damaged_state_is_named(make, unbroken, tmp_path, name, damaged):
    if name == "summary.json":
        shutil.copytree(unbroken, tmp_path / "out")
        (tmp_path / "out" / name).write_text(damaged)
    else:
        for shard in ("1/2", "2/2"):
            predict(make(shard=shard), silent)
        next((tmp_path / "out" / "parts").glob(f"*/{'summary.json' if name == 'asked' else name}")).write_text(damaged)
    with pytest.raises(CheckpointError, match=r"is damaged; remove|is not of a run"):
        combine(CombineConfig(str(tmp_path / "out")), silent)


def test_an_input_that_changes_under_way_is_not_used(make, inputs, tmp_path, monkeypatch):
    shutil.copytree(inputs, tmp_path / "in")
    whole = Parts.write

    def write(self, block):
        (tmp_path / "in" / "a.jsonl").touch()
        return whole(self, block)

    monkeypatch.setattr(Parts, "write", write)
    with pytest.raises(DataError, match=r"a.jsonl: has changed while it was scored"):
        predict(make(input=(str(tmp_path / "in"),)), silent)
    assert not (tmp_path / "out" / "a.jsonl").exists()
    monkeypatch.setattr(predicting, "check_blocks", lambda *_: (tmp_path / "in" / "a.jsonl").unlink())
    with pytest.raises(DataError, match=r"a.jsonl: (has changed|cannot be read|is gone)"):
        predict(make(input=(str(tmp_path / "in"),), output_dir=str(tmp_path / "second")), silent)


def test_two_runs_at_once_are_refused(make, tmp_path):
    parts = Parts(tmp_path / "out", build_workload(make()).facts)
    parts.open(Asked((), 0))
    with parts.locked(0, 1):
        with pytest.raises(CheckpointError, match="another run is writing here"):
            predict(make(), silent)
        with pytest.raises(CheckpointError, match="1 of 1 writers is at work here"):
            predict(make(shard="2/2"), silent)
    assert predict(make(shard="2/2"), silent) is None


def test_bad_rows_stop_before_the_model_is_loaded_or_are_kept(make, tmp_path, monkeypatch, capsys):
    path = tmp_path / "rows.jsonl"
    good = {"prompt": "How?", "response": "So."}
    lines = [
        json.dumps(good),
        '{"prompt": "a", "response"',
        json.dumps({"prompt": "b", "response": None}),
        json.dumps(good),
    ]
    path.write_text("\n".join(lines) + "\n")
    flags = [
        "--model_path",
        make().model_path,
        "--input",
        str(path),
        "--output_dir",
        str(tmp_path / "out"),
        "--use_cpu",
    ]
    with monkeypatch.context() as patch:
        patch.setattr(local_engine, "load_classifier", None)
        assert run_job("predict", flags) == 2
    errors = capsys.readouterr().err
    assert (
        f"error: {path}, line 2: is not valid JSON" in errors and "line 3: response is empty (null), not text" in errors
    )
    assert "error: mend such rows, keep them, with the reason in an error column, by --on_bad_row keep" in errors
    assert run_job("predict", [*flags, "--on_bad_row", "keep"]) == 0
    assert "4 rows, 2 of them bad (see error)" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert rows[0] == rows[3] and rows[0]["flagged"] is not None and "error" not in rows[0]
    assert rows[1]["raw"] == lines[1] and rows[2]["response"] is None
    assert all(row[column] is None for row in rows[1:3] for column in NEW_COLUMNS[:-1])
    path.write_text("\n".join(lines[:2] * 7) + "\n")
    assert run_job("predict", [*flags, "--overwrite", "--block_size", "2"]) == 2
    errors = capsys.readouterr().err
    assert errors.count("is not valid JSON") == 5 and "line 10: " in errors and "error: and 2 more bad rows" in errors
    path.write_text("\n".join(lines[:1]) + "\n" + json.dumps(good | {"risk": 1}) + "\n")
    for mode in ("stop", "keep"):
        assert run_job("predict", [*flags, "--overwrite", "--on_bad_row", mode]) == 2
        assert f"{path}, line 2: has a column risk already" in capsys.readouterr().err


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_logit_that_is_no_number_is_never_a_verdict(value, make, tmp_path, monkeypatch):
    whole = local_engine.load_classifier

    def load(*arguments, **options):
        classifier = whole(*arguments, **options)
        forward = classifier.model.forward

        def break_one(batch):
            logits = forward(batch)
            logits[-1, 3] = value
            return logits

        classifier.model.forward = break_one
        return classifier

    monkeypatch.setattr(local_engine, "load_classifier", load)
    with pytest.raises(CheckpointError, match=r"a.jsonl, line \d+: the model's logits are not finite for \d+ pair"):
        predict(make(), silent)
    assert not list((tmp_path / "out").glob("parts/*/[0-9]*-[0-9]*"))


def test_equal_pairs_are_scored_once(model):
    scorer = BlockScorer(local_engine.load_classifier(model, use_cpu=True))
    done: list[int] = []
    rows = [{"prompt": "How?", "response": "So."}] * 5 + [{"prompt": "Why?", "response": "So. " * 200}, "is broken"]
    found = scorer.score(rows, done.append)
    assert sum(done) == 1 + found.windows[5] and found.windows.tolist()[:5] == [1] * 5 and found.windows[5] > 1
    assert len(set(found.risk[:5])) == 1 and found.errors == [None] * 6 + ["is broken"]
    assert len(scorer.score([])) == 0 and scorer.score(["x"]).to_rows()[0]["flagged"] is None


def test_a_hub_set_becomes_parquet(make, inputs, tmp_path, monkeypatch):
    made = datasets.Dataset.from_list([json.loads(line) for line in (inputs / "a.jsonl").read_text().splitlines()])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: made)
    summary = predict(make(input=("org/rows:test",), group_by=("model",)), silent)
    written = datasets.Dataset.from_parquet(
        str(tmp_path / "out" / "rows-test.parquet"), cache_dir=str(tmp_path / "cache")
    )
    assert summary["rows"] == len(written) == 60 and written["id"] == made["id"]
    assert written.column_names == [*made.column_names, *NEW_COLUMNS]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--shard", "3/2"], "--shard 3/2: there are only shards 1/2 to 2/2"),
        (["--shard", "one"], "--shard one: expected i/n"),
        (["--response_column", "prompt"], "both prompt; name two columns"),
        (["--input", "gone.csv"], "gone.csv: no such file"),
        (["--group_by", "a", "a"], "names a column twice"),
    ],
)
def test_faults_of_the_command_are_named(options, words, make, capsys):
    flags = [
        "--model_path",
        "m",
        "--output_dir",
        "o",
        *([] if "--input" in options else ["--input", __file__ + "x.csv"]),
    ]
    assert run_job("predict", [*flags, *options]) == 2
    assert words in capsys.readouterr().err


def test_scoring_in_another_type_is_not_mixed_in(make, tmp_path, monkeypatch):
    predict(make(shard="1/2"), silent)
    path = next((tmp_path / "out").glob("parts/*/engine.json"))
    path.write_text(path.read_text().replace('"dtype": "float32"', '"dtype": "bfloat16"'))
    with pytest.raises(CheckpointError, match=r"scored with another dtype than here \(dtype bfloat16, now float32\)"):
        predict(make(shard="2/2"), silent)
    path.write_text(path.read_text().replace('"bfloat16"', '"float32"').replace('"threads": ', '"threads": 9'))
    log: list[str] = []
    predict(make(shard="2/2"), log.append)
    assert "the blocks done were scored with another threads; last digits may differ" in log


def test_combine_wants_parts(tmp_path):
    with pytest.raises(CheckpointError, match="holds no parts"):
        combine(CombineConfig(str(tmp_path)), silent)
