"""The one forward: micro-batch → last token of each text → logits in fp32.

In: a `MicroBatch`. Out: logits [S, C]. Step 6 of the straight line.
"""

from __future__ import annotations

import contextlib

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from qlora_moderation.last_layer import shorten_last_layer
from qlora_moderation.layout import MicroBatch


def settle_vector_math() -> None:
    """Call the vector functions of positions once from one thread.

    Where two threads make MKL's very first such call together, one of them may get a path that is right to 4 digits only (seen
    with torch 2.13 on an AVX-512 Xeon: cos(1) = 0.54033 in half of the rows, logits off by 2e-4, in 7 of 12 processes; after
    one call from one thread in none of 12).
    """
    few = torch.ones(16)  # far too few numbers to be shared between threads
    few.cos(), few.sin()


class ModerationModel(nn.Module):
    """Backbone, pooling and head as one module, the root that is trained, sharded and scored.

    Args:
        network: a stock sequence classifier, or PEFT's wrapper around one.
        is_encoder: run the stock forward of a BERT-like network instead of pooling the last token.
        device: where it computes; sharded weights may lie elsewhere.
        autocast_dtype: type of the backbone's products under autocast; None: no autocast.
    """

    def __init__(
        self,
        network: PreTrainedModel | PeftModel,
        is_encoder: bool,
        device: torch.device,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        settle_vector_math()
        self.network = network
        self.is_encoder = is_encoder
        self.device = device
        self.autocast_dtype = autocast_dtype
        if not is_encoder:
            shorten_last_layer(network)

    @property
    def classifier(self) -> PreTrainedModel:
        """The stock classifier, without PEFT's wrapper."""
        return self.network.get_base_model() if isinstance(self.network, PeftModel) else self.network

    def forward(self, batch: MicroBatch) -> torch.Tensor:
        """Return logits [S, C] in fp32; the head runs outside autocast, on the pooled tokens only."""
        classifier = self.classifier
        if self.is_encoder:
            with self._autocast():
                output = classifier(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
            return output.logits.float()
        backbone = getattr(classifier, classifier.base_model_prefix)
        borders = {} if batch.segments is None else {"segments": batch.segments}
        with self._autocast():
            # a cache or an all-ones mask would switch packing off in transformers without a word
            hidden = backbone(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                attention_mask=batch.attention_mask,
                use_cache=False,
                **borders,
            ).last_hidden_state
        if batch.segments is None:
            pooled = hidden[torch.arange(len(batch.last), device=hidden.device), batch.last]
        else:  # the last layer may have returned the last tokens alone
            pooled = hidden[0] if hidden.shape[1] == len(batch.last) else hidden[0, batch.last]
        with torch.autocast(pooled.device.type, enabled=False):
            return classifier.score(pooled.float())

    def _autocast(self) -> contextlib.AbstractContextManager:
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)
