"""A common beginning that is computed once gives the logits and gradients of whole texts."""

from __future__ import annotations

import itertools
import random
from unittest.mock import create_autospec

import numpy as np
import pytest
import torch
import torch.nn.attention.varlen
from conftest import make_config, silent
from test_fused_layers import build_model
from torch.utils.flop_counter import FlopCounterMode

from qlora_moderation import QAModeration
from qlora_moderation.attention import _attend_variable_length
from qlora_moderation.fused_layers import fuse_layers
from qlora_moderation.layout import MicroBatch, build_micro_batch
from qlora_moderation.model import ModerationModel
from qlora_moderation.scoring import score_pairs
from qlora_moderation.train import train

CPU = torch.device("cpu")
TEXTS = [[5, 9, 2, 7, 1], [5, 9, 2, 3], [5, 9, 2, 7, 9, 9, 1], [5, 9, 2, 8]]


def build(ids, shared: bool) -> MicroBatch:
    return build_micro_batch(ids, "packed", 0, CPU, shared)


def run(model: ModerationModel, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and the gradients of their weighted sum."""
    model.zero_grad()
    logits = model(batch)
    (logits * torch.arange(1.0, 1.0 + logits.numel()).view_as(logits)).sum().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_a_row_holds_each_beginning_once():
    batch = build([[5, 9, 2, 7, 1], [5, 9, 2, 3], [5, 9, 2, 7, 9, 9, 1], [8, 8], [8, 8, 8]], True)
    assert batch.input_ids.tolist() == [
        [7, 1, 5, 9, 2, 3, 9, 9, 1, 8, 8, 8, 8]
    ]  # with the text that comes first by its tokens
    assert batch.position_ids.tolist() == [[3, 4, 0, 1, 2, 3, 4, 5, 6, 0, 1, 1, 2]]
    assert batch.last.tolist() == [1, 5, 8, 10, 12]
    assert batch.segments.lengths == (5, 4, 7, 2, 3) and batch.segments.borders.tolist() == [0, 5, 9, 16, 18, 21]


def test_places_lead_from_the_row_to_the_whole_texts_and_back():
    rng = random.Random(0)
    for _ in range(200):
        texts = [[rng.randint(0, 2) for _ in range(rng.randint(1, 9))] for _ in range(rng.randint(2, 12))]
        texts = [text[:6] for text in texts] + texts[:3]
        batch, whole = build(texts, True), build(texts, False)
        prefixes = batch.segments.prefixes
        assert prefixes is not None
        places, origins, copies = (part.numpy() for part in (prefixes.places, prefixes.origins, prefixes.copies))
        assert (batch.input_ids[0, places] == whole.input_ids[0]).all()
        assert (batch.position_ids[0, places] == whole.position_ids[0]).all()
        assert (places[origins] == np.arange(len(origins))).all()
        assert sorted([*origins, *copies]) == list(range(whole.input_ids.shape[1]))
        assert len(set(batch.last.tolist())) == len(texts)  # each text has a token of its own
        assert (places[whole.last.numpy()] == batch.last.numpy()).all()
        beginnings = {tuple(text[: index + 1]) for text in texts for index in range(len(text) - 1)}
        assert len(origins) <= len(beginnings) + len(texts)


def test_nothing_is_shared_where_it_would_not_pay():
    for texts in ([[1, 2, 3]], [[1, 2, 3], [2, 2, 3]], [[1], [1, 2]], [[1, *range(2, 99)], [1, *range(102, 199)]]):
        assert build(texts, True).segments.prefixes is None
    assert build([[1, 2], [1, 2, 3]], True).segments.prefixes is not None
    assert build(TEXTS, False).segments.prefixes is None


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize(
    "texts", [TEXTS, [[4, 8, 8]] * 3, [[1, 2], [1, 2, 3]], [[9], [8, 8], [8, 8, 1], [5, 9, 2], [5, 9]]]
)
def test_sharing_changes_neither_logits_nor_gradients(family, fused, texts):
    model = build_model(family, target_modules="all-linear")
    if fused:
        fuse_layers(model.network)
    (expected, gradients), (logits, found) = (run(model, build(texts, shared)) for shared in (False, True))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-4, rtol=1e-3, msg=name)


def test_decoders_whose_last_layer_stays_whole_share_too():
    model = build_model("llama", target_modules="all-linear")
    del model.classifier.model.layers[-1].forward
    (expected, _), (logits, _) = (run(model, build(TEXTS, shared)) for shared in (False, True))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_products_run_on_the_row_alone():
    texts, counts = [[7] * 30 + [index] * 10 for index in range(1, 9)], []
    for shared in (False, True):
        model = build_model("llama")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(build(texts, shared))
        counts.append(counter.get_flop_counts()["Global"][torch.ops.aten.mm])
    hidden, inner, keys, spared = 64, 128, 32, 7 * 30
    # one whole layer, and keys and values of the last
    assert counts[0] - counts[1] == 2 * spared * (2 * hidden * hidden + 2 * hidden * keys * 2 + 3 * hidden * inner)


def test_scoring_keeps_answers_to_one_question_together(runs, monkeypatch):
    moderation = QAModeration.from_pretrained(runs["lora"].weights, use_cpu=True)
    pairs = [(f"{name} " * 20, f"{name} {number}") for number in range(6) for name in ("How", "Why", "Who", "What")]
    rows: list[int] = []
    whole = ModerationModel.forward

    def watch(self: ModerationModel, batch: MicroBatch) -> torch.Tensor:
        rows.append(batch.input_ids.shape[1])
        return whole(self, batch)

    monkeypatch.setattr(ModerationModel, "forward", watch)
    texts = [[question for question, _ in pairs], [answer for _, answer in pairs]]
    scores = score_pairs(moderation.classifier, *texts, max_tokens=150)
    assert max(rows) <= 150 and sum(rows) < scores.tokens / 2
    alone = [score_pairs(moderation.classifier, [question], [answer]).logits[0] for question, answer in pairs]
    np.testing.assert_allclose(scores.logits, alone, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_training_shares_beginnings_unless_dropout_falls_on_them(llama, rows_file, tmp_path, monkeypatch, dropout):
    seen: list[MicroBatch] = []
    whole = ModerationModel.forward

    def watch(self: ModerationModel, batch: MicroBatch) -> torch.Tensor:
        if torch.is_grad_enabled():
            seen.append(batch)
        return whole(self, batch)

    monkeypatch.setattr(ModerationModel, "forward", watch)
    train(make_config(llama, rows_file, tmp_path / "run", lora_dropout=dropout, max_steps=2), silent)
    real = [batch for batch in seen if type(batch.input_ids) is torch.Tensor]
    assert real and all((batch.segments.prefixes is None) == bool(dropout) for batch in real)


@pytest.mark.parametrize("shared", [False, True])
def test_the_kernel_for_cuda_is_asked_for_the_same(monkeypatch, shared):
    """A plain reading of torch's documentation of `varlen_attn` stands in for the kernel, which needs a GPU."""

    def attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size=(-1, -1), **flags):
        groups, is_causal, parts = query.shape[1] // key.shape[1], flags.get("is_causal", False), []
        if groups > 1:
            assert flags["enable_gqa"]
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        for q, k in zip(itertools.pairwise(cu_seq_q.tolist()), itertools.pairwise(cu_seq_k.tolist()), strict=True):
            one, keys, values = query[slice(*q)], key[slice(*k)], value[slice(*k)]
            assert len(one) <= max_q and len(keys) <= max_k
            scores = torch.einsum("qhd,khd->hqk", one, keys) * scale
            if is_causal or window_size == (-1, 0):
                assert len(one) == len(keys)  # else versions differ in where the diagonal begins
                scores = scores.masked_fill(torch.ones_like(scores[0], dtype=torch.bool).triu(1), -torch.inf)
            parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
        return torch.cat(parts)

    model, batch = build_model("llama", target_modules="all-linear"), build(TEXTS, shared)
    expected, gradients = run(model, batch)
    kernel = create_autospec(torch.nn.attention.varlen.varlen_attn, side_effect=attend)
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", kernel)
    monkeypatch.setattr("qlora_moderation.attention._attend_by_text", _attend_variable_length)
    logits, found = run(model, batch)
    assert kernel.call_count == 2
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-4, rtol=1e-3, msg=name)
