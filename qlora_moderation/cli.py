"""The only place that reads arguments: one entry for each job.

In: a command line. Out: an exit code. 2 is a fault that the message says how to mend.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from qlora_moderation.audit_config import AuditConfig
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
from qlora_moderation.errors import ConfigError, Interrupted, ModerationError
from qlora_moderation.faults import (
    describe_missing,
    is_unread,
    report,
    report_early,
    report_fault,
    report_interrupt,
    report_once,
    report_stop,
    report_unread,
)
from qlora_moderation.inputs import check_inputs
from qlora_moderation.interruption import unwinding
from qlora_moderation.options import build_parser, load_options, nearest
from qlora_moderation.prediction_config import CombineConfig, PredictConfig
from qlora_moderation.serving.config import ServeConfig


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


def _run_predict(config: PredictConfig) -> None:
    from qlora_moderation.predict import predict

    predict(config)


def _run_combine(config: CombineConfig) -> None:
    from qlora_moderation.combine import combine

    combine(config)


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
    from qlora_moderation.taxonomy import load_taxonomy

    taxonomy = load_taxonomy(config.taxonomy)
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


def _run_audit(config: AuditConfig) -> None:
    from qlora_moderation.data_audit import audit_data

    audit_data(config)


def _run_quickstart(config: QuickstartConfig) -> None:
    from qlora_moderation.quickstart import run_quickstart

    run_quickstart(config)


def _run_serve(config: ServeConfig) -> int:
    from qlora_moderation.serving.server import serve

    return serve(config)


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
    "predict": (PredictConfig, _run_predict, "Score rows of any number, block by block, and sum up what is flagged."),
    "combine": (CombineConfig, _run_combine, "Put together what the shards of predict have scored."),
    "serve": (ServeConfig, _run_serve, "Serve a model at /v1/moderations in OpenAI's schema, with a page to try it."),
    "report": (ReportConfig, _run_report, "Make figures and report of an evaluation anew from its files."),
    "audit": (AuditConfig, _run_audit, "Describe a data set: repeats, disagreement, lengths, leakage, broken rows."),
    "backbone": (BackboneConfig, _run_backbone, "Build a small LLaMA with its tokenizer from the texts of some rows."),
    "quickstart": (QuickstartConfig, _run_quickstart, "Run the whole line, embedded or on a real backbone and rows."),
}


_GOES_ON = {
    "train": "; a run with checkpoints goes on when the same command is given again",
    "predict": "; the same command goes on behind the blocks that are done",
    "combine": "; nothing is lost, give the same command again",
}
_SEVERAL_PROCESSES = {"train", "evaluate", "predict"}


def run_job(name: str, argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run one of the jobs with the given flags and return the exit code."""
    config_class, job, description = _JOBS[name]
    if name not in _SEVERAL_PROCESSES and os.environ.get("WORLD_SIZE", "1") != "1":
        return report_early(ConfigError(f"{name} runs in one process; start it without torchrun"))
    parser = build_parser(config_class, description, prog)
    try:
        config: Any = load_options(config_class, parser, sys.argv[1:] if argv is None else argv)
        check_inputs(config)
    except ModerationError as error:
        return report_early(error)
    except (OSError, RuntimeError) as error:
        return report_fault(error, name)
    _silence_libraries()
    try:
        with unwinding():
            code = job(config) or 0
            print(end="", flush=True)  # unlike a flush of its own, this bears a closed standard output
            return code
    except ModerationError as error:
        return report_once(error)
    except BrokenPipeError as error:
        return report_unread(_GOES_ON.get(name, "")) if is_unread() else report_fault(error, name)
    except ModuleNotFoundError as error:
        missing = describe_missing(error)
        if missing is None:
            raise
        return report_early(missing)
    except Interrupted as stop:
        return report_stop(stop)
    except KeyboardInterrupt as stop:
        return report_interrupt(stop, _GOES_ON.get(name, ""))
    except Exception as error:
        return report_fault(error, name)


def _silence_libraries() -> None:
    """Keep the log to what this library has to say: deprecations inside other libraries are not the user's to mend."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    # its retries; what comes of them is said in a line of ours
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def _print_completion(arguments: Sequence[str]) -> int:
    from qlora_moderation.completion import SHELLS, build_script

    if len(arguments) != 1 or arguments[0] in ("--help", "-h"):
        print(f"usage: qlora-moderation completion {' | '.join(SHELLS)}; prints a script to be sourced")
        return 0 if arguments in (["--help"], ["-h"]) else 2
    print(build_script(arguments[0], {name: (config_class, text) for name, (config_class, _, text) in _JOBS.items()}))
    return 0


def _print_versions() -> int:
    from qlora_moderation.environment import describe_versions

    print("\n".join(describe_versions()))
    return 0


def _print_jobs(code: int) -> int:
    lines = ["usage: qlora-moderation JOB FLAGS; `qlora-moderation JOB --help` lists the flags", "", "jobs:"]
    lines += [f"  {name:12}{description}" for name, (_, _, description) in _JOBS.items()]
    lines += [
        "",
        f"  {'completion':12}Print a script for bash, zsh, fish or tcsh that completes jobs, flags and words.",
    ]
    lines += [f"  {'--version':12}Print the versions that a report of a bug needs."]
    print("\n".join(lines))
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run `qlora-moderation JOB FLAGS` and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    word = arguments[0] if arguments else ""
    if word in _JOBS:
        return run_job(word, arguments[1:], prog=f"qlora-moderation {word}")
    try:
        return _print_word(word, arguments[1:])
    except ModerationError as error:
        return report(error)
    except BrokenPipeError:  # `| head` has read enough
        sys.stdout = None  # nothing is left to be flushed at the end
        return 0


def _print_word(word: str, rest: Sequence[str]) -> int:
    if word == "completion":
        return _print_completion(rest)
    if word in ("--version", "-V"):
        return _print_versions()
    if word in ("", "help", "--help", "-h"):
        return _print_jobs(0 if word else 2)
    what, known = ("flag", ["--version", "--help"]) if word.startswith("-") else ("job", [*_JOBS, "completion"])
    raise ConfigError(f"unknown {what} {word}{nearest(word, known)}; the {what}s are {', '.join(known)}")
