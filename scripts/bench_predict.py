#!/usr/bin/env python
"""Scoring speed beside what a user would write instead; same model, texts, type; probabilities must agree.

    python scripts/bench_predict.py [--rows FILE] [--count 256] [--rounds 2]

Contenders, in turn in one process, tokenising included: `ours`, score_pairs; `padded`, the whole set padded to its longest text
and run in batches of 16, as the original predict does; `pipeline`, transformers' text-classification pipeline in batches of 16,
fed in order of length. The limit is one pass of every real token through the linear layers at the speed of this machine's
matrix products; ours does not run all of them, so the speed of those that it runs stands beside it.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore", category=FutureWarning)

import numpy as np
import torch
import transformers
from flags import add_common_flags, whole
from rivals import (
    build_small_llama,
    count_layer_weights,
    count_products,
    list_shapes,
    load_rows,
    measure_matrix_rate,
    synchronize,
)

from qlora_moderation.adapter import replace_head, set_label_names
from qlora_moderation.backbone import quiet
from qlora_moderation.classifier import load_classifier
from qlora_moderation.scoring import score_pairs
from qlora_moderation.stock_tokenizer import prepare_for_stock_use
from qlora_moderation.taxonomy import Taxonomy
from qlora_moderation.tokenization import TextEncoder, choose_pad_token


def build_model(place, backbone, max_length):
    """Write a merged classifier with a random head, as the merge does; its tokenizer serves stock pipelines."""
    taxonomy = Taxonomy()
    with quiet():
        model = transformers.AutoModelForSequenceClassification.from_pretrained(backbone, dtype="auto")
        tokenizer = transformers.AutoTokenizer.from_pretrained(backbone)
    tokenizer.pad_token = choose_pad_token(tokenizer)
    prepare_for_stock_use(tokenizer, TextEncoder(tokenizer, taxonomy, max_length))
    replace_head(model, taxonomy.categories, 0)
    set_label_names(model.config, taxonomy.categories)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return str(place)


def score_padded(model, tokenizer, texts, longest):
    """Pad all texts to the longest of the set and run batches of 16, as the original predict does."""
    rows = tokenizer(texts, padding="max_length", max_length=longest, truncation=True, return_tensors="pt")
    parts = []
    with torch.inference_mode():
        for start in range(0, len(texts), 16):
            batch = {name: rows[name][start : start + 16].to(model.device) for name in ("input_ids", "attention_mask")}
            parts.append(model(**batch).logits.float().sigmoid().cpu())
    return torch.cat(parts).numpy()


def score_with_pipeline(pipe, texts, lengths, names):
    """Run the stock pipeline over the texts, longest first."""
    order = sorted(range(len(texts)), key=lambda i: -lengths[i])
    found = np.zeros((len(texts), len(names)))
    answers = pipe([texts[i] for i in order], batch_size=16, top_k=None, function_to_apply="sigmoid")
    for index, answer in zip(order, answers, strict=True):
        scores = {entry["label"]: entry["score"] for entry in answer}
        found[index] = [scores[name] for name in names]
    return found


def main():
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common_flags(parser)
    parser.add_argument("--count", type=whole(), default=256)
    parser.add_argument(
        "--max_length", type=whole(64), default=1024, help="no text is cut: all contenders read the same"
    )
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    with tempfile.TemporaryDirectory() as place:
        rows = load_rows(arguments.rows, arguments.count)
        backbone = arguments.backbone
        if backbone is None:
            backbone = build_small_llama(Path(place) / "backbone", rows, arguments.layers, arguments.width)
        rows = rows[: arguments.count]
        path = build_model(Path(place) / "model", backbone, arguments.max_length)
        classifier = load_classifier(path, max_length=arguments.max_length)
        prompts, responses = [row["prompt"] for row in rows], [row["response"] for row in rows]
        lengths = classifier.encoder.count_tokens(prompts, responses)
        texts = [Taxonomy().render(*pair) for pair in zip(prompts, responses, strict=True)]
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        with quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(path)
            stock = transformers.AutoModelForSequenceClassification.from_pretrained(path, dtype=dtype).to(device).eval()
        pipe = transformers.pipeline("text-classification", model=stock, tokenizer=tokenizer, device=device)
        names = Taxonomy().categories
        jobs = {
            "ours": lambda: score_pairs(classifier, prompts, responses).probabilities,
            "padded": lambda: score_padded(stock, tokenizer, texts, max(lengths)),
            "pipeline": lambda: score_with_pipeline(pipe, texts, lengths, names),
        }
        tokens, found, seconds = sum(lengths), {}, {job: [] for job in jobs}
        weights, rates = count_layer_weights(classifier.model), []
        score_pairs(classifier, prompts[:16], responses[:16])
        for index in range(arguments.rounds):
            for job in list(jobs) if index % 2 == 0 else list(jobs)[::-1]:
                rates.append(measure_matrix_rate(list_shapes(classifier.model), device))
                synchronize(device)
                started = time.perf_counter()
                found[job] = jobs[job]()
                synchronize(device)
                seconds[job].append(time.perf_counter() - started)
    limit = statistics.median(rates) / (2 * weights)
    run = count_products(jobs["ours"]) / (2 * weights * tokens)
    order = sorted(lengths, reverse=True)
    sixteen = [order[i : i + 16] for i in range(0, len(order), 16)]
    waste = {
        "ours": 1.0,
        "padded": max(lengths) * len(lengths) / tokens,
        "pipeline": sum(len(batch) * batch[0] for batch in sixteen) / tokens,
    }
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(
        f"{name}, {versions}; {len(texts)} pairs, {tokens / len(texts):.0f} tokens on average, longest {max(lengths)}\n"
    )
    print(
        "| | pairs/s | real tokens/s | ours is faster by | padded / real | share of product limit | speed of the products it "
        "runs | probabilities differ by |"
    )
    print("|---|---|---|---|---|---|---|---|")
    ours, figures = statistics.median(seconds["ours"]), {}
    for job, times in seconds.items():
        spent = statistics.median(times)
        far = float(np.abs(found[job] - found["ours"]).max())
        share = tokens / spent / limit
        figures[job] = {
            "seconds": spent,
            "tokens_per_second": tokens / spent,
            "padded_per_real": waste[job],
            "differ": far,
        }
        print(
            f"| {job} | {len(texts) / spent:.2f} | {tokens / spent:,.0f} | {spent / ours:.2f} | {waste[job]:.2f} | "
            f"{share:.0%} | {share * (run if job == 'ours' else waste[job]):.0%} | {far:.1e} |"
        )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
