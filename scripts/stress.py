#!/usr/bin/env python
"""The long campaigns: the grid of law 1, hundreds of kills of every job, law 2 over a thousand texts, drawn input, learning.

    ./scripts/stress.sh [--minutes M] [grid] [kills] [predict] [jobs] [invariance] [fuzz] [bar]

Prints what it had no time for.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PYTHONWARNINGS", "ignore")

STEPS = 30
CAMPAIGNS = (("lora", 1, 60), ("qlora", 2, 60), ("lora", 2, 40), ("full", 2, 40))
"""Method, processes, kills."""


def run_grid(backbone, rows, texts, folder, until):
    """Run every cell with every method and print the largest differences."""
    import grid

    skipped, failed = [], False
    print(f"\nlaw 1: {STEPS} steps, against {grid.REFERENCE.name}; largest differences, relative for loss and norm")
    print(
        "| method | cells | loss (allowed 1e-5) | gradient norm (1e-4) | logits of 64 texts (1e-4) |\n|---|---|---|---|---|"
    )
    for method in grid.METHODS:
        if time.monotonic() >= until:
            skipped += [f"grid {method}: all {len(grid.FULL_GRID)} cells"]
            continue
        place = folder / f"grid-{method}"
        found, left = grid.measure(method, grid.FULL_GRID, backbone, rows, texts, place, STEPS, until)
        largest = [max(getattr(each, name) for each in found.values()) for name in ("loss", "norm", "logit")]
        print(f"| {method} | {len(found)} | {' | '.join(f'{number:.1e}' for number in largest)} |", flush=True)
        failed |= any(each.fails for each in found.values())
        skipped += [f"grid {method}: {name}" for name in left]
    return skipped, failed


def kill_again_and_again(what, columns, campaigns, until):
    """Run campaigns of kills, each for its share of the time that is left, and print what they did.

    Args:
        what: name of them all, for what there was no time for.
        columns: heads of the columns before the tally.
        campaigns: (cells of these columns, kills, function of kills, seed and end that returns a `kills.Tally`).
        until: `time.monotonic()` at the end.
    """
    skipped = []
    print(f"| {' | '.join(columns)} | kills | of them while writing | runs finished |\n|{'---|' * (len(columns) + 3)}")
    for seed, (cells, kills, campaign) in enumerate(campaigns):
        name = f"{what}, {' '.join(cells)}"
        if time.monotonic() >= until:
            skipped.append(f"{name}: all {kills}")
            continue
        end = time.monotonic() + (until - time.monotonic()) / (len(campaigns) - seed)
        tally = campaign(kills, seed, end)
        print(f"| {' | '.join(cells)} | {tally.kills} | {tally.while_writing} | {tally.runs} |", flush=True)
        if tally.kills < kills:
            skipped.append(f"{name}: {kills - tally.kills} of {kills}")
    return skipped, False


def run_kills(backbone, rows, texts, folder, until):
    """Kill runs, compare their ends with unbroken ones, and print the tally."""
    import grid
    import kills

    def plan(method, processes):
        more = {"method": method, "max_steps": 16, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
        more |= {"eval_strategy": "steps", "eval_steps": 3, "max_tokens_per_micro_batch": 256}
        more |= {"sharding": ("none", "fsdp")[processes - 1], "lora_dropout": 0.0 if method == "full" else 0.1}

        def settings(run):
            return grid.options(backbone, rows, run, processes, **more)

        def campaign(number, seed, end):
            return kills.campaign(settings, processes, number, folder / f"kills-{seed}", seed, end)

        return campaign

    print(
        "\nlaw 6: SIGKILL to all processes; every end bit-identical with an unbroken run's, every checkpoint readable"
    )
    campaigns = [((method, str(count)), number, plan(method, count)) for method, count, number in CAMPAIGNS]
    return kill_again_and_again("kills", ("method", "processes"), campaigns, until)


PREDICT_KILLS = 60
"""For each way of running."""


def run_predict(backbone, rows, texts, folder, until):
    """Kill runs of predict, start them again, compare their outputs with unbroken ones, and print the tally."""
    import predict_kills
    from conftest import make_config, silent

    from qlora_moderation.train import train

    model = train(make_config(backbone, rows, folder / "predict-model", method="full", max_steps=2), silent)
    made = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    inputs = predict_kills.write_inputs(made, folder / "predict-inputs")
    options = {"model_path": str(model), "input": (str(inputs),), "block_size": 8, "use_cpu": True}

    def plan(setting):
        return lambda number, seed, end: predict_kills.campaign(
            setting, options, number, folder / f"predict-{seed}", seed, end
        )

    print(
        "\npredict: SIGKILL at random instants; every output byte for byte that of an unbroken run, nothing left over"
    )
    campaigns = [((setting,), PREDICT_KILLS, plan(setting)) for setting in predict_kills.SETTINGS]
    return kill_again_and_again("predict", ("run as",), campaigns, until)


JOB_KILLS = {"merge": 130, "evaluate": 144, "tune": 32}
"""Two for each of a job's operations on files, over nothing and over an earlier result."""


