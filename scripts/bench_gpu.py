#!/usr/bin/env python
"""Checks and measures the CUDA path on one GPU: LLaMA-7B's shape with random weights, built on the spot.

    ./scripts/bench_gpu.sh [--shape 7b | small] [--use_cpu]

Checks first: packed = padded, training under NF4, the guard of sharded NF4 bytes, fsdp on one rank = none, a resumed run = an
unbroken one. Then tokens a second and peak memory of lora, qlora and scoring, each beside the share of the machine's own
matrix-product rate. `--shape small --use_cpu` tries the script itself, without a GPU.
"""

import argparse
import dataclasses
import itertools
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore", category=FutureWarning)

import numpy as np
import torch

from qlora_moderation.adapter import find_head
from qlora_moderation.assembly import build_classifier
from qlora_moderation.classifier import load_classifier
from qlora_moderation.config import TrainConfig
from qlora_moderation.distributed import current_device, processes
from qlora_moderation.embedded import build_tokenizer, render_texts
from qlora_moderation.interruption import StopSignals
from qlora_moderation.sample import build_sample
from qlora_moderation.scoring import score_pairs
from qlora_moderation.taxonomy import Taxonomy
from qlora_moderation.train import train

SHAPES = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "small": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4},
}


def build_backbone(place, shape, texts, device):
    """Write a LLaMA with random weights in bfloat16 and a small tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = build_tokenizer(texts, vocab_size=2000)
    config = LlamaConfig(vocab_size=32000, max_position_embeddings=2048, pad_token_id=None, **SHAPES[shape])
    torch.manual_seed(0)
    kept = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    with device:
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(kept)
    model.save_pretrained(place, max_shard_size="2GB")
    tokenizer.save_pretrained(place)
    weights = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name)
    del model
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return str(place), weights


def build_rows(place, pairs):
    """Write rows whose lengths are like BeaverTails': about 105 tokens on average, one in twenty above 200."""
    rng, rows = random.Random(0), []
    sentences = [row["response"] for row in build_sample(seed=0)["train"]]
    for index in range(pairs):
        count = max(1, round(rng.lognormvariate(1.1, 0.55)))
        row = dict(build_sample(seed=0)["train"][index % 1000])
        row["response"] = " ".join([*rng.choices(sentences, k=count), f"({index})"])
        rows.append(row)
    place.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(place)


