"""A LLaMA of at most 2 million weights, built on the spot, for places without network or accelerator.

In: rendered texts. Out: a directory that `AutoTokenizer` and `AutoModelForSequenceClassification` open like any LLaMA
checkpoint, so that the rest of the line cannot tell it from a downloaded backbone. It is trained for some seconds as a
causal language model first: adapters then start from weights that have learnt something, as they do on a real backbone.
"""

from __future__ import annotations

import json
import math
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qlora_moderation.backbone import quiet
from qlora_moderation.errors import CheckpointError
from qlora_moderation.staging import replaced_whole
from qlora_moderation.taxonomy import Taxonomy

UNK, BOS, EOS = "<unk>", "<s>", "</s>"
"""Special tokens with the ids 0, 1 and 2, as in LLaMA's own vocabulary; like LLaMA, it has no pad token."""

MAX_EMBEDDED_WEIGHTS = 2_000_000


def render_texts(rows: Iterable[Mapping[str, Any]], taxonomy: Taxonomy | None = None) -> list[str]:
    """Return the distinct rendered pairs of `rows`, in order of appearance."""
    taxonomy = taxonomy or Taxonomy()
    return list(dict.fromkeys(taxonomy.render(row["prompt"], row["response"]) for row in rows))


def build_embedded_backbone(
    output_dir: str | os.PathLike[str],
    texts: Sequence[str],
    seed: int = 0,
    steps: int = 160,
    log: Callable[[str], Any] = print,
) -> Path:
    """Build the backbone of the quick start: 2 layers of width 128.

    Args:
        output_dir: Must not exist yet.
        texts: Rendered texts without begin and end tokens; see `render_texts`.
        seed: Seed of the weights and of the order of the texts.
        steps: Language-model steps.
        log: Called with one line at a time.

    Returns:
        `output_dir`.

    Raises:
        CheckpointError: `output_dir` exists.
    """
    return build_llama_shape(output_dir, texts, seed=seed, steps=steps, max_weights=MAX_EMBEDDED_WEIGHTS, log=log)


