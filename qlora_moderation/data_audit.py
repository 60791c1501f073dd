"""The job `audit`: what a data set holds, before anything is trained on it or judged by it.

In: data specs, and perhaps a model for its tokenizer. Out: a printed table, and `audit.json`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qlora_moderation.audit import compute_audit, count_disagreement, describe_lengths
from qlora_moderation.audit_config import AuditConfig
from qlora_moderation.data import Pairs, aggregate_rows, check_usable, tell_renamed
from qlora_moderation.errors import ConfigError
from qlora_moderation.leakage import TrainingHashes, hash_training, load_hashes
from qlora_moderation.metadata import load_metadata, write_json
from qlora_moderation.refusals import refusals
from qlora_moderation.sources import parse_spec
from qlora_moderation.taxonomy import Taxonomy, load_taxonomy

if TYPE_CHECKING:
    from qlora_moderation.tokenization import TextEncoder

AUDIT_FILE = "audit.json"
_DEFAULT_LENGTH = 512
Log = Callable[[str], None]


def audit_data(config: AuditConfig, log: Log = print) -> dict[str, Any]:
    """Describe a data set; torch is imported for a tokenizer alone.

    Returns:
        The content of `audit.json`.

    Raises:
        ModerationError: a source or the model cannot be read, no row can be used, or the target is a run's directory.
    """
    target = None if config.output_dir is None else Path(config.output_dir)
    if target is not None and (target / "status.json").exists():
        raise ConfigError(
            f"--output_dir {target}: is a run's directory, which has an {AUDIT_FILE} of its own; give another"
        )
    model = config.model_name_or_path
    metadata = None if model is None else load_metadata(Path(model))
    taxonomy = load_taxonomy(config.taxonomy) if config.taxonomy or metadata is None else metadata.taxonomy
    max_length = config.max_length or (metadata.max_length if metadata else _DEFAULT_LENGTH)
    training = _load(config.train_data_name_or_path, taxonomy, log)
    judging = None if config.eval_data_name_or_path is None else _load(config.eval_data_name_or_path, taxonomy, log)
    encoder = None if model is None else _open_encoder(model, config.model_revision, taxonomy, max_length)
    hashes = None if model is None else load_hashes(Path(model))
    audit: dict[str, Any] = {
        "data": config.train_data_name_or_path,
        **_describe(training, taxonomy, encoder, max_length, hashes),
    }
    if judging is not None:
        audit["evaluation"] = {
            "data": config.eval_data_name_or_path,
            **_describe(judging, taxonomy, encoder, max_length, hashes),
            "leakage": _find_leakage(training, judging),
        }
    for line in format_audit(audit, config.show_bad_rows):
        log(line)
    if target is not None:
        with refusals(f"--output_dir {target}"):
            write_json(target / AUDIT_FILE, audit)
        log(f"written: {target / AUDIT_FILE}")
    return audit


def _load(spec: str, taxonomy: Taxonomy, log: Log) -> Pairs:
    sources = parse_spec(spec)
    tell_renamed(sources, log)
    pairs = aggregate_rows(sources, taxonomy, "skip")
    check_usable(spec, pairs, lambda line: None, need_labels=False)
    return pairs


def _open_encoder(model: str, revision: str | None, taxonomy: Taxonomy, max_length: int) -> TextEncoder:
    from qlora_moderation.classifier import open_tokenizer

    return open_tokenizer(model, revision, taxonomy, max_length)[1]


def _describe(
    pairs: Pairs, taxonomy: Taxonomy, encoder: TextEncoder | None, max_length: int, hashes: TrainingHashes | None
) -> dict[str, Any]:
    counts = None if encoder is None else np.array(encoder.count_tokens(pairs.prompts, pairs.responses))
    audit = compute_audit(pairs, taxonomy, counts, max_length)
    lengths = [len(prompt) + len(response) for prompt, response in zip(pairs.prompts, pairs.responses, strict=True)]
    audit["characters"] = describe_lengths(np.array(lengths))
    if pairs.labels is not None:
        audit["disagreement"] = count_disagreement(pairs, taxonomy)
    if pairs.models is not None:
        names, found = np.unique(np.array(pairs.models), return_counts=True)
        audit["models"] = dict(zip(names.tolist(), found.tolist(), strict=True))
    if hashes is not None:
        audit["known_to_the_model"] = {
            "pairs_with_a_training_prompt": int(hashes.has_prompts(pairs.prompts).sum()),
            "pairs_also_in_training": int(hashes.has_pairs(pairs.prompts, pairs.responses).sum()),
            "pairs_with_a_selection_prompt": int(hashes.has_selection_prompts(pairs.prompts).sum()),
        }
    audit["bad_rows"] = pairs.skipped_rows
    return audit


def _find_leakage(training: Pairs, judging: Pairs) -> dict[str, int]:
    """Count judging pairs that training knows; spelling in capitals and spacing makes no difference."""
    known = hash_training(training.prompts, training.responses)
    return {
        "pairs_with_a_training_prompt": int(known.has_prompts(judging.prompts).sum()),
        "pairs_also_in_training": int(known.has_pairs(judging.prompts, judging.responses).sum()),
    }


def format_audit(audit: dict[str, Any], bad_rows: int) -> list[str]:
    """Return the audit as lines; of each set's broken rows at most `bad_rows` are named."""
    lines = _format_set(audit, bad_rows)
    if "evaluation" in audit:
        judging = audit["evaluation"]
        leakage, pairs = judging["leakage"], judging["pairs"]
        lines += ["", *_format_set(judging, bad_rows), ""]
        lines.append(
            f"leakage: of these {pairs:,} pairs {_share(leakage['pairs_with_a_training_prompt'], pairs)} have a prompt of "
            f"{audit['data']}, {_share(leakage['pairs_also_in_training'], pairs)} stand there themselves"
        )
    return lines


