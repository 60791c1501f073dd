"""Merge an adapter and its head into a plain classifier, and prove that nothing changed.

In: an adapter directory. Out: a checkpoint that `AutoModelForSequenceClassification` opens, with `merge_report.json`.
Step 11 of the straight line.

A QLoRA adapter was trained against the NF4-rounded weights. Merged into those it is the trained function; merged into
the original weights it is another one, which is measured and reported but not gated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import nn

from qlora_moderation import backbone as bb
from qlora_moderation.adapter import find_head, set_label_names
from qlora_moderation.card import build_card
from qlora_moderation.classifier import ADAPTER_FILE, Classifier, load_classifier
from qlora_moderation.config import MergeConfig
from qlora_moderation.errors import CheckpointError, ConfigError, ModerationError
from qlora_moderation.metadata import read_json, write_json, write_text
from qlora_moderation.sample import build_sample
from qlora_moderation.scoring import Scores, score_pairs
from qlora_moderation.staging import replaced_whole

LOGIT_TOLERANCE = 1e-4
"""Largest difference of an fp32 logit that a faithful fp32 merge may show."""

PROBABILITY_TOLERANCE = 0.02
"""Largest difference of a probability that a faithful merge into 16-bit weights may show."""

_PROOF_PAIRS = 64


class MergeError(ModerationError):
    """A merge whose result is not the trained function."""


def merge_adapter(config: MergeConfig, log: Callable[[str], None] = print) -> Path:
    """Merge, prove, write; the directory appears whole or not at all.

    Raises:
        MergeError: a faithful merge misses its tolerance; nothing is left behind.
        ModerationError: the adapter, its base or the target cannot be used.
    """
    adapter_path, output = Path(config.adapter_path), Path(config.output_dir)
    if not (adapter_path / ADAPTER_FILE).is_file():
        raise CheckpointError(
            f"--adapter_path {adapter_path}: holds no {ADAPTER_FILE}; give the adapter directory of a run"
        )
    _check_target(output, adapter_path, config.overwrite)
    adapter = load_classifier(adapter_path, "float32", config.use_cpu)
    quantized = adapter.metadata.quantization is not None
    base = config.base if config.base != "auto" else ("dequantized" if quantized else "original")
    if base == "dequantized" and not quantized:
        raise ConfigError("--base dequantized: this adapter was trained on plain weights; use --base original")
    faithful = base == "dequantized" or not quantized
    spec = bb.inspect_backbone(adapter.metadata.base_model, adapter.metadata.base_revision)
    stored = spec.config.dtype or torch.float32
    dtype = stored if config.dtype == "auto" else getattr(torch, config.dtype)
    log(f"merging {adapter_path} into the {base} weights of {adapter.metadata.base_model}, written in {_name(dtype)}")

    sample = build_sample()["combinations"][:_PROOF_PAIRS]
    prompts, responses = [row["prompt"] for row in sample], [row["response"] for row in sample]
    trained = score_pairs(adapter, prompts, responses, "truncate")
    merged = _merge(adapter, adapter_path, spec, dequantize=base == "dequantized")
    overflow = [name for name, p in merged.named_parameters() if not bool(torch.isfinite(p.to(dtype)).all())]
    if overflow:
        raise MergeError(f"--dtype {_name(dtype)}: cannot hold {overflow[0]}; use bfloat16 or float32")
    head = find_head(merged)[2]
    merged.to(dtype)
    head.float()
    metadata = dataclasses.replace(adapter.metadata, kind="merged", quantization=None)
    with replaced_whole(output) as unfinished:
        merged.config.dtype = dtype
        with bb.quiet():
            merged.save_pretrained(str(unfinished), max_shard_size="2GB")
        adapter.tokenizer.save_pretrained(str(unfinished))
        metadata.save(unfinished)
        adapter.thresholds.save(unfinished, adapter.taxonomy)
        validation = adapter_path / "validation_metrics.json"
        metrics = read_json(validation) if validation.is_file() else None
        write_text(unfinished / "README.md", build_card(metadata, adapter.thresholds, metrics, None, adapter.pad_id))
        del merged
        written = load_classifier(unfinished, "float32", config.use_cpu)
        report = {
            "base": base,
            "dtype": _name(dtype),
            "gated": faithful,
            **_compare(trained, score_pairs(written, prompts, responses, "truncate"), adapter),
            "stock_load": _compare(trained, _score_stock(unfinished, written, prompts, responses), adapter),
        }
        write_json(unfinished / "merge_report.json", report)
        for line in _describe(report):
            log(line)
        if faithful:
            _gate(report, dtype)
    log(f"written: {output}")
    log(f"next: scripts/evaluate.py --model_path {output} --eval_dataset FILE --output_dir DIR")
    return output


def _check_target(output: Path, adapter: Path, overwrite: bool) -> None:
    """Refuse a target whose writing would lose anything but an earlier merge."""
    target, source = output.resolve(), adapter.resolve()
    if target == source or target in source.parents or source in target.parents:
        raise ConfigError(f"--output_dir {output}: holds the adapter itself, or lies in it; give another directory")
    if not output.exists() and not output.is_symlink():
        return
    if not overwrite:
        raise CheckpointError(f"--output_dir {output}: exists; give another directory, or --overwrite")
    if output.is_symlink() or not (output / "merge_report.json").is_file():
        raise CheckpointError(
            f"--output_dir {output}: is no earlier merge, so --overwrite does not touch it; give another"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _merge(adapter: Classifier, adapter_path: Path, spec: bb.BackboneSpec, dequantize: bool) -> Any:
    """Return the plain fp32 classifier with the adapter's product added and its head in place."""
    count = len(adapter.taxonomy.categories)
    device = adapter.model.device
    quantization = adapter.metadata.quantization if dequantize else None
    plain: Any = bb.load_backbone(spec, count, torch.float32, device, "padded", quantization).model
    if dequantize:
        _unpack_nf4(plain)
    plain.float()
    bb.fit_pad_token(plain, adapter.pad_id)
    set_label_names(plain.config, adapter.taxonomy.categories)
    merged = PeftModel.from_pretrained(plain, str(adapter_path)).merge_and_unload(safe_merge=True)
    if hasattr(merged.config, "quantization_config"):
        del merged.config.quantization_config
    return merged


