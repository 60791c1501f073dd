"""Bytes foreseen without weights against bytes really held; what is decided from them, and what is said when they run out."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_config, silent
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from qlora_moderation import capacity as capacity_module
from qlora_moderation.activations import EstimateError, LiveBytes, build_example, compute_activations, run_step
from qlora_moderation.blueprint import Blueprint
from qlora_moderation.capacity import Capacity, choose_capacity
from qlora_moderation.cards import build_blueprint, open_spec, plan_cards
from qlora_moderation.classifier import Classifier
from qlora_moderation.cli import run_job
from qlora_moderation.config import EvaluateConfig, PlanConfig, TuneConfig
from qlora_moderation.errors import CheckpointError, ConfigError
from qlora_moderation.estimate import MemoryEstimator, Setting, reserve
from qlora_moderation.evaluate import evaluate
from qlora_moderation.layout import MicroBatch
from qlora_moderation.loss import compute_loss
from qlora_moderation.memory import compute_static_memory
from qlora_moderation.model import ModerationModel
from qlora_moderation.moderation import QAModeration
from qlora_moderation.optim import build_optimizer
from qlora_moderation.recomputation import find_layer_list, recompute_layers
from qlora_moderation.shortage import ShortageError
from qlora_moderation.train import train
from qlora_moderation.tune import tune_model

META = torch.device("meta")


@dataclasses.dataclass(frozen=True)
class Example:
    """A micro-batch with its labels, made before anything is counted."""

    batch: MicroBatch
    labels: torch.Tensor
    weight: torch.Tensor

    @property
    def tensors(self) -> list[torch.Tensor]:
        borders = [] if self.batch.segments is None else [self.batch.segments.borders]
        own = [t for t in vars(self.batch).values() if isinstance(t, torch.Tensor)]
        return [*own, *borders, self.labels, self.weight]

    def loss(self, classifier: Classifier) -> torch.Tensor:
        classifier.model.train()
        return compute_loss(classifier.model(self.batch), self.labels, self.weight, 1.0)


def build_micro_batch_of(classifier: Classifier, tokens: int) -> Example:
    assert classifier.capacity is not None
    batch = build_example(classifier.capacity.blueprint, tokens)
    return Example(batch, torch.zeros(len(batch.last), 14), torch.ones(len(batch.last)))


def bytes_of(tensors: Any) -> int:
    """Bytes of distinct storages."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(storages.values())


