"""The training loop: one plain loop for every method and every number of processes.

In: a classifier, data and a plan. Out: the best weights, checkpoints, records. Steps 5 to 10.
"""

from __future__ import annotations

import json
import math
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from qlora_moderation.batching import micro_batches, step_batch
from qlora_moderation.best import Best
from qlora_moderation.checkpoint import collect_tensors, read_facts, restore_tensors, save_checkpoint
from qlora_moderation.classifier import Classifier
from qlora_moderation.config import TrainConfig
from qlora_moderation.distributed import gather_full, is_main, rank, sum_over_ranks, world_size
from qlora_moderation.errors import CheckpointError, Interrupted, ModerationError
from qlora_moderation.interruption import StopSignals
from qlora_moderation.layout import build_micro_batch, send
from qlora_moderation.loss import compute_loss
from qlora_moderation.metrics import Metrics
from qlora_moderation.optim import build_optimizer, build_scheduler
from qlora_moderation.plan import Log, Material, Plan
from qlora_moderation.progress import describe_left
from qlora_moderation.run_directory import RunDirectory
from qlora_moderation.tracking import Trackers


class NonFiniteError(ModerationError):
    """A loss or gradient is not finite; names the step and the rows."""


class Loop:
    """The state of a run while it learns."""

    def __init__(self, config: TrainConfig, classifier: Classifier, material: Material, plan: Plan, log: Log) -> None:
        self.config, self.classifier, self.material, self.plan, self.log = config, classifier, material, plan, log
        self.device = classifier.model.device
        self.optimizer = build_optimizer(classifier.model, config)
        self.scheduler = build_scheduler(self.optimizer, config, plan.total_steps)
        self.trainable = [p for p in classifier.model.parameters() if p.requires_grad]
        self.labels = torch.tensor(material.training.labels, dtype=torch.float32)
        self.weight = torch.tensor(material.training.weight, dtype=torch.float32)
        self.best = Best(config, classifier, material, plan)
        self.reads_late = can_read_late(config, self.device)
        # 1 from the first step on whose loss or gradient is not finite
        self.broken = torch.zeros((), device=self.device)
        self.unread: list[dict[str, Any]] = []
        self.done = 0
        self.started = time.monotonic()

    def run(self, run: RunDirectory) -> None:
        """Learn from behind the last step done to the last one.

        Raises:
            Interrupted: a signal stopped the run; a checkpoint is written.
        """
        trackers = Trackers(self.config)
        try:
            with StopSignals() as signals:
                self._run(run, trackers, signals)
        finally:
            trackers.finish()

    def _run(self, run: RunDirectory, trackers: Trackers, signals: StopSignals) -> None:
        plan, first = self.plan, self.done + 1
        visible = is_main() and sys.stderr.isatty()
        bar = tqdm(total=plan.total_steps, initial=self.done, unit="step", disable=not visible, dynamic_ncols=True)
        say = bar.write if visible else self.log
        run.set_status("running", total_steps=plan.total_steps)
        self.classifier.model.train()
        window_start, window_tokens = time.monotonic(), 0
        for step in range(first, plan.total_steps + 1):
            record = self.take_step(step)
            self.unread.append(record)
            bar.update()
            window_tokens += record["tokens"]
            speaks = step % self.config.logging_steps == 0 or step == plan.total_steps
            if speaks or not self.reads_late:
                self.read_records(run, trackers)
            if speaks:
                now = time.monotonic()
                say(
                    f"step {step}/{plan.total_steps}  epoch {record['epoch']:.2f}  loss {record['loss']:.4f}  "
                    f"grad_norm {record['grad_norm']:.3f}  learning_rate {record['learning_rate']:.2e}  "
                    f"{window_tokens / (now - window_start):,.0f} tokens/s  "
                    f"{describe_left(now - self.started, step + 1 - first, plan.total_steps - step)}"
                )
                window_start, window_tokens = now, 0
            if plan.eval_steps and (step % plan.eval_steps == 0 or step == plan.total_steps):
                self.read_records(run, trackers)
                trackers.log(self.evaluate(step, run, say), step)
                window_start, window_tokens = time.monotonic(), 0
            stop = signals.agreed() if step < plan.total_steps else 0
            if stop or (plan.save_steps and step % plan.save_steps == 0):
                self.read_records(run, trackers)
                self.save_checkpoint(step)
                window_start, window_tokens = time.monotonic(), 0
            if stop:
                without = ", without --overwrite_output_dir," if self.config.overwrite_output_dir else ""
                say(f"step {step}: stopping on request; the same command{without} goes on from here")
                raise Interrupted(stop)
        if self.best.step == 0:
            if plan.eval_steps:
                say(
                    f"warning: {self.config.metric_for_best_model} was undefined at every evaluation; the last weights are kept"
                )
            self.best.save(plan.total_steps)
        bar.close()

    def save_checkpoint(self, step: int) -> None:
        """Write everything that the rest of the run depends on, frozen weights left out.

        Random numbers are not in it: every step draws from a seed of its own, see `take_step`.
        """
        tensors, plain = collect_tensors(self.classifier.model, self.optimizer)
        facts = {
            "step": step,
            "optimizer": plain,
            "scheduler": self.scheduler.state_dict(),
            "best": self.best.state(),
            "identity": self.best.identity,
            "world_size": world_size(),
            "threads": torch.get_num_threads(),
        }
        run = Path(self.config.output_dir)
        save_checkpoint(run, step, tensors, facts, self.config.save_total_limit, self.best.step)

    def read_state(self, directory: Path) -> dict[str, Any]:
        """Return what a checkpoint says of itself, once it is sure to belong to this run.

        Raises:
            CheckpointError: it is damaged, or something that the run depends on has changed since.
        """
        facts = read_facts(directory)
        own = json.loads(json.dumps(self.best.identity))
        changed = [name for name, value in own.items() if facts["identity"].get(name) != value]
        if changed:
            raise CheckpointError(
                f"{directory}: the {' and the '.join(changed)} changed since; start anew in another directory"
            )
        best_step = facts["best"]["step"]
        if best_step and not self.best.output.exists():
            raise CheckpointError(
                f"{self.best.output}: is missing, which holds the best weights, of step {best_step}; restore it, or go on "
                "from an earlier checkpoint with --resume"
            )
        return facts

    def resume(self, directory: Path, facts: dict[str, Any]) -> None:
        """Take up the state of a checkpoint.

        Args:
            directory: the checkpoint.
            facts: from `read_state`.

        Raises:
            CheckpointError: its tensors cannot be read.
        """
        restore_tensors(directory, self.classifier.model, self.optimizer, facts["optimizer"])
        self.scheduler.load_state_dict(facts["scheduler"])
        for group, rate in zip(self.optimizer.param_groups, self.scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        self.best.restore(facts["best"])
        self.done = facts["step"]
        now = {"world_size": world_size(), "threads": torch.get_num_threads()}
        was = {key: facts[key] for key in now}
        self.log(f"going on from {directory.name} of {self.plan.total_steps} steps")
        if now != was:
            self.log(
                f"processes x threads were {was['world_size']} x {was['threads']} and are {now['world_size']} x "
                f"{now['threads']}: the steps stay the same up to rounding, not bit for bit"
            )

    def take_step(self, step: int) -> dict[str, Any]:
        """Learn from one step batch; returns its record, in which numbers may still be on the device.

        Raises:
            NonFiniteError: before any weight has changed.
        """
        config, classifier, ids, sharding = self.config, self.classifier, self.material.ids, self.classifier.sharding
        # dropout depends on seed, step and rank alone, so that no checkpoint needs the state of a generator
        torch.manual_seed(random.Random(f"dropout {config.seed} {step} {rank()}").getrandbits(63))
        members = step_batch(len(ids), self.plan.pairs_per_step, config.seed, step - 1)
        lengths = [len(ids[i]) for i in members]
        step_weight = float(self.weight[list(members)].sum())
        draws = bool(config.lora_dropout or config.backbone_dropout)
        loss = torch.zeros((), device=self.device)
        self.optimizer.zero_grad(set_to_none=True)
        mine = micro_batches(lengths, self.plan.token_budget, classifier.layout, world_size())[rank()]
        for index, positions in enumerate(mine):
            if not positions and not sharding.needs_fillers:
                continue
            chosen = [members[i] for i in positions or [lengths.index(min(lengths))]]
            rows = [ids[i] for i in chosen]
            batch = build_micro_batch(rows, classifier.layout, classifier.pad_id, self.device, shares=not draws)
            labels, weight = send(self.labels[chosen], self.device), send(self.weight[chosen], self.device)
            sharding.before_backward(classifier.model, last=index == len(mine) - 1)
            # a filler has weight 0 and only keeps this rank in step with the others
            share = compute_loss(classifier.model(batch), labels, weight * bool(positions), step_weight)
            share.backward()
            loss += share.detach()
        sharding.reduce_gradients(self.trainable)
        value = sum_over_ranks(loss)
        norm = gather_full(torch.nn.utils.clip_grad_norm_(self.trainable, config.max_grad_norm or math.inf))
        norm = norm.to(self.device)  # gradients may lie on the host, see --fsdp_cpu_offload
        broken = torch.isfinite(norm).logical_and_(torch.isfinite(value)).logical_not_().to(self.broken.dtype)
        self.broken = torch.maximum(self.broken, broken)
        if self.reads_late:
            # the device itself leaves the weights alone from the first broken step on, and nobody waits for it here
            self.optimizer.found_inf = self.broken  # type: ignore[attr-defined]  # read by torch's fused optimisers
        elif self.broken:
            raise NonFiniteError(self._describe_non_finite(step, float(value), float(norm)))
        learning_rate = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()
        self.scheduler.step()
        return {
            "step": step,
            "epoch": step / self.plan.steps_per_epoch,
            "loss": value if self.reads_late else float(value),
            "grad_norm": norm if self.reads_late else float(norm),
            "learning_rate": learning_rate,
            "pairs": len(members),
            "tokens": sum(lengths),
            "elapsed_seconds": time.monotonic() - self.started,
        }

    def read_records(self, run: RunDirectory, trackers: Trackers) -> None:
        """Fetch what is still on the device and write the records of all steps since the last call.

        Raises:
            NonFiniteError: of the first step whose loss or gradient is not finite; no weight has changed since.
        """
        records, self.unread = self.unread, []
        if self.reads_late and records:
            numbers = torch.stack(
                [record[name].float() for record in records for name in ("loss", "grad_norm")]
            ).tolist()
            for record, loss, norm in zip(records, numbers[::2], numbers[1::2], strict=True):
                record.update(loss=loss, grad_norm=norm)
        for record in records:
            if not (math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"])):
                raise NonFiniteError(self._describe_non_finite(record["step"], record["loss"], record["grad_norm"]))
            run.record(record)
            trackers.log(record, record["step"])

    def _describe_non_finite(self, step: int, loss: float, norm: float) -> str:
        members = step_batch(len(self.material.ids), self.plan.pairs_per_step, self.config.seed, step - 1)
        places = ", ".join(self.material.training.places[i] for i in members[:3])
        return (
            f"step {step}: loss {loss} with gradient norm {norm} is not finite; no weight was changed. Lower "
            f"--learning_rate, or look at the step's {len(members)} pairs, which start with: {places}"
        )

    def evaluate(self, step: int, run: RunDirectory, say: Log) -> Metrics:
        """Judge the weights on the validation pairs, and report it."""
        metrics, better = self.best.judge(step)
        run.record({"step": step, "eval": metrics, "best": better, "elapsed_seconds": time.monotonic() - self.started})
        shown = "  ".join(
            f"{key} {metrics[key]:.4f}" if metrics.get(key) is not None else f"{key} undefined"
            for key in dict.fromkeys((self.config.metric_for_best_model, "flagged/f1", "flagged/auroc", "log_loss"))
        )
        say(f"step {step}  validation: {shown}{'  best so far, saved' if better else ''}")
        return {f"eval/{key}": number for key, number in metrics.items()}


def can_read_late(config: TrainConfig, device: torch.device) -> bool:
    """Say whether losses may stay on the device until a line is due: a GPU that can itself refuse a broken step."""
    return device.type == "cuda" and config.optim == "adamw_torch_fused" and not config.offloads
