"""What a user would write instead: transformers' Trainer with PEFT and dynamic padding. Imported by the benchmarks.

The rival gets every advantage that its own options give: no recomputation, no cast of the frozen weights to fp32, the same
initial adapters and head, the same token ids, the same optimiser, schedule and clipping.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from flags import refuse
from torch.utils.data import Dataset, Sampler
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from qlora_moderation.adapter import add_lora, replace_head
from qlora_moderation.annotation import BadRow, read_annotation
from qlora_moderation.backbone import inspect_backbone, quiet
from qlora_moderation.config import TrainConfig
from qlora_moderation.embedded import build_llama_shape, render_texts
from qlora_moderation.rows import read_rows
from qlora_moderation.sample import build_sample
from qlora_moderation.sources import Source
from qlora_moderation.taxonomy import Taxonomy

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RATE_TOKENS = {"cpu": 2048, "cuda": 16384}


def load_rows(path: str | None, count: int) -> list[dict[str, Any]]:
    """Return distinct pairs of a file, or made-up ones whose lengths are like BeaverTails'; a broken row ends the program."""
    if path:
        found = {}
        for place, row in read_rows(Source(path)):
            try:
                if isinstance(row, str):
                    raise BadRow(row)
                annotation = read_annotation(row, Taxonomy(), place)
            except BadRow as error:
                refuse(f"{place}: {error}")
            found[annotation.prompt, annotation.response] = row
        return list(found.values()) or refuse(f"{path}: holds no row")
    rng, made = random.Random(0), []
    known = build_sample(seed=0)["train"]
    sentences = [row["response"] for row in known]
    for index in range(count):
        row = dict(known[index % len(known)])
        words = rng.choices(sentences, k=max(1, round(rng.lognormvariate(1.1, 0.55))))
        made.append({**row, "response": " ".join([*words, f"({index})"])})
    return made


def write_rows(place: Path, rows: list[dict[str, Any]]) -> str:
    """Write rows as JSONL and return the path."""
    place.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(place)


