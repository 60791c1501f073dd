"""The model card: what was trained on what, how to load it, what it may be used for.

In: metadata, thresholds, metrics. Out: the text of `README.md` beside the weights. No path of a user's machine enters it.
"""

from __future__ import annotations

from typing import Any

import yaml

from qlora_moderation.metadata import ModelMetadata
from qlora_moderation.metrics import Metrics
from qlora_moderation.taxonomy import BEAVERTAILS_CATEGORIES
from qlora_moderation.thresholds import Thresholds

_SHOWN = ("precision", "recall", "f1", "auroc", "average_precision")

_LICENCE = (
    "The code is under Apache-2.0. BeaverTails is under CC BY-NC 4.0: a model trained on it is for non-commercial use. "
    "The backbone's own licence applies too."
)
_OTHER_LICENCE = (
    "The code is under Apache-2.0. What the licences of training rows and backbone say of models made from them applies too"
    "{own}."
)
_LIMITS = (
    "The model judges one question with one answer as a whole, in the language and style of its training rows. It does not "
    "see earlier turns, facts of the world, or who asks. It is wrong on a share of texts that the metrics above only "
    "estimate; do not let it decide alone where people can be hurt."
)


def build_card(
    metadata: ModelMetadata, thresholds: Thresholds, metrics: Metrics | None, embedding_rows: int | None, pad_id: int
) -> str:
    """Return the card.

    Args:
        metadata: of the model.
        thresholds: stored with it.
        metrics: validation metrics of the selected weights, or None.
        embedding_rows: rows of the embedding where it had to grow for the pad token, else None.
        pad_id: id of the pad token.
    """
    base = metadata.base_name
    front = {
        "library_name": "peft" if metadata.kind == "adapter" else "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["moderation", "multi-label", metadata.method],
        "license": "other",
    }
    of_beavertails = "beavertails" in str(metadata.training.get("training_data", "beavertails")).lower()
    if of_beavertails:
        front["license_name"] = "apache-2.0-code-with-non-commercial-data"
    own = "; rows of BeaverTails are under CC BY-NC 4.0, for non-commercial use"
    licence = _OTHER_LICENCE.format(own=own if metadata.taxonomy.categories == BEAVERTAILS_CATEGORIES else "")
    licence = _LICENCE if of_beavertails else licence
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n",
        f"# QA moderation: {metadata.kind} of `{base}`\n",
        "Judges a question with its answer as a whole: harmful if the answer does not neutralise the question's risk, "
        f"in any of {len(metadata.taxonomy.categories)} categories (multi-label).\n"
        if len(metadata.taxonomy.categories) > 1
        else f"by one category, `{metadata.taxonomy.categories[0]}`.\n",
        "## Use\n\n```python\nfrom qlora_moderation import QAModeration\n\n"
        'moderation = QAModeration.from_pretrained("path/to/this/directory")\n'
        'print(moderation.predict(question="...", answer="..."))\n```\n',
        _stock_call(metadata, embedding_rows, pad_id),
        _training_section(metadata, base),
        _metrics_section(metrics),
        _thresholds_section(thresholds),
        f"## Licence and limits\n\n{licence}\n\n{_LIMITS}\n",
    ]
    return "\n".join(sections)


