#!/usr/bin/env python
"""What is enough: space, speed and quality of a classifier, merged and as NF4 base with adapter, on the backbones at hand.

    python scripts/bench_cost.py --output DIR [--encoder DIR] [--rows FILE --validation FILE] [--steps 300]
    python scripts/bench_cost.py --output DIR --quick    (tiny, on the embedded sample)

Backbones: an encoder (`--encoder`; else MiniLM-L6's shape with random weights), a small LLaMA trained as a language model on
the rows, and LLaMA-7B's shape with random weights, which needs CUDA (without it: the bytes that `plan` reckons). Each is
trained, merged by the function behind scripts/merge_adapter.py, and opened again. Every measurement has a process of its
own, in turn, `--rounds` times; the median speed counts. Writes cost.md, cost.json and cost.png.
"""

import argparse
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

import torch
from flags import above_zero, add_rows_flags, model_name, rows_file, whole
from high_water import peak_rss
from random_encoder import build_random_encoder
from rivals import build_small_llama, load_rows, synchronize

from qlora_moderation.cards import build_blueprint, open_spec
from qlora_moderation.classifier import load_classifier
from qlora_moderation.config import MergeConfig, PlanConfig, TrainConfig
from qlora_moderation.data import load_pairs
from qlora_moderation.distributed import silent
from qlora_moderation.embedded import render_texts
from qlora_moderation.memory import compute_static_memory
from qlora_moderation.merge import merge_adapter
from qlora_moderation.metrics import compute_metrics
from qlora_moderation.sample import write_sample
from qlora_moderation.scoring import score_pairs
from qlora_moderation.taxonomy import Taxonomy
from qlora_moderation.train import train

QUALITY = ("micro/average_precision", "flagged/auroc")
MERGED, NF4 = "merged", "NF4 base + adapter"
COLUMNS = ("backbone", "kept as", "GB on disk", "GB of weights", "GB at most", "pairs/s", "s per million pairs")


def make_models(name, backbone, method, steps, arguments, place):
    """Train on a backbone and merge; returns (way of keeping, directory, files it needs) of each classifier."""
    config = TrainConfig(
        model_name_or_path=backbone,
        train_data_name_or_path=arguments.rows,
        output_dir=str(place / "models" / name / "run"),
        method=method,
        max_steps=steps,
        learning_rate=arguments.rate,
        eval_strategy="no",
        cache_dir=None,
        use_cpu=not torch.cuda.is_available(),
    )
    adapter = train(config, silent)
    merged = merge_adapter(
        MergeConfig(adapter_path=str(adapter), output_dir=str(place / "models" / name / "merged")), silent
    )
    made = [(MERGED, merged, [merged])]
    return [*made, (NF4, adapter, [adapter, Path(backbone)])] if method == "qlora" else made


def weigh(directories):
    """Return the bytes of the weight files."""
    return sum(
        f.stat().st_size for place in directories for f in place.iterdir() if f.suffix in (".safetensors", ".bin")
    )


def measure(job):
    """Open one classifier, score the validation rows, and return its figures."""
    validation = load_pairs(job["validation"], Taxonomy(), log=silent)
    cuda = torch.cuda.is_available()
    before = peak_rss()
    classifier = load_classifier(job["path"], use_cpu=not cuda)
    device = classifier.model.device
    parts = compute_static_memory(classifier.model, "adamw_torch")
    prompts, responses = validation.prompts[: job["pairs"]], validation.responses[: job["pairs"]]
    score_pairs(classifier, prompts[:16], responses[:16])
    synchronize(device)
    started = time.perf_counter()
    scores = score_pairs(classifier, prompts, responses)
    seconds = time.perf_counter() - started
    taken = validation.take(range(len(prompts)))
    judgement = classifier.thresholds.judge(scores.probabilities)
    metrics = compute_metrics(taken.labels, taken.flagged, judgement, classifier.taxonomy.categories)
    peak = torch.cuda.max_memory_allocated() if cuda else peak_rss() - before
    return {
        "weights": parts["weights"] + parts["constants"] + parts["adapters"],
        "peak": peak,
        "pairs_per_second": len(prompts) / seconds,
        **{name: metrics[name] for name in QUALITY},
    }


def run_apart(job):
    """Measure in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--job", json.dumps(job)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{job['path']} could not be measured:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def foresee(way):
    """Return the bytes of LLaMA-7B's shape in bfloat16, as `plan` reckons them, without its weights."""
    config = PlanConfig()

    def count(method):
        network = build_blueprint(config, open_spec(config), method).build(torch.device("meta"))[0]
        return compute_static_memory(network, "adamw_torch")

    plain = count("lora")
    if way == MERGED:
        return {"disk": plain["weights"], "weights": plain["weights"]}
    parts = count("qlora")
    held = parts["weights"] + parts["constants"] + parts["adapters"]
    return {"disk": plain["weights"] + plain["adapters"], "weights": held}


