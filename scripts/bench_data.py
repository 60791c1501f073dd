#!/usr/bin/env python
"""What a start pays for its data, on made-up rows of BeaverTails-330k's size, and how it grows.

    python scripts/bench_data.py [--rows 333963] [--folder DIR]

Makes JSONL rows in BeaverTails' layout (about 3.35 annotations a pair, 6 answers a prompt, rendered lengths log-normal with a
mean of 105 tokens and a 95th percentile of 205) and a byte-pair tokenizer of 32,000 tokens in a temporary folder, then
starts twice, each time in a fresh process: without a cache, and from the cache that the first start left. Peak RSS is the
high-water mark of the process up to the end of the stage.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import numpy as np
from flags import existing_folder, whole
from high_water import peak_rss

ROWS_OF_330K, PAIRS_OF_330K = 333_963, 99_734
ANSWERS_A_PROMPT = 6
# of a log-normal; the scatter of made-up words turns them into a mean of 105 and 205 for the 95th percentile
MEAN_TOKENS, SPREAD = 103, 0.462
SEED, PAIRS_PER_STEP, TOKEN_BUDGET = 0, 128, 16384


def make_words(rng, count=20_000):
    """Return made-up words, the frequent ones short."""
    syllables = [c + v + e for c in "bcdfghjklmnprstvw" for v in "aeiou" for e in ("", "n", "r", "s", "t")]
    return ["".join(rng.choice(syllables, 1 + int(rng.integers(1 + index**0.2)))) for index in range(count)]


def make_texts(rng, words, lengths):
    """Return a text for each number of words; words are drawn by Zipf's law."""
    share = 1 / np.arange(1.0, 1 + len(words))
    drawn = rng.choice(len(words), size=int(lengths.sum()), p=share / share.sum()).tolist()
    ends = lengths.cumsum()
    return [
        " ".join(words[i] for i in drawn[end - n : end]).capitalize() + "."
        for n, end in zip(lengths, ends, strict=True)
    ]