def _stock_call(metadata: ModelMetadata, embedding_rows: int | None, pad_id: int) -> str:
    before, between, after = metadata.taxonomy.template_parts
    render = (
        "def render(question, answer):\n"
        f"    return {before!r} + question + {between!r} + answer + {after!r}\n\n\n"
        'text = render("How do I boil an egg?", "Put it into boiling water for eight minutes.")\n'
    )
    if metadata.kind != "adapter":
        return (
            "Without this library (the head runs in the backbone's type there, and a text must fit "
            f"{metadata.max_length} tokens; this library keeps the head in fp32 and scores longer texts in windows):\n\n"
            "```python\nfrom transformers import pipeline\n\n"
            'directory = "path/to/this/directory"\n'
            'classify = pipeline("text-classification", model=directory, top_k=None, function_to_apply="sigmoid")\n\n\n'
            f"{render}print(classify(text))\n```\n"
        )
    arguments = [
        "    base.base_model_name_or_path,",
        "    revision=base.revision,",
        f"    num_labels={len(metadata.taxonomy.categories)},",
        '    problem_type="multi_label_classification",',
        *([f"    pad_token_id={pad_id},"] if embedding_rows is None else []),
        "    ignore_mismatched_sizes=True,",
    ]
    imports = "AutoModelForSequenceClassification, AutoTokenizer"
    if metadata.quantization is None:
        arguments.append("    dtype=torch.float32,")
    else:
        imports += ", BitsAndBytesConfig"
        arguments += [
            f"    dtype=torch.{metadata.quantization.weights_dtype},",
            "    quantization_config=BitsAndBytesConfig(",
            "        load_in_4bit=True,",
            '        bnb_4bit_quant_type="nf4",',
            f"        bnb_4bit_use_double_quant={metadata.quantization.double_quant},",
            f"        bnb_4bit_compute_dtype=torch.{metadata.quantization.weights_dtype},",
            '        llm_int8_skip_modules=["score"],',
            "    ),",
        ]
    exact = ""
    if metadata.quantization is not None:
        exact = (
            "for module in model.modules():  # bitsandbytes' bfloat16 kernel for some CPUs would round the weights again\n"
            '    if hasattr(module, "support_avx512bf16_for_cpu"):\n'
            "        module.support_avx512bf16_for_cpu = False\n"
        )
    grow = ""
    if embedding_rows is not None:
        grow = (
            f"model.resize_token_embeddings({embedding_rows}, mean_resizing=False)  # the pad token is new\n"
            f"model.config.pad_token_id = {pad_id}\n"
        )
    return (
        "With PEFT alone:\n\n```python\nimport torch\nfrom peft import PeftConfig, PeftModel\n"
        f"from transformers import {imports}\n\n"
        'directory = "path/to/this/directory"\n'
        "base = PeftConfig.from_pretrained(directory)\n"
        "model = AutoModelForSequenceClassification.from_pretrained(\n" + "\n".join(arguments) + "\n)\n"
        f"{exact}{grow}model = PeftModel.from_pretrained(model, directory).eval()\n"
        "tokenizer = AutoTokenizer.from_pretrained(directory)\n\n\n"
        f"{render}with torch.no_grad():\n"
        '    logits = model(**tokenizer(text, return_tensors="pt")).logits\n'
        "print(torch.sigmoid(logits))\n```\n"
    )


def _training_section(metadata: ModelMetadata, base: str) -> str:
    facts: dict[str, Any] = {"method": metadata.method, "base": base, "base revision": metadata.base_revision}
    if metadata.quantization is not None:
        double = "with" if metadata.quantization.double_quant else "without"
        facts["base weights"] = f"NF4 {double} double quantisation, from {metadata.quantization.weights_dtype}"
    facts["longest text"] = f"{metadata.max_length} tokens; beyond: {metadata.long_text}"
    template = metadata.taxonomy.template.replace("\n", "\\n").replace("|", "\\|")  # in one cell of the table
    facts["template"] = f"`{template}` and the end token"
    facts |= {key.replace("_", " "): value for key, value in metadata.training.items() if key != "warnings"}
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items() if value is not None)
    notes = "".join(f"\n**Note:** {warning}\n" for warning in metadata.training.get("warnings", []))
    return f"## Training\n\n| | |\n|---|---|\n{rows}\n{notes}"


def _metrics_section(metrics: Metrics | None) -> str:
    if metrics is None:
        return "## Validation\n\nNot measured: the run had no validation data.\n"
    return f"## Validation\n\n{format_metrics_table(metrics)}\n"


def format_metrics_table(metrics: Metrics) -> str:
    """Return a Markdown table with one row for `flagged`, `micro`, `macro` and each category."""
    parts = list(dict.fromkeys(name.rpartition("/")[0] for name in metrics if "/" in name))
    head = ["flagged", "micro", "macro"]
    lines = ["| | " + " | ".join((*_SHOWN, "support")) + " |", "|---|" + "---|" * (len(_SHOWN) + 1)]
    for part in [*head, *(part for part in parts if part not in head)]:
        values = [metrics.get(f"{part}/{key}") for key in (*_SHOWN, "support")]
        cells = ["" if v is None else str(v) if isinstance(v, int) else f"{v:.3f}" for v in values]
        lines.append(f"| {part} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _thresholds_section(thresholds: Thresholds) -> str:
    return (
        "## Thresholds\n\n`thresholds.json` says when a probability is a yes; every score of this library reads it, and its "
        "`raw` numbers go with the output of any other loader. When this card was written: "
        f"{thresholds.describe()}.\n"
    )
