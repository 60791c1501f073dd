"""A BERT with random weights, for speeds that do not depend on what weights say. Imported by `bench_cost.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from qlora_moderation.embedded import render_texts


def build_random_encoder(place: Path, rows: list[dict[str, Any]], layers: int, width: int) -> str:
    """Write a BERT with random weights and a vocabulary of MiniLM-L6's size, and a WordPiece tokenizer learnt from the rows."""
    names = {
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "mask_token": "[MASK]",
    }
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=30522, special_tokens=list(names.values()), show_progress=False)
    backend.train_from_iterator(render_texts(rows), trainer)
    ends = [("[SEP]", backend.token_to_id("[SEP]")), ("[CLS]", backend.token_to_id("[CLS]"))]
    backend.post_processor = processors.BertProcessing(*ends)
    torch.manual_seed(0)
    shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": width // 32}
    BertModel(BertConfig(vocab_size=30522, num_hidden_layers=layers, **shape)).save_pretrained(place)
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(place)
    return str(place)
