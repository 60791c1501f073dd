"""Trained weights as files that stock libraries load: an adapter in PEFT's format, or a whole classifier.

In: a trained model, sharded or not; all ranks take part. Out: safetensors in a directory. Step 10.
"""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from qlora_moderation.backbone import quiet
from qlora_moderation.distributed import gather_full, is_main, rank, world_size
from qlora_moderation.model import ModerationModel
from qlora_moderation.tensor_files import FILE_BYTES, plan_files, write_index


def write_weights(model: ModerationModel, directory: Path) -> None:
    """Write the adapter and what is trained beside it, or the whole classifier; the frozen base is never gathered."""
    network = model.network
    if isinstance(network, PeftModel):
        state = {name: gather_full(p).cpu() for name, p in network.named_parameters() if p.requires_grad}
        if is_main():
            with quiet():
                network.save_pretrained(str(directory), state_dict=state, save_embedding_layers=False)
    elif any(isinstance(parameter, DTensor) for parameter in network.parameters()):
        _write_slices(network, directory)
    elif is_main():
        with quiet():
            network.save_pretrained(str(directory), max_shard_size=FILE_BYTES)


def _write_slices(network: PreTrainedModel, directory: Path) -> None:
    """Write a sharded classifier, each file by another rank: none holds more than one file of whole tensors at a time."""
    tensors = network.state_dict()
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    files = plan_files(sizes, FILE_BYTES)
    failure: Exception | None = None
    for index, (place, names) in enumerate(files.items()):
        whole: dict[str, torch.Tensor] = {}
        for name in names:
            tensor = gather_full(tensors[name])
            if index % world_size() == rank():
                whole[name] = tensor.cpu().contiguous()
        try:
            if whole and failure is None:
                save_file(whole, directory / place, metadata={"format": "pt"})
        except Exception as error:  # the others are waiting in the next gather: keep step, speak afterwards
            failure = error
    if failure is not None:
        raise OSError(str(failure))
    if is_main():
        write_config(network, directory, next(iter(tensors.values())).dtype)
        write_index(directory, files, sum(sizes.values()))


def write_config(network: PreTrainedModel, directory: Path, dtype: torch.dtype) -> None:
    """Write the configuration of a classifier whose weights are written by us."""
    config = network.config
    config.architectures, config.dtype = [type(network).__name__], dtype
    config.save_pretrained(str(directory))
