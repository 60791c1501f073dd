#!/usr/bin/env python
"""Training speed beside what a user would write instead: Trainer, PEFT, dynamic padding; same rows, steps and start.

    python scripts/bench_train.py [--rows FILE] [--methods lora qlora] [--pairs 16 128] [--steps 6] [--rounds 2]

Contenders: `ours`; (a) `dynamic`, Trainer in batches of 16 padded to their longest text, in the very step batches of ours, as
the original recipe collates; (b) `grouped` and `rebalanced`, the same with Trainer's own length-aware samplers, which make up
other batches. Each runs in a process of its own, in turn, `--rounds` times; the median speed counts. The first step
is not timed. Losses of ours and (a) must agree step by step. The limit is the machine's speed at these products, for two
passes over the frozen weights with every real token; ours does not run all of them, so the speed of those that it runs stands
beside it.
"""

import argparse
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore", category=FutureWarning)

CONTENDERS = {"ours": None, "dynamic": "random", "grouped": "group_by_length", "rebalanced": "batch_rebalance"}


def make_config(job):
    """Return the configuration that all contenders share."""
    from qlora_moderation.config import TrainConfig

    return TrainConfig(
        model_name_or_path=job["backbone"],
        train_data_name_or_path=job["rows"],
        output_dir=job["output"],
        method=job["method"],
        per_device_train_batch_size=job["pairs"],
        max_tokens_per_micro_batch=job["budget"],
        max_steps=job["steps"],
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        eval_strategy="no",
        head_prior=False,
        logging_steps=1,
        overwrite_output_dir=True,
        use_cpu=not job["cuda"],
    )


def run_contender(job):
    """Train as one contender does and return its figures."""
    import torch
    from rivals import (
        Examples,
        build_rival,
        count_layer_weights,
        count_products,
        list_shapes,
        measure_matrix_rate,
        train_rival,
    )

    from qlora_moderation.assembly import build_classifier
    from qlora_moderation.batching import step_batch
    from qlora_moderation.plan import load_material
    from qlora_moderation.taxonomy import Taxonomy

    config, device = make_config(job), torch.device("cuda" if job["cuda"] else "cpu")
    before = peak_gib(job["cuda"], start=True)  # all that a contender loads counts
    classifier = build_classifier(config, Taxonomy(), device, lambda line: None)
    material = load_material(config, classifier, lambda line: None)
    weights, shapes = count_layer_weights(classifier.model), list_shapes(classifier.model)
    rate_before = measure_matrix_rate(shapes, device)
    adapters = sum(p.numel() for name, p in classifier.model.named_parameters() if ".lora_" in name)
    if job["contender"] == "ours":
        spans, real, losses, count = train_own(config, classifier, material)
        padded = real
    else:
        pad_id = classifier.pad_id
        del classifier
        gc.collect()  # its fused layers refer to themselves
        order = None
        if job["contender"] == "dynamic":
            steps = range(job["steps"])
            order = [i for s in steps for i in step_batch(len(material.ids), job["pairs"], config.seed, s)]
        model = build_rival(config, Taxonomy().categories, pad_id, device)
        examples = Examples(material.ids, torch.tensor(material.training.labels, dtype=torch.float32))
        strategy = "random" if order else CONTENDERS[job["contender"]]
        ends, losses = train_rival(model, config, examples, pad_id, job["steps"], order, strategy)
        spans = [b[0] - a[0] for a, b in itertools.pairwise(ends)]
        real = [b[1] - a[1] for a, b in itertools.pairwise(ends)]
        padded = [b[2] - a[2] for a, b in itertools.pairwise(ends)]
    peak = peak_gib(job["cuda"]) - (0 if job["cuda"] else before)
    ours = job["contender"] == "ours"
    products = count(count_products) if ours else (4 * weights + 6 * adapters) * sum(padded) / sum(real)
    # a shared machine is not always equally fast, and a limit is what was reached at best
    rate = max(rate_before, measure_matrix_rate(shapes, device))
    return {
        "matrix_rate": rate,
        "tokens_per_second": sum(real) / sum(spans),
        "pairs_per_second": job["pairs"] * len(spans) / sum(spans),
        "padded_per_real": sum(padded) / sum(real),
        # two passes over the frozen weights for every token
        "share_of_limit": sum(real) / sum(spans) * 4 * weights / rate,
        # three over the adapters, which have gradients of their own; padding counts, what is not computed does not
        "speed_of_products": sum(real) / sum(spans) * products / rate,
        "peak_gib": peak,
        "losses": losses,
    }