def _unpack_nf4(model: nn.Module) -> None:
    """Replace each NF4 layer by a plain one that holds the rounded weights in fp32."""
    import bitsandbytes

    for name, module in list(model.named_modules()):
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.weight = nn.Parameter(weight.float(), requires_grad=False)
            if module.bias is not None:
                plain.bias = nn.Parameter(module.bias.data.float(), requires_grad=False)
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, plain)
    for attribute in ("is_loaded_in_4bit", "is_quantized", "hf_quantizer", "quantization_method"):
        if hasattr(model, attribute):
            delattr(model, attribute) if attribute in vars(model) else None


def _score_stock(directory: Path, written: Classifier, prompts: list[str], responses: list[str]) -> Scores:
    """Score with transformers alone, as a user without this library would: stored types, stock forward, own ids."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    with bb.quiet():
        model = AutoModelForSequenceClassification.from_pretrained(directory, dtype="auto").eval()
        tokenizer = AutoTokenizer.from_pretrained(directory)
    render = written.taxonomy.render
    logits = []
    with torch.inference_mode():
        for prompt, response in zip(prompts, responses, strict=True):
            inputs = tokenizer(render(prompt, response), return_tensors="pt", truncation=True)
            logits.append(model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.float())
    counts = np.ones(len(prompts), dtype=np.int64)
    return Scores(torch.cat(logits).numpy(), counts, np.zeros(len(prompts), dtype=bool))


def _compare(trained: Scores, merged: Scores, adapter: Classifier) -> dict[str, Any]:
    logits = np.abs(trained.logits - merged.logits)
    probabilities = np.abs(trained.probabilities - merged.probabilities)
    thresholds = np.asarray(adapter.thresholds.per_category)
    flips = adapter.thresholds.decide(trained.probabilities)[1] != adapter.thresholds.decide(merged.probabilities)[1]
    near = np.abs(trained.probabilities - thresholds) <= PROBABILITY_TOLERANCE
    return {
        "pairs": len(logits),
        "largest_logit_difference": float(logits.max()),
        "mean_logit_difference": float(logits.mean()),
        "largest_probability_difference": float(probabilities.max()),
        "flag_flips": int(flips.sum()),
        "flag_flips_away_from_threshold": int((flips & ~near).sum()),
    }


def _describe(report: dict[str, Any]) -> list[str]:
    def line(name: str, part: dict[str, Any]) -> str:
        return (
            f"{name}: largest difference to the adapter over {part['pairs']} pairs: logit "
            f"{part['largest_logit_difference']:.2e}, probability {part['largest_probability_difference']:.2e}; "
            f"{part['flag_flips']} flag flips"
        )

    lines = [line("merged", report), line("stock load of the merged files", report["stock_load"])]
    if not report["gated"]:
        lines.append(
            "warning: merged into the original weights, which is another function than the one that was trained; the "
            "figures above say how far, and --base dequantized gives the trained one"
        )
    return lines


def _gate(report: dict[str, Any], dtype: torch.dtype) -> None:
    if dtype == torch.float32:
        fails = report["largest_logit_difference"] > LOGIT_TOLERANCE
        limit = f"{LOGIT_TOLERANCE:g} of a logit"
    else:
        far = report["largest_probability_difference"] > PROBABILITY_TOLERANCE
        fails = far or report["flag_flips_away_from_threshold"] > 0
        limit = f"{PROBABILITY_TOLERANCE:g} of a probability and no flip beyond that of a threshold"
    if fails:
        raise MergeError(
            f"the merged model is not the trained one: largest logit difference {report['largest_logit_difference']:.2e}, "
            f"probability {report['largest_probability_difference']:.2e}; allowed: {limit}. Nothing was written; try "
            "--dtype float32"
        )
