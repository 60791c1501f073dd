"""What stands in the report of an evaluation, section by section.

In: the content of `metrics.json`. Out: headings, paragraphs, tables and figures for `rendering`. Part of step 12.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qlora_moderation.analysis import OURS
from qlora_moderation.rendering import Figure, Heading, Paragraph, Part, Table, Tiles

_SHOWN = ("precision", "recall", "f1", "auroc", "average_precision")
_AGREEMENT = ("cohen_kappa", "recall", "precision", "f1", "agreement")


def build_parts(result: Mapping[str, Any], categories: Sequence[str]) -> list[Part]:
    """Return the report's parts from the content of `metrics.json`."""
    parts: list[Part] = [*_summary(result)]
    if "metrics" in result:
        parts += [*_metrics(result, categories), *_baselines(result), *_views(result)]
    parts += _proportions(result)
    if "metrics" in result:
        parts += _calibration(result)
    parts += [*_thresholds(result, categories), *_windows(result), *_comparison(result), *_method(result)]
    return parts


def _with_edges(metrics: Mapping[str, Any], intervals: Mapping[str, Any], name: str) -> tuple[Any, Any]:
    return metrics.get(name), intervals.get(name)


def find_warnings(result: Mapping[str, Any]) -> list[str]:
    """Return what a reader must not overlook."""
    always = result.get("baselines", {}).get("always_flag")
    if always is None:
        return []
    value, edges = result["metrics"]["flagged/f1"], result["intervals"].get("flagged/f1")
    if (edges[0] if edges else value) > always["f1"]:
        return []
    return [
        f"warning: flagging everything has F1 {always['f1']:.3f} on these rows; that this model is better is not shown "
        f"({value:.3f}{f', {edges[0]:.3f} to {edges[1]:.3f}' if edges else ''})"
    ]


def _summary(result: Mapping[str, Any]) -> list[Part]:
    data, model, settings = result["data"], result["model"], result["settings"]
    tiles = []
    if "metrics" in result:
        for name, what in (
            ("flagged/f1", "F1 of flagged"),
            ("flagged/auroc", "AUROC of flagged"),
            ("flagged/recall", "recall of flagged"),
            ("flagged/false_positive_rate", "false-positive rate of flagged"),
            ("micro/average_precision", "average precision over all categories"),
        ):
            value, edges = _with_edges(result["metrics"], result["intervals"], name)
            if value is not None:
                tiles.append((f"{value:.3f}", what, f"{edges[0]:.3f} to {edges[1]:.3f}" if edges else ""))
    share, edges = result["flagged_proportion"]["all"][OURS], result["flagged_intervals"]["all"][OURS]
    tiles.append((f"{share:.1%}", "flagged", f"{edges[0]:.1%} to {edges[1]:.1%}" if edges else ""))
    missed = result.get("missed_harm", {})
    if missed.get("harmful_prompts"):
        what = f"of {missed['harmful_prompts']} harmful prompts missed"
        tiles.append((str(missed["missed"]), what, f"at most {missed['upper_bound']:.3f} of them, at 95 % confidence"))
    draws = result["bootstrap"]["replicates"]
    return [
        Paragraph(
            f"{model['kind']} model ({model['method']}) on {model['base_model']}; {data['rows']:,} rows, {data['pairs']:,} "
            f"distinct pairs, {data['skipped_rows']} broken rows left out. Longest text {settings['max_length']} tokens; "
            f"{data['pairs_in_several_windows']} pairs were scored in several windows, {data['truncated_pairs']} were cut."
        ),
        *(Paragraph(warning, is_warning=True) for warning in [*model["warnings"], *find_warnings(result)]),
        Tiles(tiles),
        Paragraph(
            f"Intervals hold 95 %, from {draws:,} draws of whole prompts; a share with no exception among few prompts has its "
            "exact binomial interval."
            if draws
            else "No intervals: --bootstrap_replicates 0."
        ),
    ]


def _rows_of(metrics: Mapping[str, Any], intervals: Mapping[str, Any], names: Sequence[str]) -> list[list[Any]]:
    rows = []
    for part in names:
        values = [_with_edges(metrics, intervals, f"{part}/{key}") for key in _SHOWN]
        rows.append([part, *values, metrics.get(f"{part}/support")])
    return rows


def _metrics(result: Mapping[str, Any], categories: Sequence[str]) -> list[Part]:
    columns = ["", *(name.replace("_", " ") for name in _SHOWN), "positives"]
    rows = _rows_of(result["metrics"], result["intervals"], ["flagged", "micro", "macro", *categories])
    return [
        Heading("Against the labels"),
        Paragraph("A label is what at least half of a pair's annotators said; each pair counts once."),
        Table(columns, rows),
        Figure("ranking_curves.png", "Precision over recall, and true-positive over false-positive rate, by category"),
    ]


