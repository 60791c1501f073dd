"""The one score path, for training-time evaluation, `evaluate` and the Python API alike.

In: a classifier and N pairs. Out: logits [N, C]. Step 9 of the straight line.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch

from qlora_moderation.batching import micro_batches, micro_batches_by_prefix
from qlora_moderation.classifier import Classifier
from qlora_moderation.distributed import rank, sum_over_ranks, world_size
from qlora_moderation.errors import CheckpointError
from qlora_moderation.layout import build_micro_batch, send
from qlora_moderation.prefix import order_by_prefix
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
        tokens: of all windows together.
    """

    logits: np.ndarray
    first_window_logits: np.ndarray
    windows: np.ndarray
    truncated: np.ndarray
    tokens: int = 0

    @property
    def probabilities(self) -> np.ndarray:
        """[N, C] sigmoid of the logits, before any calibration."""
        return _sigmoid(self.logits)

    @property
    def first_window_probabilities(self) -> np.ndarray:
        """[N, C] sigmoid of the first window's logits."""
        return _sigmoid(self.first_window_logits)

    def check_finite(self, places: Sequence[str]) -> None:
        """Refuse logits that are no numbers: no verdict at all, least of all "not flagged".

        Args:
            places: N, of the pairs.

        Raises:
            CheckpointError: names the first place.
        """
        broken = np.flatnonzero(~np.isfinite(self.logits).all(axis=1))
        if len(broken):
            raise CheckpointError(
                f"{places[broken[0]]}: the model's logits are not finite, for {len(broken):,} of {len(self.logits):,} "
                "pairs; use --dtype float32, or another model"
            )


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
    cut = cut_windows(classifier, prompts, responses, long_text)
    logits = np.empty((len(cut.windows), len(classifier.taxonomy.categories)), dtype=np.float32)
    model = classifier.model
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(cut.windows), _CHUNK):
            chunk = cut.windows[start : start + _CHUNK]
            logits[start : start + _CHUNK] = score_windows(classifier, chunk, max_tokens, progress)
    finally:
        model.train(was_training)
    return cut.collect(logits)


@dataclasses.dataclass(frozen=True, repr=False)
class CutPairs:
    """N pairs as the windows that are scored; without a `repr`, which would show the texts as ids.

    Attributes:
        windows: in the order of the pairs, each with the index of its pair.
        count: N.
        whole: whether the windows of a pair hold all of it, or only what one window holds.
    """

    windows: Sequence[Window]
    count: int
    whole: bool

    def collect(self, logits: np.ndarray) -> Scores:
        """Put together what was said of the windows.

        Args:
            logits: [number of windows, C] in fp32, in the order of the windows.
        """
        texts = np.array([window.text for window in self.windows], dtype=np.int64)
        highest = np.full((self.count, logits.shape[1]), -np.inf, dtype=np.float32)
        np.maximum.at(highest, texts, logits)
        first = logits[np.searchsorted(texts, np.arange(self.count))]  # the pairs stand in order, each at least once
        truncated = np.zeros(self.count, dtype=bool)
        if not self.whole:
            truncated[texts] = [window.truncated for window in self.windows]
        tokens = sum(len(window.ids) for window in self.windows)
        return Scores(highest, first, np.bincount(texts, minlength=self.count), truncated, tokens)


def cut_windows(
    classifier: Classifier, prompts: Sequence[str], responses: Sequence[str], long_text: str | None = None
) -> CutPairs:
    """Tokenise N pairs; `long_text` is `window` or `truncate`, or None for the model's own choice."""
    encoder = classifier.encoder
    whole = (long_text or classifier.metadata.long_text) == "window"
    windows = encoder.windows(prompts, responses) if whole else encoder.encode(prompts, responses)
    return CutPairs(windows, len(prompts), whole)


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
    for members in _deal_windows(classifier, windows, lengths, budget):
        if not members and not classifier.sharding.needs_fillers:
            continue
        ids = [windows[i].ids for i in members or [shortest]]
        scored = classifier.model(build_micro_batch(ids, classifier.layout, classifier.pad_id, device, shares=True))
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


def _deal_windows(
    classifier: Classifier, windows: Sequence[Window], lengths: list[int], budget: int
) -> list[list[int]]:
    """Return the micro-batches of this rank; in packed rows answers to one question stand together, unless that takes more."""
    plain = micro_batches(lengths, budget, classifier.layout, world_size())[rank()]
    if classifier.layout == "padded":
        return plain
    order, shared = order_by_prefix([np.asarray(window.ids) for window in windows])
    dealt = micro_batches_by_prefix([lengths[i] for i in order], shared, budget, world_size())[rank()]
    return plain if len(plain) < len(dealt) else [[order[i] for i in members] for members in dealt]
