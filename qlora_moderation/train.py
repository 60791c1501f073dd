"""The training loop: one plain loop for every method.

In: a `TrainConfig`. Out: a run directory with the best adapter, or the best model with `--method full`. Steps 1 to 10.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from qlora_moderation.batching import micro_batches, step_batch
from qlora_moderation.card import build_card
from qlora_moderation.checkpoint import load_checkpoint, save_checkpoint
from qlora_moderation.classifier import Classifier, build_classifier, choose_device
from qlora_moderation.config import TrainConfig
from qlora_moderation.data import write_pairs
from qlora_moderation.errors import CheckpointError, ConfigError, ModerationError
from qlora_moderation.layout import build_micro_batch
from qlora_moderation.loss import compute_loss
from qlora_moderation.metadata import write_json, write_text
from qlora_moderation.metrics import Metrics, compute_metrics, selecting_metrics
from qlora_moderation.optim import build_optimizer, build_scheduler
from qlora_moderation.options import nearest
from qlora_moderation.plan import (
    Log,
    Material,
    Plan,
    announce,
    apply_bf16,
    build_plan,
    find_inapplicable,
    load_material,
    show_first_pair,
)
from qlora_moderation.plots import plot_curves
from qlora_moderation.prior import set_head_prior
from qlora_moderation.run_directory import RunDirectory
from qlora_moderation.scoring import score_pairs
from qlora_moderation.taxonomy import load_taxonomy
from qlora_moderation.tracking import Trackers, check_trackers


class NonFiniteError(ModerationError):
    """A loss or gradient is not finite; names the step and the rows."""


def train(config: TrainConfig, log: Log = print) -> Path:
    """Run training and return the directory of the best weights (of the run itself for a dry run).

    Raises:
        ModerationError: bad configuration, data or files, or a loss that is not finite.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError("WORLD_SIZE is not 1: this version trains in one process; start it without torchrun")
    taxonomy = load_taxonomy(config.taxonomy)
    allowed = selecting_metrics(taxonomy.categories)
    if config.metric_for_best_model not in allowed:
        hint = nearest(config.metric_for_best_model, allowed)
        raise ConfigError(
            f"--metric_for_best_model {config.metric_for_best_model}: is no metric of this taxonomy{hint}"
        )
    check_trackers(config)
    device = choose_device(config.use_cpu)
    for line in [*config.advice(), *find_inapplicable(config, device)]:
        log(line)
    torch.manual_seed(config.seed)
    if config.tf32 is not None and device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = config.tf32
    classifier = build_classifier(apply_bf16(config, device), taxonomy, device, log)
    material = load_material(config, classifier, log)
    if config.head_prior:
        set_head_prior(classifier, material.training, material.ids)
    plan = build_plan(config, len(material.training), device)
    announce(config, classifier, material, plan, log)
    if config.dry_run:
        show_first_pair(config, classifier, material, plan, log)
        log("dry run: everything up to the first step works; nothing was written")
        return Path(config.output_dir)
    run = RunDirectory(config)
    if run.is_finished:
        log(f"{run.path}: this run is finished already; nothing to do")
        return run.path / _weights_name(config)
    try:
        write_json(run.path / "audit.json", material.audit)
        if material.validation is not None and not config.eval_data_name_or_path:
            write_pairs(run.path / "validation.jsonl", material.validation, taxonomy)
        trained = _Loop(config, classifier, material, plan, run, log).run()
        plot_curves(run.records(), config.metric_for_best_model, run.path / "curves.png")
        run.set_status("finished", best=trained.name)
    except KeyboardInterrupt:
        run.set_status("interrupted")
        raise
    except BaseException as error:
        run.set_status("failed", error=type(error).__name__)
        raise
    finally:
        run.close()
    log(f"written: {run.path} (weights in {trained})")
    if config.method == "full":
        log(
            f"next: scripts/evaluate.py --model_path {trained} --eval_dataset FILE --output_dir {run.path / 'evaluation'}"
        )
    else:
        log(f"next: scripts/merge_adapter.py --adapter_path {trained} --output_dir {run.path / 'merged'}")
    return trained


