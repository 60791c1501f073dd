#!/usr/bin/env python
"""Checks and measures the CUDA path on one GPU: LLaMA-7B's shape with random weights, built on the spot.

    ./scripts/bench_gpu.sh [--shape 7b | small] [--parts checks lora qlora rivals] [--backbone DIR] [--use_cpu]

Checks first: packed = padded, training under NF4, the guard of sharded NF4 bytes, fsdp on one rank = none (one rank sends
nothing), a resumed run = an unbroken one. Then, for lora and qlora, tokens a second of five settings beside the share of the
machine's own matrix-product rate, the highest memory beside the estimate, the operations that a step spends its time in, and
scoring; last the rivals of `bench_train.py` and `bench_predict.py`. What is done stands in `results.json` and `results.md`
under `--output` at any time, and `--parts` adds to it. `--backbone` keeps the backbone there for the next part.
`--shape small --use_cpu` tries the script itself, without a GPU.
"""

import argparse
import contextlib
import dataclasses
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore", category=FutureWarning)

import numpy as np
import torch
from rivals import load_rows, synchronize, write_rows

from qlora_moderation.adapter import find_head
from qlora_moderation.assembly import build_classifier, estimate_memory
from qlora_moderation.config import TrainConfig
from qlora_moderation.distributed import current_device, processes
from qlora_moderation.embedded import build_tokenizer, render_texts
from qlora_moderation.errors import brief
from qlora_moderation.interruption import StopSignals
from qlora_moderation.loop import Loop
from qlora_moderation.plan import build_plan, load_material
from qlora_moderation.recomputation import recompute_layers
from qlora_moderation.sample import build_sample
from qlora_moderation.scoring import score_pairs
from qlora_moderation.taxonomy import Taxonomy
from qlora_moderation.train import train

PARTS = ("checks", "lora", "qlora", "rivals")
SHAPES = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "small": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4},
}


def build_backbone(place, shape, texts, device):
    """Write a LLaMA with random weights and a small tokenizer, unless it is there; returns place and layers' weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=32000, max_position_embeddings=2048, pad_token_id=None, **SHAPES[shape])
    with torch.device("meta"):
        drawn = LlamaForCausalLM(config)
    weights = sum(p.numel() for name, p in drawn.named_parameters() if p.ndim == 2 and "layers" in name)
    if (place / "tokenizer.json").exists():  # written last
        return str(place), weights
    torch.manual_seed(0)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    with device:
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(usual)
    model.save_pretrained(place, max_shard_size="2GB")
    build_tokenizer(texts, vocab_size=2000).save_pretrained(place)
    del model
    free_memory(device)
    return str(place), weights


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


def free_memory(device):
    """Let go of what nothing uses: fused layers refer to themselves, so a classifier ends with a collection."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib(device):
    return torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan")


def losses_of(run):
    records = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record], records


def show(name, passed, detail):
    """Return one row of the table of checks."""
    return {"check": name, "passed": bool(passed), "detail": detail}


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
        free_memory(device)
    far = float(np.abs(logits[0] - logits[2]).max())
    neighbours = max(float(np.abs(logits[i][0] - logits[i + 1][0]).max()) for i in (0, 2))
    allowed = 1e-4 if config.dtype == "float32" or device.type == "cpu" else 0.05 * float(logits[2].std() + 1)
    return show(
        "packed = padded", far <= allowed, f"logits differ by {far:.1e}, alone or with neighbours by {neighbours:.1e}"
    )


