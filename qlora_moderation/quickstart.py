"""The whole line on one machine, as a newcomer meets it.

In: nothing, or a backbone and rows. Out: a run directory with data, adapter, merged model and evaluations. Steps 1 to 13.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qlora_moderation.config import EvaluateConfig, MergeConfig, QuickstartConfig, TrainConfig
from qlora_moderation.embedded import build_embedded_backbone, render_texts
from qlora_moderation.errors import ConfigError
from qlora_moderation.evaluate import evaluate
from qlora_moderation.merge import merge_adapter
from qlora_moderation.metadata import write_text
from qlora_moderation.moderation import QAModeration
from qlora_moderation.options import build_parser, load_options
from qlora_moderation.refusals import refusals
from qlora_moderation.sample import build_minimal_pair, build_sample, shuffle_labels, write_sample
from qlora_moderation.train import train

REAL_RUN = (
    "python scripts/train.py --config configs/llama7b_qlora.yaml --model_name_or_path huggyllama/llama-7b "
    "--train_data_name_or_path PKU-Alignment/BeaverTails:330k_train --output_dir output/llama7b_qlora"
)


def run_quickstart(config: QuickstartConfig, log: Callable[[str], None] = print) -> Path:
    """Train, merge, evaluate and judge; returns the run directory.

    Raises:
        ModerationError: an input cannot be used, or `output_dir` holds something else.
    """
    root = Path(config.output_dir)
    marker = root / "quickstart.json"
    if root.exists() and any(root.iterdir()) and not marker.is_file():
        raise ConfigError(f"--output_dir {root}: holds something else than a quick start; give another directory")
    with refusals(f"--output_dir {root}"):
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        marker.write_text(json.dumps(dataclasses.asdict(config)) + "\n", encoding="utf-8")
    if config.model_name_or_path is None:
        _run_embedded(config, root, log)
    else:
        _run_real(config, root, log)
    return root


def _run_embedded(config: QuickstartConfig, root: Path, log: Callable[[str], None]) -> None:
    started = time.monotonic()
    log("\n1. data: an embedded hand-made sample, question-answer pairs in which only the combination decides")
    training, shuffled = build_sample(config.seed)["train"], root / "data" / "shuffled.jsonl"
    with refusals(f"--output_dir {root}"):
        data = write_sample(root / "data", config.seed)
        write_text(shuffled, "".join(json.dumps(row) + "\n" for row in shuffle_labels(training, config.seed)))
    log("\n2. backbone: a small LLaMA, built on the spot and trained as a language model on the sample's texts")
    backbone = build_embedded_backbone(root / "backbone", render_texts(training), seed=config.seed, log=log)

    def settings(rows: Path, name: str) -> TrainConfig:
        flags = {
            "--config": config.recipe,
            "--model_name_or_path": backbone,
            "--train_data_name_or_path": rows,
            "--output_dir": root / name,
            "--method": config.method,
            "--seed": config.seed,
        }
        parser = build_parser(TrainConfig, "")
        return load_options(TrainConfig, parser, [str(part) for flag in flags.items() for part in flag])

    log(f"\n3. training: {config.method}")
    weights = train(settings(data["train"], "run"), log)
    log("\n4. control: the same training on shuffled labels")
    control = train(settings(shuffled, "control"), _only_steps(log))
    model = _merge(config, weights, root, log)
    log("\n6. evaluation: held-out combinations of known questions and answers (the bar), and wholly unseen ones")
    results = {
        name: evaluate(
            EvaluateConfig(
                model_path=str(path),
                eval_dataset=str(data[split]),
                output_dir=str(root / "evaluation" / name),
                train_data_name_or_path=str(data["train"]),
            ),
            lambda line: None,
        )
        for name, path, split in (
            ("combinations", model, "combinations"),
            ("unseen", model, "unseen"),
            ("control", control, "combinations"),
        )
    }
    for line in _compare(results):
        log(line)
    log("\n7. one question, two answers")
    pair = build_minimal_pair(config.seed)
    moderation = QAModeration.from_pretrained(model)
    for kind in ("harmful", "safe"):
        _judge(moderation, pair["prompt"], pair[kind], log)
    log(f"\nthe whole quick start took {time.monotonic() - started:.0f} s; everything lies in {root}:")
    log("  data/  backbone/  run/ (adapter, metrics, curves)  control/  merged/  evaluation/*/report.html")
    log("It shows that the machinery learns; it says nothing about moderation quality. To go on, on this machine:")
    if ".venv" in sys.prefix and os.environ.get("VIRTUAL_ENV") is None:
        log("  source .venv/bin/activate")
    log(f"  qlora-moderation serve --model_path {model}")
    log("A real run on one 24 GB GPU:")
    log(f"  {REAL_RUN}")


def _run_real(config: QuickstartConfig, root: Path, log: Callable[[str], None]) -> None:
    assert config.model_name_or_path is not None and config.train_data_name_or_path is not None
    log(f"\n1. training: {config.method}")
    training = TrainConfig(
        model_name_or_path=config.model_name_or_path,
        train_data_name_or_path=config.train_data_name_or_path,
        eval_data_name_or_path=config.eval_data_name_or_path,
        output_dir=str(root / "run"),
        method=config.method,
        max_steps=config.max_steps,
        learning_rate=config.learning_rate,
        seed=config.seed,
    )
    weights = train(training, log)
    model = _merge(config, weights, root, log)
    rows = config.eval_data_name_or_path or str(root / "run" / "validation.jsonl")
    log("\nevaluation: the validation rows, on which the best weights were selected")
    result = evaluate(
        EvaluateConfig(
            model_path=str(model),
            eval_dataset=rows,
            output_dir=str(root / "evaluation" / "validation"),
            train_data_name_or_path=config.train_data_name_or_path,
        ),
        log,
    )
    log(f"everything lies in {root}; flagged F1 {result['metrics']['flagged/f1']:.3f}")


def _merge(config: QuickstartConfig, weights: Path, root: Path, log: Callable[[str], None]) -> Path:
    if config.method == "full":
        return weights
    log("\n5. merge: the adapter into a plain classifier")
    return merge_adapter(MergeConfig(adapter_path=str(weights), output_dir=str(root / "merged")), log)


def _compare(results: dict[str, dict[str, Any]]) -> list[str]:
    bar = results["combinations"]
    rivals = {
        "always flag": bar["baselines"]["always_flag"]["f1"],
        "question only (TF-IDF)": bar["baselines"]["tfidf_question"]["f1"],
        "answer only (TF-IDF)": bar["baselines"]["tfidf_answer"]["f1"],
        "trained on shuffled labels": results["control"]["metrics"]["flagged/f1"],
    }
    own = bar["metrics"]["flagged/f1"]
    lines = [f"  {'the pair (this model)':28} flagged F1 {own:.3f}"]
    lines += [f"  {name:28} flagged F1 {value:.3f}" for name, value in rivals.items()]
    lead = 100 * (own - max(rivals.values()))
    lines.append(f"  lead over the best of them: {lead:.0f} points of F1 (the bar is 10)")
    unseen = results["unseen"]
    lines.append(
        f"  unseen questions and wordings: flagged F1 {unseen['metrics']['flagged/f1']:.3f}, always flag "
        f"{unseen['baselines']['always_flag']['f1']:.3f} (a vocabulary of some hundred sentences does not carry far)"
    )
    return lines


def _judge(moderation: QAModeration, question: str, answer: str, log: Callable[[str], None]) -> None:
    result: Any = moderation.predict(question=question, answer=answer)
    name, probability = max(result["categories"].items(), key=lambda item: item[1])
    verdict = "FLAGGED" if result["flagged"] else "not flagged"
    log(f"  question: {question}\n  answer:   {answer}\n  -> {verdict} (highest: {name} {probability:.3f})")


def _only_steps(log: Callable[[str], None]) -> Callable[[str], None]:
    return lambda line: log(line) if line.startswith("step ") else None
