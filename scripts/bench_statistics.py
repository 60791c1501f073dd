#!/usr/bin/env python
"""How often the intervals hold what they promise, by simulation.

    python scripts/bench_statistics.py [--worlds 400] [--seed 0]

Prompts have a common difficulty, so that the answers to one prompt resemble each other. Three tables: coverage of the clustered
bootstrap beside the one over rows; how often a model chosen with --max_missed_harm misses more than it may; false alarms and
power of the paired test.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import numpy as np
from flags import whole
from scipy.special import expit

from qlora_moderation.intervals import Bootstrap, compare_by_exchange
from qlora_moderation.metrics import Judged, derive_metrics, measure, sum_decisions
from qlora_moderation.tuning import bound_missed_harm

KEYS = (
    "recall",
    "precision",
    "f1",
    "false_positive_rate",
    "flagged_proportion",
    "auroc",
    "average_precision",
    "cohen_kappa",
)


def draw_world(rng, prompts, answers=4, skill=2.0):
    """Return (truth, score, prompt) of `prompts` x `answers` rows whose harm and errors share a part by prompt."""
    of_prompt, own = rng.normal(0, 1, prompts), rng.normal(0, 1, (prompts, answers))
    harm = of_prompt[:, None] + own - 0.5
    truth = (harm > 0).ravel()
    error = 0.7 * rng.normal(0, 1, (prompts, 1)) + 0.7 * rng.normal(0, 1, (prompts, answers))
    return truth, expit(skill * (harm + error)).ravel(), np.repeat(np.arange(prompts), answers)


def measure_coverage(worlds, seed, prompts, replicates=400):
    """Return key -> (coverage by prompt, coverage by row, mean width by prompt)."""
    rng = np.random.default_rng(seed)
    truth, score, _ = draw_world(np.random.default_rng(seed + 1), 200_000)
    exact = {key: float(value[0]) for key, value in measure(Judged.of(truth, score > 0.5, score)).items()}
    held = {key: [0, 0, 0.0] for key in KEYS}
    for world in range(worlds):
        truth, score, prompt = draw_world(rng, prompts)
        judged = Judged.of(truth, score > 0.5, score)
        for kind, groups in enumerate((prompt, np.arange(len(truth)))):
            found = Bootstrap(groups, replicates, world).intervals(
                lambda weights, judged=judged: measure(judged, weights)
            )
            for key in KEYS:
                low, high = found[key] or (0, 1)
                held[key][kind] += low <= exact[key] <= high
                if kind == 0:
                    held[key][2] += high - low
    return {key: (a / worlds, b / worlds, c / worlds) for key, (a, b, c) in held.items()}


def measure_missed_harm(worlds, seed, prompts, limit, confidence):
    """Return (share of worlds in which the true missed share is above the limit, mean true missed share)."""
    rng = np.random.default_rng(seed)
    truth, score, prompt = draw_world(np.random.default_rng(seed + 1), 200_000)
    # the truth of one harmful answer a prompt, drawn as the bound draws it
    order = np.random.default_rng(0).permutation(len(truth))
    rows = order[truth[order]]
    _, first = np.unique(prompt[rows], return_index=True)
    harmful = np.sort(score[rows[first]])
    broken, missed = 0, 0.0
    for world in range(worlds):
        truth, score, prompt = draw_world(rng, prompts)
        threshold, _ = bound_missed_harm(score, truth, prompt.astype(str), limit, confidence, world)
        share = np.searchsorted(harmful, threshold, side="right") / len(harmful)
        broken += share > limit
        missed += share
    return broken / worlds, missed / worlds


def measure_paired_test(worlds, seed, prompts, better):
    """Return how often two judges of F1 are told apart at 5 %; `better`: less error in the first."""
    rng = np.random.default_rng(seed)
    told = 0
    for world in range(worlds):
        of_prompt, own = rng.normal(0, 1, (prompts, 1)), rng.normal(0, 1, (prompts, 4))
        harm = (of_prompt + own - 0.5).ravel()
        prompt = np.repeat(np.arange(prompts), 4)
        sums = []
        for noise in (1.0 - better, 1.0):
            error = 0.7 * rng.normal(0, 1, prompts)[prompt] + 0.7 * rng.normal(0, 1, len(harm))
            sums.append(sum_decisions(Judged.of(harm > 0, harm + noise * error > 0)))
        told += (
            compare_by_exchange(
                prompt,
                lambda w, s=sums: w @ s[0],
                lambda w, s=sums: w @ s[1],
                lambda a, b: derive_metrics(a)["f1"] - derive_metrics(b)["f1"],
                200,
                world,
            )
            <= 0.05
        )
    return told / worlds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=whole(), default=400)
    parser.add_argument("--seed", type=whole(0), default=0)
    given = parser.parse_args()
    error = 1.96 * (0.95 * 0.05 / given.worlds) ** 0.5
    print(f"{given.worlds} worlds; a coverage of .950 is seen as .950 +- {error:.3f}\n")
    for prompts in (75, 300):
        print(f"coverage of 95 % intervals, {prompts} prompts with 4 answers each")
        print("| metric | by prompt | by row | mean width by prompt |\n|---|---|---|---|")
        for key, (by_prompt, by_row, width) in measure_coverage(given.worlds, given.seed, prompts).items():
            print(f"| {key} | {by_prompt:.3f} | {by_row:.3f} | {width:.3f} |", flush=True)
        print()
    print("--max_missed_harm: how often the true missed share is above the limit")
    print("| prompts | limit | confidence | broken | allowed | mean missed share |\n|---|---|---|---|---|---|")
    for prompts, limit, confidence in ((300, 0.05, 0.95), (300, 0.1, 0.9), (1000, 0.05, 0.95)):
        broken, missed = measure_missed_harm(5 * given.worlds, given.seed, prompts, limit, confidence)
        print(
            f"| {prompts} | {limit} | {confidence} | {broken:.3f} | {1 - confidence:.3f} | {missed:.3f} |", flush=True
        )
    print("\npaired test of F1 at 5 %, 150 prompts: equals told apart, and judges with less error in one")
    print("| error less by | told apart |\n|---|---|")
    for better in (0.0, 0.2, 0.4):
        print(f"| {better} | {measure_paired_test(given.worlds, given.seed, 150, better):.3f} |", flush=True)


if __name__ == "__main__":
    main()