def check_sharding(config, root):
    """Compare the losses of fsdp on one rank with those of no sharding; for qlora the NF4 guard has its say first.

    Kernels whose sums come in any order make two equal runs differ, so a second one without sharding says by how much.
    """
    found, said = {}, []
    for kind in ("none", "none again", "fsdp"):
        run = root / f"sharding-{config.method}-{kind.replace(' ', '-')}"
        changed = dataclasses.replace(config, sharding=kind.split()[0], output_dir=str(run), max_steps=5)
        train(changed, said.append)
        found[kind] = losses_of(run)[0]
        shutil.rmtree(run)
        free_memory(current_device(config.use_cpu))
    far, spread = (compute_distance(found["none"], found[kind]) for kind in ("fsdp", "none again"))
    guard = [line for line in said if line.startswith("NF4 guard")]
    passed = far <= max(1e-3, 3 * spread) and (config.method != "qlora" or bool(guard))
    detail = f"losses differ by {far:.1e}, those of two equal runs by {spread:.1e}; {' '.join(guard)}"
    return show(f"fsdp on one rank = none, {config.method}", passed, detail)


def compute_distance(one, other):
    """Return the largest relative difference of two lists of losses."""
    return max(abs(a - b) / abs(a) for a, b in zip(one, other, strict=True))


def check_resume(config, root):
    """Stop a run after three steps and let it go on; compare with an unbroken one."""
    unbroken = dataclasses.replace(config, output_dir=str(root / "unbroken"), max_steps=6)
    stopped = dataclasses.replace(config, output_dir=str(root / "stopped"), max_steps=6)
    train(unbroken, lambda line: None)
    free_memory(current_device(config.use_cpu))
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
    # a lost optimiser or another order of the pairs shows in the first digits; kernels differ in the fourth
    far, allowed = compute_distance(one, other), 1e-2 if torch.cuda.is_available() else 1e-6
    return show(f"resumed = unbroken, {config.method}", far <= allowed, f"{reason}; losses differ by {far:.1e}")


def measure_training(classifier, material, config, weights, rate):
    """Return one row: tokens a second, share of the limit, highest memory and its estimate."""
    device = classifier.model.device
    network = classifier.model.network
    network.gradient_checkpointing_disable()
    recompute_layers(network, config.recomputation)
    row = {"method": config.method, "tokens": config.max_tokens_per_micro_batch, "checkpointing": config.recomputation}
    free_memory(device)
    held = []  # tokens of each micro-batch as it is run, common prefixes once
    watch = classifier.model.register_forward_pre_hook(lambda _, inputs: held.append(inputs[0].input_ids.numel()))
    try:
        loop = Loop(config, classifier, material, build_plan(config, len(material.training), device), print)
        classifier.model.train()
        seconds, learnt = [], 0
        for step in range(1, config.max_steps + 1):
            synchronize(device)
            started = time.perf_counter()
            record = loop.take_step(step)
            synchronize(device)
            if step > 2:
                seconds.append(time.perf_counter() - started)
                learnt += record["tokens"]
        row["losses_finite"] = bool(torch.as_tensor(record["loss"]).isfinite())
    except torch.OutOfMemoryError:
        return {**row, "tokens_per_second": None}
    finally:
        watch.remove()
    speed = learnt / sum(seconds)
    share = {"none": 4, "selective": 5, "all": 6}[config.recomputation]
    peak = peak_gib(device)
    foreseen = estimate_memory(config, Taxonomy(), device, tokens=max(held)).total / 2**30
    return {
        **row,
        "largest_row": max(held),
        "tokens_per_second": speed,
        "share_of_two_passes": speed * 4 * weights / rate,
        "share_with_recomputation": speed * share * weights / rate,
        "peak_gib": peak,
        "estimate_gib": foreseen,
        "estimate_per_peak": foreseen / peak,
    }


