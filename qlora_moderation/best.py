"""The best weights of a run so far: whether new ones are better, and their files.

In: a classifier while it learns, and validation pairs. Out: `adapter/` or `model/`, with metadata and card. Steps 9 and 10.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

from qlora_moderation.card import build_card
from qlora_moderation.classifier import Classifier
from qlora_moderation.config import TrainConfig
from qlora_moderation.distributed import on_main
from qlora_moderation.leakage import TrainingHashes, hash_training
from qlora_moderation.metadata import write_json, write_text
from qlora_moderation.metrics import Metrics, compute_metrics
from qlora_moderation.plan import Material, Plan
from qlora_moderation.scoring import score_pairs


def name_weights(config: TrainConfig) -> str:
    """Return the directory of a run's best weights."""
    return "model" if config.method == "full" else "adapter"


class Best:
    """The best weights so far; all ranks take part in every method.

    Attributes:
        value: of the selecting metric; None before the first evaluation.
        metrics: all of them, with that value.
        step: when; 0: nothing is saved yet.
        identity: fingerprints of what the run depends on.
    """

    def __init__(self, config: TrainConfig, classifier: Classifier, material: Material, plan: Plan) -> None:
        self.config, self.classifier, self.material, self.plan = config, classifier, material, plan
        self.value: float | None = None
        self.metrics: Metrics | None = None
        self.step = 0
        validation = material.validation
        self.identity: dict[str, Any] = {
            "training data": material.training.fingerprint(),
            "validation data": None if validation is None else validation.fingerprint(),
            "taxonomy": classifier.taxonomy.to_dict(),
            "base model": classifier.base_fingerprint,
        }

    @property
    def output(self) -> Path:
        """Where the weights go."""
        return Path(self.config.output_dir) / name_weights(self.config)

    @functools.cached_property
    def hashes(self) -> TrainingHashes:
        """Of the texts that train and select the weights."""
        training, validation = self.material.training, self.material.validation
        return hash_training(training.prompts, training.responses, validation.prompts if validation else ())

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"value": self.value, "metrics": self.metrics, "step": self.step}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what a checkpoint kept."""
        self.value, self.metrics, self.step = state["value"], state["metrics"], state["step"]

    def judge(self, step: int) -> tuple[Metrics, bool]:
        """Score the validation pairs; where the selecting metric is the best so far, save the weights.

        Returns:
            The metrics, and whether they are the best so far.
        """
        pairs, classifier = self.material.validation, self.classifier
        assert pairs is not None and pairs.labels is not None and pairs.flagged is not None
        labels, flagged, categories = pairs.labels, pairs.flagged, classifier.taxonomy.categories
        scores = score_pairs(classifier, pairs.prompts, pairs.responses, max_tokens=self.plan.token_budget)
        scores.check_finite(pairs.places)
        # rank 0's figures count: another machine may round them otherwise, and all ranks must take the same branch
        metrics = on_main(
            lambda: compute_metrics(labels, flagged, classifier.thresholds.judge(scores.probabilities), categories)
        )
        value = metrics[self.config.metric_for_best_model]
        better = value is not None and (self.value is None or value > self.value)
        if better:
            self.value, self.metrics = value, metrics
            self.save(step)
        return metrics, better

    def save(self, step: int) -> None:
        """Write adapter or model with metadata and card."""
        config, material, classifier = self.config, self.material, self.classifier
        self.step = step
        selection = "the last step"
        if self.metrics is not None:
            selection = f"best {config.metric_for_best_model} on validation data, at step {step}"
        training = {
            "training_data": _name_of_data(config.train_data_name_or_path),
            "training_rows": material.training.annotations,
            "training_pairs": len(material.training),
            "training_fingerprint": self.identity["training data"],
            "selection": selection,
            "steps": self.plan.total_steps,
            "pairs_per_step": self.plan.pairs_per_step,
            "learning_rate": config.resolved_learning_rate,
            "seed": config.seed,
            "warnings": material.warnings,
        }
        if material.validation is not None:
            training["validation_pairs"] = len(material.validation)
            training["validation_fingerprint"] = self.identity["validation data"]
        metadata = classifier.metadata = dataclasses.replace(classifier.metadata, training=training)

        def write_more(directory: Path) -> None:
            card = build_card(
                metadata, classifier.thresholds, self.metrics, classifier.grown_embedding_rows, classifier.pad_id
            )
            write_text(directory / "README.md", card)
            self.hashes.save(directory)
            if self.metrics is not None:
                write_json(directory / "validation_metrics.json", self.metrics)

        classifier.save(self.output, metadata, write_more)


def _name_of_data(spec: str) -> str:
    """Return a data spec without the folders of local files."""
    return " + ".join(Path(part).name if Path(part).is_file() else part for part in spec.split("+"))
