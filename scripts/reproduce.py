#!/usr/bin/env python
"""Methods x seeds x data sets into one table of results, on official test rows and on those with unknown prompts.

    ./scripts/reproduce.sh --backbone NAME --output DIR [--data NAME=TRAIN=TEST ...] [--methods full lora qlora] [--seeds 0 1 2]
        [--rate METHOD=RATE ...] [--minutes M] [-- TRAINING FLAGS]

What is already evaluated in DIR is not run again, so an interrupted table goes on. What --minutes leaves out, and what has
failed, is "not measured". The table goes to DIR/results.md.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEAVERTAILS = "PKU-Alignment/BeaverTails"
DATA = [f"30k={BEAVERTAILS}:30k_train={BEAVERTAILS}:30k_test", f"330k={BEAVERTAILS}:330k_train={BEAVERTAILS}:330k_test"]
KEYS = ("flagged/f1", "flagged/auroc", "micro/average_precision")
MISSING = "not measured"


def run_cell(folder, backbone, train, test, method, seed, rate, flags):
    """Train, merge, evaluate; every step is skipped where its result is there already. Return whether all went well."""
    run, merged, evaluation = folder / "run", folder / "merged", folder / "evaluation"
    weights = run / ("model" if method == "full" else "adapter")
    commands = []
    command = ["train.py", "--model_name_or_path", backbone, "--train_data_name_or_path", train, "--method", method]
    command += ["--output_dir", str(run), "--seed", str(seed), "--save_strategy", "epoch", "--save_total_limit", "1"]
    commands.append((None, command + (["--learning_rate", rate] if rate else []) + flags))
    if method != "full":
        commands.append((merged, ["merge_adapter.py", "--adapter_path", str(weights), "--output_dir", str(merged)]))
    model = weights if method == "full" else merged
    command = ["evaluate.py", "--model_path", str(model), "--eval_dataset", test, "--output_dir", str(evaluation)]
    commands.append((evaluation, command))
    folder.mkdir(parents=True, exist_ok=True)
    for result, command in commands:
        if result is not None and result.is_dir():
            continue
        started = time.monotonic()
        call = [sys.executable, str(ROOT / "scripts" / command[0]), *command[1:]]
        with (folder / "log.txt").open("a", encoding="utf-8") as log:
            code = subprocess.run(call, stdout=log, stderr=log, check=False).returncode
        if code:
            print(f"{folder}: {command[0]} ended with {code}, see log.txt", flush=True)
            return False
        if result is None and not (folder / "seconds.json").is_file():
            (folder / "seconds.json").write_text(json.dumps(time.monotonic() - started))
    return True


def read_cell(folder):
    """Return the content of metrics.json and the seconds of training, or None."""
    metrics = folder / "evaluation" / "metrics.json"
    if not metrics.is_file():
        return None
    seconds = folder / "seconds.json"
    return json.loads(metrics.read_text()), json.loads(seconds.read_text()) if seconds.is_file() else None


def show(values):
    """Return mean and standard deviation of what is there."""
    found = [value for value in values if value is not None]
    if not found:
        return MISSING
    spread = f" ± {statistics.stdev(found):.3f}" if len(found) > 1 else ""
    return f"{statistics.mean(found):.3f}{spread}"


def clean_metrics(result):
    """Return the metrics on rows whose prompt the model was not trained on; those on all rows where that is all of them."""
    clean = result.get("clean", {})
    if clean.get("pairs") == result["data"]["pairs"]:
        return result["metrics"]
    return clean.get("metrics", {})


def build_row(name, method, cells, seeds):
    """Return the cells of one row of the table."""
    results = [result for result, _ in cells]
    clean = [result["clean"]["pairs"] for result in results if "clean" in result]
    times = [seconds / 60 for _, seconds in cells if seconds is not None]
    return [
        name,
        method,
        f"{len(cells)} of {seeds}",
        *(show([result["metrics"].get(key) for result in results]) for key in KEYS),
        f"{clean[0]} of {results[0]['data']['pairs']}" if clean else MISSING,
        *(show([clean_metrics(result).get(key) for result in results]) for key in KEYS),
        f"{statistics.mean(times):.1f}" if times else MISSING,
    ]


def build_table(output, names, methods, seeds):
    """Return the table in Markdown: a row for each data set and method."""
    clean = [f"{key}, those" for key in KEYS]
    rows = [["data", "method", "seeds", *KEYS, "pairs with unknown prompts", *clean, "training, minutes"]]
    rows.append(["---"] * len(rows[0]))
    for name in names:
        for method in methods:
            found = [read_cell(output / name / f"{method}-{seed}") for seed in seeds]
            rows.append(build_row(name, method, [cell for cell in found if cell is not None], len(seeds)))
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def main():
    flags = sys.argv[sys.argv.index("--") + 1 :] if "--" in sys.argv else []
    own = sys.argv[1 : sys.argv.index("--")] if "--" in sys.argv else sys.argv[1:]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--data", nargs="+", default=DATA, metavar="NAME=TRAIN=TEST")
    parser.add_argument("--methods", nargs="+", default=["full", "lora", "qlora"], choices=["full", "lora", "qlora"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rate", nargs="*", default=[], metavar="METHOD=RATE")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no cell is started after this many")
    given = parser.parse_args(own)
    rates = dict(part.partition("=")[::2] for part in given.rate)
    data = {}
    for part in given.data:
        pieces = part.split("=")
        if len(pieces) != 3:
            parser.error(f"--data {part}: must be NAME=TRAIN=TEST")
        data[pieces[0]] = pieces[1:]
    until = time.monotonic() + 60 * given.minutes
    for seed in given.seeds:  # a whole table with one seed comes before any second seed
        for name, (train, test) in data.items():
            for method in given.methods:
                folder = given.output / name / f"{method}-{seed}"
                if read_cell(folder) is not None:
                    continue
                if time.monotonic() >= until:
                    print(f"no time: {name} {method} seed {seed}", flush=True)
                    continue
                print(f"{name} {method} seed {seed}", flush=True)
                run_cell(folder, given.backbone, train, test, method, seed, rates.get(method), flags)
    table = build_table(given.output, data, given.methods, given.seeds)
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / "results.md").write_text(table, encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
