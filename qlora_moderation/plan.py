"""What a run will do, before its first step: data, steps, budgets, and a word on each.

In: a configuration and a classifier. Out: `Material` and `Plan`, announced in the log. Steps 2 to 5.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qlora_moderation.audit import compute_audit, describe_audit
from qlora_moderation.batching import count_steps, step_batch
from qlora_moderation.classifier import Classifier
from qlora_moderation.config import TrainConfig
from qlora_moderation.data import Pairs, choose_held_out
from qlora_moderation.distributed import world_size
from qlora_moderation.estimate import reserve
from qlora_moderation.memory import count_weights, describe_static_memory
from qlora_moderation.optim import warmup_steps
from qlora_moderation.scoring import default_token_budget
from qlora_moderation.token_cache import Corpus, TokenCache, find_directory, load_corpus
from qlora_moderation.token_ids import TokenIds

Log = Callable[[str], None]


_LEAST_OF_A_KIND = 5  # flagged validation pairs, or others, below which a metric moves by a fifth with a single one


@dataclasses.dataclass
class Material:
    """What a run learns from and is judged on.

    Attributes:
        training: N labelled pairs.
        validation: labelled pairs, or None.
        ids: token ids of the N training pairs.
        warnings: lines that report and card repeat.
        audit: see `audit.compute_audit`.
    """

    training: Pairs
    validation: Pairs | None
    ids: TokenIds
    warnings: list[str]
    audit: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The numbers that follow from configuration and data."""

    pairs_per_step: int
    steps_per_epoch: int
    total_steps: int
    token_budget: int
    eval_steps: int | None
    save_steps: int | None


def load_material(config: TrainConfig, classifier: Classifier, log: Log) -> Material:
    """Load, split, tokenise and audit the data.

    Raises:
        DataError: see `data.load_pairs`.
    """
    taxonomy, encoder = classifier.taxonomy, classifier.encoder
    cache = TokenCache(find_directory(config.cache_dir), log, read_only=config.dry_run)
    training = load_corpus(config.train_data_name_or_path, encoder, config.on_bad_row, log, cache)
    validation, warnings = None, []
    if config.eval_data_name_or_path:
        spec = config.eval_data_name_or_path
        validation = load_corpus(spec, encoder, config.on_bad_row, log, cache).pairs
        if config.eval_strategy != "no" and re.search(r"(?<![a-z])test(?![a-z])", Path(spec).name.lower()):
            warnings.append(
                f"the best weights are selected on {Path(spec).name}, by its name a test split: its metrics are no estimate "
                "for new data"
            )
    elif config.holds_out:
        training, validation = _hold_out(training, config)
        log(
            f"validation: {len(validation)} pairs of whole prompts held out of the training data "
            f"({len(validation) / (len(validation) + len(training.pairs)):.0%})"
        )
    warnings += _find_thin_validation(validation)
    audit = compute_audit(training.pairs, taxonomy, training.token_counts, config.max_length, validation)
    return Material(training.pairs, validation, training.ids, warnings, audit)


def _find_thin_validation(validation: Pairs | None) -> list[str]:
    if validation is None or validation.flagged is None:
        return []
    flagged = int((validation.flagged > 0.5).sum())
    if min(flagged, len(validation) - flagged) >= _LEAST_OF_A_KIND:
        return []
    return [
        f"of {len(validation)} validation pairs {flagged} are flagged: too few of a kind to tell better weights from worse; "
        "give --eval_data_name_or_path, or hold more out by --validation_fraction"
    ]


def _hold_out(corpus: Corpus, config: TrainConfig) -> tuple[Corpus, Pairs]:
    kept, held_out = choose_held_out(corpus.pairs, config.holds_out, config.seed)
    training = corpus.take(kept)
    training.pairs.skipped_rows = corpus.pairs.skipped_rows
    return training, corpus.pairs.take(held_out)


def count_pairs_per_step(config: TrainConfig, processes: int) -> int:
    """Return the pairs that all processes together learn from in one step."""
    return config.per_device_train_batch_size * config.gradient_accumulation_steps * processes


def build_plan(config: TrainConfig, pairs: int, device: torch.device) -> Plan:
    """Derive steps and budgets."""
    pairs_per_step = count_pairs_per_step(config, world_size())
    steps_per_epoch = count_steps(pairs, pairs_per_step)
    by_epochs = max(1, math.ceil(config.num_train_epochs * steps_per_epoch))
    budget = config.max_tokens_per_micro_batch or default_token_budget(device, config.max_length)
    every = {"no": None, "epoch": steps_per_epoch, "steps": config.eval_steps or config.logging_steps}
    total = config.max_steps if config.max_steps > 0 else by_epochs
    saving = {"no": None, "epoch": steps_per_epoch, "steps": config.save_steps}[config.save_strategy]
    return Plan(pairs_per_step, steps_per_epoch, total, budget, every[config.eval_strategy], saving)