def profile_step(classifier, material, config, count=15):
    """Return the operations that one step spends most of its time in: name, milliseconds, calls."""
    device = classifier.model.device
    loop = Loop(config, classifier, material, build_plan(config, len(material.training), device), print)
    classifier.model.train()
    loop.take_step(1)
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    with torch.profiler.profile(activities=kinds) as record:
        loop.take_step(2)
        synchronize(device)
    spent = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    known = record.key_averages()
    if device.type == "cuda":  # an operation counts the time of its kernels once more
        known = [event for event in known if event.device_type == torch.autograd.DeviceType.CUDA]
    events = sorted(known, key=lambda event: -getattr(event, spent))
    whole = sum(getattr(event, spent) for event in events) or 1
    return [
        {"name": e.key[:70], "ms": getattr(e, spent) / 1e3, "share": getattr(e, spent) / whole, "calls": e.count}
        for e in events[:count]
    ]


def measure_scoring(classifier, rows, weights, rate):
    """Return one row: tokens a second of scoring with the adapter as it is, and seconds for a million pairs."""
    device = classifier.model.device
    lines = [json.loads(line) for line in Path(rows).read_text().splitlines()]
    prompts, responses = [line["prompt"] for line in lines], [line["response"] for line in lines]
    tokens = sum(classifier.encoder.count_tokens(prompts, responses))
    score_pairs(classifier, prompts[:256], responses[:256])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    synchronize(device)
    started = time.perf_counter()
    score_pairs(classifier, prompts, responses)
    spent = time.perf_counter() - started
    return {
        "method": classifier.metadata.method,
        "tokens_per_second": tokens / spent,
        "share_of_one_pass": tokens / spent * 2 * weights / rate,
        "seconds_per_million_pairs": spent / len(lines) * 1e6,
        "peak_gib": peak_gib(device),
    }


def run_rivals(root, backbone, rows, shape):
    """Run the benchmarks beside stock tools in processes of their own; yields name, output and figures of each."""
    small = ["--layers", "2", "--width", "64"] if shape == "small" else ["--backbone", backbone]
    pairs, count = ("16", "64") if shape == "small" else ("128", "1024")
    training = ["--pairs", pairs, "--steps", "4", "--contenders", "ours", "dynamic", "grouped", "--methods"]
    jobs = [
        ("bench_train", [*training, "lora"]),
        ("bench_predict", ["--count", count]),
        ("bench_train", [*training, "qlora"]),
    ]
    for name, more in jobs:
        figures = root / f"{name}.json"
        figures.unlink(missing_ok=True)
        command = [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *small, *more, "--rounds", "1", "--rows", rows]
        done = subprocess.run([*command, "--json", str(figures)], capture_output=True, text=True, check=False)
        print(done.stdout, done.stderr[-2000:] if done.returncode else "", flush=True)
        known = json.loads(figures.read_text()) if figures.exists() else None
        yield f"{name} {more[-1]}", {"printed": done.stdout, "figures": known}


def as_table(rows):
    """Return rows of the same keys as a Markdown table."""
    names = list(max(rows, key=len))

    def show(value):
        if not isinstance(value, float):
            return str(value)
        return f"{value:,.3g}" if value < 100 else f"{value:,.0f}"

    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return "\n".join([*lines, *("| " + " | ".join(show(row.get(name, "")) for name in names) + " |" for row in rows)])


