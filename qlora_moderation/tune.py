"""Tune a model's calibration and thresholds on validation rows, and store them with it.

In: a model directory and labelled rows that it was not trained on. Out: `thresholds.json`. Between steps 11 and 12.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from qlora_moderation.calibration import Calibrator
from qlora_moderation.classifier import load_classifier
from qlora_moderation.config import TuneConfig
from qlora_moderation.data import Pairs, load_pairs
from qlora_moderation.distributed import processes
from qlora_moderation.errors import DataError
from qlora_moderation.leakage import TrainingHashes, load_hashes
from qlora_moderation.refusals import refusals
from qlora_moderation.scoring import default_token_budget, score_pairs
from qlora_moderation.shortage import scoring_shortage
from qlora_moderation.thresholds import PREVIOUS_FILE, Thresholds
from qlora_moderation.tuning import Objective, TuningSettings, tune

_LOW = 0.02  # a calibrated probability that hardly any pair stays below


def tune_model(config: TuneConfig, log: Callable[[str], None] = print) -> Thresholds:
    """Score the rows, fit, write `thresholds.json`.

    Raises:
        ModerationError: model, rows or objectives cannot be used; the earlier thresholds stay.
    """
    objective = Objective.parse(config.objective)
    settings = TuningSettings(
        objective=objective,
        flagged_objective=Objective.parse(config.flagged_objective) if config.flagged_objective else objective,
        rule=config.flagged_rule,
        calibrate=config.calibrate,
        min_positives=config.min_positives,
        max_missed_harm=config.max_missed_harm,
        confidence=config.confidence,
        seed=config.seed,
    )
    with processes(config.use_cpu):
        directory = Path(config.model_path)
        classifier = load_classifier(directory, config.dtype, config.use_cpu)
        pairs = load_pairs(config.eval_dataset, classifier.taxonomy, config.on_bad_row, log, need_labels=True)
        pairs, apart = _choose_rows(pairs, load_hashes(directory), settings, log)
        log(f"scoring {len(pairs):,} pairs")
        longest = classifier.encoder.max_length
        budget = config.max_tokens_per_micro_batch or default_token_budget(classifier.model.device, longest)
        with scoring_shortage(f"--model_path {directory}", "--max_tokens_per_micro_batch", budget, longest):
            scores = score_pairs(classifier, pairs.prompts, pairs.responses, config.long_text, budget)
    scores.check_finite(pairs.places)
    assert pairs.labels is not None and pairs.flagged is not None
    names = classifier.taxonomy.categories
    thresholds = tune(
        scores.probabilities, pairs.labels, pairs.flagged, pairs.weight, pairs.prompts, names, settings, apart
    )
    if _is_untuned(thresholds):
        raise DataError(
            f"{config.eval_dataset}: of {len(pairs)} pairs {int((pairs.flagged > 0.5).sum())} are flagged, too few of a kind "
            "to tune or calibrate anything; give more rows, or lower --min_positives"
        )
    thresholds = dataclasses.replace(thresholds, fit={**thresholds.fit, "data": Path(config.eval_dataset).name})
    with refusals(f"--model_path {directory}"):
        classifier.thresholds.save(directory, classifier.taxonomy, PREVIOUS_FILE)
        thresholds.save(directory, classifier.taxonomy)
    for line in _summarise(thresholds, names):
        log(line)
    log(f"written: {directory / 'thresholds.json'} (the one before: {PREVIOUS_FILE})")
    log(f"next: python scripts/evaluate.py --model_path {directory} --eval_dataset OTHER_ROWS --output_dir DIR")
    return thresholds


def _choose_rows(
    pairs: Pairs, hashes: TrainingHashes | None, settings: TuningSettings, log: Callable[[str], None]
) -> tuple[Pairs, np.ndarray | None]:
    """Leave out what the model was trained on; set apart, by prompt, what only the bound on missed harm may see.

    Returns:
        The pairs, and [N] bool: set apart; None where no bound is asked for.
    """
    if hashes is None:
        log("warning: the model does not say what it was trained on; nobody can tell whether these rows are new to it")
        selected = np.zeros(len(pairs), dtype=bool)
    else:
        known = hashes.has_prompts(pairs.prompts)
        if known.all():
            raise DataError("the model was trained on the prompts of all these rows; give validation rows")
        if known.any():
            log(f"{int(known.sum())} pairs are left out: the model was trained on their prompts")
            pairs = pairs.take(np.flatnonzero(~known).tolist())
        selected = hashes.has_selection_prompts(pairs.prompts)
    if settings.max_missed_harm is None:
        return pairs, None
    # the weights were selected on some rows, and the fits see half of the others: neither may take part in the bound
    free = sorted({prompt for prompt, taken in zip(pairs.prompts, selected, strict=True) if not taken})
    order = np.random.default_rng(settings.seed).permutation(len(free))
    if not free:
        raise DataError(
            "--max_missed_harm: all these rows selected the weights, so they bound nothing; give other rows"
        )
    half = len(free) if selected.any() and (~selected).sum() < selected.sum() else (len(free) + 1) // 2
    kept = {free[i] for i in order[:half]}
    apart = np.array([prompt in kept for prompt in pairs.prompts]) & ~selected
    if apart.all() or not apart.any():
        raise DataError("--max_missed_harm: needs rows of more prompts: some to fit on, some for the bound")
    log(
        f"{int(apart.sum())} pairs are set apart for the bound on missed harm; calibration and categories see the others"
    )
    if selected.any():
        log(f"{int(selected.sum())} pairs selected the weights, so they take no part in the bound")
    return pairs, apart


def _is_untuned(thresholds: Thresholds) -> bool:
    """Say whether everything kept its default."""
    categories = thresholds.fit["categories"].values()
    sources = [each["threshold_from"] for each in (*categories, thresholds.fit["flagged"])]
    return all(source.startswith("default") for source in sources) and all(
        each["calibration"] == "none" for each in categories
    )


def _summarise(thresholds: Thresholds, categories: tuple[str, ...]) -> list[str]:
    fit = thresholds.fit
    own = [name for name in categories if fit["categories"][name]["threshold_from"] == "own"]
    mapped = [name for name in categories if fit["categories"][name]["calibration"] != "none"]
    others = [name for name in categories if name not in own]
    line = f"{len(own)} of {len(categories)} categories have a threshold of their own"
    if others:  # one calibrated threshold, of which each map makes a raw one of its own
        first, source = others[0], fit["categories"][others[0]]["threshold_from"]
        raw = thresholds.per_category[categories.index(first)]
        maps = thresholds.calibrators or (Calibrator(),) * len(categories)
        value = float(maps[categories.index(first)].apply(np.array(raw)))
        line += f", {len(others)} share {value:.3g}" + ("" if source == "shared" else f" ({source})")
    lines = [thresholds.describe(), f"{line}; {len(mapped)} have a calibration map"]
    if others and source == "shared" and value < _LOW:
        lines.append(
            f"warning: the shared threshold {value:.3g} makes nearly everything a yes; ask for another --objective"
        )
    rules = {rule: fit["flagged"][rule] for rule in ("max", "calibrated")}
    lines += [
        f"telling flagged from not, rule {rule}{' (cross-validated)' if rule == 'calibrated' else ''}: AUROC "
        f"{found['auroc']:.4f}, log-loss {found['log_loss']:.4f}"
        for rule, found in rules.items()
        if found["auroc"] is not None
    ]
    point, always = fit["flagged"]["on_these_rows"], fit["flagged"]["always_flag_f1"]
    shown = {"recall": point["recall"], "precision": point["precision"], "F1": point["f1"]}
    if point["recall"] is None:  # nothing is there to be found
        shown = {}
    shown["false-positive rate"] = point["false_positive_rate"]
    lines.append("flagged on these rows: " + ", ".join(f"{k} {v:.3f}" for k, v in shown.items() if v is not None))
    source = fit["flagged"]["threshold_from"]
    if source.startswith("default"):
        lines.append(
            f"warning: the threshold of flagged is not tuned, it keeps the {source}; give more rows, or lower --min_positives"
        )
    elif point["f1"] <= always + 0.02:
        lines.append(
            f"warning: flagging everything has F1 {always:.3f} on these rows; this threshold is hardly better. Ask for another "
            "objective, as 'fpr<=0.1', or train a better model"
        )
    bound = fit.get("missed_harm")
    if bound is not None:
        low, high = bound["false_positive_rate_interval"]
        lines.append(
            f"missed harm: {bound['missed']} of {bound['harmful_prompts']} harmful prompts, at most "
            f"{bound['upper_bound']:.3f} at {bound['confidence']:g} confidence; paid with a false-positive rate of "
            f"{bound['false_positive_rate']:.3f} ({low:.3f} to {high:.3f})"
        )
    return lines