def show(row):
    """Return one line of the table; what has no figure says why."""
    missing = row.get("reason", "not measured")
    sizes = [f"{row[key] / 1e9:.3f}" if key in row else missing for key in ("disk", "weights", "peak")]
    speed = row.get("pairs_per_second")
    speeds = [missing] * 2 if speed is None else [f"{speed:.1f}", f"{1e6 / speed:,.0f}"]
    quality = (
        [missing] * 2
        if speed is None
        else [f"{row[name]:.3f}" if row["real"] else "random weights" for name in QUALITY]
    )
    return f"| {' | '.join([row['backbone'], row['way'], *sizes, *speeds, *quality])} |"


def draw(rows, title, path):
    """Plot pairs a second against the GB of weights."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for row in rows:
        place = row["weights"] / 1e9, row["pairs_per_second"]
        axes.plot(*place, "o" if row["way"] == MERGED else "s", color="C0" if row["way"] == MERGED else "C1")
        axes.annotate(
            f"{row['backbone']}\n{row['way']}", place, (8, 0), textcoords="offset points", va="center", fontsize=8
        )
    axes.set(xscale="log", yscale="log", xlabel="GB of weights in memory", ylabel="pairs a second", title=title)
    axes.margins(0.35)
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def collect(arguments, place):
    """Build, train, merge and measure everything; returns the rows of the table."""
    rows, cuda = load_rows(arguments.rows, 0), torch.cuda.is_available()
    encoder = arguments.encoder or build_random_encoder(
        place / "encoder", rows, arguments.layers + 2, 3 * arguments.width // 2
    )
    llama = arguments.backbone or build_small_llama(
        place / "llama", rows, arguments.layers, arguments.width, arguments.lm_steps, vocab_size=2000
    )
    backbones = [
        ("encoder", encoder, "lora", bool(arguments.encoder)),
        ("small LLaMA", llama, "qlora", True),
    ]
    if cuda:
        from bench_gpu import build_backbone

        large, _ = build_backbone(place / "7b", "7b", render_texts(rows), torch.device("cuda"))
        backbones.append(("LLaMA-7B's shape", large, "qlora", False))
    table, jobs = [], []
    for name, backbone, method, real in backbones:
        for way, path, files in make_models(name, backbone, method, arguments.steps if real else 1, arguments, place):
            row = {"backbone": name, "way": way, "real": real, "disk": weigh(files)}
            table.append(row)
            jobs.append((row, {"path": str(path), "validation": arguments.validation, "pairs": arguments.pairs}))
        if method == "lora":
            table.append({"backbone": name, "way": NF4, "reason": "not offered"})
    found = [[] for _ in jobs]
    for index in range(arguments.rounds):
        for number in range(len(jobs))[:: 1 if index % 2 == 0 else -1]:
            found[number].append(run_apart(jobs[number][1]))
    for (row, _), figures in zip(jobs, found, strict=True):
        row |= {key: statistics.median(one[key] for one in figures) for key in figures[0]}
    if not cuda:
        table += [{"backbone": "LLaMA-7B's shape (estimate)", "way": way, **foresee(way)} for way in (MERGED, NF4)]
    return table


def main():
    """Run the benchmark; with --job one measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", help="directory for table and figure")
    parser.add_argument("--encoder", type=model_name, help="a pretrained encoder; default: random weights")
    parser.add_argument(
        "--backbone", type=model_name, help="a small decoder; default: a LLaMA trained on the rows for --lm_steps"
    )
    add_rows_flags(parser, rows="the embedded sample", layers=4, width=256)
    parser.add_argument("--lm_steps", type=whole(0), default=160)
    parser.add_argument("--validation", type=rows_file, help="rows to score, with --rows")
    parser.add_argument("--pairs", type=whole(), default=300, help="most pairs to score")
    parser.add_argument("--steps", type=whole(), default=300, help="of training where weights are real")
    parser.add_argument("--rate", type=above_zero, default=2e-3)
    parser.add_argument("--rounds", type=whole(), default=3)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        print(json.dumps(measure(json.loads(arguments.job))))
        return 0
    if not arguments.output or bool(arguments.rows) != bool(arguments.validation):
        parser.error("--output is needed, and --rows and --validation go together")
    if arguments.quick:
        arguments.layers, arguments.width, arguments.lm_steps, arguments.steps = 2, 64, 10, 5
        arguments.pairs, arguments.rounds = 60, 1
    output = Path(arguments.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output {output}: cannot be made ({error.strerror})")
    with tempfile.TemporaryDirectory() as place:
        if not arguments.rows:
            sample = write_sample(Path(place) / "data")
            arguments.rows, arguments.validation = str(sample["train"]), str(sample["combinations"])
        table = collect(arguments, Path(place))
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    title = f"{name}, torch {torch.__version__}"
    header = [*COLUMNS, "micro AP", "flagged AUROC"]
    lines = [title, "", f"| {' | '.join(header)} |", "|" + "---|" * len(header), *map(show, table)]
    (output / "cost.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (output / "cost.json").write_text(json.dumps({"machine": title, "rows": table}, indent=2) + "\n", encoding="utf-8")
    draw([row for row in table if "pairs_per_second" in row], title, output / "cost.png")
    print("\n".join(lines))
    print(f"\nwritten: cost.md, cost.json and cost.png in {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