def build_small_llama(
    place: Path, rows: list[dict[str, Any]], layers: int, width: int, steps: int = 0, vocab_size: int = 8000
) -> str:
    """Write a LLaMA in LLaMA-7B's proportions, and a tokenizer learnt from the rows; its weights are random for 0 steps."""
    wide = round(width * 2.6875 / 64) * 64
    shape = {"hidden_size": width, "intermediate_size": wide, "num_layers": layers, "num_heads": max(1, width // 64)}
    built = build_llama_shape(
        place, render_texts(rows), vocab_size=vocab_size, steps=steps, log=lambda line: None, **shape
    )
    return str(built)


def count_layer_weights(model: Any) -> int:
    """Return the weights of the decoder layers' linear maps, whatever type they lie in."""
    total = 0
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in LAYERS:
            layer = getattr(module, "base_layer", module)
            total += layer.in_features * layer.out_features
    return total


def list_shapes(model: Any) -> list[tuple[int, int]]:
    """Return (out, in) of the linear layers of one decoder layer."""
    first = next(module for name, module in model.named_modules() if name.endswith("layers.0"))
    linear = [getattr(m, "base_layer", m) for n, m in first.named_modules() if n.rpartition(".")[2] in LAYERS]
    return [(layer.out_features, layer.in_features) for layer in linear]


def measure_matrix_rate(shapes: list[tuple[int, int]], device: torch.device) -> float:
    """Return FLOP/s of one layer's matrix products at their own sizes, in the compute type: the limit of every speed here."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokens = RATE_TOKENS[device.type]
    pairs = [
        (
            torch.randn(tokens, inputs, device=device, dtype=dtype),
            torch.randn(outputs, inputs, device=device, dtype=dtype),
        )
        for outputs, inputs in shapes
    ]
    best = 0.0
    for _ in range(4):
        synchronize(device)
        started = time.perf_counter()
        for _ in range(3):
            for x, weight in pairs:
                x @ weight.t()
        synchronize(device)
        flop = 3 * sum(2 * tokens * weight.numel() for _, weight in pairs)
        best = max(best, flop / (time.perf_counter() - started))
    return best


def count_products(call: Callable[[], object]) -> int:
    """Return the floating-point operations of all matrix products in a call, attention left out."""
    aten = torch.ops.aten

    def count(_: Any, left: torch.Size, right: torch.Size, *others: Any, **options: Any) -> int:
        return 2 * left[0] * left[1] * right[1]

    # the counter of torch 2.13 does not know products that are added in place
    with FlopCounterMode(display=False, custom_mapping={aten.addmm_: count}) as counter:
        call()
    return sum(
        counter.get_flop_counts()["Global"].get(operation, 0) for operation in (aten.mm, aten.addmm, aten.addmm_)
    )


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def build_rival(config: TrainConfig, categories: tuple[str, ...], pad_id: int, device: torch.device) -> Any:
    """Return the stock classifier with PEFT's adapters as a user builds it, on the device, starting where ours starts."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    more: dict[str, Any] = {}
    if config.method == "qlora":
        more["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=config.bnb_4bit_use_double_quant,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=["score"],
        )
        more["device_map"] = {"": device}
    with quiet():
        model = AutoModelForSequenceClassification.from_pretrained(
            config.model_name_or_path, dtype=dtype, num_labels=len(categories), attn_implementation="sdpa", **more
        )
    if config.method == "qlora" and device.type == "cpu":
        for (
            module
        ) in model.modules():  # else bitsandbytes repacks NF4 where the CPU has bfloat16 units, and loses gradients
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    model.config.pad_token_id, model.config.use_cache = pad_id, False
    torch.manual_seed(config.seed)
    replace_head(model, categories, config.seed)
    model.score.to(dtype)  # the stock forward has no fp32 head
    return add_lora(model, inspect_backbone(config.model_name_or_path), config).to(device)


class Examples(Dataset):
    """Token ids and labels, as Trainer reads them."""

    def __init__(self, ids: Any, labels: torch.Tensor) -> None:
        self.ids, self.labels = ids, labels

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.ids[index], "labels": self.labels[index]}


class Collator:
    """Pads a batch to its longest text, and counts what it pads."""

    def __init__(self, pad_id: int) -> None:
        self.pad_id, self.real, self.padded = pad_id, 0, 0

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return input_ids and attention_mask [S, L], labels [S, C]."""
        texts = [torch.as_tensor(example["input_ids"]).long() for example in examples]
        ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=self.pad_id)
        lengths = torch.tensor([len(text) for text in texts])
        self.real += int(lengths.sum())
        self.padded += ids.numel()
        mask = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": torch.stack([example["labels"] for example in examples]),
        }


class FixedOrder(Sampler):
    """Hands out rows in a given order."""

    def __init__(self, order: list[int]) -> None:
        self.order = order

    def __iter__(self) -> Any:
        return iter(self.order)

    def __len__(self) -> int:
        return len(self.order)


class Clock(TrainerCallback):
    """Notes when each step ended."""

    def __init__(self, collator: Collator, device: torch.device) -> None:
        self.collator, self.device = collator, device
        self.ends: list[tuple[float, int, int]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        """Note time, real tokens and padded tokens so far."""
        synchronize(self.device)
        self.ends.append((time.perf_counter(), self.collator.real, self.collator.padded))


def train_rival(
    model: Any,
    config: TrainConfig,
    examples: Examples,
    pad_id: int,
    steps: int,
    order: list[int] | None,
    strategy: str = "random",
    callbacks: tuple[TrainerCallback, ...] = (),
) -> tuple[list[tuple[float, int, int]], list[float]]:
    """Train with Trainer in batches of 16, accumulated to the pairs of a step.

    Args:
        model: from `build_rival`.
        config: gives pairs a step, rate, schedule, clipping.
        examples: the rows.
        pad_id: fills short rows.
        steps: optimiser steps.
        order: rows in the order they are learnt; None leaves it to `strategy`.
        strategy: Trainer's `train_sampling_strategy`.
        callbacks: called as Trainer calls them.

    Returns:
        (time, real tokens, padded tokens) at the end of each step, and the losses.
    """
    collator = Collator(pad_id)
    device = next(model.parameters()).device
    clock = Clock(collator, device)
    with tempfile.TemporaryDirectory() as place, quiet():
        arguments = TrainingArguments(
            output_dir=place,
            per_device_train_batch_size=min(16, config.per_device_train_batch_size),
            gradient_accumulation_steps=max(1, config.per_device_train_batch_size // 16),
            max_steps=steps,
            learning_rate=config.resolved_learning_rate,
            lr_scheduler_type=config.lr_scheduler_type,
            warmup_steps=round(config.warmup_ratio * steps),
            max_grad_norm=config.max_grad_norm,
            weight_decay=config.weight_decay,
            optim=config.optim,
            seed=config.seed,
            bf16=device.type == "cuda",
            use_cpu=device.type == "cpu",
            train_sampling_strategy=strategy,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=device.type == "cuda",
        )
        trainer = Trainer(
            model, arguments, train_dataset=examples, data_collator=collator, callbacks=[clock, *callbacks]
        )
        trainer.pop_callback(PrinterCallback)
        # a stock classifier takes any keyword, so Trainer leaves the mean over accumulated batches to it, and nobody takes it
        trainer.model_accepts_loss_kwargs = False
        if order is not None:
            trainer._get_train_sampler = lambda *_: FixedOrder(order)  # type: ignore[method-assign]
        trainer.train()
    return clock.ends, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
