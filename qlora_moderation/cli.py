"""The only place that reads arguments: one entry for each job.

In: a command line. Out: an exit code. 2 is a fault that the message says how to mend.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from qlora_moderation.config import (
    BackboneConfig,
    EvaluateConfig,
    MergeConfig,
    PlanConfig,
    QuickstartConfig,
    ReportConfig,
    TrainConfig,
    TuneConfig,
)
from qlora_moderation.errors import ConfigError, Interrupted, ModerationError, SaidByMainError
from qlora_moderation.inputs import check_inputs
from qlora_moderation.options import build_parser, load_options, nearest


def _run_train(config: TrainConfig) -> None:
    from qlora_moderation.train import train

    train(config)


def _run_plan(config: PlanConfig) -> None:
    from qlora_moderation.cards import plan_cards

    plan_cards(config)


def _run_merge(config: MergeConfig) -> None:
    from qlora_moderation.merge import merge_adapter

    merge_adapter(config)


def _run_evaluate(config: EvaluateConfig) -> int:
    from qlora_moderation.evaluate import evaluate, find_exit_code

    return find_exit_code(evaluate(config))


def _run_tune(config: TuneConfig) -> None:
    from qlora_moderation.tune import tune_model

    tune_model(config)


def _run_report(config: ReportConfig) -> None:
    from pathlib import Path

    from qlora_moderation.report import remake_report

    remake_report(Path(config.evaluation_dir))
    print(f"written: {Path(config.evaluation_dir) / 'report.html'}")


def _run_backbone(config: BackboneConfig) -> None:
    from qlora_moderation.data import load_pairs
    from qlora_moderation.embedded import build_llama_shape
    from qlora_moderation.taxonomy import Taxonomy

    taxonomy = Taxonomy()
    pairs = load_pairs(config.train_data_name_or_path, taxonomy, config.on_bad_row)
    build_llama_shape(
        config.output_dir,
        [taxonomy.render(*pair) for pair in zip(pairs.prompts, pairs.responses, strict=True)],
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        vocab_size=config.vocab_size,
        max_length=config.max_length,
        steps=config.steps,
        seed=config.seed,
    )


def _run_quickstart(config: QuickstartConfig) -> None:
    from qlora_moderation.quickstart import run_quickstart

    run_quickstart(config)


_JOBS: dict[str, tuple[type, Callable[[Any], int | None], str]] = {
    "train": (TrainConfig, _run_train, "Train a QA-moderation classifier: LoRA, NF4 QLoRA, or all weights."),
    "plan": (
        PlanConfig,
        _run_plan,
        "Estimate the memory of each GPU, by method, card and number of GPUs; no download.",
    ),
    "merge": (MergeConfig, _run_merge, "Merge an adapter and its head into a plain classifier, and prove it."),
    "evaluate": (EvaluateConfig, _run_evaluate, "Evaluate a full, adapter or merged model on labelled or judged rows."),
    "tune": (TuneConfig, _run_tune, "Tune a model's calibration and thresholds on validation rows."),
    "report": (ReportConfig, _run_report, "Make figures and report of an evaluation anew from its files."),
    "backbone": (BackboneConfig, _run_backbone, "Build a small LLaMA with its tokenizer from the texts of some rows."),
    "quickstart": (QuickstartConfig, _run_quickstart, "Run the whole line, embedded or on a real backbone and rows."),
}


_SEVERAL_PROCESSES = {"train", "evaluate"}


def run_job(name: str, argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run one of the jobs with the given flags and return the exit code."""
    config_class, job, description = _JOBS[name]
    if name not in _SEVERAL_PROCESSES and os.environ.get("WORLD_SIZE", "1") != "1":
        return _report_early(ConfigError(f"{name} runs in one process; start it without torchrun"))
    parser = build_parser(config_class, description, prog)
    try:
        config: Any = load_options(config_class, parser, sys.argv[1:] if argv is None else argv)
        check_inputs(config)
    except ModerationError as error:
        return _report_early(error)
    _silence_libraries()
    try:
        return job(config) or 0
    except ModerationError as error:
        return _report_once(error)
    except Interrupted as stop:
        if not _speaker():
            print(stop, file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        if not _speaker():
            more = "; a run with checkpoints goes on when the same command is given again" if name == "train" else ""
            print(f"interrupted{more}", file=sys.stderr)
        return 130
    except Exception as error:
        return _report_fault(error)


def _report_early(error: ModerationError) -> int:
    """Report what every process meets before they know each other: once on each machine, which has files of its own."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        return _report(error)
    time.sleep(3)  # torchrun ends all processes with the first: leave it time to speak
    return 2


def _report_once(error: ModerationError) -> int:
    """Report what several ranks may have met: once, by rank 0 where it is among them.

    torchrun ends all processes with the first, so the ranks that have nothing to say wait for the one that has.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return _report(error)
    from qlora_moderation.distributed import speaks_first

    time.sleep(3 if isinstance(error, SaidByMainError) else 1 if _speaker() else 0)
    return _report(error) if speaks_first(str(error)) else 2


def _report(error: ModerationError) -> int:
    if not isinstance(error, SaidByMainError):
        print("\n".join(f"{_speaker()}error: {line}" for line in str(error).splitlines()), file=sys.stderr)
    return 2


def _report_fault(error: Exception) -> int:
    """Report what no message was written for, rank by rank where there are several.

    Raises:
        Exception: the given one, in a run of one process.
    """
    from qlora_moderation.distributed import is_lost_contact

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        raise error
    lines = traceback.format_exception(error)
    if is_lost_contact(error):
        lines = [
            f"lost contact with another rank, whose error, if it had one, stands in the same log ({lines[-1].strip()})"
        ]
    print("".join(f"{_speaker() or '[rank 0] '}{line}\n" for line in "".join(lines).splitlines()), file=sys.stderr)
    return 1


def _speaker() -> str:
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f"[rank {rank}] "


def _silence_libraries() -> None:
    """Keep the log to what this library has to say: deprecations inside other libraries are not the user's to mend."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `qlora-moderation JOB FLAGS` and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in _JOBS:
        return run_job(arguments[0], arguments[1:], prog=f"qlora-moderation {arguments[0]}")
    if arguments and not arguments[0].startswith("-"):
        word = arguments[0]
        return _report(ConfigError(f"unknown job {word}{nearest(word, _JOBS)}; the jobs are {', '.join(_JOBS)}"))
    lines = ["usage: qlora-moderation JOB FLAGS; `qlora-moderation JOB --help` lists the flags", "", "jobs:"]
    print("\n".join([*lines, *(f"  {name:12}{description}" for name, (_, _, description) in _JOBS.items())]))
    return 0 if arguments in (["--help"], ["-h"]) else 2
