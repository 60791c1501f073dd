"""Law 2 at length: the same texts in random company, order, layout, number of processes and program; logits must not move."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import rank_cases
from ranks import run_ranks
from test_serving_process import start_server

from qlora_moderation.classifier import Classifier, load_classifier
from qlora_moderation.predict import predict
from qlora_moderation.prediction_config import PredictConfig
from qlora_moderation.scoring import score_pairs

Pairs = list[tuple[str, str]]
ALLOWED = 1e-5
"""Of a logit, in fp32."""

_BUDGETS = (128, 300, 512, 2048, 16384)
_LARGEST_BATCH = 64


class Found(NamedTuple):
    """What a way of scoring gave: [N, C] logits, and how many batches they came in."""

    logits: np.ndarray
    batches: int


def make_pairs(rows: list[dict[str, Any]], count: int, seed: int) -> Pairs:
    """Return distinct pairs as long as BeaverTails' (log-normal, mean 105 tokens), some many windows long, some empty."""
    rng, sentences = random.Random(seed), [row["response"] for row in rows]
    pairs: Pairs = []
    for index in range(count):
        length = max(1, round(rng.lognormvariate(1.1, 0.55)))
        if index % 25 == 0:
            length = rng.randint(20, 60)
        answer = " ".join([*rng.choices(sentences, k=length), f"({index})"])
        pairs.append((rng.choice(rows)["prompt"], "" if index == 7 else answer))
    return pairs


def measure(model: Path, pairs: Pairs, folder: Path, seed: int) -> Iterator[tuple[str, int, float]]:
    """Score pairs in every way and yield (way, batches, largest difference of a logit from each pair scored alone)."""
    rng = random.Random(seed)
    packed, padded = (load_classifier(model, use_cpu=True, layout=layout) for layout in ("packed", "padded"))
    assert (packed.layout, padded.layout) == ("packed", "padded")
    alone = np.concatenate([_score(packed, [pair]) for pair in pairs])
    ways = {
        "packed, random batches": lambda: _score_in_batches(packed, pairs, rng),
        "padded, random batches": lambda: _score_in_batches(padded, pairs, rng),
        "two processes": lambda: _score_on_ranks(model, pairs, rng),
        "predict": lambda: _predict(model, pairs, folder / "predict", rng, processes=1),
        "predict on two processes": lambda: _predict(model, pairs, folder / "predict2", rng, processes=2),
        "server, 8 clients": lambda: asyncio.run(_serve(model, pairs, rng)),
    }
    for name, way in ways.items():
        logits, batches = way()
        yield name, batches, float(np.abs(logits - alone).max())


def _score(classifier: Classifier, pairs: Pairs, budget: int | None = None) -> np.ndarray:
    prompts, responses = zip(*pairs, strict=True)
    return score_pairs(classifier, prompts, responses, max_tokens=budget).logits


def _deal(count: int, rng: random.Random) -> list[list[int]]:
    """Return the indices in a random order, in batches of random sizes."""
    order, batches = rng.sample(range(count), count), []
    while order:
        size = rng.randint(1, _LARGEST_BATCH)
        batches.append(order[:size])
        order = order[size:]
    return batches


def _gather(parts: list[tuple[list[int], np.ndarray]], count: int) -> np.ndarray:
    logits = np.full((count, parts[0][1].shape[1]), np.nan)
    for members, found in parts:
        logits[members] = found
    return logits


def _score_in_batches(classifier: Classifier, pairs: Pairs, rng: random.Random) -> Found:
    batches = _deal(len(pairs), rng)
    budgets = [max(classifier.encoder.max_length, rng.choice(_BUDGETS)) for _ in batches]
    parts = [
        (members, _score(classifier, [pairs[i] for i in members], budget))
        for members, budget in zip(batches, budgets, strict=True)
    ]
    return Found(_gather(parts, len(pairs)), len(batches))


def _score_on_ranks(model: Path, pairs: Pairs, rng: random.Random) -> Found:
    batches = _deal(len(pairs), rng)
    cases = [("score_batches", {"model": str(model), "batches": [[pairs[i] for i in members] for members in batches]})]
    first, second = (results[0] for results in run_ranks(2, rank_cases.run_all, cases, timeout=900.0))
    assert all(np.array_equal(*both) for both in zip(first, second, strict=True))
    return Found(_gather(list(zip(batches, first, strict=True)), len(pairs)), len(batches))


def _logits_of(scores: dict[str, float]) -> np.ndarray:
    """Undo the sigmoid; outputs hold it in float64, where nothing of an fp32 logit is lost."""
    probabilities = np.array(list(scores.values()))
    return np.log(probabilities) - np.log1p(-probabilities)


def _predict(model: Path, pairs: Pairs, folder: Path, rng: random.Random, processes: int) -> Found:
    folder.mkdir()
    order = rng.sample(range(len(pairs)), len(pairs))
    rows = [{"prompt": pairs[i][0], "response": pairs[i][1]} for i in order]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    size = rng.randint(5, _LARGEST_BATCH)
    options = {
        "model_path": str(model), "input": (str(folder / "rows.jsonl"),), "output_dir": str(folder / "out"), "use_cpu": True,
        "block_size": size, "bootstrap_replicates": 0,
    }  # fmt: skip
    if processes == 1:
        predict(PredictConfig(**options), rank_cases.silent)
    else:
        run_ranks(processes, rank_cases.predict_rows, options, timeout=900.0)
    lines = (folder / "out" / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    found = np.stack([_logits_of(json.loads(line)["probabilities"]) for line in lines])
    return Found(_gather([(order, found)], len(pairs)), -(-len(pairs) // size))


async def _serve(model: Path, pairs: Pairs, rng: random.Random) -> Found:
    """Send single pairs and lists from eight clients at once."""
    batches = [batch[start : start + 8] for batch in _deal(len(pairs), rng) for start in range(0, len(batch), 8)]
    waiting, parts = iter(batches), []
    flags = ["--max_queue_tokens", "10000000", "--max_text_length", "1000000", "--log_requests", "False"]
    flags += ["--forwards_at_once", "2"]

    async def ask(client: httpx.AsyncClient) -> None:
        for members in waiting:
            inputs = [{"question": pairs[i][0], "answer": pairs[i][1]} for i in members]
            answer = await client.post("/v1/moderations", json={"input": inputs})
            answer.raise_for_status()
            found = [_logits_of(result["category_scores"]) for result in answer.json()["results"]]
            parts.append((members, np.stack(found)))

    with start_server(model, *flags) as (_, address, _):
        async with httpx.AsyncClient(base_url=address, timeout=300) as client:
            await asyncio.gather(*(ask(client) for _ in range(8)))
    return Found(_gather(parts, len(pairs)), len(batches))