class _Loop:
    """The state of a run while it learns."""

    def __init__(
        self, config: TrainConfig, classifier: Classifier, material: Material, plan: Plan, run: RunDirectory, log: Log
    ) -> None:
        self.config, self.classifier, self.material, self.plan, self.run_files = config, classifier, material, plan, run
        self.log = log
        self.device = classifier.model.device
        self.optimizer = build_optimizer(classifier.model, config)
        self.scheduler = build_scheduler(self.optimizer, config, plan.total_steps)
        self.trainable = [p for p in classifier.model.parameters() if p.requires_grad]
        self.fingerprint = material.training.fingerprint()
        self.labels = torch.tensor(material.training.labels, dtype=torch.float32)
        self.weight = torch.tensor(material.training.weight, dtype=torch.float32)
        self.best: float | None = None
        self.best_metrics: Metrics | None = None
        self.best_step = 0
        self.started = time.monotonic()

    @property
    def output(self) -> Path:
        return self.run_files.path / _weights_name(self.config)

    def run(self) -> Path:
        config, plan = self.config, self.plan
        trackers = Trackers(config)
        bar = tqdm(total=plan.total_steps, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True)
        say = bar.write if not bar.disable else self.log
        first = 1 if self.run_files.checkpoint is None else self.resume(self.run_files.checkpoint) + 1
        self.run_files.set_status("running", total_steps=plan.total_steps)
        self.classifier.model.train()
        bar.update(first - 1)
        window_start, window_tokens = time.monotonic(), 0
        for step in range(first, plan.total_steps + 1):
            record = self.take_step(step)
            self.run_files.record(record)
            trackers.log(record, step)
            bar.update()
            window_tokens += record["tokens"]
            if step % config.logging_steps == 0 or step == plan.total_steps:
                now = time.monotonic()
                say(
                    f"step {step}/{plan.total_steps}  epoch {record['epoch']:.2f}  loss {record['loss']:.4f}  "
                    f"grad_norm {record['grad_norm']:.3f}  learning_rate {record['learning_rate']:.2e}  "
                    f"{window_tokens / (now - window_start):,.0f} tokens/s  "
                    f"{_remaining(now - self.started, step, plan.total_steps)}"
                )
                window_start, window_tokens = now, 0
            if plan.eval_steps and (step % plan.eval_steps == 0 or step == plan.total_steps):
                trackers.log(self.evaluate(step, say), step)
                window_start, window_tokens = time.monotonic(), 0
            if plan.save_steps and step % plan.save_steps == 0:
                save_checkpoint(self.run_files.path, step, self.state(step), config.save_total_limit)
                window_start, window_tokens = time.monotonic(), 0
        if self.best_step == 0:
            self.save(plan.total_steps)
        bar.close()
        trackers.finish()
        return self.output

    def state(self, step: int) -> dict[str, Any]:
        """Return everything that the rest of the run depends on, frozen weights left out."""
        parameters = self.classifier.model.named_parameters()
        return {
            "step": step,
            "parameters": {name: parameter.detach() for name, parameter in parameters if parameter.requires_grad},
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "rng": torch.get_rng_state(),
            "best": {"value": self.best, "metrics": self.best_metrics, "step": self.best_step},
            "training_fingerprint": self.fingerprint,
        }

    def resume(self, directory: Path) -> int:
        """Take up the state of a checkpoint and return its step.

        Raises:
            CheckpointError: it is damaged, or belongs to other data or another model.
        """
        state = load_checkpoint(directory)
        if state["training_fingerprint"] != self.fingerprint:
            raise CheckpointError(f"{directory}: the training data has changed since; start anew in another directory")
        own = {
            name: parameter for name, parameter in self.classifier.model.named_parameters() if parameter.requires_grad
        }
        if own.keys() != state["parameters"].keys():
            raise CheckpointError(f"{directory}: belongs to another model; start anew in another directory")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state["parameters"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["rng"])
        self.best, self.best_metrics, self.best_step = (state["best"][key] for key in ("value", "metrics", "step"))
        self.run_files.cut_records(state["step"])
        self.log(f"going on from {directory.name} of {self.plan.total_steps} steps")
        return state["step"]

    def take_step(self, step: int) -> dict[str, Any]:
        """Learn from one step batch; returns its record.

        Raises:
            NonFiniteError: before any weight has changed.
        """
        config, classifier, ids = self.config, self.classifier, self.material.ids
        members = step_batch(len(ids), self.plan.pairs_per_step, config.seed, step - 1)
        step_weight = float(self.weight[list(members)].sum())
        loss = torch.zeros((), device=self.device)
        self.optimizer.zero_grad(set_to_none=True)
        for positions in micro_batches([len(ids[i]) for i in members], self.plan.token_budget, classifier.layout)[0]:
            chosen = [members[position] for position in positions]
            batch = build_micro_batch([ids[i] for i in chosen], classifier.layout, classifier.pad_id, self.device)
            labels, weight = self.labels[chosen].to(self.device), self.weight[chosen].to(self.device)
            share = compute_loss(classifier.model(batch), labels, weight, step_weight)
            share.backward()
            loss += share.detach()
        limit = config.max_grad_norm or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.trainable, limit))
        if not math.isfinite(norm) or not math.isfinite(float(loss)):
            places = ", ".join(self.material.training.places[i] for i in members[:3])
            raise NonFiniteError(
                f"step {step}: loss {float(loss)} with gradient norm {norm} is not finite; no weight was changed. Lower "
                f"--learning_rate, or look at the step's {len(members)} pairs, which start with: {places}"
            )
        learning_rate = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()
        self.scheduler.step()
        return {
            "step": step,
            "epoch": step / self.plan.steps_per_epoch,
            "loss": float(loss),
            "grad_norm": norm,
            "learning_rate": learning_rate,
            "pairs": len(members),
            "tokens": sum(len(ids[i]) for i in members),
            "elapsed_seconds": time.monotonic() - self.started,
        }

    def evaluate(self, step: int, say: Log) -> Metrics:
        """Score the validation pairs; where the selecting metric is the best so far, save."""
        validation, name = self.material.validation, self.config.metric_for_best_model
        assert validation is not None and validation.labels is not None and validation.flagged is not None
        scores = score_pairs(
            self.classifier, validation.prompts, validation.responses, max_tokens=self.plan.token_budget
        )
        categories = self.classifier.taxonomy.categories
        metrics = compute_metrics(
            validation.labels, validation.flagged, scores.probabilities, self.classifier.thresholds, categories
        )
        value = metrics[name]
        better = value is not None and (self.best is None or value > self.best)
        self.run_files.record(
            {"step": step, "eval": metrics, "best": better, "elapsed_seconds": time.monotonic() - self.started}
        )
        shown = "  ".join(
            f"{key} {metrics[key]:.4f}" if metrics.get(key) is not None else f"{key} undefined"
            for key in dict.fromkeys((name, "flagged/f1", "flagged/auroc", "log_loss"))
        )
        say(f"step {step}  validation: {shown}{'  best so far, saved' if better else ''}")
        if better:
            self.best, self.best_metrics = value, metrics
            self.save(step)
        return {f"eval/{key}": number for key, number in metrics.items()}

    def save(self, step: int) -> None:
        """Write adapter or model with metadata and card."""
        config, material, classifier = self.config, self.material, self.classifier
        self.best_step = step
        selection = "the last step"
        if self.best_metrics is not None:
            selection = f"best {config.metric_for_best_model} on validation data, at step {step}"
        training = {
            "training_data": _name_of_data(config.train_data_name_or_path),
            "training_rows": material.training.annotations,
            "training_pairs": len(material.training),
            "training_fingerprint": self.fingerprint,
            "selection": selection,
            "steps": self.plan.total_steps,
            "pairs_per_step": self.plan.pairs_per_step,
            "learning_rate": config.resolved_learning_rate,
            "seed": config.seed,
            "warnings": material.warnings,
        }
        if material.validation is not None:
            training["validation_pairs"] = len(material.validation)
            training["validation_fingerprint"] = material.validation.fingerprint()
        metadata = dataclasses.replace(classifier.metadata, training=training)
        classifier.metadata = metadata

        def write_more(directory: Path) -> None:
            card = build_card(
                metadata, classifier.thresholds, self.best_metrics, classifier.grown_embedding_rows, classifier.pad_id
            )
            write_text(directory / "README.md", card)
            if self.best_metrics is not None:
                write_json(directory / "validation_metrics.json", self.best_metrics)

        classifier.save(self.output, metadata, write_more)


def _weights_name(config: TrainConfig) -> str:
    return "model" if config.method == "full" else "adapter"


def _name_of_data(spec: str) -> str:
    """Return a data spec without the folders of local files."""
    return " + ".join(Path(part).name if Path(part).is_file() else part for part in spec.split("+"))


def _remaining(elapsed: float, step: int, total: int) -> str:
    seconds = int(elapsed / step * (total - step))
    return f"{seconds // 3600}:{seconds % 3600 // 60:02d}:{seconds % 60:02d} left"