def run_jobs(backbone, rows, texts, folder, until):
    """Kill merge, evaluate and tune, start them again, compare their ends with unbroken ones, and print the tally."""
    import job_kills
    from conftest import make_config, silent

    from qlora_moderation.sample import write_sample
    from qlora_moderation.train import train

    adapter = train(make_config(backbone, rows, folder / "jobs-model", max_steps=2), silent)
    jobs = job_kills.list_jobs(write_sample(folder / "jobs-data", seed=1)["combinations"])

    def plan(name):
        return lambda number, seed, end: job_kills.campaign(
            jobs[name], adapter, number, folder / f"jobs-{name}", seed, end
        )

    print("\nmerge, evaluate, tune: SIGKILL at random instants and before every operation on files, twice over")
    return kill_again_and_again("jobs", ("job",), [((name,), JOB_KILLS[name], plan(name)) for name in jobs], until)


INVARIANCE_TEXTS = 1000


def run_invariance(backbone, rows, texts, folder, until):
    """Score texts in every company, layout, number of processes and program, and print the largest differences."""
    import invariance
    from conftest import make_config, silent

    from qlora_moderation.train import train

    if time.monotonic() >= until:
        return [f"invariance: all {INVARIANCE_TEXTS} texts"], False
    model = train(make_config(backbone, rows, folder / "invariance-model", method="full", max_steps=2), silent)
    made = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    pairs, place = invariance.make_pairs(made, INVARIANCE_TEXTS, seed=0), folder / "invariance"
    place.mkdir()
    print(
        f"\nlaw 2: {INVARIANCE_TEXTS} texts against each scored alone, fp32 (allowed: {invariance.ALLOWED:g} of a logit)"
    )
    print("| scored by | batches | largest difference |\n|---|---|---|")
    skipped, failed = [], False
    for name, batches, difference in invariance.measure(model, pairs, place, seed=0):
        print(f"| {name} | {batches} | {difference:.1e} |", flush=True)
        failed |= not difference <= invariance.ALLOWED
        if time.monotonic() >= until:
            skipped = [f"invariance: every way behind {name}"]
            break
    return skipped, failed


def run_fuzz(backbone, rows, texts, folder, until):
    """Draw input for every property, seed after seed until the time is over, and print what failed."""
    import fuzz

    told = []
    print("\ndrawn input: whatever it is, what is documented comes out, or a fault that names a place")
    print("| property | examples | failures |\n|---|---|---|")
    for name, tried, faults in fuzz.run_campaign(fuzz.list_properties(), until):
        print(f"| {name} | {tried:,} | {len(faults)} |", flush=True)
        told += [f"{name}, {fault}" for fault in faults]
    print("\n".join(["", *told]))
    return [], bool(told)


RATES = {"lora": 3e-3, "qlora": 3e-3, "full": 1e-3}
BAR = 0.10  # of F1, over a model that reads the answer alone


