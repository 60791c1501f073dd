"""A tokenizer that gives our ids by itself, to whoever opens it.

In: a model's tokenizer and its encoder. Out: the same tokenizer, prepared, and its files beside the weights. Steps 10 and 11.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from qlora_moderation.metadata import read_json, write_json
from qlora_moderation.tokenization import TextEncoder, drop_control_merges

_PLAIN_CLASS = "PreTrainedTokenizerFast"


def prepare_for_stock_use(tokenizer: Any, encoder: TextEncoder) -> None:
    """Make a tokenizer give our ids by itself: begin and end ids around a rendered text, special strings read as text.

    The tokenizer is changed in place; it then serves `pipeline("text-classification")` on `Taxonomy.render(...)`.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    drop_control_merges(state)
    for token in state["added_tokens"]:
        token["special"] = True  # `split_special_tokens` reads only special ones as text
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    names = {token: tokenizer.convert_ids_to_tokens(token) for token in {*encoder.begin_ids, *encoder.end_ids}}
    single = [*(names[i] for i in encoder.begin_ids), "$A", *(names[i] for i in encoder.end_ids)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=" ".join(single), special_tokens=[(name, token) for token, name in names.items()]
    )
    settings = {
        "padding_side": "right",
        "truncation_side": "right",
        "model_max_length": encoder.max_length,
        "split_special_tokens": True,
    }
    for name, value in settings.items():
        setattr(tokenizer, name, value)
        tokenizer.init_kwargs[name] = value  # what `save_pretrained` writes


def save_stock_tokenizer(tokenizer: Any, directory: Path) -> None:
    """Write a prepared tokenizer so that transformers 4 and 5 read it alike.

    Both read `PreTrainedTokenizerFast` as what `tokenizer.json` says and nothing else. Under its own name a tokenizer of LLaMA
    loses the end token in transformers 4, which writes the begin token anew (`LlamaTokenizerFast.update_post_processor`), and
    the name that transformers 5 gives to the others is unknown there. A server with either would pool another token.
    """
    tokenizer.save_pretrained(str(directory))
    path = directory / "tokenizer_config.json"
    settings = read_json(path)
    # the plain class has a default of its own for what a call returns
    write_json(path, settings | {"tokenizer_class": _PLAIN_CLASS, "model_input_names": tokenizer.model_input_names})