def measure_matrix_rate(device):
    """Return FLOP/s of a square matrix product in the compute type, at the size of LLaMA-7B's layers."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    rates = []
    for _ in range(6):
        synchronize(device)
        started = time.perf_counter()
        for _ in range(10):
            a @ b
        synchronize(device)
        rates.append(10 * 2 * size**3 / (time.perf_counter() - started))
    return max(rates)


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_gib(device):
    return torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan")


def losses_of(run):
    records = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record], records


def show(name, passed, detail):
    print(f"check  {name}: {'passed' if passed else 'FAILED'} ({detail})", flush=True)
    return passed


def check_packing(config, device):
    """Compare the logits of packed and padded micro-batches."""
    texts = build_sample(seed=0)["train"][:48]
    prompts, responses = [row["prompt"] for row in texts], [row["response"] for row in texts]
    logits = []
    for layout in ("packed", "padded"):
        classifier = build_classifier(dataclasses.replace(config, layout=layout), Taxonomy(), device, lambda line: None)
        head = find_head(classifier.model.classifier)[2]
        with torch.no_grad():
            head.weight.normal_(0, 0.02, generator=torch.Generator(head.weight.device).manual_seed(0))
        logits.append(score_pairs(classifier, prompts, responses).logits)
        alone = score_pairs(classifier, prompts[:1], responses[:1]).logits[0]
        logits.append(np.vstack([alone]))
        del classifier, head
    far = float(np.abs(logits[0] - logits[2]).max())
    neighbours = max(float(np.abs(logits[i][0] - logits[i + 1][0]).max()) for i in (0, 2))
    allowed = 1e-4 if config.dtype == "float32" or device.type == "cpu" else 0.05 * float(logits[2].std() + 1)
    return show(
        "packed = padded", far <= allowed, f"logits differ by {far:.1e}, alone or with neighbours by {neighbours:.1e}"
    )


def check_sharding(config, root):
    """Compare the losses of fsdp on one rank with those of no sharding; for qlora the NF4 guard has its say first."""
    found, said = {}, []
    for kind in ("none", "fsdp"):
        run = root / f"sharding-{config.method}-{kind}"
        train(dataclasses.replace(config, sharding=kind, output_dir=str(run), max_steps=5), said.append)
        found[kind] = losses_of(run)[0]
        shutil.rmtree(run)
    far = max(abs(a - b) / abs(a) for a, b in zip(*found.values(), strict=True))
    guard = [line for line in said if line.startswith("NF4 guard")]
    passed = far <= 1e-3 and (config.method != "qlora" or bool(guard))
    return show(f"fsdp on one rank = none, {config.method}", passed, f"losses differ by {far:.1e}; {' '.join(guard)}")


def check_resume(config, root):
    """Stop a run after three steps and let it go on; compare with an unbroken one."""
    unbroken = dataclasses.replace(config, output_dir=str(root / "unbroken"), max_steps=6)
    stopped = dataclasses.replace(config, output_dir=str(root / "stopped"), max_steps=6)
    train(unbroken, lambda line: None)
    agreed, asked = StopSignals.agreed, []
    StopSignals.agreed = lambda self: asked.append(1) or (15 if len(asked) == 3 else 0)
    try:
        train(stopped, lambda line: None)
    except Exception as stop:
        reason = str(stop)
    else:
        reason = "not stopped"
    StopSignals.agreed = agreed
    train(stopped, lambda line: None)
    one, other = (losses_of(run.output_dir)[0] for run in (unbroken, stopped))
    far = max(abs(a - b) / abs(a) for a, b in zip(one, other, strict=True))
    return show(f"resumed = unbroken, {config.method}", far <= 1e-3, f"{reason}; losses differ by {far:.1e}")


def measure_training(config, root, device, weights, rate):
    """Print tokens a second, share of the matrix-product floor, and peak memory."""
    run = root / "measured"
    shutil.rmtree(run, ignore_errors=True)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    train(dataclasses.replace(config, output_dir=str(run), max_steps=12), lambda line: None)
    records = losses_of(run)[1]
    speeds = [
        record["tokens"] / (record["elapsed_seconds"] - before["elapsed_seconds"])
        for before, record in itertools.pairwise(records[2:])
    ]
    speed = statistics.median(speeds)
    floor = rate / (weights * (6 if config.gradient_checkpointing else 4))
    name = f"{config.method}, {config.sharding}, {config.max_tokens_per_micro_batch} tokens a micro-batch"
    name += ", recomputing" if config.gradient_checkpointing else ""
    print(
        f"train  {name}: {speed:,.0f} tokens/s, {speed / floor:.0%} of the floor {floor:,.0f}, peak {peak_gib(device):.1f} GiB"
    )
    sys.stdout.flush()
    return run


def measure_scoring(adapter, rows, device, weights, rate, use_cpu):
    """Print tokens a second of scoring with an adapter."""
    classifier = load_classifier(adapter, use_cpu=use_cpu)
    lines = [json.loads(line) for line in Path(rows).read_text().splitlines()]
    prompts, responses = [line["prompt"] for line in lines], [line["response"] for line in lines]
    tokens = sum(classifier.encoder.count_tokens(prompts, responses))
    score_pairs(classifier, prompts[:256], responses[:256])
    synchronize(device)
    started = time.perf_counter()
    score_pairs(classifier, prompts, responses)
    speed, floor = tokens / (time.perf_counter() - started), rate / (2 * weights)
    print(
        f"score  {classifier.metadata.method} adapter: {speed:,.0f} tokens/s, {speed / floor:.0%} of the floor {floor:,.0f}"
    )


def main():
    """Run all checks, then all measurements; exit code 1 where a check failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="7b")
    parser.add_argument("--use_cpu", action="store_true", help="only to try the script")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and not arguments.use_cpu:
        print("error: no CUDA GPU here; to try the script give --use_cpu --shape small", file=sys.stderr)
        return 2
    import transformers

    device = current_device(arguments.use_cpu)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    rate = measure_matrix_rate(device)
    print(
        f"{name}, torch {torch.__version__}, transformers {transformers.__version__}: {rate / 1e12:.1f} TFLOP/s in products"
    )
    passed = True
    with tempfile.TemporaryDirectory() as place, processes(arguments.use_cpu, alone=True):
        root = Path(place)
        texts = render_texts(build_sample(seed=0)["train"])
        backbone, weights = build_backbone(root / "backbone", arguments.shape, texts, device)
        rows = build_rows(root / "rows.jsonl", 4096 if arguments.shape == "7b" else 300)
        pairs = 128 if arguments.shape == "7b" else 16
        base = TrainConfig(
            model_name_or_path=backbone,
            train_data_name_or_path=rows,
            output_dir=str(root / "run"),
            eval_strategy="no",
            use_cpu=arguments.use_cpu,
            per_device_train_batch_size=pairs,
            max_tokens_per_micro_batch=4096,
            optim="adamw_torch_fused",
        )
        passed &= check_packing(base, device)
        for method in ("lora", "qlora"):
            config = dataclasses.replace(base, method=method)
            passed &= check_sharding(config, root)
        passed &= check_resume(dataclasses.replace(base, method="qlora"), root)
        for method in ("lora", "qlora"):
            for kind, budget, recompute in (
                ("none", 4096, False),
                ("none", 16384, False),
                ("none", 16384, True),
                ("fsdp", 16384, False),
                ("none", 1024, True),
            ):
                config = dataclasses.replace(
                    base,
                    method=method,
                    sharding=kind,
                    max_tokens_per_micro_batch=budget,
                    gradient_checkpointing=recompute,
                )
                try:
                    run = measure_training(config, root, device, weights, rate)
                except torch.OutOfMemoryError:
                    print(f"train  {method}, {kind}, {budget} tokens a micro-batch: out of memory")
            measure_scoring(run / "adapter", rows, device, weights, rate, arguments.use_cpu)
    print("bench_gpu: " + ("all checks passed" if passed else "a check FAILED"))
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
