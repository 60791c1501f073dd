"""The loop from its configuration to its run directory."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
import yaml
from conftest import make_config, silent

from qlora_moderation.adapter import find_head
from qlora_moderation.cli import run_job
from qlora_moderation.config import EvaluateConfig, MergeConfig, TrainConfig
from qlora_moderation.errors import CheckpointError, ConfigError, DataError
from qlora_moderation.evaluate import evaluate
from qlora_moderation.loop import NonFiniteError, can_read_late
from qlora_moderation.merge import merge_adapter
from qlora_moderation.metadata import load_metadata
from qlora_moderation.optim import build_optimizer, build_scheduler
from qlora_moderation.prior import compute_log_odds, set_head_prior
from qlora_moderation.sample import build_sample
from qlora_moderation.taxonomy import Taxonomy
from qlora_moderation.train import train


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_run_directory_holds_what_the_readme_says(runs):
    for method, run in runs.items():
        names = {path.name for path in run.directory.iterdir()}
        assert {"config.yaml", "environment.json", "status.json", "metrics.jsonl", "audit.json", "curves.png"} <= names
        records = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
        steps = [record for record in records if "loss" in record]
        assert [record["step"] for record in steps] == [1, 2, 3, 4]
        assert {"loss", "grad_norm", "learning_rate", "tokens", "pairs", "elapsed_seconds"} <= steps[0].keys()
        assert [record["step"] for record in records if "eval" in record] == [2, 4]
        assert json.loads((run.directory / "status.json").read_text())["state"] == "finished"
        assert yaml.safe_load((run.directory / "config.yaml").read_text())["method"] == method
        assert run.weights.name == ("model" if method == "full" else "adapter")
        log = "\n".join(run.log)
        for fact in (
            "pairs a step 16",
            "steps 4",
            "trainable ",
            "static memory",
            "an epoch has",
            "next: python scripts/",
        ):
            assert fact in log


def test_training_learns_each_method(llama, tmp_path):
    """Every method learns 32 pairs by heart, which the base rates that the head starts from do not give."""
    data = write_rows(tmp_path / "rows.jsonl", build_sample(0)["train"][:32])
    for method, rate in (("lora", 5e-3), ("qlora", 5e-3), ("full", 2e-3)):
        config = make_config(llama, data, tmp_path / method, method=method, learning_rate=rate, max_steps=80)
        weights = train(config, silent)
        records = [json.loads(line) for line in (weights.parent / "metrics.jsonl").read_text().splitlines()]
        losses = [record["loss"] for record in records]
        assert np.mean(losses[-4:]) < 0.6 * np.mean(losses[:4]), (method, losses)


def test_the_original_command_line_trains(llama, rows_file, tmp_path, capsys):
    arguments = (
        f"--model_name_or_path {llama} --train_data_name_or_path {rows_file} --eval_data_name_or_path {rows_file} "
        f"--output_dir {tmp_path / 'out'} --num_train_epochs 1 --per_device_train_batch_size 16 "
        "--per_device_eval_batch_size 16 --gradient_accumulation_steps 8 --evaluation_strategy steps --eval_steps 1 "
        "--save_strategy steps --save_total_limit 1 --learning_rate 2e-5 --weight_decay 0.1 --warmup_ratio 0.03 "
        "--lr_scheduler_type cosine --logging_steps 1"
    ).split()
    arguments += ["--fsdp", "full_shard auto_wrap", "--fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer"]
    arguments += ["--gradient_checkpointing", "--bf16", "True", "--tf32", "True"]
    assert run_job("train", arguments) == 0
    shown = capsys.readouterr().out
    assert "LoRA wants about ten times" in shown and "--fsdp has no effect" in shown and "--bf16 has no effect" in shown
    assert load_metadata(tmp_path / "out" / "adapter").method == "lora"
    evaluation = (
        f"--eval_dataset {rows_file} --model_path {tmp_path}/out/adapter --max_length 512 --output_dir {tmp_path}/e"
    )
    assert run_job("evaluate", evaluation.split()) == 0
    assert (tmp_path / "e" / "report.md").is_file()


def test_dry_run_shows_the_first_pair_and_writes_nothing(llama, rows_file, tmp_path):
    log: list[str] = []
    train(make_config(llama, rows_file, tmp_path / "run", dry_run=True), log.append)
    shown = "\n".join(log)
    assert "BEGINNING OF CONVERSATION: USER:" in shown and "its labels:" in shown and "pairs a step 16" in shown
    assert not (tmp_path / "run").exists()


def test_selecting_on_a_test_split_is_said_everywhere(llama, rows, tmp_path):
    data, test = write_rows(tmp_path / "a.jsonl", rows[:60]), write_rows(tmp_path / "30k_test.jsonl", rows[60:90])
    options = {"eval_strategy": "epoch", "eval_data_name_or_path": str(test), "max_steps": 2}
    log: list[str] = []
    weights = train(make_config(llama, data, tmp_path / "run", **options), log.append)
    assert any(line.startswith("warning: the best weights are selected on 30k_test") for line in log)
    assert "selected on 30k_test" in (weights / "README.md").read_text()
    evaluate(EvaluateConfig(str(weights), str(test), str(tmp_path / "e")), silent)
    assert "selected on 30k_test" in (tmp_path / "e" / "report.md").read_text()


def test_too_few_validation_pairs_are_said_everywhere(llama, rows, tmp_path):
    safe = [row for row in rows if row["is_safe"]]
    few = write_rows(tmp_path / "few.jsonl", safe[:8])
    options = {"eval_strategy": "epoch", "eval_data_name_or_path": str(few), "max_steps": 2}
    log: list[str] = []
    weights = train(
        make_config(llama, write_rows(tmp_path / "a.jsonl", rows[:60]), tmp_path / "run", **options), log.append
    )
    assert any(re.match(r"warning: of \d validation pairs 0 are flagged: too few of a kind", line) for line in log)
    assert "validation pairs 0 are flagged" in (weights / "README.md").read_text()
    undefined = "warning: micro/average_precision was undefined at every evaluation; the last weights are kept"
    assert undefined in log


def test_a_loss_that_is_not_finite_stops_with_step_and_rows(llama, rows_file, tmp_path, monkeypatch):
    monkeypatch.setattr("qlora_moderation.loop.compute_loss", lambda *args: args[0].sum() * float("nan"))
    with pytest.raises(NonFiniteError, match=r"step 1: loss nan .*rows\.jsonl, line \d+"):
        train(make_config(llama, rows_file, tmp_path / "run"), silent)
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"


def read_late(monkeypatch) -> None:
    """Let a CPU run leave its losses where they are until a line is due, as a GPU run does."""
    monkeypatch.setattr("qlora_moderation.loop.can_read_late", lambda config, device: True)


def test_losses_stay_on_a_gpu_that_can_refuse_a_broken_step_itself(llama, rows_file):
    def reads_late(kind: str, **options) -> bool:
        return can_read_late(make_config(llama, rows_file, "unused", **options), torch.device(kind))

    assert reads_late("cuda") and not reads_late("cpu")
    assert not reads_late("cuda", optim="adamw_torch")
    # then the optimiser works on the host, and would read the device's word before it is there
    assert not reads_late("cuda", sharding="fsdp", fsdp_cpu_offload=True)


def test_losses_that_are_read_late_are_the_same(llama, rows_file, tmp_path, monkeypatch):
    options = {
        "optim": "adamw_torch_fused",
        "max_steps": 5,
        "logging_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 3,
    }
    found = []
    for name in ("at_once", "late"):
        train(make_config(llama, rows_file, tmp_path / name, **options), silent)
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        found.append([{k: v for k, v in line.items() if k != "elapsed_seconds"} for line in lines])
        read_late(monkeypatch)
    assert found[0] == found[1]
    assert [line["step"] for line in found[1]] == [1, 2, 3, 3, 4, 5, 5]


def test_a_broken_step_that_is_read_late_has_changed_no_weight(llama, rows_file, tmp_path, monkeypatch):
    from qlora_moderation.loop import Loop, compute_loss

    weights, whole_step = [], Loop.take_step

    def watched(self, step):
        record = whole_step(self, step)
        weights.append(torch.cat([p.detach().reshape(-1).clone() for p in self.trainable]))
        return record

    steps = []

    def poisoned(*arguments):
        steps.append(1)
        return compute_loss(*arguments) * (float("nan") if len(steps) == 3 else 1.0)

    read_late(monkeypatch)
    monkeypatch.setattr(Loop, "take_step", watched)
    monkeypatch.setattr("qlora_moderation.loop.compute_loss", poisoned)
    options = {"optim": "adamw_torch_fused", "max_steps": 6, "logging_steps": 5}
    with pytest.raises(NonFiniteError, match=r"step 3: loss nan .*no weight was changed"):
        train(make_config(llama, rows_file, tmp_path / "run", **options), silent)
    assert len(weights) == 5
    assert not torch.equal(weights[0], weights[1])
    assert all(torch.equal(weights[1], later) for later in weights[2:])
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


def test_an_unknown_metric_or_too_little_data_is_refused(llama, rows, rows_file, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1}
    with pytest.raises(ConfigError, match=r"micro/f1x: is no metric of this taxonomy .did you mean micro/f1"):
        train(make_config(llama, rows_file, tmp_path / "a", metric_for_best_model="micro/f1x", **options), silent)
    single = write_rows(tmp_path / "one.jsonl", rows[:1])
    with pytest.raises(DataError, match="leaves no training or no validation pair"):
        train(make_config(llama, single, tmp_path / "b", **options), silent)


@pytest.mark.parametrize(
    "name", ["adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"]
)
def test_every_optimizer_steps(name):
    torch.manual_seed(0)
    layer = torch.nn.Linear(128, 64)
    config = TrainConfig(
        "m", train_data_name_or_path="d", output_dir="o", optim=name, learning_rate=1e-2, weight_decay=0.1
    )
    optimizer = build_optimizer(layer, config)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    inputs = torch.randn(32, 128)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = layer(inputs).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(("kind", "last"), [("cosine", 0), ("linear", 0), ("constant", 1), ("constant_with_warmup", 1)])
def test_schedules_warm_up_and_end(kind, last):
    layer = torch.nn.Linear(2, 2)
    config = TrainConfig(
        "m", train_data_name_or_path="d", output_dir="o", lr_scheduler_type=kind, learning_rate=1.0, warmup_ratio=0.1
    )
    optimizer = build_optimizer(layer, config)
    scheduler = build_scheduler(optimizer, config, 100)
    rates = []
    for _ in range(101):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[0] == (1.0 if kind == "constant" else 0.0)
    assert rates[10] == pytest.approx(1.0) and rates[100] == pytest.approx(last, abs=1e-9)


def test_the_head_starts_at_the_base_rates(llama, bert, build, rows_file):
    from qlora_moderation.data import load_pairs
    from qlora_moderation.scoring import score_pairs

    pairs = load_pairs(str(rows_file), Taxonomy())
    for backbone in (llama, bert):
        classifier = build(backbone)
        ids = [np.array(window.ids) for window in classifier.encoder.encode(pairs.prompts, pairs.responses)]
        set_head_prior(classifier, pairs, ids)
        logits = score_pairs(classifier, pairs.prompts, pairs.responses).logits.mean(axis=0)
        np.testing.assert_allclose(logits, compute_log_odds(pairs), atol=0.4)


def test_tensorboard_gets_the_numbers(llama, rows_file, tmp_path):
    pytest.importorskip("tensorboard")
    train(make_config(llama, rows_file, tmp_path / "run", report_to=("tensorboard",)), silent)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next(path.parent for path in (tmp_path / "run").rglob("events.out.tfevents*"))))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]


@pytest.mark.parametrize("count", [1, 19])
def test_another_taxonomy_end_to_end(count, llama, tmp_path):
    names = [f"kind {i}" for i in range(count)]
    taxonomy = {"categories": names, "template": "Q: {question}\nA: {answer}\n", "labels_from": "category"}
    rows = []
    for i, row in enumerate(build_sample(0)["train"][:80]):
        category = {name: not row["is_safe"] and (i + k) % 3 == 0 for k, name in enumerate(names)}
        rows.append({**row, "category": category, "is_safe": not any(category.values())})
    if count == 1:
        taxonomy["labels_from"] = "is_safe"
        rows = [{key: row[key] for key in ("prompt", "response", "is_safe")} for row in rows]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    (tmp_path / "taxonomy.yaml").write_text(yaml.safe_dump(taxonomy))
    taxonomy_flags = ["--taxonomy", str(tmp_path / "taxonomy.yaml"), "--steps", "0", "--num_layers", "1"]
    flags = ["--train_data_name_or_path", str(data), "--output_dir", str(tmp_path / "backbone"), *taxonomy_flags]
    assert run_job("backbone", flags) == 0
    config = make_config(llama, data, tmp_path / "run", taxonomy=str(tmp_path / "taxonomy.yaml"), method="qlora")
    weights = train(config, silent)
    merge_adapter(MergeConfig(str(weights), str(tmp_path / "merged")), silent)
    result = evaluate(EvaluateConfig(str(tmp_path / "merged"), str(data), str(tmp_path / "e")), silent)
    assert all(f"{name}/f1" in result["metrics"] for name in names)
    assert "A: " in load_metadata(tmp_path / "merged").taxonomy.template


def test_training_starts_from_an_existing_classifier(runs, rows, tmp_path):
    """Head rows follow their names: one kept, two swapped, one new."""
    names = list(Taxonomy().categories)[:3]
    order = [names[0], names[2], names[1], "a new one"]
    (tmp_path / "taxonomy.yaml").write_text(yaml.safe_dump({"categories": order}))
    changed = []
    for row in rows[:60]:
        category = {name: row["category"].get(name, False) for name in order}
        changed.append({**row, "category": category, "is_safe": not any(category.values())})
    data = write_rows(tmp_path / "rows.jsonl", changed)
    log: list[str] = []
    options = {"taxonomy": str(tmp_path / "taxonomy.yaml"), "max_steps": 1, "learning_rate": 1e-12}
    weights = train(make_config(runs["full"].weights, data, tmp_path / "run", **options), log.append)
    line = next(line for line in log if line.startswith("head rows"))
    assert line.endswith(f"kept {names[0]}; reordered {names[2]}, {names[1]}; new a new one")
    from qlora_moderation.classifier import load_classifier

    old = find_head(load_classifier(runs["full"].weights).model.classifier)[2].weight
    new = find_head(load_classifier(weights).model.classifier)[2].weight
    torch.testing.assert_close(new[:3], old[[0, 2, 1]])


@pytest.mark.parametrize("method", ["lora", "full"])
def test_an_encoder_trains_merges_and_comes_back(method, bert, rows_file, tmp_path):
    from qlora_moderation.classifier import load_classifier
    from qlora_moderation.scoring import score_pairs

    weights = train(make_config(bert, rows_file, tmp_path / "run", method=method), silent)
    classifier = load_classifier(weights)
    assert classifier.layout == "padded"
    questions, answers = ["How?", "Why " * 30], ["So.", "Because " * 20]
    together = score_pairs(classifier, questions, answers).logits
    alone = [score_pairs(classifier, [q], [a]).logits[0] for q, a in zip(questions, answers, strict=True)]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    if method == "lora":
        state = (weights / "adapter_config.json").read_text()
        assert "pooler" in json.loads(state)["modules_to_save"]
        merge_adapter(MergeConfig(str(weights), str(tmp_path / "merged")), silent)
        merged = load_classifier(tmp_path / "merged")
        np.testing.assert_allclose(score_pairs(merged, questions, answers).logits, together, atol=1e-5)


def test_backbones_that_do_not_fit_are_refused_in_one_line(bert, llama, runs, rows_file, tmp_path):
    cases = [
        (bert, {"method": "qlora"}, r"is an encoder; --method qlora is for decoders"),
        (llama, {"max_length": 4096, "max_tokens_per_micro_batch": 4096}, r"reads at most 2048 tokens"),
        (tmp_path, {}, r"holds no model, config.json is missing; give the directory of a model"),
        (runs["lora"].directory, {}, r"holds no model, .*; models lie in .*lora/adapter; give"),
        (tmp_path / "nowhere", {}, r"nowhere: no such directory; give the directory of a model, or a hub name"),
        (llama, {"target_modules": ("q_proj", "nothing")}, r"--target_modules nothing: names no linear layer.*q_proj"),
        (llama, {"report_to": ("trackio",)}, r"--report_to trackio needs its package: pip install"),
        (runs["lora"].weights, {}, r"is an adapter, not a backbone; merge it first"),
        (bert, {"layout": "packed"}, r"--layout packed: encoders attend both ways"),
    ]
    for backbone, options, message in cases:
        with pytest.raises((CheckpointError, ConfigError), match=message):
            train(make_config(backbone, rows_file, tmp_path / "run", **options), silent)
    assert not (tmp_path / "run").exists()