def write_results(output, results):
    """Write all that is known so far as JSON and as Markdown."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    parts = [f"{results['hardware']}; {results['versions']}; {results['tflops']:.1f} TFLOP/s in matrix products"]
    for name in ("checks", "training", "scoring", *sorted(key for key in results if key.startswith("profile"))):
        if results.get(name):
            parts.append(f"## {name}\n\n{as_table(results[name])}")
    parts += [run["printed"] for run in results.get("rivals", {}).values()]
    (output / "results.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def main():
    """Run all checks, then all measurements; exit code 1 where a check failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="7b")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--backbone", help="folder where the backbone is kept; made where it is missing")
    parser.add_argument("--use_cpu", action="store_true", help="only to try the script")
    parser.add_argument("--output", default=os.environ.get("OUT", "output/bench_gpu"), help="folder of the results")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and not arguments.use_cpu:
        print("error: no CUDA GPU here; to try the script give --use_cpu --shape small", file=sys.stderr)
        return 2
    import transformers

    device = current_device(arguments.use_cpu)
    rate, started = measure_matrix_rate(device), time.monotonic()
    results = {
        "hardware": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "tflops": rate / 1e12,
        "checks": [],
        "training": [],
        "scoring": [],
    }
    output = Path(arguments.output)
    with contextlib.suppress(OSError, ValueError):  # an earlier part of the same measurement
        earlier = json.loads((output / "results.json").read_text())
        if arguments.parts != list(PARTS) and earlier["hardware"] == results["hardware"]:
            results = earlier
    print(f"{results['hardware']}, {results['versions']}: {rate / 1e12:.1f} TFLOP/s in products")
    small = arguments.shape == "small"

    def note(kind, name, measure, *given):
        """Add what a function finds; one that fails is noted as such, and the next one has its turn."""
        try:
            found = measure(*given)
        except Exception as error:
            traceback.print_exc()
            kind, found = "checks", show(name, False, f"failed: {type(error).__name__}: {brief(error)}")
        rows = found if isinstance(found, list) else [found]
        results[kind] = results.get(kind, []) + rows
        write_results(output, results)
        print(f"{time.monotonic() - started:.0f} s\n{as_table(rows)}", flush=True)

    with tempfile.TemporaryDirectory() as place, processes(arguments.use_cpu, alone=True):
        root = Path(place)
        texts = render_texts(build_sample(seed=0)["train"])
        kept = Path(arguments.backbone or root / "backbone")
        backbone, weights = build_backbone(kept, arguments.shape, texts, device)
        rows = write_rows(root / "rows.jsonl", load_rows(None, 300 if small else 4096))
        base = TrainConfig(
            model_name_or_path=backbone,
            train_data_name_or_path=rows,
            output_dir=str(root / "run"),
            eval_strategy="no",
            use_cpu=arguments.use_cpu,
            per_device_train_batch_size=16 if small else 128,
            max_tokens_per_micro_batch=4096,
            cache_dir=None,
        )
        if "checks" in arguments.parts:
            note("checks", "packed = padded", check_packing, base, device)
            for method in ("lora", "qlora"):
                note("checks", f"sharding, {method}", check_sharding, dataclasses.replace(base, method=method), root)
            note("checks", "resume", check_resume, dataclasses.replace(base, method="qlora"), root)
            free_memory(device)
        for method in [part for part in arguments.parts if part in ("lora", "qlora")]:
            config = dataclasses.replace(base, method=method, max_steps=6, gradient_checkpointing="none")
            classifier = build_classifier(config, Taxonomy(), device, lambda line: None)
            material = load_material(config, classifier, lambda line: None)
            for budget, recompute in (
                (4096, "none"),
                (16384, "none"),
                (16384, "selective"),
                (16384, "all"),
                (1024, "all"),
            ):
                setting = {"max_tokens_per_micro_batch": budget, "gradient_checkpointing": recompute}
                if budget == 16384 and not small:
                    setting["per_device_train_batch_size"] = 256  # 128 of these short pairs would not fill a row
                changed = dataclasses.replace(config, **setting)
                name = f"training, {method}, {budget} tokens, recomputing {recompute}"
                note("training", name, measure_training, classifier, material, changed, weights, rate)
            classifier.model.network.gradient_checkpointing_disable()
            note(f"profile of {method}", f"profile of {method}", profile_step, classifier, material, config)
            note("scoring", f"scoring, {method}", measure_scoring, classifier, rows, weights, rate)
            del classifier, material
            free_memory(device)
        if "rivals" in arguments.parts:
            for name, run in run_rivals(root, backbone, rows, arguments.shape):
                results.setdefault("rivals", {})[name] = run
                write_results(output, results)
    passed = all(check["passed"] for check in results["checks"])
    print("bench_gpu: " + ("all checks passed" if passed else "a check FAILED"))
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
