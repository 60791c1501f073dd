"""The evaluation pipeline, the same for full, adapter and merged models.

In: a model directory and rows. Out: `predictions.jsonl`, `metrics.json`, figures, `report.md`. Step 12.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from qlora_moderation.baselines import compute_constant_baselines, compute_text_baselines
from qlora_moderation.classifier import Classifier, load_classifier
from qlora_moderation.config import EvaluateConfig
from qlora_moderation.data import Pairs, load_pairs
from qlora_moderation.distributed import is_main, on_main, processes, silent
from qlora_moderation.errors import CheckpointError, DataError
from qlora_moderation.metadata import write_json, write_text
from qlora_moderation.metrics import compute_agreement, compute_metrics, majority
from qlora_moderation.plots import plot_flagged_proportion
from qlora_moderation.report import build_report
from qlora_moderation.scoring import Scores, score_pairs
from qlora_moderation.staging import replaced_whole
from qlora_moderation.taxonomy import Taxonomy

OURS = "qlora_moderation"
"""Name of this project's verdicts beside other moderators'."""

_WRITTEN = {"predictions.jsonl", "metrics.json", "report.md", "flagged_proportion.png"}


def evaluate(config: EvaluateConfig, log: Callable[[str], None] = print) -> dict[str, Any]:
    """Score the rows, write the files, return the content of `metrics.json`.

    Started by torchrun, the processes share the scoring; rank 0 alone speaks and writes.

    Raises:
        ModerationError: model or rows cannot be used, or `output_dir` holds other things.
    """
    with processes(config.use_cpu):
        return _evaluate(config, log if is_main() else silent)


def _evaluate(config: EvaluateConfig, log: Callable[[str], None]) -> dict[str, Any]:
    output = Path(config.output_dir)
    on_main(lambda: _check_output(output))
    classifier = load_classifier(config.model_path, config.dtype, config.use_cpu, max_length=config.max_length)
    pairs, training = on_main(lambda: _load_rows(config, classifier.taxonomy, log))
    low, high = min(classifier.thresholds.per_category), max(classifier.thresholds.per_category)
    log(f"thresholds: {low:g}{f' to {high:g}' if high > low else ''} ({classifier.thresholds.origin})")
    log(f"scoring {len(pairs):,} distinct pairs of {pairs.annotations:,} rows")
    long_text = config.long_text or classifier.metadata.long_text
    scores = score_pairs(classifier, pairs.prompts, pairs.responses, long_text, config.max_tokens_per_micro_batch)
    result = on_main(lambda: compute_evaluation(classifier, pairs, scores, training))
    result["data"]["name"] = Path(config.eval_dataset).name
    result["settings"]["long_text"] = long_text
    with replaced_whole(output) as unfinished:
        if is_main():
            _write_predictions(unfinished / "predictions.jsonl", classifier, pairs, scores)
            write_json(unfinished / "metrics.json", result)
            if "flagged_proportion" in result:
                plot_flagged_proportion(result["flagged_proportion"], unfinished / "flagged_proportion.png")
            write_text(unfinished / "report.md", build_report(result))
    for line in _summarise(result):
        log(line)
    log(f"written: {output} (start with {output / 'report.md'})")
    return result


def _check_output(output: Path) -> None:
    if output.is_file():
        raise CheckpointError(f"--output_dir {output}: is a file; give a directory")
    if output.is_dir() and {path.name for path in output.iterdir()} - _WRITTEN:
        raise CheckpointError(f"--output_dir {output}: holds other files than an evaluation's; give another directory")


def _load_rows(config: EvaluateConfig, taxonomy: Taxonomy, log: Callable[[str], None]) -> tuple[Pairs, Pairs | None]:
    pairs = load_pairs(config.eval_dataset, taxonomy, config.on_bad_row, log)
    if OURS in pairs.verdicts:
        raise DataError(
            f"{config.eval_dataset}: names a moderator {OURS}, as this project's own verdicts are; rename it"
        )
    if config.train_data_name_or_path is None:
        return pairs, None
    return pairs, load_pairs(config.train_data_name_or_path, taxonomy, config.on_bad_row, log, need_labels=True)


def compute_evaluation(classifier: Classifier, pairs: Pairs, scores: Scores, training: Pairs | None) -> dict[str, Any]:
    """Return everything that `metrics.json` holds.

    Args:
        classifier: gives names and thresholds.
        pairs: N pairs, with labels, moderators' verdicts, or both.
        scores: of the pairs.
        training: pairs to fit the TF-IDF baselines on, or None.
    """
    probabilities = scores.probabilities
    flagged = classifier.thresholds.decide(probabilities)[0]
    names = classifier.taxonomy.categories
    result: dict[str, Any] = {
        "data": {
            "rows": pairs.annotations,
            "pairs": len(pairs),
            "skipped_rows": len(pairs.skipped_rows),
            "pairs_in_several_windows": int((scores.windows > 1).sum()),
            "truncated_pairs": int(scores.truncated.sum()),
        },
        "model": {
            "kind": classifier.metadata.kind,
            "method": classifier.metadata.method,
            "base_model": Path(classifier.metadata.base_model).name,
            "warnings": classifier.metadata.training.get("warnings", []),
        },
        "settings": {
            "thresholds": dict(zip(names, classifier.thresholds.per_category, strict=True)),
            "thresholds_origin": classifier.thresholds.origin,
            "flagged_rule": classifier.taxonomy.flagged_rule,
            "max_length": classifier.encoder.max_length,
        },
    }
    if pairs.labels is not None and pairs.flagged is not None:
        result["metrics"] = compute_metrics(pairs.labels, pairs.flagged, probabilities, classifier.thresholds, names)
        result["baselines"] = compute_constant_baselines(majority(pairs.flagged))
        if training is not None:
            judged = set(zip(pairs.prompts, pairs.responses, strict=True))
            own = list(zip(training.prompts, training.responses, strict=True))
            unseen = training.take([i for i, pair in enumerate(own) if pair not in judged])
            result["baselines"] |= compute_text_baselines(unseen, pairs, min(classifier.thresholds.per_category))
            result["data"]["pairs_also_in_training"] = len(judged & set(own))
            prompts = set(training.prompts)
            result["data"]["pairs_with_a_training_prompt"] = sum(prompt in prompts for prompt in pairs.prompts)
    verdicts = {OURS: flagged.astype(float), **pairs.verdicts}
    if pairs.labels is not None and pairs.flagged is not None and "labels" not in verdicts:
        verdicts["labels"] = majority(pairs.flagged).astype(float)
    result["flagged_proportion"] = compute_flagged_proportion(verdicts, pairs.models)
    if pairs.verdicts:
        result["agreement"] = compute_all_agreements(verdicts, pairs.models)
    return result


def compute_flagged_proportion(
    verdicts: dict[str, np.ndarray], models: list[str] | None
) -> dict[str, dict[str, float]]:
    """Return model -> moderator -> share of its judged answers that the moderator flags; `all` pools the models."""
    groups = {"all": np.ones(len(next(iter(verdicts.values()))), dtype=bool)}
    if models is not None:
        named = [model for model in dict.fromkeys(models) if model]
        groups = {model: np.array([m == model for m in models]) for model in named} | groups
    shares: dict[str, dict[str, float]] = {}
    for group, members in groups.items():
        for moderator, votes in verdicts.items():
            judged = votes[members & ~np.isnan(votes)]
            if len(judged):
                shares.setdefault(group, {})[moderator] = float(majority(judged).mean())
    return shares


def compute_all_agreements(verdicts: dict[str, np.ndarray], models: list[str] | None) -> list[dict[str, Any]]:
    """Compare this project's verdicts with each moderator's, over all pairs and for each answering model."""
    rows = []
    for moderator, votes in verdicts.items():
        if moderator == OURS:
            continue
        for model in [None, *(name for name in dict.fromkeys(models or []) if name)]:
            members = ~np.isnan(votes)
            if model is not None:
                members &= np.array([name == model for name in models or []])
            if members.any():
                agreement = compute_agreement(majority(votes[members]), verdicts[OURS][members] > 0)
                rows.append({"reference": moderator, "model": model or "all", **agreement})
    return rows


def _write_predictions(path: Path, classifier: Classifier, pairs: Pairs, scores: Scores) -> None:
    probabilities = scores.probabilities
    flagged, decided = classifier.thresholds.decide(probabilities)
    names = classifier.taxonomy.categories
    with path.open("w", encoding="utf-8") as file:
        for i in range(len(pairs)):
            row: dict[str, Any] = {"prompt": pairs.prompts[i], "response": pairs.responses[i]}
            if pairs.models is not None:
                row["model"] = pairs.models[i]
            row["flagged"] = bool(flagged[i])
            row["categories"] = {name: bool(decided[i, c]) for c, name in enumerate(names)}
            row["probabilities"] = {name: float(probabilities[i, c]) for c, name in enumerate(names)}
            row["windows"], row["truncated"] = int(scores.windows[i]), bool(scores.truncated[i])
            if pairs.labels is not None and pairs.flagged is not None:
                row["votes"] = {name: float(pairs.labels[i, c]) for c, name in enumerate(names)}
                row["flagged_vote"] = float(pairs.flagged[i])
                row["annotations"] = int(pairs.weight[i])
            if pairs.verdicts:
                row["verdicts"] = {n: None if np.isnan(v[i]) else float(v[i]) for n, v in pairs.verdicts.items()}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _summarise(result: dict[str, Any]) -> list[str]:
    lines = []
    if "metrics" in result:
        keys = ("flagged/f1", "flagged/auroc", "flagged/average_precision", "micro/average_precision", "micro/f1")
        shown = [f"{key} {result['metrics'][key]:.4f}" for key in keys if result["metrics"].get(key) is not None]
        lines.append("metrics: " + "  ".join(shown))
        lines.append(
            "baselines, flagged/f1: " + "  ".join(f"{name} {m['f1']:.4f}" for name, m in result["baselines"].items())
        )
    for model, shares in result["flagged_proportion"].items():
        lines.append(f"flagged, {model}: " + "  ".join(f"{name} {share:.1%}" for name, share in shares.items()))
    return lines