def _baselines(result: Mapping[str, Any]) -> list[Part]:
    own = {key: result["metrics"].get(f"flagged/{key}") for key in (*_SHOWN, "accuracy")}
    rows = [
        [name, *(values.get(key) for key in (*_SHOWN, "accuracy"))]
        for name, values in {"this model": own, **result["baselines"]}.items()
    ]
    parts: list[Part] = [
        Heading("Baselines for flagged", 3),
        Table(["", *(name.replace("_", " ") for name in (*_SHOWN, "accuracy"))], rows),
    ]
    if not any(name.startswith("tfidf") for name in result["baselines"]):
        return parts
    return [
        *parts,
        Paragraph(
            "tfidf_*: TF-IDF over words and word pairs with logistic regression, fitted on the training rows (shown when they "
            "are given, and without pairs that are judged here), flagged above this model's threshold."
        ),
    ]


def _views(result: Mapping[str, Any]) -> list[Part]:
    """Show rows that the model cannot know, and annotations one by one, beside the plain metrics."""
    columns = ["", *(name.replace("_", " ") for name in _SHOWN), "positives"]
    named = ["flagged", "micro", "macro"]
    parts: list[Part] = []
    clean = result.get("clean")
    if clean is None:
        parts += [
            Heading("Known prompts"),
            Paragraph("The model does not say what it was trained on, so nobody can tell which rows it knows."),
        ]
    else:
        known = result["data"]["pairs"] - clean["pairs"]
        parts += [
            Heading("Known prompts"),
            Paragraph(
                f"{known:,} of {result['data']['pairs']:,} pairs have a prompt that the model was trained on; "
                f"{clean['known_pairs']:,} are training pairs themselves."
            ),
        ]
        if "metrics" in clean:
            rows = [["all: " + row[0], *row[1:]] for row in _rows_of(result["metrics"], result["intervals"], named)]
            rows += [
                ["unknown prompts: " + row[0], *row[1:]]
                for row in _rows_of(clean["metrics"], clean["intervals"], named)
            ]
            parts.append(Table(columns, rows))
    by_annotation = result.get("by_annotation")
    if by_annotation is not None:
        parts += [
            Heading("Annotation by annotation", 3),
            Paragraph(f"The same decisions against each of {by_annotation['rows']:,} annotations by itself."),
            Table(columns, _rows_of(by_annotation["metrics"], by_annotation["intervals"], named)),
        ]
    return parts


def _proportions(result: Mapping[str, Any]) -> list[Part]:
    shares, intervals = result["flagged_proportion"], result["flagged_intervals"]
    moderators = list(dict.fromkeys(name for row in shares.values() for name in row))
    rows = [
        [model, *((row.get(name), intervals[model].get(name)) for name in moderators)] for model, row in shares.items()
    ]
    parts: list[Part] = [
        Heading("Flagged proportion"),
        Figure("flagged_proportion.png", "Share of each model's answers that each moderator flags"),
        Table(["answers of", *moderators], rows),
    ]
    for name, found in result.get("moderators", {}).items():
        gaps = []
        if found["rows_without_a_pair"]:
            gaps.append(
                f"{found['rows_without_a_pair']} of its rows have no pair here (first: {found['first_row_without_a_pair']})"
            )
        if found["pairs_without_a_verdict"]:
            first = found["first_pair_without_a_verdict"]
            gaps.append(f"{found['pairs_without_a_verdict']} pairs have no verdict (first: {first})")
        if gaps:
            parts.append(Paragraph(f"Moderator {name}: {', '.join(gaps)}.", is_warning=True))
    if "agreement" in result:
        rows = [
            [
                f"{row['reference']}, {row['model']}",
                *((row[key], row["intervals"].get(key)) for key in _AGREEMENT),
                row["reference_flagged"],
                row["judged_flagged"],
                row["pairs"],
            ]
            for row in result["agreement"]
        ]
        columns = ["reference, model", *(key.replace("_", " ") for key in _AGREEMENT), "it flags", "we flag", "pairs"]
        parts += [
            Heading("Agreement"),
            Paragraph(
                "Where a moderator flags few answers, never flagging agrees with it nearly always: read kappa, recall and "
                "precision first."
            ),
            Table(columns, rows),
        ]
    return parts


def _calibration(result: Mapping[str, Any]) -> list[Part]:
    rows = [
        [
            name,
            found["raw_log_loss"],
            found["log_loss"],
            (found["intercept"], found["intervals"].get("intercept")),
            (found["slope"], found["intervals"].get("slope")),
            found["ece"],
            found["ece_if_perfect"],
        ]
        for name, found in result["calibration"].items()
    ]
    columns = ["", "log-loss, raw", "log-loss", "intercept", "slope", "ECE", "ECE if perfect"]
    rules = [
        [rule, found["auroc"], found["average_precision"], found["log_loss"]] for rule, found in result["rules"].items()
    ]
    return [
        Heading("Calibration"),
        Paragraph(
            "On these rows, against the annotators' votes. Intercept 0 and slope 1 are perfect; a slope below 1 says "
            "overconfident. An ECE means something only beside the one that perfect probabilities would show at this number "
            "of rows. For flagged, raw is the highest raw probability."
        ),
        Table(columns, rows),
        Figure("reliability.png", "Share of votes that say yes over the probability given; bars hold 95 %"),
        Heading("Telling flagged from not", 3),
        Paragraph("max: the highest category; calibrated: P(unsafe), a logistic function of all categories."),
        Table(["rule", "auroc", "average precision", "log-loss"], rules),
    ]


