"""The proof of a merge: the written model against the trained one, and the written tensors against another route.

In: an adapter, the plan of its merge, the written directory. Out: the content of `merge_report.json`, or an error. Step 11.

What fits into memory is loaded whole and scored as users score it. A larger model is run layer by layer from disk, and a
sample of its tensors is compared.
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qlora_moderation import backbone as bb
from qlora_moderation.adapter import read_adapter_tensors
from qlora_moderation.classifier import Classifier, OpenedModel, load_classifier
from qlora_moderation.distributed import current_device
from qlora_moderation.errors import ModerationError
from qlora_moderation.merged_weights import MergePlan, read_lora_settings
from qlora_moderation.model import ModerationModel
from qlora_moderation.sample import build_sample
from qlora_moderation.scoring import Scores, score_pairs
from qlora_moderation.streaming import stream_adapted, stream_merged
from qlora_moderation.tensor_files import find_tensors
from qlora_moderation.thresholds import Thresholds
from qlora_moderation.whole_merge import merge_in_memory, merge_single_weights

LOGIT_TOLERANCE = 1e-4
"""Largest difference of an fp32 logit that a faithful fp32 merge may show."""

PROBABILITY_TOLERANCE = 0.02
"""Largest difference of a probability that a faithful merge into 16-bit weights may show."""

WHOLE_BYTES = 2 * 2**30
"""Models whose weights take more than this in fp32 are proven layer by layer."""

_PAIRS = 64
_PAIRS_LAYER_BY_LAYER = 16
_SAMPLED_TENSORS = 8


class MergeError(ModerationError):
    """A merge whose result is not the trained function."""


def prove_merge(
    opened: OpenedModel, plan: MergePlan | None, directory: Path, dequantize: bool, dtype: torch.dtype, use_cpu: bool
) -> dict[str, Any]:
    """Compare what was written with the adapter, on texts and tensor by tensor.

    Args:
        opened: the adapter.
        plan: of the merge; None: it was merged in memory.
        directory: the written classifier.
        dequantize: whether it was merged into NF4-rounded weights.
        dtype: type of its backbone.
        use_cpu: stay on the CPU.

    Returns:
        The report, whose `gated` says whether `check_report` is to be asked.
    """
    whole = plan is None or fits_memory(plan)
    sample = build_sample()["combinations"][: _PAIRS if whole else _PAIRS_LAYER_BY_LAYER]
    prompts, responses = [row["prompt"] for row in sample], [row["response"] for row in sample]
    report: dict[str, Any] = {
        "base": "dequantized" if dequantize else "original",
        "dtype": str(dtype).removeprefix("torch."),
        "gated": dequantize or opened.metadata.quantization is None,
        "route": "in memory" if plan is None else "tensor by tensor",
        "proof": "whole model" if whole else "layer by layer",
    }
    if whole:
        trained, written = (load_classifier(path, "float32", use_cpu) for path in (opened.directory, directory))
    else:
        assert plan is not None
        trained, written = _stream(opened, plan, directory, use_cpu)
    reference, found = (score_pairs(one, prompts, responses, "truncate", 2**31) for one in (trained, written))
    report |= _compare(reference, found, opened.thresholds)
    if whole:
        stock = _score_stock(directory, opened, prompts, responses)
        report["stock_load"] = _compare(reference, stock, opened.thresholds)
    del trained, written
    if plan is not None:
        report["tensors"] = _compare_tensors(opened, plan, directory, dequantize, whole, use_cpu)
    return report


def fits_memory(plan: MergePlan) -> bool:
    """Say whether the whole model is proven at once."""
    return 4 * sum(math.prod(recipe.shape) for recipe in plan.recipes.values()) <= WHOLE_BYTES


def _stream(opened: OpenedModel, plan: MergePlan, directory: Path, use_cpu: bool) -> tuple[Classifier, Classifier]:
    device = current_device(use_cpu)
    settings, tensors = read_lora_settings(opened.directory), read_adapter_tensors(opened.directory)
    places = find_tensors(str(directory))
    networks: list[Any] = [
        stream_adapted(plan.skeleton.config, plan.recipes, settings, tensors, device),
        stream_merged(plan.skeleton.config, lambda name: places[name].read().float(), device),
    ]
    adapted, merged = (
        Classifier(
            ModerationModel(network, opened.spec.kind == "encoder", device).eval(),
            opened.tokenizer,
            opened.encoder,
            opened.metadata,
            opened.thresholds,
            "padded",
        )
        for network in networks
    )
    return adapted, merged


def _score_stock(directory: Path, opened: OpenedModel, prompts: list[str], responses: list[str]) -> Scores:
    """Score with transformers alone, as a user without this library would: stored types, stock forward, own ids."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    with bb.quiet():
        model = AutoModelForSequenceClassification.from_pretrained(directory, dtype="auto").eval()
        tokenizer = AutoTokenizer.from_pretrained(directory)
    render = opened.taxonomy.render
    logits = []
    with torch.inference_mode():
        for prompt, response in zip(prompts, responses, strict=True):
            inputs = tokenizer(render(prompt, response), return_tensors="pt", truncation=True)
            logits.append(model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.float())
    counts = np.ones(len(prompts), dtype=np.int64)
    found = torch.cat(logits).numpy()
    return Scores(found, found, counts, np.zeros(len(prompts), dtype=bool))