def build_llama_shape(
    output_dir: str | os.PathLike[str],
    texts: Sequence[str],
    *,
    hidden_size: int = 128,
    intermediate_size: int | None = None,
    num_layers: int = 2,
    num_heads: int | None = None,
    vocab_size: int = 1280,
    max_length: int = 2048,
    steps: int = 160,
    batch_size: int = 16,
    learning_rate: float = 3e-3,
    seed: int = 0,
    max_weights: int | None = None,
    log: Callable[[str], Any] = print,
) -> Path:
    """Build a LLaMA of any shape with a tokenizer learnt from `texts`, and train it as a causal language model.

    The same arguments, thread count and versions give the same weights. The directory appears whole or not at all.

    Args:
        output_dir: Must not exist yet.
        texts: Rendered texts without begin and end tokens.
        hidden_size: H, a multiple of 64, so that NF4 blocks of 64 weights never span two rows.
        intermediate_size: Width of the feed-forward part, a multiple of 64; 3 H when not given.
        num_layers: Decoder layers.
        num_heads: Attention heads; one per 32 of H when not given.
        vocab_size: Upper bound; a small corpus may give fewer tokens.
        max_length: Longest text in tokens; longer ones are cut in training.
        steps: Language-model steps; 0 leaves the weights random.
        batch_size: Texts per step.
        learning_rate: Peak of the cosine schedule.
        seed: Seed of the weights and of the order of the texts. The caller's random state is left as it was.
        max_weights: Refuse to build a larger model.
        log: Called with one line at a time.

    Returns:
        `output_dir`.

    Raises:
        CheckpointError: `output_dir` exists or cannot be written, or the model has more than `max_weights` weights.
        ValueError: no texts, or a width that is no multiple of 64.
    """
    output_dir = Path(output_dir)
    intermediate_size = intermediate_size or 3 * hidden_size
    if output_dir.exists():
        raise CheckpointError(f"{output_dir} exists; remove it or give another directory")
    if not texts:
        raise ValueError("no texts: a tokenizer and a language model need at least one")
    if hidden_size % 64 or intermediate_size % 64:
        raise ValueError(f"widths {hidden_size} and {intermediate_size}: both must be multiples of 64 (NF4 blocks)")
    tokenizer = build_tokenizer(texts, vocab_size=vocab_size, max_length=max_length)
    heads = num_heads or max(1, hidden_size // 32)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=max_length,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    weights = sum(parameter.numel() for parameter in model.parameters())
    log(f"backbone: {num_layers} layers of width {hidden_size}, {len(tokenizer)} tokens, {weights:,} weights")
    if max_weights is not None and weights > max_weights:
        raise CheckpointError(f"{weights:,} weights, but at most {max_weights:,} are allowed; lower hidden_size")
    _train_language_model(model, tokenizer, texts, steps, batch_size, learning_rate, seed, log)
    with replaced_whole(output_dir) as whole:
        with quiet():
            model.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
    log(f"backbone: written to {output_dir}")
    return output_dir


def build_tokenizer(texts: Iterable[str], vocab_size: int = 1280, max_length: int = 2048) -> PreTrainedTokenizerFast:
    """Build a byte-pair tokenizer in the manner of LLaMA's.

    Words start with `▁`, punctuation stands alone, characters outside the vocabulary fall back to their UTF-8 bytes,
    and `<s>` is put in front.

    Args:
        texts: What the merges are learnt from.
        vocab_size: Upper bound, special and byte tokens included.
        max_length: Stored as the tokenizer's `model_max_length`.

    Returns:
        A fast tokenizer without a pad token.
    """
    specials = [UNK, BOS, EOS]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    words = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first"), pre_tokenizers.Punctuation()]
    )
    trained = Tokenizer(models.BPE(unk_token=UNK, byte_fallback=True))
    trained.pre_tokenizer = words
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=specials + byte_tokens, show_progress=False, min_frequency=2
    )
    trained.train_from_iterator(texts, trainer)
    # The trainer makes the byte tokens special too, and a typed "<0x41>" would become one token. As ordinary entries of
    # the vocabulary only the byte fallback reaches them.
    state = json.loads(trained.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in specials]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNK,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def _train_language_model(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    log: Callable[[str], Any],
) -> None:
    """Train every weight to predict the next token of `texts`, which end in `</s>`; leave `model` in eval mode."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    order = _iterate_epochs(_encode(tokenizer, texts), random.Random(seed))
    start = time.monotonic()
    model.train()
    for step in range(1, steps + 1):
        progress = step / steps
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, progress / 0.05) * (0.05 + 0.95 * math.cos(progress * math.pi / 2))
        ids, mask = _pad([next(order) for _ in range(batch_size)])
        loss = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step == 1 or step % 40 == 0 or step == steps:
            seconds = time.monotonic() - start
            log(f"language model: step {step}/{steps}, {loss.item():.3f} nats a token, {seconds:.1f} s")
    model.eval()


def _encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    longest = tokenizer.model_max_length - 1
    encoded = tokenizer(list(texts), split_special_tokens=True, verbose=False)["input_ids"]
    return [[*ids[:longest], tokenizer.eos_token_id] for ids in encoded]


def _iterate_epochs(items: list[list[int]], rng: random.Random) -> Iterator[list[int]]:
    while True:
        yield from rng.sample(items, len(items))


def _pad(sequences: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and attention mask [N, T], padded on the right."""
    length = max(map(len, sequences))
    ids = torch.tensor([[*sequence, *[0] * (length - len(sequence))] for sequence in sequences])
    mask = torch.tensor([[1] * len(sequence) + [0] * (length - len(sequence)) for sequence in sequences])
    return ids, mask
