"""Training: from a configuration to a run directory, on one process or many.

In: a `TrainConfig`. Out: a run directory with the best adapter, or the best model with `--method full`. Steps 1 to 10.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch

from qlora_moderation.assembly import build_classifier
from qlora_moderation.best import name_weights
from qlora_moderation.config import TrainConfig
from qlora_moderation.data import write_pairs
from qlora_moderation.distributed import is_main, on_main, processes, silent, world_size
from qlora_moderation.errors import CheckpointError, Interrupted
from qlora_moderation.loop import Loop
from qlora_moderation.metrics import check_selecting
from qlora_moderation.plan import (
    Log,
    announce,
    apply_bf16,
    build_plan,
    count_pairs_per_step,
    find_inapplicable,
    load_material,
    show_first_pair,
)
from qlora_moderation.plots import plot_curves
from qlora_moderation.prior import set_head_prior
from qlora_moderation.run_directory import RunDirectory
from qlora_moderation.sharding import check_nf4_bytes
from qlora_moderation.shortage import training_shortage
from qlora_moderation.start import Start, decide_start
from qlora_moderation.taxonomy import Taxonomy, load_taxonomy
from qlora_moderation.tracking import check_trackers


def train(config: TrainConfig, log: Log = print) -> Path:
    """Run training and return the directory of the best weights (of the run itself for a dry run).

    Started by torchrun, all processes call this; rank 0 alone speaks.

    Raises:
        ModerationError: bad configuration, data or files, or a loss that is not finite.
        Interrupted: SIGTERM or SIGINT stopped the run behind a checkpoint.
    """
    with processes(config.use_cpu, alone=config.sharding == "fsdp") as device:
        return _train(config, device, log if is_main() else silent)


def _train(config: TrainConfig, device: torch.device, log: Log) -> Path:
    taxonomy, start = on_main(lambda: _check(config))
    for line in [*config.advice(), *find_inapplicable(config, device)]:
        log(line)
    weights = Path(config.output_dir) / name_weights(config)
    if start.is_finished:
        log(f"{config.output_dir}: this run is finished already; nothing to do")
        return weights
    if config.tf32 is not None and device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = config.tf32
    classifier = build_classifier(apply_bf16(config, device), taxonomy, device, log)
    material = on_main(lambda: load_material(config, classifier, log))
    assert classifier.capacity is not None
    if config.head_prior:
        with training_shortage(config, classifier.capacity):
            set_head_prior(classifier, material.training, material.ids, config.max_tokens_per_micro_batch)
    plan = build_plan(config, len(material.training), device)
    announce(config, classifier, material, plan, log)
    if classifier.sharding.checksums:
        payloads = check_nf4_bytes(classifier.model, classifier.sharding)
        log(f"NF4 guard: {payloads} payloads were put together from all ranks and have the bytes that were loaded")
    if config.dry_run:
        show_first_pair(config, classifier, material, plan, log)
        log("dry run: everything up to the first step works; nothing was written")
        return Path(config.output_dir)
    facts = {
        "world_size": world_size(),
        "threads": torch.get_num_threads(),
        "device": str(device.type),
        "sharding": classifier.sharding.kind,
        "pairs_per_step": plan.pairs_per_step,
    }
    run, loop = RunDirectory(config), Loop(config, classifier, material, plan, log)
    found = start.checkpoint
    state = None if found is None else on_main(lambda: loop.read_state(found))
    run.open(start.checkpoint, facts)
    try:
        with training_shortage(config, classifier.capacity):
            _learn(loop, run, start, state, log)
        run.set_status("finished", best=weights.name)
    except Interrupted as stop:
        run.set_status("interrupted, resumable", reason=str(stop))
        raise
    except BaseException as error:
        state_of_it = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        with contextlib.suppress(CheckpointError):  # the error itself matters more
            run.set_status(state_of_it, error=type(error).__name__)
        raise
    finally:
        run.close()
    log(f"written: {run.path} (weights in {weights})")
    if config.method == "full":
        place = run.path / "evaluation"
        log(f"next: python scripts/evaluate.py --model_path {weights} --eval_dataset FILE --output_dir {place}")
    else:
        log(f"next: python scripts/merge_adapter.py --adapter_path {weights} --output_dir {run.path / 'merged'}")
    return weights


def _learn(loop: Loop, run: RunDirectory, start: Start, state: dict[str, Any] | None, log: Log) -> None:
    """Take up the state of a checkpoint, if there is one, learn, and draw the curves."""
    validation = loop.material.validation
    run.write("audit.json", loop.material.audit)
    if is_main() and validation is not None and not loop.config.eval_data_name_or_path:
        with run.writing():
            write_pairs(run.path / "validation.jsonl", validation, loop.classifier.taxonomy)
    for note in start.notes:
        log(f"warning: {note}; going on from {start.checkpoint}")
    if start.checkpoint is not None and state is not None:
        loop.resume(start.checkpoint, state)
    loop.run(run)
    if is_main():
        with run.writing():
            plot_curves(run.records(), loop.config.metric_for_best_model, run.path / "curves.png")


def _check(config: TrainConfig) -> tuple[Taxonomy, Start]:
    """Check what needs no model: taxonomy, metric, trackers, and what the run directory holds."""
    taxonomy = load_taxonomy(config.taxonomy)
    check_selecting(config.metric_for_best_model, taxonomy.categories)
    check_trackers(config)
    start = Start() if config.dry_run else decide_start(config, count_pairs_per_step(config, world_size()))
    return taxonomy, start