def make_data(folder, rows):
    """Write `rows.jsonl` and `tokenizer/`; returns the numbers of rows, pairs and bytes."""
    from qlora_moderation.embedded import build_tokenizer
    from qlora_moderation.taxonomy import Taxonomy

    rng, taxonomy = np.random.default_rng(SEED), Taxonomy()
    pairs = max(2, round(rows * PAIRS_OF_330K / ROWS_OF_330K))
    words = make_words(rng)
    sample = make_texts(rng, words, np.full(4000, 60))
    tokenizer = build_tokenizer([taxonomy.render(text[:80], text) for text in sample], vocab_size=32_000)
    tokenizer.save_pretrained(folder / "tokenizer")
    per_word = sum(map(len, tokenizer(sample[:200])["input_ids"])) / (200 * 60)
    prompts = make_texts(rng, words, rng.integers(5, 18, 1 + pairs // ANSWERS_A_PROMPT))
    of_pair = rng.integers(len(prompts), size=pairs)
    fixed = len(tokenizer(taxonomy.render("A.", "A."))["input_ids"]) + 1
    question = np.array([prompt.count(" ") + 1 for prompt in prompts])[of_pair]
    wanted = np.exp(rng.normal(np.log(MEAN_TOKENS) - SPREAD**2 / 2, SPREAD, pairs))
    lengths = np.maximum(1, np.round((wanted - fixed) / per_word).astype(int) - question)
    categories = taxonomy.categories
    votes = [json.dumps({name: name == ticked for name in categories}) for ticked in (None, *categories)]
    # every pair has one annotation, the others are dealt out; the rows of a pair stand apart
    order = rng.permutation(np.concatenate([np.arange(pairs), rng.integers(pairs, size=max(0, rows - pairs))]))
    ticked = np.where(rng.random(len(order)) < 0.55, rng.integers(1, len(votes), len(order)), 0)
    texts = []
    for start in range(0, pairs, 50_000):
        texts += map(json.dumps, make_texts(rng, words, lengths[start : start + 50_000]))
    prompts = [json.dumps(prompt) for prompt in prompts]
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for pair, vote in zip(order.tolist(), ticked.tolist(), strict=True):
            file.write(
                f'{{"prompt": {prompts[of_pair[pair]]}, "response": {texts[pair]}, "category": {votes[vote]}, '
                f'"is_safe": {json.dumps(not vote)}}}\n'
            )
    return {"rows": len(order), "pairs": pairs, "bytes": (folder / "rows.jsonl").stat().st_size}


class Stopwatch:
    """Seconds and peak RSS of stages, in their order."""

    def __init__(self):
        self.stages = {}

    def time(self, name, function, *arguments, **more):
        """Call a function and note what it took, where it did anything."""
        started = time.perf_counter()
        try:
            return function(*arguments, **more)
        finally:
            seconds = time.perf_counter() - started + self.stages.get(name, (0, 0))[0]
            self.stages[name] = (seconds, peak_rss())

    def watch(self, owner, attribute, name):
        """Let every call of `owner.attribute` count as the stage `name`."""
        function = getattr(owner, attribute)
        setattr(owner, attribute, lambda *arguments, **more: self.time(name, function, *arguments, **more))


def start(folder):
    """Do what a run does with its data before the first step; returns stages, and facts by which two starts are compared."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    watch = Stopwatch()
    watch.time("imports (torch, transformers)", __import__, "qlora_moderation.plan")
    from qlora_moderation import plan, token_cache
    from qlora_moderation.batching import count_steps, epoch_order, micro_batches, step_batch
    from qlora_moderation.classifier import open_tokenizer
    from qlora_moderation.config import TrainConfig
    from qlora_moderation.leakage import hash_training
    from qlora_moderation.taxonomy import Taxonomy

    config = TrainConfig(
        model_name_or_path=str(folder / "tokenizer"),
        train_data_name_or_path=str(folder / "rows.jsonl"),
        output_dir="unused",
        cache_dir=str(folder / "cache"),
    )
    taxonomy = Taxonomy()
    _, encoder = watch.time(
        "open the tokenizer", open_tokenizer, config.model_name_or_path, None, taxonomy, config.max_length
    )
    watch.watch(token_cache.TokenCache, "find_key", "cache: hash the file")
    watch.watch(token_cache.TokenCache, "read", "cache: read, check")
    watch.watch(token_cache, "aggregate_rows", "read, validate, aggregate")
    watch.watch(token_cache.TextEncoder, "encode_all", "tokenise")
    watch.watch(token_cache.TokenCache, "write", "cache: write")
    watch.watch(plan, "_hold_out", "split by prompt")
    watch.watch(plan, "compute_audit", "audit")
    log = []
    material = plan.load_material(config, SimpleNamespace(taxonomy=taxonomy, encoder=encoder), log.append)
    size = len(material.ids)

    def plan_epoch(ranks):
        epoch_order.cache_clear()
        cut = 0
        for step in range(count_steps(size, PAIRS_PER_STEP)):
            members = step_batch(size, PAIRS_PER_STEP, config.seed, step)
            lengths = [len(material.ids[i]) for i in members]
            cut += len(micro_batches(lengths, TOKEN_BUDGET, "packed", ranks)[0])
        return cut

    cut = [watch.time(f"plan an epoch, {ranks} rank{'s' * (ranks > 1)}", plan_epoch, ranks) for ranks in (1, 8)]
    fingerprint = watch.time("fingerprint of the data", material.training.fingerprint)
    watch.time(
        "hashes of prompts and pairs",
        hash_training,
        material.training.prompts,
        material.training.responses,
        material.validation.prompts,
    )
    same = [fingerprint, material.validation.fingerprint(), material.audit, log, cut]
    tokens = material.audit["tokens"]
    return (
        watch.stages,
        same,
        {**tokens, "total": int(material.ids.lengths.sum()), "annotations": material.audit["rows"]},
    )


def run_fresh(function, *arguments):
    """Call a function in a fresh process and return what it returns."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def print_table(title, stages, rows):
    """Print one start as Markdown; the sum leaves the imports out, which do not depend on the data."""
    print(f"\n{title}\n\n| stage | seconds | rows/s | peak RSS so far, GB |\n|---|---|---|---|")
    for name, (seconds, peak) in stages.items():
        if seconds >= 0.005:
            speed = "" if name.startswith(("imports", "open")) else f"{rows / seconds:,.0f}"
            print(f"| {name} | {seconds:.2f} | {speed} | {peak / 1e9:.2f} |")
    total = sum(seconds for name, (seconds, _) in stages.items() if not name.startswith("imports"))
    print(
        f"| **all but the imports** | {total:.2f} | {rows / total:,.0f} | {max(p for _, p in stages.values()) / 1e9:.2f} |"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=whole(100), default=ROWS_OF_330K)
    parser.add_argument(
        "--folder", type=existing_folder, help="where the temporary folder goes, if not where the system puts them"
    )
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder, prefix="bench-data-") as name:
        folder = Path(name)
        made = run_fresh(make_data, folder, given.rows)
        first, of_first, tokens = run_fresh(start, folder)
        cached, of_cached, _ = run_fresh(start, folder)
        size = sum(path.stat().st_size for path in (folder / "cache").iterdir())
    print(
        f"{made['rows']:,} rows, {made['pairs']:,} pairs, {made['bytes'] / 1e6:,.0f} MB of JSONL; {tokens['total']:,} tokens, "
        f"a pair {tokens['mean']:.0f}, 95 % below {tokens['p95']:.0f}, longest {tokens['longest']}; cache "
        f"{size / 1e6:,.0f} MB; {os.cpu_count()} cores"
    )
    print_table("First run", first, made["rows"])
    print_table("From the cache", cached, made["rows"])
    if json.dumps(of_first) != json.dumps(of_cached):
        sys.exit("error: the two starts differ in data, log or plan")


if __name__ == "__main__":
    main()