def train_own(config, classifier, material):
    """Take the steps of ours; returns seconds and tokens of all but the first, all losses, and what counts operations."""
    from rivals import synchronize

    from qlora_moderation.loop import Loop
    from qlora_moderation.plan import build_plan

    device = classifier.model.device
    plan = build_plan(config, len(material.training), device)
    loop = Loop(config, classifier, material, plan, lambda line: None)
    classifier.model.train()
    ends, records = [], []
    for step in range(1, config.max_steps + 1):
        records.append(loop.take_step(step))
        synchronize(device)
        ends.append(time.perf_counter())

    def count(count_products):
        """Take one more step, beside the clock."""
        found = []
        return count_products(lambda: found.append(loop.take_step(config.max_steps + 1))) / found[0]["tokens"]

    spans = [after - before for before, after in itertools.pairwise(ends)]
    return spans, [record["tokens"] for record in records[1:]], [float(record["loss"]) for record in records], count


def peak_gib(cuda, start=False):
    """Return the highest memory so far, of the GPU or of this process."""
    if cuda:
        import torch

        if start:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 2**30
    from high_water import peak_rss

    return peak_rss() / 2**30


def run_apart(job):
    """Run one contender in a process of its own."""
    command = [sys.executable, __file__, "--job", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{job['contender']} failed:\n{done.stderr[-3000:]}", file=sys.stderr, flush=True)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def compare(arguments, method, pairs, common):
    """Run all contenders in turn and print one table."""
    found = {name: [] for name in arguments.contenders}
    for index in range(arguments.rounds):
        order = list(found) if index % 2 == 0 else list(found)[::-1]
        for name in order:
            found[name].append(run_apart({**common, "contender": name, "method": method, "pairs": pairs}))
    failed = [name for name, runs in found.items() if None in runs]
    if "ours" in failed:
        raise SystemExit(f"{method}, {pairs} pairs a step: ours failed, so there is nothing to compare with")
    found = {name: runs for name, runs in found.items() if name not in failed}
    middle = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0] if key != "losses"}
        for name, runs in found.items()
    }
    ours = middle["ours"]["tokens_per_second"]
    print(f"\n{method}, {pairs} pairs a step, {arguments.steps} steps, {arguments.rounds} rounds\n")
    print(
        "| | pairs/s | real tokens/s | ours is faster by | padding alone | share of the product limit | speed of the products "
        "it runs | peak GiB | last loss |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name, run in middle.items():
        ratio, bound = ours / run["tokens_per_second"], run["padded_per_real"]
        shares = f"{run['share_of_limit']:.0%} | {run['speed_of_products']:.0%}"
        print(
            f"| {name} | {run['pairs_per_second']:.2f} | {run['tokens_per_second']:,.0f} | {ratio:.2f} | {bound:.2f} | "
            f"{shares} | {run['peak_gib']:.2f} | {found[name][0]['losses'][-1]:.4f} |"
        )
    if failed:
        print(f"\nfailed: {', '.join(failed)}")
    if "dynamic" in found:
        pairs_of_losses = zip(found["ours"][0]["losses"], found["dynamic"][0]["losses"], strict=True)
        print(f"\nlosses of ours and dynamic differ by at most {max(abs(a - b) for a, b in pairs_of_losses):.1e}")
    sys.stdout.flush()
    return {"method": method, "pairs": pairs, "contenders": middle}


def main():
    """Run the benchmark; with --job one contender."""
    from flags import add_common_flags, whole

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common_flags(parser)
    parser.add_argument("--methods", nargs="+", default=["lora", "qlora"], choices=["lora", "qlora"])
    parser.add_argument("--pairs", nargs="+", type=whole(), default=[16, 128])
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--steps", type=whole(2), default=6, help="the first is not timed")
    parser.add_argument(
        "--budget", type=whole(), help="tokens of a micro-batch of ours; default 2048 on the CPU, 16384 on CUDA"
    )
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        print(json.dumps(run_contender(json.loads(arguments.job))))
        return 0
    if "ours" not in arguments.contenders:
        parser.error("--contenders: ours must be among them, the others are compared with it")
    import torch
    import transformers
    from rivals import build_small_llama, load_rows, write_rows

    cuda = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as place:
        rows = load_rows(arguments.rows, 4096)
        path = write_rows(Path(place) / "rows.jsonl", rows)
        backbone = arguments.backbone
        if backbone is None:
            backbone = build_small_llama(Path(place) / "backbone", rows, arguments.layers, arguments.width)
        name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
        print(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}")
        common = {
            "backbone": backbone,
            "rows": path,
            "output": str(Path(place) / "run"),
            "cuda": cuda,
            "steps": arguments.steps,
            "budget": arguments.budget or (16384 if cuda else 2048),
        }
        tables = [compare(arguments, m, n, common) for m in arguments.methods for n in arguments.pairs]
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(tables, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
