"""Merge an adapter and its head into a plain classifier, tensor by tensor, and prove that nothing changed.

In: an adapter directory. Out: a checkpoint that `AutoModelForSequenceClassification` opens, with `merge_report.json`.
Step 11 of the straight line.

A QLoRA adapter was trained against the NF4-rounded weights. Merged into those it is the trained function; merged into
the original weights it is another one, which is measured and reported but not gated.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch

from qlora_moderation import backbone as bb
from qlora_moderation.adapter import find_head
from qlora_moderation.card import build_card
from qlora_moderation.classifier import ADAPTER_FILE, OpenedModel, open_model
from qlora_moderation.config import MergeConfig
from qlora_moderation.distributed import current_device
from qlora_moderation.errors import CheckpointError, ConfigError
from qlora_moderation.export import write_config
from qlora_moderation.leakage import load_hashes
from qlora_moderation.merged_weights import MergePlan, Recipe, plan_merge
from qlora_moderation.metadata import is_abandoned, read_json, write_json, write_text
from qlora_moderation.proof import MergeError, check_report, describe_report, prove_merge
from qlora_moderation.staging import replaced_whole
from qlora_moderation.stock_tokenizer import save_stock_tokenizer
from qlora_moderation.tensor_files import FILE_BYTES, OnlyWholeError, TensorWriter, describe_names
from qlora_moderation.thresholds import PREVIOUS_FILE
from qlora_moderation.whole_merge import merge_in_memory

_NUMBER = int | float | None
_MERGED_FILE = re.compile(
    r"README\.md|(config|generation_config|merge_report|moderation_config|thresholds|model\.safetensors\.index)\.json"
    r"|(tokenizer|special_tokens|added_tokens|vocab|chat_template)[\w.]*|merges\.txt|(model|training_hashes)[\w-]*\.safetensors"
)


def merge_adapter(config: MergeConfig, log: Callable[[str], None] = print) -> Path:
    """Merge, prove, write; the directory appears whole or not at all.

    Raises:
        MergeError: a faithful merge misses its tolerance; nothing is left behind.
        ModerationError: the adapter, its base or the target cannot be used.
    """
    adapter_path, output = Path(config.adapter_path), Path(config.output_dir)
    if not (adapter_path / ADAPTER_FILE).is_file():
        raise CheckpointError(f"--adapter_path {adapter_path}: {_say_what_it_is(adapter_path)}")
    opened = open_model(adapter_path)
    _check_target(output, adapter_path, Path(opened.spec.name), config.overwrite)
    quantized = opened.metadata.quantization is not None
    base = config.base if config.base != "auto" else ("dequantized" if quantized else "original")
    dequantize = base == "dequantized"
    if dequantize and not quantized:
        raise ConfigError("--base dequantized: this adapter was trained on plain weights; use --base original")
    dtype = (opened.spec.config.dtype or torch.float32) if config.dtype == "auto" else getattr(torch, config.dtype)
    named = str(dtype).removeprefix("torch.")
    log(f"merging {adapter_path} into the {base} weights of {opened.spec.name}, written in {named}")
    plan: MergePlan | None = None
    try:
        plan = plan_merge(adapter_path, opened.metadata, opened.spec, opened.pad_id, dequantize)
    except OnlyWholeError as reason:
        log(f"merging in memory: {reason}")
    with replaced_whole(output) as unfinished:
        started = time.monotonic()
        if plan is None:
            _write_whole(opened, unfinished, dtype, dequantize, config.use_cpu)
        else:
            if plan.dropped:
                log(f"left out of the base: {describe_names(plan.dropped)}")
            write_merged(plan, unfinished, dtype)
        size = sum(file.stat().st_size for file in unfinished.glob("*.safetensors"))
        shown = f"{size / 1e9:.2f} GB" if size > 5e7 else f"{size / 1e6:.1f} MB"
        log(f"{shown} written in {time.monotonic() - started:.1f} s; now the proof")
        _write_companions(opened, unfinished)
        report = prove_merge(opened, plan, unfinished, dequantize, dtype, config.use_cpu)
        if plan is not None:
            report["left_out"] = list(plan.dropped)
        write_json(unfinished / "merge_report.json", report)
        for line in describe_report(report):
            log(line)
        check_report(report)
    log(f"written: {output}")
    log(f"next: python scripts/evaluate.py --model_path {output} --eval_dataset FILE --output_dir DIR")
    return output


def _say_what_it_is(path: Path) -> str:
    """Say what lies where no adapter does, and what to give instead."""
    if not path.is_dir():
        return "no such directory; give the adapter directory of a run"
    if (path / "config.json").is_file():
        return "is a full model; there is nothing to merge"
    if (path / "adapter" / ADAPTER_FILE).is_file():
        return f"is a run directory; give {path / 'adapter'}"
    return f"holds no {ADAPTER_FILE}; give the adapter directory of a run"


def _check_target(output: Path, adapter: Path, base: Path, overwrite: bool) -> None:
    """Refuse a target whose writing would lose anything but an earlier merge."""
    target = output.resolve()
    for what, place in (("adapter itself", adapter.resolve()), ("adapter's base model", base.resolve())):
        if place.is_dir() and (target == place or target in place.parents or place in target.parents):
            raise ConfigError(f"--output_dir {output}: holds the {what}, or lies in it; give another directory")
    if not output.exists() and not output.is_symlink():
        return
    if not overwrite:
        raise CheckpointError(f"--output_dir {output}: exists; give another directory, or --overwrite")
    if output.is_symlink() or not (output / "merge_report.json").is_file():
        raise CheckpointError(
            f"--output_dir {output}: is no earlier merge, so --overwrite does not touch it; give another"
        )
    there = (path for path in output.iterdir() if not is_abandoned(path))
    others = sorted(path.name for path in there if not _MERGED_FILE.fullmatch(path.name))
    if others:
        raise CheckpointError(
            f"--output_dir {output}: holds {others[0]} beside the earlier merge (tuned thresholds leave {PREVIOUS_FILE}); "
            "--overwrite would lose it: remove it, or give another directory"
        )


def write_merged(plan: MergePlan, directory: Path, dtype: torch.dtype, file_bytes: int = FILE_BYTES) -> None:
    """Compute every tensor and write it, several at a time, and the configuration beside them.

    Each core computes one tensor, and one more thread is reading or writing. The head stays in fp32.

    Raises:
        MergeError: `dtype` cannot hold a weight.
        CheckpointError: a file of the base is damaged, or the disk is full.
    """

    def type_of(recipe: Recipe) -> torch.dtype:
        source = recipe.own if recipe.own is not None else recipe.base
        assert source is not None
        stored = source.dtype
        return stored if not stored.is_floating_point else torch.float32 if recipe.is_head else dtype

    tensors = {name: (recipe.shape, type_of(recipe)) for name, recipe in plan.recipes.items()}
    threads = torch.get_num_threads()
    try:
        with (
            TensorWriter(directory, tensors, file_bytes) as writer,
            # one thread inside each: tensors, not rows, are what is dealt to the cores
            ThreadPoolExecutor(threads + 1, "merge", torch.set_num_threads, (1,)) as pool,
        ):
            jobs = [pool.submit(_write_tensor, name, recipe, writer, threads) for name, recipe in plan.recipes.items()]
            try:
                for job in as_completed(jobs):
                    job.result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
    finally:
        torch.set_num_threads(threads)
    write_config(plan.skeleton, directory, dtype)


def _write_tensor(name: str, recipe: Recipe, writer: TensorWriter, threads: int) -> None:
    dtype = writer.places[name].dtype
    for start, values in recipe.pieces(threads):
        written = values.to(dtype)
        if dtype.is_floating_point and not bool(torch.isfinite(written.abs().amax())):
            _refuse_non_finite(name, recipe, values, dtype)
        writer.write(name, start, written)


def _refuse_non_finite(name: str, recipe: Recipe, values: torch.Tensor, dtype: torch.dtype) -> None:
    if bool(torch.isfinite(values).all()):
        named = str(dtype).removeprefix("torch.")
        raise MergeError(f"--dtype {named}: cannot hold {name}; use bfloat16 or float32")
    place = "" if recipe.base is None else f"{recipe.base.path}: "
    raise CheckpointError(f"{place}weight {name} is not finite; download the checkpoint again")


def _write_whole(opened: OpenedModel, directory: Path, dtype: torch.dtype, dequantize: bool, use_cpu: bool) -> None:
    merged = merge_in_memory(opened, dequantize, current_device(use_cpu))
    overflow = [name for name, value in merged.named_parameters() if not bool(torch.isfinite(value.to(dtype)).all())]
    if overflow:
        named = str(dtype).removeprefix("torch.")
        raise MergeError(f"--dtype {named}: cannot hold {overflow[0]}; use bfloat16 or float32")
    head = find_head(merged)[2]
    merged.to(dtype)
    head.float()
    merged.config.dtype = dtype
    with bb.quiet():
        merged.save_pretrained(str(directory), max_shard_size=FILE_BYTES)


def _write_companions(opened: OpenedModel, directory: Path) -> None:
    """Write what a classifier carries besides its weights."""
    metadata = dataclasses.replace(opened.metadata, kind="merged", quantization=None)
    save_stock_tokenizer(opened.tokenizer, directory)
    metadata.save(directory)
    opened.thresholds.save(directory, opened.taxonomy)
    hashes = load_hashes(opened.directory)
    if hashes is not None:
        hashes.save(directory)
    validation = opened.directory / "validation_metrics.json"
    metrics = read_json(validation) if validation.is_file() else None
    if metrics is not None and not (
        isinstance(metrics, dict) and all(isinstance(v, _NUMBER) for v in metrics.values())
    ):
        raise CheckpointError(f"{validation}: holds other things than numbers by name; copy the adapter again")
    write_text(directory / "README.md", build_card(metadata, opened.thresholds, metrics, None, opened.pad_id))
