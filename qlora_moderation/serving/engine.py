"""The classifier behind the server: texts to windows, windows to logits, through the one score path.

In: a model directory. Out: logits. The server's other modules work without torch; this one opens the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers.pytorch_utils import Conv1D

from qlora_moderation.classifier import Classifier, load_classifier
from qlora_moderation.scoring import CutPairs, cut_windows, default_token_budget, score_windows
from qlora_moderation.serving.config import ServeConfig
from qlora_moderation.serving.faults import EngineShortageError
from qlora_moderation.tokenization import Window

_CPU_TOKENS = 512  # a larger forward is hardly faster a token on a CPU, and everyone waits for its end
_BRIEF_CPU_TOKENS = 256  # nor is this one much slower
_WEIGHTS_A_THREAD = 25_000_000  # at 50 GFLOP/s a thread, a text of 100 tokens then takes about 0.1 s


class Engine:
    """A loaded classifier. `cut` may run in any thread, `score` in as many at once as `forwards_at_once` says.

    Attributes:
        token_budget: most tokens of a forward.
        brief_budget: most tokens of a forward while little waits.
        forwards_at_once: how many may run side by side.

    On a CPU several forwards on few threads each serve more texts than one on all threads, which wait for each other; and what
    arrives waits for the first of several forwards to end. A large model needs its threads together.
    """

    def __init__(self, classifier: Classifier, config: ServeConfig) -> None:
        self.classifier = classifier
        self.long_text = config.long_text or classifier.metadata.long_text
        device, longest = classifier.model.device, classifier.encoder.max_length
        chosen = default_token_budget(device, longest) if device.type == "cuda" else max(longest, _CPU_TOKENS)
        self.token_budget = config.max_tokens_per_micro_batch or chosen
        self.brief_budget = self.token_budget if device.type == "cuda" else min(self.token_budget, _BRIEF_CPU_TOKENS)
        cores = torch.get_num_threads()
        self.forwards_at_once = config.forwards_at_once or _count_forwards(classifier, cores)
        self._threads = max(1, cores // self.forwards_at_once)
        self._probe = self.cut(["?"], ["."]).windows

    @property
    def names(self) -> tuple[str, ...]:
        """The C categories."""
        return self.classifier.taxonomy.categories

    def cut(self, questions: Sequence[str], answers: Sequence[str]) -> CutPairs:
        """Tokenise N pairs."""
        return cut_windows(self.classifier, questions, answers, self.long_text)

    def score(self, windows: Sequence[Window]) -> np.ndarray:
        """Return logits [number of windows, C].

        Raises:
            EngineShortageError: out of memory.
        """
        if torch.get_num_threads() != self._threads:  # each thread has a number of its own
            torch.set_num_threads(self._threads)
        try:
            return score_windows(self.classifier, windows, self.token_budget, None)
        except MemoryError:
            raise EngineShortageError from None
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
                raise
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        raise EngineShortageError

    def probe(self) -> bool:
        """Say whether the model still answers, by one short text."""
        try:
            return bool(np.isfinite(self.score(self._probe)).all())
        except Exception:  # whatever it is, the answer is no
            return False

    def warm_up(self) -> None:
        """Run the forwards that traffic will run, so that no client waits for what happens once: the largest on a GPU."""
        self.score(self._probe)
        if self.classifier.model.device.type == "cuda":
            self.score(self._fill_forward())

    def _fill_forward(self) -> list[Window]:
        """Return texts of the greatest length for one forward, without a common prefix, which would make it smaller."""
        random = np.random.default_rng(0)
        longest = self.classifier.encoder.max_length
        vocabulary = self.classifier.model.classifier.get_input_embeddings().num_embeddings
        count = max(1, self.token_budget // longest)
        return [Window(random.integers(vocabulary, size=longest).tolist(), index) for index in range(count)]

    def describe(self) -> dict[str, Any]:
        """Return what clients may want to know of the model."""
        metadata = self.classifier.metadata
        return {
            "categories": list(self.names),
            "template": metadata.taxonomy.template,
            "max_length": self.classifier.encoder.max_length,
            "long_text": self.long_text,
            "method": metadata.method,
            "kind": metadata.kind,
        }

    def explain(self) -> str:
        """Return where and how it computes, for the log."""
        model = self.classifier.model
        kind = str(model.autocast_dtype or torch.float32).removeprefix("torch.")
        threads = f", threads each: {self._threads}" if model.device.type == "cpu" else ""
        return (
            f"{model.device.type}, {kind}, {self.classifier.layout} ({self.classifier.layout_reason}), forwards of at most "
            f"{self.token_budget} tokens, {self.forwards_at_once} at once{threads}"
        )


def _count_forwards(classifier: Classifier, cores: int) -> int:
    """Return one on a GPU; on a CPU as many as there are cores, or fewer for a model that needs several for a text."""
    if classifier.model.device.type != "cpu":
        return 1
    modules = list(classifier.model.modules())
    # an NF4 weight has another shape than its layer
    weights = sum(layer.in_features * layer.out_features for layer in modules if isinstance(layer, torch.nn.Linear))
    weights += sum(layer.weight.numel() for layer in modules if isinstance(layer, Conv1D))
    return max(1, cores // max(1, round(weights / _WEIGHTS_A_THREAD)))


def load_engine(config: ServeConfig) -> Engine:
    """Open the model and run it once.

    Raises:
        ModerationError: the directory cannot be used, or the device is too small.
    """
    classifier = load_classifier(config.model_path, config.dtype, config.use_cpu, max_length=config.max_length)
    engine = Engine(classifier, config)
    engine.warm_up()
    return engine
