#!/usr/bin/env python
"""Time to quality: seconds of training until ours reaches the micro average precision that the rival has at its end.

    python scripts/bench_quality.py [--rows FILE --validation FILE] [--rates 1e-3 3e-3 1e-2] [--epochs 3] [--json FILE]
    python scripts/bench_quality.py --quick    (tiny, on the embedded sample)

The rival is Trainer with PEFT, batches of 16 padded to their longest text, random order. Both learn from the same annotations
for the same number of epochs: `single`, one of each pair, and `three`, by three simulated annotators (see `annotators.py`),
which the rival learns one by one and ours aggregates. The same function judges both on the validation rows, with the clock
stopped. Each contender counts at the rate that gets it to the rival's best end soonest; contenders take turns.
"""

import argparse
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore", category=FutureWarning)

import torch
import transformers
from annotators import simulate_annotations
from courses import CLOCKS, run_ours, run_rival
from flags import above_zero, add_rows_flags, model_name, new_file, rows_file, whole
from rivals import build_small_llama, load_rows

from qlora_moderation.config import TrainConfig
from qlora_moderation.data import load_pairs
from qlora_moderation.distributed import silent
from qlora_moderation.sample import write_sample
from qlora_moderation.taxonomy import Taxonomy

PAIRS = 16
CONTENDERS = {"Trainer, PEFT, padded, row by row": run_rival, "ours": run_ours}


def find_seconds(curve, target, clock="wall"):
    """Return seconds until a curve reaches the target, on the line between the points around it; None: it never does."""
    before = None
    for point in curve:
        if point["value"] >= target:
            if before is None:
                return point[clock]
            share = (target - before["value"]) / (point["value"] - before["value"])
            return before[clock] + share * (point[clock] - before[clock])
        before = point
    return None


def choose_best(curves, target):
    """Return the rate whose curve reaches the target soonest; where none does, the one that ends highest."""

    def rank(rate):
        seconds = find_seconds(curves[rate], target)
        return (seconds is None, seconds or 0.0, -curves[rate][-1]["value"])

    return min(curves, key=rank)


def summarize(runs):
    """Return what the table says.

    Args:
        runs: contender -> rate -> curve; the first contender is the rival.
    """
    rival = next(iter(runs))
    target = max(curve[-1]["value"] for curve in runs[rival].values())
    found = {}
    for name, curves in runs.items():
        rate = choose_best(curves, target)
        found[name] = {
            "rate": rate,
            "final": curves[rate][-1]["value"],
            "best_final": max(curve[-1]["value"] for curve in curves.values()),
            "end": curves[rate][-1]["wall"],
            **{clock: find_seconds(curves[rate], target, clock) for clock in CLOCKS},
        }
    for figures in found.values():
        for clock in CLOCKS:
            seconds = figures[clock]
            figures[f"{clock}_ratio"] = found[rival][clock] / seconds if seconds else None
    return {"target": target, "contenders": found}


def show(setting, summary):
    """Return the lines of one setting."""

    def seconds(figures, clock):
        if figures[clock] is None:
            return "not reached | "
        ratio = figures[f"{clock}_ratio"]
        return f"{figures[clock]:.1f} | {'at once' if ratio is None else f'{ratio:.2f}'}"

    return [
        f"| {setting} | {name} | {figures['rate']:g} | {figures['final']:.3f} ({figures['best_final']:.3f}) | "
        f"{figures['end']:.1f} | {seconds(figures, 'wall')} | {seconds(figures, 'cpu')} |"
        for name, figures in summary["contenders"].items()
    ]


def compete(setting, rows, backbone, validation, arguments, place, device):
    """Run all contenders at all rates in turn; returns contender -> rate -> curve."""
    path = Path(place) / f"{setting}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    runs = {name: {} for name in CONTENDERS}
    for index, rate in enumerate(arguments.rates):
        config = TrainConfig(
            model_name_or_path=backbone,
            train_data_name_or_path=str(path),
            output_dir=str(Path(place) / "unused"),
            method=arguments.method,
            per_device_train_batch_size=PAIRS,
            num_train_epochs=arguments.epochs,
            learning_rate=rate,
            eval_strategy="no",
            cache_dir=None,
            use_cpu=device.type == "cpu",
        )
        for name in list(runs) if index % 2 == 0 else list(runs)[::-1]:
            curve = runs[name][rate] = CONTENDERS[name](config, rows, validation, arguments.points, device)
            print(
                f"{setting}, {name}, {rate:g}: {curve[-1]['value']:.3f} after {curve[-1]['wall']:.1f} s",
                file=sys.stderr,
            )
    return runs


def main():
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_rows_flags(parser, rows="the embedded sample", layers=4, width=256)
    parser.add_argument("--validation", type=rows_file, help="rows to judge on, with --rows")
    parser.add_argument("--most_rows", type=whole(), help="learn from the first distinct pairs only")
    parser.add_argument(
        "--backbone", type=model_name, help="default: a LLaMA trained as a language model on the rows, for --lm_steps"
    )
    parser.add_argument("--lm_steps", type=whole(0), default=160)
    parser.add_argument("--settings", nargs="+", default=["single", "three"], choices=["single", "three"])
    parser.add_argument("--method", default="lora", choices=["lora", "qlora"])
    parser.add_argument("--rates", nargs="+", type=above_zero, default=[1e-3, 3e-3, 1e-2])
    parser.add_argument("--epochs", type=above_zero, default=3)
    parser.add_argument("--points", type=whole(), default=10, help="evaluations of a run, besides its start")
    parser.add_argument("--json", type=new_file, help="also write the figures, with all curves, here")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    arguments = parser.parse_args()
    if bool(arguments.rows) != bool(arguments.validation):
        parser.error("--rows and --validation go together")
    if arguments.quick:
        arguments.layers, arguments.width, arguments.lm_steps, arguments.epochs = 2, 64, 20, 1
        arguments.most_rows = min(arguments.most_rows or 160, 160)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as place:
        sample = write_sample(Path(place) / "data")
        rows = load_rows(arguments.rows or str(sample["train"]), 0)
        validation = load_pairs(arguments.validation or str(sample["combinations"]), Taxonomy(), log=silent)
        backbone = arguments.backbone or build_small_llama(
            Path(place) / "backbone", rows, arguments.layers, arguments.width, arguments.lm_steps, vocab_size=2000
        )
        rows = rows[: arguments.most_rows]
        name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        print(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}")
        print(
            f"{arguments.method}, {len(rows)} pairs, {len(validation)} to judge on, {arguments.epochs:g} epochs, "
            f"rates {', '.join(f'{rate:g}' for rate in arguments.rates)}\n"
        )
        results = {}
        for setting in arguments.settings:
            annotated = rows if setting == "single" else simulate_annotations(rows)
            runs = compete(setting, annotated, backbone, validation, arguments, place, device)
            results[setting] = {**summarize(runs), "runs": runs}
    print(
        "| annotations | contender | best rate | micro AP at its end (of any rate) | s in all | s to the rival's end | "
        "sooner by | CPU s | sooner by |\n|---|---|---|---|---|---|---|---|---|"
    )
    print("\n".join(line for setting, result in results.items() for line in show(setting, result)))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
