"""The evaluation report in Markdown, from saved numbers only.

In: the content of `metrics.json`. Out: the text of `report.md`. Part of step 12.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlora_moderation.card import format_metrics_table

_AGREEMENT = ("cohen_kappa", "recall", "precision", "f1", "agreement", "reference_flagged", "judged_flagged", "pairs")


def build_report(result: Mapping[str, Any]) -> str:
    """Return the report."""
    data, model, settings = result["data"], result["model"], result["settings"]
    thresholds = sorted(set(settings["thresholds"].values()))
    sections = [
        "# Evaluation\n",
        f"{model['kind']} model ({model['method']}) on `{model['base_model']}`; data `{data.get('name', '')}`: "
        f"{data['rows']:,} rows, {data['pairs']:,} distinct pairs, {data['skipped_rows']} broken rows left out.\n",
        f"A category is a yes above {' or '.join(f'{t:g}' for t in thresholds)} ({settings['thresholds_origin']}); a pair "
        f"is flagged by the rule `{settings['flagged_rule']}`. Longest text {settings['max_length']} tokens; "
        f"{data['pairs_in_several_windows']} pairs were scored in several windows, {data['truncated_pairs']} were cut.\n",
        *(f"**Note:** {warning}\n" for warning in model["warnings"]),
    ]
    if "metrics" in result:
        sections.append("## Against the labels\n\nA label is what at least half of a pair's annotators said.\n")
        if "pairs_with_a_training_prompt" in data:
            sections.append(
                f"{data['pairs_with_a_training_prompt']} pairs have a prompt that is in the training data, "
                f"{data['pairs_also_in_training']} are in it themselves; the baselines are fitted without the latter.\n"
            )
        sections.append(format_metrics_table(result["metrics"]) + "\n")
        sections.append("### Baselines for `flagged`\n")
        baselines = {"this model": _flagged(result["metrics"]), **result["baselines"]}
        sections.append(
            _table(baselines, ("precision", "recall", "f1", "auroc", "average_precision", "accuracy")) + "\n"
        )
        sections.append(
            "`tfidf_*`: TF-IDF over words and word pairs with logistic regression, fitted on the training rows (shown when "
            "they are given) and flagged above the model's lowest threshold.\n"
        )
    proportions = result["flagged_proportion"]
    moderators = tuple(dict.fromkeys(name for shares in proportions.values() for name in shares))
    sections.append("## Flagged proportion\n\n![flagged proportion](flagged_proportion.png)\n")
    sections.append(_table(proportions, moderators) + "\n")
    if "agreement" in result:
        sections.append(
            "## Agreement\n\nWhere a moderator flags few answers, never flagging agrees with it nearly always: read kappa, "
            "recall and precision first.\n"
        )
        rows = {f"{row['reference']}, {row['model']}": row for row in result["agreement"]}
        sections.append(_table(rows, _AGREEMENT) + "\n")
    return "\n".join(sections)


def _flagged(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("flagged/"): value for name, value in metrics.items() if name.startswith("flagged/")}


def _table(rows: Mapping[str, Mapping[str, Any]], columns: tuple[str, ...]) -> str:
    lines = [
        "| | " + " | ".join(column.replace("_", " ") for column in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for name, row in rows.items():
        values = [row.get(column) for column in columns]
        cells = ["" if v is None else f"{v:,}" if isinstance(v, int) else f"{v:.3f}" for v in values]
        lines.append(f"| {name.replace('|', ' ')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