def _compare(trained: Scores, merged: Scores, thresholds: Thresholds) -> dict[str, Any]:
    logits = np.abs(trained.logits - merged.logits)
    probabilities = np.abs(trained.probabilities - merged.probabilities)
    flips = thresholds.judge(trained.probabilities).categories != thresholds.judge(merged.probabilities).categories
    near = np.abs(trained.probabilities - np.asarray(thresholds.per_category)) <= PROBABILITY_TOLERANCE
    return {
        "pairs": len(logits),
        "largest_logit_difference": float(logits.max()),
        "mean_logit_difference": float(logits.mean()),
        "largest_probability_difference": float(probabilities.max()),
        "flag_flips": int(flips.sum()),
        "flag_flips_away_from_threshold": int((flips & ~near).sum()),
    }


def _compare_tensors(
    opened: OpenedModel, plan: MergePlan, directory: Path, dequantize: bool, whole: bool, use_cpu: bool
) -> dict[str, Any]:
    """Compare written tensors with those of the route through transformers, bitsandbytes and PEFT.

    Returns:
        Among others `largest_excess`: the largest difference in units of what rounding allows, one unit in the last place of
        the written type plus a millionth of the tensor's largest magnitude (products summed in another order).
    """
    if whole:
        # on a CPU, as the writer rounds: on CUDA the constants of NF4 may differ in the last place, and with them whole numbers
        misread = any(recipe.nf4 is not None and recipe.shape[-1] % 64 for recipe in plan.recipes.values())
        device = current_device(use_cpu) if misread else torch.device("cpu")
        expected = merge_in_memory(opened, dequantize, device).state_dict()
    else:
        expected = merge_single_weights(opened.directory, plan.recipes, _sample_names(plan))
    places = find_tensors(str(directory))
    worst, different, elements = 0.0, 0, 0
    for name, other in expected.items():
        ours = places[name].read()
        theirs = other.detach().cpu().to(ours.dtype)
        if ours.shape != theirs.shape:
            raise MergeError(
                f"{name}: written as {list(ours.shape)}, {list(theirs.shape)} in memory; nothing was written"
            )
        unequal = ours != theirs
        elements += ours.numel()
        if bool(unequal.any()):
            different += int(unequal.sum())
            a, b = ours[unequal].double(), theirs[unequal].double()
            step = torch.finfo(ours.dtype).eps if ours.is_floating_point() else 0.0
            allowed = step * torch.maximum(a.abs(), b.abs()) + 1e-6 * float(theirs.abs().max())
            worst = max(worst, float(((a - b).abs() / allowed).max()))
    return {
        "compared": len(expected),
        "of": len(places),
        "elements": elements,
        "different_elements": different,
        "largest_excess": worst,
    }


def _sample_names(plan: MergePlan) -> list[str]:
    """Draw weights that are updated, from as many kinds of layers and depths as possible; the same ones every time."""
    names = [name for name, recipe in plan.recipes.items() if recipe.update is not None and recipe.base is not None]
    names = [name for name in names if math.prod(plan.recipes[name].shape) % 64 == 0]
    rng = random.Random("sampled tensors")
    rng.shuffle(names)
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(name.split(".")[-2], []).append(name)
    chosen = [each.pop() for each in kinds.values()]
    rest = [name for each in kinds.values() for name in each]
    return [*chosen, *rest][:_SAMPLED_TENSORS]


def describe_report(report: dict[str, Any]) -> list[str]:
    """Return the report as lines for the log."""

    def line(name: str, part: dict[str, Any]) -> str:
        return (
            f"{name}: largest difference to the adapter over {part['pairs']} pairs: logit "
            f"{part['largest_logit_difference']:.2e}, probability {part['largest_probability_difference']:.2e}; "
            f"{part['flag_flips']} flag flips"
        )

    lines = [line("merged", report)]
    if "stock_load" in report:
        lines.append(line("stock load of the merged files", report["stock_load"]))
    if "tensors" in report:
        part = report["tensors"]
        lines.append(
            f"tensors: {part['compared']} of {part['of']} compared with a merge in memory; {part['different_elements']:,} of "
            f"{part['elements']:,} numbers differ, by at most {part['largest_excess']:.2f} of what rounding explains"
        )
    if not report["gated"]:
        lines.append(
            "warning: merged into the original weights, which is another function than the one that was trained; the "
            "figures above say how far, and --base dequantized gives the trained one"
        )
    return lines


def check_report(report: dict[str, Any]) -> None:
    """Refuse a merge that is not what it says.

    Raises:
        MergeError: tensors are not those of the independent route, or a faithful merge is not the trained function.
    """
    if report.get("tensors", {}).get("largest_excess", 0.0) > 1:
        raise MergeError(
            f"the written tensors differ from those merged in memory by {report['tensors']['largest_excess']:.1f} times of "
            "what rounding explains. Nothing was written; this is a fault of the merge, please report it"
        )
    if not report["gated"]:
        return
    if report["dtype"] == "float32":
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
