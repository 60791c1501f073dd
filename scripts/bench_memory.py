#!/usr/bin/env python
"""Compares the memory estimate with what the allocator records in real training steps: a LLaMA with random weights.

    python scripts/bench_memory.py [--hidden_size 512] [--layers 4] [--tokens 2048]        (on CUDA 2048, 4, 16384)

On CUDA the record is `torch.cuda.max_memory_allocated`, of everything. On the CPU it is the profiler's account of torch's
allocator, of all that comes after loading: weights read from a file are mapped, not allocated.
"""

import argparse
import gc
import itertools
import os
import sys
import tempfile
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")

import torch
from flags import whole
from torch.profiler import ProfilerActivity, profile

from qlora_moderation.assembly import build_classifier, estimate_memory
from qlora_moderation.config import TrainConfig
from qlora_moderation.distributed import current_device
from qlora_moderation.embedded import build_llama_shape, render_texts
from qlora_moderation.layout import build_micro_batch
from qlora_moderation.loss import compute_loss
from qlora_moderation.optim import build_optimizer
from qlora_moderation.sample import build_sample
from qlora_moderation.taxonomy import Taxonomy

LONGEST = 256  # tokens of a text


def take_steps(classifier, config, tokens):
    """Two steps of two micro-batches each."""
    model, device = classifier.model.train(), classifier.model.device
    optimizer = build_optimizer(model, config)
    longest = [config.max_length] * (tokens // config.max_length)
    longest[-1] -= 1  # rows of one length need no mask
    batch = build_micro_batch([[1] * length for length in longest], classifier.layout, classifier.pad_id, device)
    labels, weight = torch.zeros(len(longest), 14, device=device), torch.ones(len(longest), device=device)
    for _ in range(2):
        optimizer.zero_grad(set_to_none=True)
        for _ in range(2):
            compute_loss(model(batch), labels, weight, 1.0).backward()
        optimizer.step()


def record_on_cpu(work):
    """Return the peak of torch's allocator during `work`, in bytes above its start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(held)


def compare(config, device, tokens):
    """Return (estimated, recorded) bytes."""
    foreseen = estimate_memory(config, Taxonomy(), device, tokens)
    gc.collect()  # fused layers of the classifier before refer to themselves
    if device.type == "cuda":
        torch.ones(64, 64, device=device) @ torch.ones(64, 64, device=device)  # cuBLAS takes its workspace once
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    classifier = build_classifier(config, Taxonomy(), device, lambda line: None)
    if device.type == "cuda":
        take_steps(classifier, config, tokens)
        return foreseen.total, torch.cuda.max_memory_allocated() - held
    loaded = foreseen.weights + foreseen.constants + foreseen.adapters
    return foreseen.total - loaded, record_on_cpu(lambda: take_steps(classifier, config, tokens))


def main():
    """Print one line for each method, layout and checkpointing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden_size", type=whole(64, 64))
    parser.add_argument("--layers", type=whole(), default=4)
    parser.add_argument("--tokens", type=whole(2 * LONGEST))
    parser.add_argument("--use_cpu", action="store_true")
    arguments = parser.parse_args()
    device = current_device(arguments.use_cpu)
    # beside workspaces of kernels a small model says little of a GPU's memory
    arguments.hidden_size = arguments.hidden_size or (2048 if device.type == "cuda" else 512)
    arguments.tokens = arguments.tokens or (16384 if device.type == "cuda" else 2048)
    print(f"{device.type}, torch {torch.__version__}; {vars(arguments)}")
    print(
        "| method | layout | checkpointing | estimated, MiB | recorded, MiB | estimated / recorded |\n|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as place:
        texts = render_texts(build_sample(seed=0)["train"])
        backbone = build_llama_shape(
            Path(place) / "backbone",
            texts,
            hidden_size=arguments.hidden_size,
            num_layers=arguments.layers,
            vocab_size=2000,
            steps=0,
            log=lambda line: None,
        )
        for method, layout, which in itertools.product(
            ("lora", "qlora", "full"), ("packed", "padded"), ("none", "selective", "all")
        ):
            config = TrainConfig(
                model_name_or_path=str(backbone),
                train_data_name_or_path="none",
                output_dir="none",
                method=method,
                layout=layout,
                gradient_checkpointing=which,
                max_length=LONGEST,
                max_tokens_per_micro_batch=arguments.tokens,
                per_device_train_batch_size=arguments.tokens,
                use_cpu=arguments.use_cpu,
            )
            estimated, recorded = compare(config, device, arguments.tokens)
            sizes = f"{estimated / 2**20:.1f} | {recorded / 2**20:.1f} | {estimated / recorded:.3f}"
            print(f"| {method} | {layout} | {which} | {sizes} |", flush=True)


if __name__ == "__main__":
    main()
