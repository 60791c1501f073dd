"""What a trainable network is built from, besides its weights: the same recipe makes the real one and one that holds none.

In: configuration, backbone and head names. Out: a stock classifier, or PEFT's wrapper around one, on any device; on the meta
device without weights, whole or with fewer layers. Before step 6.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from qlora_moderation import backbone as bb
from qlora_moderation.adapter import add_lora, replace_head
from qlora_moderation.batching import Layout
from qlora_moderation.config import TrainConfig
from qlora_moderation.distributed import silent
from qlora_moderation.fused_layers import fuse_layers
from qlora_moderation.metadata import Quantization


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """A network before it has weights.

    Attributes:
        config: method, adapters and seed count.
        spec: the backbone.
        compute_dtype: of the products.
        layout: decides the attention function.
        quantization: NF4 settings for `--method qlora`, else None.
        categories: C names, the head's rows.
        pad_id: id of the padding token; where it lies beyond the embedding, that grows.
        pad_token: its text, for the log.
    """

    config: TrainConfig
    spec: bb.BackboneSpec
    compute_dtype: torch.dtype
    layout: Layout
    quantization: Quantization | None
    categories: tuple[str, ...]
    pad_id: int
    pad_token: str = ""

    @property
    def layers(self) -> int:
        """How many decoder or encoder layers the network has."""
        return self.spec.config.num_hidden_layers

    def build(self, device: torch.device, log: Callable[[str], None] = silent) -> tuple[Any, int | None, list[int]]:
        """Return the trainable network, the rows of a grown embedding, and the head's new rows; on the meta device: no weights.

        Raises:
            ModerationError: weights or options do not fit the backbone.
        """
        config = self.config
        torch.manual_seed(config.seed)  # modules that the checkpoint does not hold are made up, as the adapters are
        # full training keeps fp32 master weights and computes in bfloat16 under autocast
        dtype = torch.float32 if config.method == "full" else self.compute_dtype
        empty = device.type == "meta"
        loaded = bb.load_backbone(
            self.spec, None, dtype, device, self.layout, self.quantization, config.backbone_dropout, empty=empty
        )
        network: Any = loaded.model
        rows = bb.fit_pad_token(network, self.pad_id)
        if rows is not None:
            log(f"pad token: {self.pad_token} is new, the embedding grew by one zero row")
        new_rows, lines = replace_head(network, self.categories, config.seed)
        for line in lines:
            log(line)
        if config.method != "full":
            network = add_lora(network, self.spec, config)
            fuse_layers(network)
        return network, rows, new_rows

    def with_layers(self, layers: int) -> Blueprint:
        """Return the blueprint of the same network with fewer layers."""
        config = copy.deepcopy(self.spec.config)
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
        return dataclasses.replace(self, spec=dataclasses.replace(self.spec, config=config))

    def without_nf4(self) -> Blueprint:
        """Return the blueprint of the LoRA network whose linear layers have the same shapes in plain weights."""
        if self.quantization is None:
            return self
        return dataclasses.replace(self, config=dataclasses.replace(self.config, method="lora"), quantization=None)