def apply_bf16(config: TrainConfig, device: torch.device) -> TrainConfig:
    """Let `--bf16` decide the compute type where `--dtype` does not."""
    if config.bf16 is None or config.dtype != "auto" or device.type != "cuda":
        return config
    return dataclasses.replace(config, dtype="bfloat16" if config.bf16 else "float32")


def find_inapplicable(config: TrainConfig, device: torch.device) -> list[str]:
    """Say which flags of the original recipe do nothing here."""
    lines = []
    if device.type != "cuda":
        lines += [
            f"--{name} has no effect on the CPU, which computes in float32; going on"
            for name in ("bf16", "tf32")
            if getattr(config, name)
        ]
        if config.offloads and world_size() > 1:
            lines.append("--fsdp_cpu_offload has no effect on the CPU; going on")
    if config.fsdp and config.sharding == "auto" and world_size() == 1:
        lines.append("--fsdp has no effect with one process; going on unsharded")
    return lines


def announce(config: TrainConfig, classifier: Classifier, material: Material, plan: Plan, log: Log) -> None:
    """Print every derived value with its reason."""
    model = classifier.model
    trainable, everything = count_weights(model)
    tokens = sum(map(len, material.ids))
    warmup = warmup_steps(config, plan.total_steps)
    compute = model.autocast_dtype or next(p.dtype for p in model.parameters() if p.is_floating_point())
    for line in [*describe_audit(material.audit), *(f"warning: {warning}" for warning in material.warnings)]:
        log(line)
    log(f"method {config.method} on {model.device}, compute type {str(compute).removeprefix('torch.')}")
    log(f"layout {classifier.layout}: {classifier.layout_reason}; at most {plan.token_budget} tokens a micro-batch")
    log(
        f"pairs a step {plan.pairs_per_step} = per_device_train_batch_size {config.per_device_train_batch_size} x "
        f"gradient_accumulation_steps {config.gradient_accumulation_steps} x {world_size()} "
        f"process{'es' if world_size() > 1 else ''}"
    )
    log(f"sharding {classifier.sharding.kind}: {classifier.sharding.reason}")
    log(
        f"steps {plan.total_steps} ({'max_steps' if config.max_steps > 0 else f'{config.num_train_epochs:g} epochs'}; an epoch "
        f"has {plan.steps_per_epoch} steps and {tokens:,} tokens), {config.lr_scheduler_type} to "
        f"{config.resolved_learning_rate:g} with {warmup} steps of warm-up"
    )
    log(f"trainable {trainable:,} of {everything:,} weights ({trainable / everything:.2%})")
    _announce_memory(config, classifier, log)


def _announce_memory(config: TrainConfig, classifier: Classifier, log: Log) -> None:
    """Print what a process holds; the activations only where somebody waits for the figure, because they take a second."""
    capacity, device = classifier.capacity, classifier.model.device
    assert capacity is not None
    log(f"gradient checkpointing {capacity.recomputation}: {capacity.recomputation_reason}")
    log(f"each process: {describe_static_memory(classifier.model, config.optim)}")
    if config.dry_run or device.type == "cuda":
        log(
            f"memory estimate for each process: {capacity.describe()}; {capacity.memory / 2**30:.1f} GiB are there, "
            f"of which {reserve(capacity.memory, device.type) / 2**30:.2f} GiB stay in reserve"
        )


def show_first_pair(config: TrainConfig, classifier: Classifier, material: Material, plan: Plan, log: Log) -> None:
    """Print the first pair of the first step as the model reads it, with its labels."""
    first = step_batch(len(material.ids), plan.pairs_per_step, config.seed, 0)[0]
    assert material.training.labels is not None
    votes = zip(classifier.taxonomy.categories, material.training.labels[first], strict=True)
    labels = ", ".join(f"{name} {vote:.2f}" for name, vote in votes if vote) or "none"
    log(f"first pair ({material.training.places[first]}): {classifier.tokenizer.decode(material.ids[first])}")
    log(f"its labels: {labels}; annotations: {material.training.weight[first]}; tokens: {len(material.ids[first])}")
