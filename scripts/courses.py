"""Runs whose weights are judged on the way: ours, and Trainer's. Imported by `bench_quality.py`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from rivals import Examples, build_rival, synchronize, train_rival
from transformers import TrainerCallback

from qlora_moderation.assembly import build_classifier
from qlora_moderation.classifier import Classifier
from qlora_moderation.config import TrainConfig
from qlora_moderation.data import Pairs
from qlora_moderation.distributed import silent
from qlora_moderation.loop import Loop
from qlora_moderation.metrics import compute_metrics
from qlora_moderation.plan import build_plan, load_material
from qlora_moderation.prior import set_head_prior
from qlora_moderation.scoring import score_pairs
from qlora_moderation.taxonomy import Taxonomy

METRIC = "micro/average_precision"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}

Row = dict[str, Any]
Curve = list[dict[str, Any]]


class Course:
    """The curve of one run: seconds of training, and what the validation rows say of the weights."""

    def __init__(self, classifier: Classifier, validation: Pairs, total_steps: int, points: int) -> None:
        self.classifier, self.validation = classifier, validation
        self.judged = {round(total_steps * k / points) for k in range(points + 1)}
        self.curve: Curve = []
        self.spent = dict.fromkeys(CLOCKS, 0.0)
        self.since: dict[str, float] = {}

    def start(self) -> None:
        """Let the clocks run."""
        self.since = {name: clock() for name, clock in CLOCKS.items()}

    def reach(self, step: int, prepare: Callable[[], None] | None = None) -> None:
        """Note the curve at a step where it is due; the clocks stand still meanwhile.

        Args:
            step: steps done.
            prepare: called first where weights have to be brought here.
        """
        if step not in self.judged:
            return
        synchronize(self.classifier.model.device)
        for name, clock in CLOCKS.items():
            self.spent[name] += clock() - self.since[name]
        if prepare is not None:
            prepare()
        scores = score_pairs(self.classifier, self.validation.prompts, self.validation.responses)
        judgement = self.classifier.thresholds.judge(scores.probabilities)
        categories = self.classifier.taxonomy.categories
        metrics = compute_metrics(self.validation.labels, self.validation.flagged, judgement, categories)
        self.curve.append({"step": step, **self.spent, "value": metrics[METRIC]})
        self.start()


class CourseOfTrainer(TrainerCallback):
    """Follows Trainer; its weights are judged in a classifier of ours."""

    def __init__(self, course: Course, model: Any) -> None:
        self.course, self.model = course, model

    def on_train_begin(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        """Judge the start, and let the clocks run."""
        self.course.start()
        self.course.reach(0, self.copy_weights)

    def on_step_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        """Judge the weights where it is time."""
        self.course.reach(state.global_step, self.copy_weights)

    @torch.no_grad()
    def copy_weights(self) -> None:
        """Bring adapters and head over."""
        places = dict(self.course.classifier.model.network.named_parameters())
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                places[name].copy_(parameter)


def run_ours(config: TrainConfig, rows: list[Row], validation: Pairs, points: int, device: torch.device) -> Curve:
    """Train on the file of the configuration, as scripts/train.py does; the head's start is part of the time."""
    classifier = build_classifier(config, Taxonomy(), device, silent)
    material = load_material(config, classifier, silent)
    plan = build_plan(config, len(material.training), device)
    course = Course(classifier, validation, plan.total_steps, points)
    loop = Loop(config, classifier, material, plan, silent)
    course.start()
    set_head_prior(classifier, material.training, material.ids)
    course.reach(0)
    classifier.model.train()
    for step in range(1, plan.total_steps + 1):
        loop.take_step(step)
        course.reach(step)
    return course.curve


def run_rival(config: TrainConfig, rows: list[Row], validation: Pairs, points: int, device: torch.device) -> Curve:
    """Train on the rows, one by one, with Trainer."""
    classifier = build_classifier(config, Taxonomy(), device, silent)
    categories = classifier.taxonomy.categories
    ids, _ = classifier.encoder.encode_all([row["prompt"] for row in rows], [row["response"] for row in rows])
    labels = torch.tensor([[float(row["category"][name]) for name in categories] for row in rows])
    steps = math.ceil(config.num_train_epochs * math.ceil(len(rows) / config.per_device_train_batch_size))
    model = build_rival(config, categories, classifier.pad_id, device)
    course = Course(classifier, validation, steps, points)
    follower = CourseOfTrainer(course, model)
    train_rival(model, config, Examples(ids, labels), classifier.pad_id, steps, None, callbacks=(follower,))
    return course.curve