def _format_set(audit: dict[str, Any], bad_rows: int) -> list[str]:
    pairs, several = audit["pairs"], audit["pairs_with_several_annotations"]
    per_pair = ", ".join(f"{count} x {number:,}" for count, number in audit["annotations_per_pair"].items())
    facts = {
        "rows": f"{audit['rows']:,} usable, {audit['skipped_rows']:,} broken",
        "pairs": f"{pairs:,} distinct, of {audit['prompts']:,} prompts",
        "annotations": f"a pair: {per_pair}",
        "characters": _format_lengths(audit["characters"]),
    }
    if "tokens" in audit:
        tokens = audit["tokens"]
        cut = f"{_share(tokens['truncated_pairs'], pairs)} are longer than {tokens['max_length']}"
        facts["tokens"] = f"{_format_lengths(tokens)}; {cut}"
    if "flagged_share" in audit:
        split = audit["pairs_with_disagreement_on_flagged"]
        facts["flagged"] = f"{audit['flagged_share']:.1%} of the rows"
        facts["disagreement"] = f"{split:,} of the {several:,} pairs with several annotations, on flagged"
    for name, found in audit.get("verdicts", {}).items():
        share = "none given" if found["flagged_share"] is None else f"{found['flagged_share']:.1%} flagged"
        facts[f"verdicts of {name}"] = f"{found['pairs']:,} pairs, {share}"
    if "models" in audit:
        facts["models"] = ", ".join(f"{name or '(none)'} {count:,}" for name, count in audit["models"].items())
    if "known_to_the_model" in audit:
        known = audit["known_to_the_model"]
        facts["known to the model"] = (
            f"{_share(known['pairs_with_a_training_prompt'], pairs)} of the pairs by their prompt, "
            f"{_share(known['pairs_also_in_training'], pairs)} themselves; "
            f"{_share(known['pairs_with_a_selection_prompt'], pairs)} have a prompt that selected its weights"
        )
    width = max(map(len, facts))
    lines = [str(audit["data"]), *(f"  {name:{width}}  {fact}" for name, fact in facts.items())]
    if "label_counts" in audit:
        lines += ["", *_format_labels(audit)]
    if audit["bad_rows"]:
        shown = audit["bad_rows"][:bad_rows]
        more = len(audit["bad_rows"]) - len(shown)
        rest = [f"  and {more:,} more"] if shown and more else []
        lines += ["", f"broken rows: {len(audit['bad_rows']):,}", *(f"  {row}" for row in shown), *rest]
    return lines


def _format_labels(audit: dict[str, Any]) -> list[str]:
    counts = audit["label_counts"]
    width = max(len("category"), *map(len, counts))
    lines = [f"  {'category':{width}}  {'votes':>9}  {'of rows':>7}  {'pairs in dispute':>16}"]
    for name, votes in counts.items():
        share = votes / audit["rows"]
        lines.append(f"  {name:{width}}  {round(votes):>9,}  {share:>7.1%}  {audit['disagreement'][name]:>16,}")
    return lines


def _format_lengths(found: dict[str, Any]) -> str:
    middle = f"mean {found['mean']:.0f}, median {found['median']:.0f}, p95 {found['p95']:.0f}"
    return f"a pair: {middle}, longest {found['longest']:,}"


def _share(count: int, of: int) -> str:
    return f"{count:,} ({count / of:.1%})"
