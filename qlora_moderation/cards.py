"""Which cards a training run needs: a table over methods, cards and numbers of GPUs, before anything is downloaded or rented.

In: a `PlanConfig`. Out: Markdown lines, and JSON on request. The job `plan`; no step of a run.
"""

from __future__ import annotations

import dataclasses
import itertools
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from qlora_moderation.activations import Activations
from qlora_moderation.backbone import BackboneSpec, choose_layout, inspect_backbone
from qlora_moderation.blueprint import Blueprint
from qlora_moderation.classifier import check_max_length
from qlora_moderation.config import PlanConfig, TrainConfig
from qlora_moderation.errors import ConfigError
from qlora_moderation.estimate import Kind, MemoryEstimate, MemoryEstimator, Setting, reserve
from qlora_moderation.metadata import Quantization, write_json
from qlora_moderation.recomputation import RECOMPUTATIONS
from qlora_moderation.refusals import refusals
from qlora_moderation.taxonomy import load_taxonomy

LLAMA_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
}
"""The shape of huggyllama/llama-7b, as its config.json has it."""

_LEAST_TOKENS = 2048  # below it matrix products no longer fill a GPU, and NF4 weights are unpacked for too few tokens
_COLUMNS = ("method", "card, GB", "GPUs", "sharding", "checkpointing", "tokens", "static", "activations", "buffers")
_HEADER = f"| {' | '.join(_COLUMNS)} | total, GiB a GPU | fits | command |"


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: the fastest setting of a method that fits a card, or the smallest where none does.

    Attributes:
        method: how the backbone is trained.
        card: in GB of 10^9 bytes.
        gpus: numbers of GPUs for which the line holds.
        estimate: of one GPU.
        fits: whether estimate and reserve go into the card.
        command: that starts it on the first of these numbers; empty where it does not fit.
    """

    method: str
    card: int
    gpus: tuple[int, ...]
    estimate: MemoryEstimate
    fits: bool
    command: str

    def as_plain(self) -> dict[str, Any]:
        """Return the line as JSON holds it, sizes in bytes."""
        return {**dataclasses.asdict(self), "static": self.estimate.static, "total": self.estimate.total}


def plan_cards(config: PlanConfig, log: Callable[[str], None] = print) -> list[Row]:
    """Print the table and return its lines.

    Raises:
        ModerationError: the backbone cannot be read, or options do not fit it.
    """
    # what is named twice, or from the large to the small, gives the same table
    config = dataclasses.replace(
        config,
        methods=tuple(dict.fromkeys(config.methods)),
        cards=tuple(sorted(set(config.cards))),
        gpus=tuple(sorted(set(config.gpus))),
    )
    spec = open_spec(config)
    check_max_length(spec, config.max_length)
    seen: dict[tuple[Any, ...], Activations] = {}
    rows = [row for method in config.methods for row in _plan_method(config, spec, method, seen)]
    highest = max(config.cards) * 10**9
    for line in [
        f"{spec.name}: {config.dtype}, texts of at most {config.max_length} tokens, {config.optim}; nothing here is measured",
        f"a card of N GB counts as N x 10^9 bytes; it fits where {reserve(0) / 2**30:.2f} GiB and "
        f"{(reserve(highest) - reserve(0)) / highest:.0%} of the card stay free (assumed)",
        "tried in this order: ddp before fsdp, checkpointing none before selective before all, larger micro-batches first",
        "a line for several numbers of GPUs has the first one's command; N take PROCESSES=N ./scripts/launch.sh --sharding ddp",
        "",
        f"COMMON='{_common(config)}'",
        "",
        _HEADER,
        "|" + "---|" * (_HEADER.count("|") - 1),
        *map(_show, rows),
    ]:
        log(line)
    if config.json is not None:
        with refusals(f"--json {config.json}"):
            path = Path(config.json)
            write_json(path.resolve() if path.is_file() else path, [row.as_plain() for row in rows])
        log(f"written: {config.json}")
    return rows


def open_spec(config: PlanConfig) -> BackboneSpec:
    """Return the backbone to plan for.

    Raises:
        CheckpointError: it cannot be read.
    """
    if config.model_name_or_path is None:
        return BackboneSpec("LLaMA-7B's shape", None, LlamaConfig(**LLAMA_7B, pad_token_id=None), "decoder")
    return inspect_backbone(config.model_name_or_path, config.model_revision)


def build_blueprint(config: PlanConfig, spec: BackboneSpec, method: Any) -> Blueprint:
    """Return the network that training by `method` would build; the padding token is taken to be in the vocabulary."""
    training = TrainConfig(
        model_name_or_path=spec.name,
        train_data_name_or_path="none",
        output_dir="none",
        method=method,
        max_length=config.max_length,
        lora_r=config.lora_r,
        target_modules=config.target_modules,
        bnb_4bit_use_double_quant=config.bnb_4bit_use_double_quant,
        optim=config.optim,
    )
    return Blueprint(
        config=training,
        spec=spec,
        compute_dtype=getattr(torch, config.dtype),
        layout=choose_layout(spec, "auto", config.max_length)[0],
        quantization=Quantization(config.bnb_4bit_use_double_quant, config.dtype) if method == "qlora" else None,
        categories=tuple(load_taxonomy(config.taxonomy).categories),
        pad_id=0,
    )


def _plan_method(
    config: PlanConfig, spec: BackboneSpec, method: str, seen: dict[tuple[Any, ...], Activations]
) -> list[Row]:
    if spec.kind == "encoder" and method == "qlora":
        raise ConfigError(f"{spec.name}: is an encoder, and qlora is for decoders; use --methods lora full")
    budgets = _list_budgets(config)
    estimator = MemoryEstimator(build_blueprint(config, spec, method), "cuda", (budgets[-1], budgets[0]), seen)
    rows: list[Row] = []
    for card, gpus in itertools.product(config.cards, config.gpus):
        estimate = _find_first(estimator, _list_settings(config, gpus, budgets), card * 10**9)
        fits = estimate.fits(card * 10**9)
        row = Row(method, card, (gpus,), estimate, fits, _command(method, estimate.setting) if fits else "")
        if rows and rows[-1].card == card and _says_the_same(rows[-1], row):
            kept = rows.pop()
            row = dataclasses.replace(kept if fits else row, gpus=(*kept.gpus, gpus))
        rows.append(row)
    return rows


def _find_first(estimator: MemoryEstimator, settings: list[Setting], memory: int) -> MemoryEstimate:
    """Return the estimate of the first setting that fits, or of the last one."""
    for setting in settings[:-1]:
        if estimator.estimate_without_activations(setting, memory).fits(memory):
            estimate = estimator.estimate(setting, memory)
            if estimate.fits(memory):
                return estimate
    return estimator.estimate(settings[-1], memory)


def _list_budgets(config: PlanConfig) -> list[int]:
    budgets = [config.max_tokens_per_micro_batch]
    while budgets[-1] // 2 >= max(_LEAST_TOKENS, config.max_length):
        budgets.append(budgets[-1] // 2)
    return budgets


def _list_settings(config: PlanConfig, gpus: int, budgets: list[int]) -> list[Setting]:
    kinds: list[Kind] = ["none"] if gpus == 1 else ["ddp", "fsdp"]
    if not config.optim.startswith("adamw_torch") and gpus > 1:
        kinds = ["ddp"]
    return [
        Setting(kind, gpus, mode, tokens) for kind, mode, tokens in itertools.product(kinds, RECOMPUTATIONS, budgets)
    ]


def _says_the_same(one: Row, other: Row) -> bool:
    """Say whether two numbers of GPUs need not stand apart: neither fits, or both run the same on each GPU."""
    if not (one.fits or other.fits):
        return True
    ways = [dataclasses.replace(row.estimate.setting, processes=1, sharding="none") for row in (one, other)]
    replicas = all(row.estimate.setting.sharding != "fsdp" for row in (one, other))
    return one.fits and other.fits and replicas and ways[0] == ways[1]


def _show(row: Row) -> str:
    estimate, setting = row.estimate, row.estimate.setting
    static, activations, buffers, total = (
        f"{size / 2**30:.1f}" for size in (estimate.static, estimate.activations, estimate.buffers, estimate.total)
    )
    gpus = ", ".join(map(str, row.gpus))
    if not row.fits:
        return f"| {row.method} | {row.card} | {gpus} | | | | | | | at least {total} | does not fit | |"
    sharding = "none, ddp" if setting.sharding == "none" and len(row.gpus) > 1 else setting.sharding
    return (
        f"| {row.method} | {row.card} | {gpus} | {sharding} | {setting.recomputation} | {setting.tokens} | {static} | "
        f"{activations} | {buffers} | {total} | yes | `{row.command}` |"
    )


def _common(config: PlanConfig) -> str:
    model = config.model_name_or_path or "huggyllama/llama-7b"
    return (
        f"--model_name_or_path {shlex.quote(model)} --train_data_name_or_path PKU-Alignment/BeaverTails:330k_train "
        f"--output_dir output/run --max_length {config.max_length} --lora_r {config.lora_r} --optim {config.optim}"
    )


def _command(method: str, setting: Setting) -> str:
    flags = (
        f"$COMMON --method {method} --sharding {setting.sharding} --gradient_checkpointing {setting.recomputation} "
        f"--max_tokens_per_micro_batch {setting.tokens}"
    )
    if setting.processes == 1:
        return f"python scripts/train.py {flags}"
    return f"PROCESSES={setting.processes} ./scripts/launch.sh {flags}"