def run_bar(backbone, rows, texts, folder, until):
    """Train the quick start's task in two processes with every method and sharding; each must clear the quick start's bar."""
    import dataclasses

    import rank_cases
    from ranks import run_ranks

    from qlora_moderation.config import EvaluateConfig, TrainConfig
    from qlora_moderation.embedded import build_embedded_backbone, render_texts
    from qlora_moderation.evaluate import evaluate
    from qlora_moderation.options import build_parser, load_options
    from qlora_moderation.sample import build_sample, write_sample

    skipped, failed = [], False
    data = write_sample(folder / "data", seed=0)
    training = render_texts(build_sample(0)["train"])
    trained = build_embedded_backbone(folder / "embedded", training, seed=0, log=lambda line: None)
    print("\nthe quick start's task in two processes: flagged F1 on held-out combinations (answer only: TF-IDF)")
    print("| method | learning rate | sharding | the pair | answer only | lead |\n|---|---|---|---|---|---|")
    for method, rate in RATES.items():
        for kind in ("ddp", "fsdp"):
            if time.monotonic() >= until:
                skipped.append(f"bar {method} {kind}")
                continue
            run = folder / f"bar-{method}-{kind}"
            flags = ["--config", str(ROOT / "configs" / "quickstart.yaml"), "--method", method, "--sharding", kind]
            flags += ["--model_name_or_path", str(trained), "--train_data_name_or_path", str(data["train"])]
            flags += ["--learning_rate", str(rate), "--per_device_train_batch_size", "16", "--output_dir", str(run)]
            config = load_options(TrainConfig, build_parser(TrainConfig, ""), flags)
            run_ranks(2, rank_cases.learn, dataclasses.asdict(config), timeout=900.0)
            judged = EvaluateConfig(
                model_path=str(run / ("model" if method == "full" else "adapter")),
                eval_dataset=str(data["combinations"]),
                output_dir=str(run / "evaluation"),
                train_data_name_or_path=str(data["train"]),
            )
            result = evaluate(judged, lambda line: None)
            own, rival = result["metrics"]["flagged/f1"], result["baselines"]["tfidf_answer"]["f1"]
            print(f"| {method} | {rate:g} | {kind} | {own:.3f} | {rival:.3f} | {own - rival:+.3f} |", flush=True)
            failed |= own - rival < BAR
    return skipped, failed


def main():
    """Run the campaigns named, all without names, for so many minutes."""
    campaigns = {
        "grid": run_grid,
        "kills": run_kills,
        "predict": run_predict,
        "jobs": run_jobs,
        "invariance": run_invariance,
        "fuzz": run_fuzz,
        "bar": run_bar,
    }
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0, help="time for all campaigns together (default: 60)")
    parser.add_argument("names", nargs="*", metavar="CAMPAIGN", help=f"of {', '.join(campaigns)}; default: all")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in campaigns]
    if unknown:
        parser.error(f"{unknown[0]}: there are {', '.join(campaigns)}")
    from conftest import silent

    from qlora_moderation.embedded import build_llama_shape, render_texts
    from qlora_moderation.sample import build_sample

    started, skipped, failed = time.monotonic(), [], False
    names = arguments.names or list(campaigns)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        rows = build_sample(seed=0)["train"][:300]
        data = folder / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        backbone = build_llama_shape(
            folder / "llama", render_texts(rows), hidden_size=64, num_layers=2, vocab_size=600, steps=0, log=silent
        )
        texts = [row["prompt"] for row in rows[:64]], [row["response"] for row in rows[:64]]
        for index, name in enumerate(names):
            # each campaign may use its share of what is left
            left = started + 60 * arguments.minutes - time.monotonic()
            until = time.monotonic() + left / (len(names) - index)
            left_out, fails = campaigns[name](backbone, data, texts, folder, until)
            skipped, failed = skipped + left_out, failed or fails
    print(f"\nno time for: {'; '.join(skipped) or 'nothing, all was run'}")
    print(f"stress: {'FAILED' if failed else 'passed'} after {(time.monotonic() - started) / 60:.1f} minutes")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
