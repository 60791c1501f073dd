"""The one score path, for training-time evaluation, `evaluate` and the Python API alike.

In: a classifier and N pairs. Out: logits [N, C]. Step 9 of the straight line.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch

from qlora_moderation.batching import micro_batches
from qlora_moderation.classifier import Classifier
from qlora_moderation.distributed import rank, sum_over_ranks, world_size
from qlora_moderation.layout import build_micro_batch, send
from qlora_moderation.sharding import reshard
from qlora_moderation.tokenization import Window

_CHUNK = 2048  # windows sorted together: enough for even micro-batches, small for memory and progress


@dataclasses.dataclass(frozen=True)
class Scores:
    """What the model says of N pairs.

    Attributes:
        logits: [N, C] in fp32; with several windows the highest of each category.
        first_window_logits: [N, C] of the first window, which is what plain truncation reads.
        windows: [N] windows scored.
        truncated: [N] whether tokens were left unread.
    """

    logits: np.ndarray
    first_window_logits: np.ndarray
    windows: np.ndarray
    truncated: np.ndarray

    @property
    def probabilities(self) -> np.ndarray:
        """[N, C] sigmoid of the logits, before any calibration."""
        return _sigmoid(self.logits)

    @property
    def first_window_probabilities(self) -> np.ndarray:
        """[N, C] sigmoid of the first window's logits."""
        return _sigmoid(self.first_window_logits)


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-logits.astype(np.float64)))


def default_token_budget(device: torch.device, longest: int) -> int:
    """Return the token budget of one forward: enough to keep the device busy, at least the longest text."""
    return max(longest, 16384 if device.type == "cuda" else 2048)


def score_pairs(
    classifier: Classifier,
    prompts: Sequence[str],
    responses: Sequence[str],
    long_text: str | None = None,
    max_tokens: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Scores:
    """Score N pairs; a pair's logits do not depend on its neighbours beyond floating-point noise.

    Args:
        classifier: the model with its tokenizer.
        prompts, responses: N texts each.
        long_text: `window` or `truncate`; None: the model's own choice.
        max_tokens: token budget of one forward.
        progress: called with the number of windows done since the last call.

    Returns:
        Scores in the order of the input.
    """
    encoder = classifier.encoder
    split = (long_text or classifier.metadata.long_text) == "window"
    windows = encoder.windows(prompts, responses) if split else encoder.encode(prompts, responses)
    logits = np.full((len(prompts), len(classifier.taxonomy.categories)), -np.inf, dtype=np.float32)
    first = np.empty_like(logits)
    counts = np.zeros(len(prompts), dtype=np.int64)
    truncated = np.zeros(len(prompts), dtype=bool)
    firsts = set()
    for index, window in enumerate(windows):
        if not counts[window.text]:
            firsts.add(index)
        counts[window.text] += 1
        truncated[window.text] = window.truncated and not split
    model = classifier.model
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(windows), _CHUNK):
            chunk = windows[start : start + _CHUNK]
            scored = score_windows(classifier, chunk, max_tokens, progress)
            texts = np.array([window.text for window in chunk], dtype=np.int64)
            np.maximum.at(logits, texts, scored)
            begins = np.array([start + i in firsts for i in range(len(chunk))], dtype=bool)
            first[texts[begins]] = scored[begins]
    finally:
        model.train(was_training)
    return Scores(logits, first, counts, truncated)


@torch.no_grad()
def score_windows(
    classifier: Classifier, windows: Sequence[Window], max_tokens: int | None, progress: Callable[[int], None] | None
) -> np.ndarray:
    """Return logits [number of windows, C] in fp32, in the order of the windows; the ranks share the work."""
    device = classifier.model.device
    lengths = [len(window.ids) for window in windows]
    budget = max_tokens or default_token_budget(device, classifier.encoder.max_length)
    shape = (len(windows), len(classifier.taxonomy.categories))
    found: list[torch.Tensor] = []
    order: list[int] = []
    shortest = min(range(len(lengths)), key=lengths.__getitem__)
    for members in micro_batches(lengths, budget, classifier.layout, world_size())[rank()]:
        if not members and not classifier.sharding.needs_fillers:
            continue
        ids = [windows[i].ids for i in members or [shortest]]
        scored = classifier.model(build_micro_batch(ids, classifier.layout, classifier.pad_id, device))
        if members:
            found.append(scored)
            order += members
        if progress is not None:
            progress(len(members))
    reshard(classifier.model)
    logits = torch.zeros(shape, dtype=torch.float32, device=device)
    if found:
        logits[send(torch.tensor(order), device)] = torch.cat(found)
    return sum_over_ranks(logits).cpu().numpy()