def _thresholds(result: Mapping[str, Any], categories: Sequence[str]) -> list[Part]:
    stored = result["settings"]["thresholds"]
    fit, flagged = stored["fit"], stored["flagged"]
    rows = []
    for name in categories:
        entry, found = stored["categories"][name], fit.get("categories", {}).get(name, {})
        rows.append(
            [
                name,
                entry["raw"],
                entry["calibrated"],
                found.get("threshold_from", "default"),
                entry["calibration"]["kind"],
                found.get("positive_pairs"),
            ]
        )
    source = fit.get("flagged", {}).get("threshold_from", "default")
    text = f"flagged: rule {flagged['rule']}, above {flagged['threshold']:.4g} ({source})."
    if fit:
        text += (
            f" Fitted on {fit['pairs']:,} pairs of {fit['prompts']:,} prompts of {fit.get('data', 'validation rows')}; "
            f"objective {fit['objective']}; a category with fewer than {fit['min_positives']} pairs of a kind shares one."
        )
    parts: list[Part] = [
        Heading("Thresholds"),
        Paragraph(text),
        Table(["", "raw", "calibrated", "threshold from", "calibration", "positives it was fitted on"], rows),
    ]
    bound = fit.get("missed_harm")
    if bound:
        low, high = bound["false_positive_rate_interval"]
        parts.append(
            Paragraph(
                f"Promised while tuning, on other rows: {bound['missed']} of {bound['harmful_prompts']} harmful prompts "
                f"missed; at most {bound['upper_bound']:.3f} at {bound['confidence']:g} confidence. It is paid with a "
                f"false-positive rate of {bound['false_positive_rate']:.3f} ({low:.3f} to {high:.3f})."
            )
        )
    if "metrics" in result:
        parts.append(Figure("threshold_sweep.png", "What another threshold of flagged would give on these rows"))
    return parts


def _windows(result: Mapping[str, Any]) -> list[Part]:
    found = result.get("windows")
    if not found:
        return []
    keys = [key for key in found[0] if key not in ("windows", "reference")]
    keys = list(dict.fromkeys([*keys, *(key for row in found for key in row if key not in ("windows", "reference"))]))
    reference = next((row["reference"] for row in found if "reference" in row), None)
    return [
        Heading("Long texts"),
        Paragraph(
            "A text longer than the model's window is scored in overlapping windows, of which the highest probability counts; "
            "truncated: the first window alone. More windows are more chances of a false alarm"
            + (f" (against {reference})." if reference else ".")
        ),
        Table(["windows", *keys], [[row["windows"], *(row.get(key) for key in keys)] for row in found]),
    ]


def _comparison(result: Mapping[str, Any]) -> list[Part]:
    parts: list[Part] = []
    found = result.get("comparison")
    if found:
        rows = [
            [name, row["old"], row["new"], (row["difference"], row["interval"]), row.get("p_value")]
            for name, row in found["differences"].items()
            if name.startswith(("flagged/", "micro/", "macro/"))
            or any(rule.startswith(f"{name} ") for rule in found["rules"])
        ]
        parts += [
            Heading("Against the earlier evaluation"),
            Paragraph(
                f"{found['rows']:,} rows that both have judged; {found['only_new']} are only here, {found['only_old']} only "
                "there. Differences are new minus old (those of single categories: metrics.json); p-values come from "
                "exchanging the two models prompt by prompt."
            ),
            *(Paragraph(f"Rule {rule}: {verdict}.", verdict != "passed") for rule, verdict in found["rules"].items()),
            Table(["", "old", "new", "difference", "p"], rows),
        ]
    if result.get("paired"):
        rows = []
        labelled = any(entry["reference"] == "labels" for entry in result["paired"])
        for entry in result["paired"]:
            if labelled and entry["reference"] != "labels":
                continue
            for key in ("cohen_kappa", "recall", "precision", "f1", "accuracy"):
                row = entry["differences"][key]
                name = f"{entry['reference']}: ours minus {entry['moderator']}, {key.replace('_', ' ')}"
                rows.append([name, (row["difference"], row["interval"]), row.get("p_value"), entry["pairs"]])
        parts += [
            Heading("Against other moderators"),
            Paragraph("With the first one's verdicts taken as the truth, on the rows that all three have judged."),
            Table(["reference: difference", "difference", "p", "pairs"], rows),
        ]
    return parts


def _method(result: Mapping[str, Any]) -> list[Part]:
    return [
        Heading("How to read this"),
        Paragraph(
            "Categories and flagged have thresholds of their own: flagged says whether, categories say what. Precision counts "
            "as 0 where nothing is decided; a field is empty where a metric is undefined, as recall without positives. An "
            "interval is empty where more than a tenth of the draws leave the metric undefined: there are too few rows to say."
        ),
    ]
