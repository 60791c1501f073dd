"""What a model was trained on, as hashes: whether a row that judges it was known to it.

In: prompts and pairs. Out: `training_hashes.safetensors` beside the weights, and a mask over rows. Used by steps 10 and 12.
"""

from __future__ import annotations

import dataclasses
import hashlib
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from qlora_moderation.errors import CheckpointError, brief

HASHES_FILE = "training_hashes.safetensors"


@dataclasses.dataclass(frozen=True)
class TrainingHashes:
    """Sorted 64-bit hashes of texts.

    Attributes:
        prompts: of the training pairs.
        pairs: of the training pairs, prompt and response.
        selection_prompts: of the validation pairs that selected the weights.
    """

    prompts: np.ndarray
    pairs: np.ndarray
    selection_prompts: np.ndarray

    def save(self, directory: Path) -> None:
        """Write `training_hashes.safetensors` into `directory`."""
        save_file({name: value.view(np.int64) for name, value in vars(self).items()}, directory / HASHES_FILE)

    def has_prompts(self, prompts: Sequence[str]) -> np.ndarray:
        """Return [N] bool: whether the model was trained on the prompt."""
        return np.isin(_hash_all(prompts), self.prompts)

    def has_pairs(self, prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        """Return [N] bool: whether the model was trained on the very pair."""
        return np.isin(_hash_pairs(prompts, responses), self.pairs)

    def has_selection_prompts(self, prompts: Sequence[str]) -> np.ndarray:
        """Return [N] bool: whether the prompt was among those that selected the weights."""
        return np.isin(_hash_all(prompts), self.selection_prompts)


def hash_training(
    prompts: Sequence[str], responses: Sequence[str], selection_prompts: Sequence[str] = ()
) -> TrainingHashes:
    """Hash the texts that a model was trained on; spelling in capitals and spacing makes no difference."""
    parts = _hash_all(prompts), _hash_pairs(prompts, responses), _hash_all(selection_prompts)
    return TrainingHashes(*(np.unique(part) for part in parts))


def load_hashes(directory: Path) -> TrainingHashes | None:
    """Read a model's hashes; None where it has none.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = directory / HASHES_FILE
    if not path.is_file():
        return None
    try:
        return TrainingHashes(**{name: value.view(np.uint64) for name, value in load_file(path).items()})
    except Exception as error:  # safetensors' own kinds
        raise CheckpointError(f"{path}: cannot be read ({brief(error)}); copy it again") from None


def _normalise(text: str) -> bytes:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).encode("utf-8", "surrogatepass")


def _digest(raw: bytes) -> int:
    return int.from_bytes(hashlib.sha256(raw).digest()[:8], "little")


def _hash_all(texts: Sequence[str]) -> np.ndarray:
    known = {text: _digest(_normalise(text)) for text in set(texts)}
    return np.array([known[text] for text in texts], dtype=np.uint64)


def _hash_pairs(prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
    known = {prompt: _normalise(prompt) + b"\0" for prompt in set(prompts)}  # a prompt stands in several pairs
    both = zip(prompts, responses, strict=True)
    return np.array([_digest(known[p] + _normalise(r)) for p, r in both], dtype=np.uint64)