def constants_of(model: torch.nn.Module) -> list[torch.Tensor | None]:
    found = []
    for module in model.modules():
        state = getattr(module, "quant_state", None)
        if state is not None:
            nested = [state.state2.absmax, state.state2.code] if state.nested else []
            found += [state.absmax, state.code, state.offset, *nested]
    return found


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit"])
@pytest.mark.parametrize(
    "options",
    [
        {"method": "lora"},
        {"method": "qlora"},
        {"method": "qlora", "bnb_4bit_use_double_quant": False},
        {"method": "qlora", "use_dora": True},
        {"method": "full"},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_the_static_part_is_exact_before_anything_is_loaded(options, optim, llama, build):
    classifier = build(llama, optim=optim, **options)
    blueprint = classifier.capacity.blueprint
    foreseen = compute_static_memory(blueprint.build(META)[0], optim)
    optimizer = build_optimizer(classifier.model, blueprint.config)
    build_micro_batch_of(classifier, 64).loss(classifier).backward()
    optimizer.step()
    parameters = list(classifier.model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    frozen = [p for p in parameters if not p.requires_grad]
    assert foreseen == {
        "weights": bytes_of(frozen or trained),
        "constants": bytes_of(constants_of(classifier.model)),
        "adapters": bytes_of(trained) if frozen else 0,
        "gradients": bytes_of([p.grad for p in trained]),
        "optimizer": bytes_of([t for t in tree_leaves(dict(optimizer.state)) if isinstance(t, torch.Tensor)]),
    }
    assert compute_static_memory(classifier.model, optim) == foreseen


def bytes_kept(classifier: Classifier, example: Example) -> int:
    """Bytes that a forward pass leaves for the backward pass, by autograd's own account, with the loss."""
    saved: list[Any] = []
    known = [*classifier.model.parameters(), *classifier.model.buffers(), *example.tensors]
    hooks = [  # what recomputing layers get by name is held without being saved
        layer.register_forward_pre_hook(lambda _, __, more: saved.extend(tree_leaves(more)), with_kwargs=True)
        for layer in find_layer_list(classifier.model.network)
        if layer.gradient_checkpointing
    ]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = example.loss(classifier)
    for hook in hooks:
        hook.remove()
    outside = {t.untyped_storage().data_ptr() for t in known}
    inside = [t for t in saved if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in outside]
    kept = bytes_of([*inside, loss])
    loss.backward()
    return kept


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_activations_are_those_of_the_real_step(method, layout, llama, build):
    for which in ("none", "selective", "all"):
        classifier = build(llama, method=method, layout=layout, gradient_checkpointing=which)
        example, model = build_micro_batch_of(classifier, 300), classifier.model
        foreseen = compute_activations(classifier.capacity.blueprint, which, 300, "cpu")
        assert foreseen.kept == bytes_kept(classifier, example), which
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        with LiveBytes([*model.parameters(), *model.buffers(), *example.tensors, *gradients]) as real:
            example.loss(classifier).backward()
        assert foreseen.peak == real.peak > foreseen.kept, which


def half_precision(classifier: Classifier) -> Blueprint:
    """The same network as a GPU computes it, where one kernel attends in all texts."""
    return dataclasses.replace(classifier.capacity.blueprint, compute_dtype=torch.bfloat16)


def test_the_attention_that_is_counted_is_the_one_that_runs(llama, build):
    plain = build(llama).capacity.blueprint
    half = half_precision(build(llama))
    for blueprint, same in ((plain, True), (half, False)):
        found = [compute_activations(blueprint, "none", 300, device) for device in ("cpu", "cuda")]
        assert (found[0] == found[1]) == same  # fp32 takes the same way on both devices


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_activations_grow_with_the_tokens(device, llama, build):
    blueprint = half_precision(build(llama))
    one, two, four = (compute_activations(blueprint, "all", tokens, device) for tokens in (128, 256, 512))
    assert four.kept - two.kept == 2 * (two.kept - one.kept)
    assert four.peak == pytest.approx(2 * two.peak, rel=0.1)  # temporaries as large as a weight do not grow


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize(("which", "layers"), [("none", 6), ("selective", 6), ("selective", 7), ("all", 6)])
def test_two_short_networks_tell_of_a_deep_one(method, which, layers, llama, build):
    deep = half_precision(build(llama, method=method)).with_layers(layers)
    assert compute_activations(deep, which, 128, "cuda") == run_step(deep, which, 128, "cuda", gathered=False)


def test_the_last_layer_keeps_its_activations_and_every_second_before_it(llama, build):
    blueprint = build(llama).capacity.blueprint
    for which, expected in (("none", [0] * 4), ("selective", [0, 1, 0, 0]), ("selective", [1, 0, 0]), ("all", [1] * 4)):
        network = blueprint.with_layers(len(expected)).build(META)[0]
        recompute_layers(network, which)
        assert [layer.gradient_checkpointing for layer in find_layer_list(network)] == expected


def test_what_memory_allows_is_chosen_with_its_reason(llama, rows_file, build, monkeypatch):
    blueprint = build(llama).capacity.blueprint.with_layers(4)  # of two, selective recomputes none
    estimator, free = MemoryEstimator(blueprint, "cuda"), {}

    def choose(memory: int, processes: int = 1, device: str = "cuda", **options: Any) -> Capacity:
        monkeypatch.setattr(capacity_module, "device_memory", lambda _: memory)
        monkeypatch.setattr(capacity_module, "world_size", lambda: processes)
        config = make_config(llama, rows_file, "unused", **options)
        return choose_capacity(config, blueprint, torch.device(device), 2048)

    for kind, processes in (("none", 1), ("ddp", 2), ("fsdp", 2)):
        for which in ("none", "selective", "all"):
            total = estimator.estimate(Setting(kind, processes, which, 2048)).total
            free[kind, which] = int((total + reserve(0)) / 0.95) + 2
    assert free["none", "none"] > free["none", "selective"] >= free["none", "all"] > reserve(0)
    for which in ("none", "selective"):
        chosen = choose(free["none", which])
        assert (chosen.sharding, chosen.recomputation) == ("none", which)
        found = estimator.estimate(chosen.setting)
        assert found.fits(free["none", which]) and not found.fits(free["none", which] - 10**6)
        assert f"checkpointing {which} needs an estimated" in chosen.recomputation_reason
    assert choose(free["ddp", "none"], 2).sharding == "ddp"
    smallest = choose(1000, 2)
    assert (smallest.sharding, smallest.recomputation) == ("fsdp", "all")
    assert "nothing fits" in smallest.recomputation_reason and "nothing fits" in smallest.sharding_reason
    assert choose(1000, 2, sharding="ddp", gradient_checkpointing=True).sharding == "ddp"
    assert choose(1000, gradient_checkpointing="none").recomputation_reason == "asked for"
    assert choose(1000, device="cpu").recomputation == "none"
    with pytest.raises(ConfigError, match="--optim adamw_8bit cannot work on slices"):
        choose(1000, 2, optim="adamw_8bit")
    with pytest.raises(ConfigError, match="--sharding none means one process, and there are 2"):
        choose(1000, 2, sharding="none")


def test_a_network_that_looks_at_values_runs_without_an_estimate(llama, rows_file, tmp_path, build, monkeypatch):
    whole = ModerationModel.forward

    def look(self: ModerationModel, batch: MicroBatch) -> torch.Tensor:
        return whole(self, batch) if int(batch.input_ids.sum()) >= 0 else torch.zeros(())

    monkeypatch.setattr(ModerationModel, "forward", look)
    monkeypatch.setattr(capacity_module, "device_memory", lambda _: 10**10)
    config = make_config(llama, rows_file, tmp_path / "run", dry_run=True)
    chosen = choose_capacity(config, build(llama).capacity.blueprint, torch.device("cuda"), 2048)
    assert chosen.recomputation == "all" and "there is no estimate" in chosen.recomputation_reason
    log: list[str] = []
    train(config, log.append)
    assert any(line.startswith("memory estimate for each process: none (") for line in log)


def test_why_there_is_no_estimate_is_said_in_one_line(llama, build, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("torch._subclasses.fake_tensor"), "handlers", [caplog.handler])
    blueprint = build(llama).capacity.blueprint
    monkeypatch.setattr(ModerationModel, "forward", lambda self, batch: batch.input_ids.expand(3, 7))
    with pytest.raises(EstimateError, match="its activations cannot be counted without data"):
        compute_activations(blueprint, "none", 128, "cpu")
    assert caplog.text == ""  # torch has a traceback to tell


def test_a_dry_run_prints_the_estimate(llama, rows_file, tmp_path):
    log: list[str] = []
    options = {"method": "qlora", "use_dora": True, "dry_run": True}
    train(make_config(llama, rows_file, tmp_path / "run", **options), log.append)
    line = next(line for line in log if line.startswith("memory estimate for each process: 0.0"))
    assert all(f" {part} 0.0" in line for part in ("constants", "adapters", "gradients", "activations", "buffers")), (
        line
    )
    assert "one process, checkpointing none, 2048 tokens a micro-batch" in line and "in reserve" in line


def run_short_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every forward over real tensors fail; an estimate still can be made."""
    whole = ModerationModel.forward

    def fail(self: ModerationModel, batch: MicroBatch) -> torch.Tensor:
        if isinstance(batch.input_ids, FakeTensor):
            return whole(self, batch)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(ModerationModel, "forward", fail)


def test_running_out_of_memory_in_training_names_what_is_left_to_turn(llama, rows_file, tmp_path, monkeypatch, capsys):
    run_short_of_memory(monkeypatch)
    cases = (
        # of two layers, selective recomputes none
        ({}, "use --gradient_checkpointing all, or --max_tokens_per_micro_batch 1024, or --method qlora"),
        ({"gradient_checkpointing": True, "method": "qlora"}, "use --max_tokens_per_micro_batch 1024"),
        (
            {"gradient_checkpointing": True, "method": "qlora", "max_tokens_per_micro_batch": 256, "max_length": 256},
            "no option is left to turn; use a device with more memory, or more of them",
        ),
    )
    for index, (options, advice) in enumerate(cases):
        run = tmp_path / str(index)
        with pytest.raises(ShortageError) as caught:
            train(make_config(llama, rows_file, run, head_prior=False, **options), silent)
        said = str(caught.value)
        assert said.endswith(f"; {advice}") and "\n" not in said, said
        assert "the estimate was 0.0" in said and "training ran out of memory on cpu" in said
        assert json.loads((run / "status.json").read_text())["state"] == "failed"
    flags = f"--model_name_or_path {llama} --train_data_name_or_path {rows_file} --output_dir {tmp_path}/cli --use_cpu"
    assert run_job("train", flags.split()) == 2
    assert capsys.readouterr().err.startswith("error: --output_dir ")
    assert not (tmp_path / "cli").exists()  # the head's start is the first forward, before anything is written


def test_running_out_of_memory_in_scoring_says_what_to_lower(runs, rows_file, tmp_path, monkeypatch):
    moderation = QAModeration.from_pretrained(str(runs["lora"].weights))
    run_short_of_memory(monkeypatch)
    with pytest.raises(ShortageError, match=r"scoring ran out of memory .* at batch_size 16; use batch_size 8$"):
        moderation.predict("How?", "So.")
    with pytest.raises(ShortageError, match="at batch_size 1; no option is left to turn"):
        moderation.predict("How?", "So.", batch_size=1)
    weights = str(runs["lora"].weights)
    with pytest.raises(ShortageError, match=r"^--model_path .*; use --max_tokens_per_micro_batch 1024$"):
        evaluate(EvaluateConfig(weights, str(rows_file), str(tmp_path / "e")), silent)
    with pytest.raises(ShortageError, match=r"^--model_path .*; use --max_tokens_per_micro_batch 1024$"):
        tune_model(TuneConfig(weights, str(rows_file)), silent)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:131] . DefaultCPUAllocator: can't allocate memory: you tried to allocate"
        ),
    ],
    ids=["cuda", "cpu"],
)
def test_running_out_of_memory_while_loading_names_what_makes_the_weights_smaller(
    error, llama, runs, rows_file, tmp_path, monkeypatch
):
    def fail(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr("qlora_moderation.backbone.AutoModelForSequenceClassification.from_pretrained", fail)
    for method, advice in (("lora", "use --method qlora"), ("qlora", "no option is left to turn; use a device with")):
        with pytest.raises(ShortageError, match=f"training ran out of memory on cpu .*; {advice}"):
            train(make_config(llama, rows_file, tmp_path / "run", method=method), silent)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ShortageError, match=r"/adapter: its weights do not fit .* device, cpu, .*; use one with more"):
        QAModeration.from_pretrained(str(runs["lora"].weights))


def test_the_plan_names_the_first_setting_that_fits(llama, tmp_path):
    log: list[str] = []
    options = {"model_name_or_path": str(llama), "max_length": 128, "max_tokens_per_micro_batch": 16384}
    rows = plan_cards(PlanConfig(**options, cards=(1, 2), gpus=(1, 2), json=str(tmp_path / "plan.json")), log.append)
    assert [line.count("|") for line in log if line.startswith("| ")] == [13] * (len(rows) + 1)
    by_card = {(row.method, row.card): row for row in rows}
    for method in ("lora", "qlora", "full"):
        assert not by_card[method, 1].fits or by_card[method, 1].estimate.fits(10**9)
        best = by_card[method, 2]
        assert best.fits and best.gpus == (1, 2) and best.estimate.fits(2 * 10**9)
        assert (best.estimate.setting.recomputation, best.estimate.setting.tokens) == ("none", 16384)
        assert f"--method {method} --sharding none --gradient_checkpointing none" in best.command
    stored = json.loads((tmp_path / "plan.json").read_text())
    assert [line["total"] for line in stored] == [row.estimate.total for row in rows]
    odd = PlanConfig(**options, cards=(2, 1, 2), gpus=(2, 1, 1), methods=("lora", "qlora", "full", "lora"))
    assert plan_cards(odd, silent) == rows


def test_the_plan_refuses_what_no_run_could_do(llama, bert, tmp_path, capfd):
    with pytest.raises(CheckpointError, match=r"holds no model, config\.json is missing"):
        plan_cards(PlanConfig(str(tmp_path)), silent)
    with pytest.raises(CheckpointError, match="reads at most 512 tokens; lower --max_length 513"):
        plan_cards(PlanConfig(str(bert), methods=("lora",), max_length=513), silent)
    shape = json.loads((llama / "config.json").read_text())
    for change in ({"hidden_size": 63}, {"hidden_size": "64"}, {"hidden_size": -64}, {"num_hidden_layers": 2.5}):
        (tmp_path / "config.json").write_text(json.dumps(shape | change))
        with pytest.raises(
            CheckpointError, match=r"its config.json cannot be used|no model that can be built"
        ) as caught:
            plan_cards(PlanConfig(str(tmp_path)), silent)
        assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_the_plan_writes_into_a_pipe_and_through_a_link(llama, tmp_path):
    def plan(path: Path) -> None:
        plan_cards(PlanConfig(str(llama), ("lora",), cards=(8,), gpus=(1,), json=str(path)), silent)

    pipe, link = tmp_path / "pipe", tmp_path / "link.json"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    plan(pipe)
    assert json.loads(os.read(reader, 2**16))[0]["card"] == 8 and pipe.is_fifo()
    os.close(reader)
    (tmp_path / "target.json").touch()
    link.symlink_to(tmp_path / "target.json")
    plan(link)
    assert link.is_symlink() and json.loads((tmp_path / "target.json").read_text())[0]["card"] == 8


def test_the_plan_of_the_7b_shape_has_the_arithmetic_of_its_weights():
    """LLaMA-7B: 32,000 x 4,096 embedding, 32 layers of 4 square and 3 wide matrices, 65 norms; LoRA of rank 16."""
    matrices, norms, embedding = 32 * (4 * 4096**2 + 3 * 4096 * 11008), 65 * 4096, 32_000 * 4096
    lora, head = 32 * 16 * (4 * 2 * 4096 + 3 * (4096 + 11008)), 14 * 4096
    for method, expected in (("lora", 2 * matrices), ("qlora", matrices // 2), ("full", 4 * matrices)):
        blueprint = build_blueprint(PlanConfig(), open_spec(PlanConfig()), method)
        parts = MemoryEstimator(blueprint, "cuda").estimate_without_activations(Setting("none", 1, "none", 2048))
        if method == "full":
            trained = matrices + norms + embedding + head
            assert (parts.weights, parts.adapters, parts.gradients) == (4 * trained, 0, 4 * trained)
        else:
            # PEFT keeps the head that it found beside the one that it trains
            assert parts.weights == expected + 2 * (norms + embedding) + 4 * head
            assert parts.adapters == parts.gradients == 4 * (lora + head)
