"""Small models and data made on the spot, shared by all tests of a session."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # two threads gain nothing on models so small, and wait for each other beside any load

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from qlora_moderation.assembly import build_classifier
from qlora_moderation.classifier import Classifier
from qlora_moderation.config import TrainConfig
from qlora_moderation.embedded import build_llama_shape, build_tokenizer, render_texts
from qlora_moderation.sample import build_sample
from qlora_moderation.taxonomy import Taxonomy
from qlora_moderation.train import train

torch.set_num_threads(1)
_cache_home = tempfile.TemporaryDirectory(prefix="qlora-moderation-tests-")  # removed when the session ends
os.environ["XDG_CACHE_HOME"] = _cache_home.name  # no test leaves rows in the user's own cache


def silent(_: str) -> None:
    """Take a log line and drop it."""


@pytest.fixture(scope="session")
def rows() -> list[dict]:
    """300 annotations of the embedded sample."""
    return build_sample(seed=0)["train"][:300]


@pytest.fixture(scope="session")
def rows_file(rows, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def texts(rows) -> list[str]:
    return render_texts(rows)


@pytest.fixture(scope="session")
def llama(texts, tmp_path_factory) -> Path:
    """A random LLaMA of 2 layers and width 64, whose tokenizer has `<unk>`, `<s>`, `</s>` and no pad token."""
    path = tmp_path_factory.mktemp("llama") / "backbone"
    return build_llama_shape(path, texts, hidden_size=64, num_layers=2, vocab_size=600, steps=0, log=silent)


def llama3_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with neither pad nor unknown token, and an added token that is not special."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    specials = ["<|begin_of_text|>", "<|end_of_text|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=specials[0], eos_token=specials[1])
    tokenizer.add_tokens(["<tool_call>"])
    return tokenizer


@pytest.fixture(scope="session")
def decoders(llama, texts, tmp_path_factory) -> dict[str, Path]:
    """Random decoders of three families; `llama3` has a tokenizer like Llama 3's, `windowed` a short sliding window."""
    root = tmp_path_factory.mktemp("decoders")
    shape = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
    }
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    sentencepiece_like, byte_level = build_tokenizer(texts, vocab_size=600), llama3_tokenizer(texts)
    torch.manual_seed(0)
    built = {
        "mistral": (
            MistralForCausalLM(MistralConfig(vocab_size=len(sentencepiece_like), sliding_window=None, **shape)),
            sentencepiece_like,
        ),
        "windowed": (
            MistralForCausalLM(MistralConfig(vocab_size=len(sentencepiece_like), sliding_window=16, **shape)),
            sentencepiece_like,
        ),
        "qwen2": (Qwen2ForCausalLM(Qwen2Config(vocab_size=len(byte_level), **ends, **shape)), byte_level),
        "llama3": (LlamaForCausalLM(LlamaConfig(vocab_size=len(byte_level), **ends, **shape)), byte_level),
    }
    for name, (model, tokenizer) in built.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return {"llama": llama, **{name: root / name for name in built}}


@pytest.fixture(scope="session")
def bert(texts, tmp_path_factory) -> Path:
    """A random BERT without a pooler in its checkpoint, as masked language models come."""
    path = tmp_path_factory.mktemp("bert") / "backbone"
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=600, special_tokens=specials, show_progress=False)
    )
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), specials, strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def build(rows_file) -> Callable[..., Classifier]:
    """Build a trainable classifier on the CPU: `build(backbone, method=..., ...)`."""

    def build_it(backbone: Path, taxonomy: Taxonomy | None = None, **options) -> Classifier:
        config = make_config(backbone, rows_file, "unused", **options)
        return build_classifier(config, taxonomy or Taxonomy(), torch.device("cpu"), silent)

    return build_it


def make_config(backbone: Path, data: Path, output: Path | str, **options) -> TrainConfig:
    """A short run: 4 steps of 16 pairs, unless `options` say otherwise."""
    settings = {
        "model_name_or_path": str(backbone),
        "train_data_name_or_path": str(data),
        "output_dir": str(output),
        "max_steps": 4,
        "max_length": 128,
        "learning_rate": 2e-3,
        "eval_strategy": "no",
        "use_cpu": True,
        "cache_dir": None,
    }
    return TrainConfig(**(settings | options))


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run: where its weights are, and what it logged."""

    weights: Path
    directory: Path
    log: list[str]


@pytest.fixture(scope="session")
def runs(llama, rows_file, tmp_path_factory) -> dict[str, Run]:
    """One short run of each method, with validation."""
    finished = {}
    for method in ("lora", "qlora", "full"):
        directory = tmp_path_factory.mktemp("runs") / method
        log: list[str] = []
        options = {"method": method, "eval_strategy": "steps", "eval_steps": 2, "validation_fraction": 0.1}
        weights = train(make_config(llama, rows_file, directory, **options), log.append)
        finished[method] = Run(weights, directory, log)
    return finished


def logits_of(classifier: Classifier, ids: list[list[int]]) -> torch.Tensor:
    """Score texts in one micro-batch, [len(ids), C]."""
    from qlora_moderation.layout import build_micro_batch

    batch = build_micro_batch(ids, classifier.layout, classifier.pad_id, torch.device("cpu"))
    with torch.no_grad():
        return classifier.model(batch)
