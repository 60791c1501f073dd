"""The evaluation pipeline, the same for full, adapter and merged models.

In: a model directory and rows. Out: `predictions.jsonl`, `metrics.json`, figures, `report.html`, `report.md`. Step 12.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qlora_moderation.analysis import OURS, analyse, collect_verdicts
from qlora_moderation.baselines import compute_constant_baselines, compute_text_baselines
from qlora_moderation.classifier import Classifier, load_classifier
from qlora_moderation.comparison import Rule, check_comparable, compare, compare_moderators, exit_code_of
from qlora_moderation.config import EvaluateConfig
from qlora_moderation.data import Pairs, load_pairs
from qlora_moderation.distributed import is_main, on_main, processes, silent
from qlora_moderation.errors import CheckpointError, ConfigError, DataError
from qlora_moderation.leakage import load_hashes
from qlora_moderation.metadata import is_abandoned, write_json
from qlora_moderation.metrics import majority
from qlora_moderation.moderators import add_moderators
from qlora_moderation.predictions import (
    PREDICTIONS_FILE,
    Predictions,
    judge_scores,
    read_predictions,
    write_predictions,
)
from qlora_moderation.report import REPORT_FILES, write_report
from qlora_moderation.scoring import default_token_budget, score_pairs
from qlora_moderation.sections import find_warnings
from qlora_moderation.shortage import scoring_shortage
from qlora_moderation.staging import replaced_whole
from qlora_moderation.taxonomy import Taxonomy

METRICS_FILE = "metrics.json"
_RESERVED = (OURS, "labels")
_WRITTEN = {PREDICTIONS_FILE, METRICS_FILE, *REPORT_FILES}


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
    rules = [Rule.parse(text) for text in config.fail_if]
    on_main(lambda: _check_output(output))
    old = on_main(lambda: None if config.compare is None else _read_old(Path(config.compare)))
    classifier = load_classifier(config.model_path, config.dtype, config.use_cpu, max_length=config.max_length)
    categories = classifier.taxonomy.categories
    if old is not None and old[1] != categories:
        raise ConfigError(
            f"--compare {config.compare}: was evaluated with other categories than {config.model_path} has"
        )
    pairs, training, matched = on_main(lambda: _load_rows(config, classifier.taxonomy, log))
    if old is not None:
        check_comparable(pairs, old[0], rules, categories)
    log(f"thresholds: {classifier.thresholds.describe()}")
    log(f"scoring {len(pairs):,} distinct pairs of {pairs.annotations:,} rows")
    long_text = config.long_text or classifier.metadata.long_text
    longest = classifier.encoder.max_length
    budget = config.max_tokens_per_micro_batch or default_token_budget(classifier.model.device, longest)
    with scoring_shortage(f"--model_path {config.model_path}", "--max_tokens_per_micro_batch", budget, longest):
        scores = score_pairs(classifier, pairs.prompts, pairs.responses, long_text, budget)
    scores.check_finite(pairs.places)
    predictions = judge_scores(pairs, scores, classifier.thresholds, load_hashes(Path(config.model_path)))

    def compute() -> dict[str, Any]:
        result = _describe(config, classifier, pairs, predictions, long_text)
        result |= analyse(predictions, classifier.thresholds, categories, config.bootstrap_replicates, config.seed)
        if "metrics" in result:
            result["baselines"] = _compute_baselines(classifier, pairs, training)
        if matched:
            result["moderators"] = matched
        verdicts = collect_verdicts(predictions)
        if len(verdicts) > 2:
            result["paired"] = compare_moderators(
                verdicts, OURS, predictions.prompts, config.bootstrap_replicates, config.seed
            )
        if old is not None:
            result["comparison"] = compare(
                predictions, old[0], categories, rules, config.bootstrap_replicates, config.seed
            )
        return result

    result = on_main(compute)
    with replaced_whole(output) as unfinished:
        if is_main():
            write_predictions(unfinished / PREDICTIONS_FILE, predictions, categories)
            write_json(unfinished / METRICS_FILE, result)
            write_report(unfinished)
    for line in _summarise(result):
        log(line)
    log(f"written: {output} (start with {output / 'report.html'})")
    return result


def _check_output(output: Path) -> None:
    if output.is_file():
        raise CheckpointError(f"--output_dir {output}: is a file; give a directory")
    there = next(place for place in [output.resolve(), *output.resolve().parents] if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise CheckpointError(f"--output_dir {output}: cannot be made, {there} is no directory that can be written in")
    if output.is_dir() and any(path.name not in _WRITTEN and not is_abandoned(path) for path in output.iterdir()):
        raise CheckpointError(f"--output_dir {output}: holds other files than an evaluation's; give another directory")


def _read_old(directory: Path) -> tuple[Predictions, tuple[str, ...]]:
    if not (directory / PREDICTIONS_FILE).is_file():
        raise CheckpointError(f"--compare {directory}: holds no {PREDICTIONS_FILE}; give the output of an evaluation")
    return read_predictions(directory / PREDICTIONS_FILE)


def _load_rows(
    config: EvaluateConfig, taxonomy: Taxonomy, log: Callable[[str], None]
) -> tuple[Pairs, Pairs | None, dict[str, Any]]:
    pairs = load_pairs(config.eval_dataset, taxonomy, config.on_bad_row, log)
    for name in _RESERVED:
        if name in pairs.verdicts:
            raise DataError(
                f"{config.eval_dataset}: names a moderator {name}, which stands for something else here; rename it"
            )
    pairs, matched = add_moderators(pairs, config.moderator, config.moderator_threshold, _RESERVED, log)
    if config.train_data_name_or_path is None:
        return pairs, None, matched
    training = load_pairs(config.train_data_name_or_path, taxonomy, config.on_bad_row, log, need_labels=True)
    return pairs, training, matched


def _describe(
    config: EvaluateConfig, classifier: Classifier, pairs: Pairs, predictions: Predictions, long_text: str
) -> dict[str, Any]:
    """Return what was evaluated, by what, and how."""
    metadata = classifier.metadata
    return {
        "data": {
            "name": Path(config.eval_dataset).name.encode("utf-8", "backslashreplace").decode(),
            "rows": pairs.annotations,
            "pairs": len(pairs),
            "skipped_rows": len(pairs.skipped_rows),
            "pairs_in_several_windows": int((predictions.windows > 1).sum()),
            "truncated_pairs": int(predictions.truncated.sum()),
        },
        "model": {
            "kind": metadata.kind,
            "method": metadata.method,
            "base_model": Path(metadata.base_model).name,
            "warnings": metadata.training.get("warnings", []),
        },
        "settings": {
            "thresholds": classifier.thresholds.to_dict(classifier.taxonomy),
            "max_length": classifier.encoder.max_length,
            "long_text": long_text,
        },
    }


def _compute_baselines(classifier: Classifier, pairs: Pairs, training: Pairs | None) -> dict[str, Any]:
    assert pairs.flagged is not None
    baselines = compute_constant_baselines(majority(pairs.flagged))
    if training is None:
        return baselines
    judged = set(zip(pairs.prompts, pairs.responses, strict=True))
    own = list(zip(training.prompts, training.responses, strict=True))
    unseen = training.take([i for i, pair in enumerate(own) if pair not in judged])
    return baselines | compute_text_baselines(unseen, pairs, classifier.thresholds.flagged_threshold)


def _summarise(result: dict[str, Any]) -> list[str]:
    lines = []
    if "metrics" in result:
        keys = ("flagged/f1", "flagged/auroc", "flagged/average_precision", "micro/average_precision", "micro/f1")
        for key in keys:
            value, edges = result["metrics"].get(key), result["intervals"].get(key)
            if value is not None:
                lines.append(f"{key} {value:.4f}" + (f" ({edges[0]:.3f} to {edges[1]:.3f})" if edges else ""))
        missed = result["missed_harm"]
        if missed["harmful_prompts"]:
            lines.append(
                f"missed harm: {missed['missed']} of {missed['harmful_prompts']} harmful prompts, at most "
                f"{missed['upper_bound']:.3f} at {missed['confidence']:g} confidence"
            )
        lines.append(
            "baselines, flagged/f1: " + "  ".join(f"{name} {m['f1']:.4f}" for name, m in result["baselines"].items())
        )
        lines += find_warnings(result)
        clean = result.get("clean")
        if clean:
            known = result["data"]["pairs"] - clean["pairs"]
            metrics = clean.get("metrics", {})
            line, value = f"{known} pairs have a prompt that the model was trained on", metrics.get("flagged/f1")
            if value is not None:
                undefined = metrics.get("flagged/recall") is None  # where nothing is to be found, F1 says nothing
                line += f"; of the {clean['pairs']} others " + (
                    "none is flagged by its labels" if undefined else f"flagged/f1 {value:.4f}"
                )
            lines.append(line)
    partly = {
        name: f" of the {facts['matched']} pairs that it judged"
        for name, facts in result.get("moderators", {}).items()
        if facts["pairs_without_a_verdict"]
    }
    for model, shares in result["flagged_proportion"].items():
        each = [f"{name} {share:.1%}{partly.get(name, '')}" for name, share in shares.items()]
        lines.append(f"flagged, {model}: " + "  ".join(each))
    if "comparison" in result:
        found = result["comparison"]
        lines.append(
            f"compared on {found['rows']} rows; {found['only_new']} are only here, {found['only_old']} only there"
        )
    for rule, verdict in result.get("comparison", {}).get("rules", {}).items():
        found = result["comparison"]["differences"][rule.split()[0]]
        edges = found["interval"]
        shown = "no interval, too few rows" if edges is None else f"{edges[0]:+.3f} to {edges[1]:+.3f}"
        difference = "undefined" if found["difference"] is None else f"{found['difference']:+.3f}"
        lines.append(f"--fail_if {rule}: {verdict}; new minus old {difference} ({shown})")
    return lines


def find_exit_code(result: dict[str, Any]) -> int:
    """Return what the command line exits with: 0, or the gate's verdict."""
    return exit_code_of(result["comparison"]) if "comparison" in result else 0
