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
from qlora_moderation.metadata import write_json
from qlora_moderation.model import ModerationModel

FILE_BYTES = 2 * 10**9


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
    files: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        bytes_ = tensor.numel() * tensor.element_size()
        if files[-1] and size + bytes_ > FILE_BYTES:
            files.append([])
            size = 0
        files[-1].append(name)
        size += bytes_
    places = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    if len(files) == 1:
        places = ["model.safetensors"]
    failure: Exception | None = None
    for index, (place, names) in enumerate(zip(places, files, strict=True)):
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
        config = network.config
        config.architectures, config.dtype = [type(network).__name__], next(iter(tensors.values())).dtype
        config.save_pretrained(str(directory))
        if len(files) > 1:
            where = {name: place for place, names in zip(places, files, strict=True) for name in names}
            total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
            index_file = {"metadata": {"total_size": total}, "weight_map": where}
            write_json(directory / "model.safetensors.index.json", index_file)
