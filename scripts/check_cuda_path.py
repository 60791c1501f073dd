#!/usr/bin/env python
"""The CUDA path without a GPU: real training steps and scoring on tensors that claim to lie on one and hold no values.

    ./scripts/check_cuda_path.sh

Shapes, types and devices are those of a GPU (torch's FakeTensorMode), so what would fail there for one of them fails here.
Checked besides: no step waits for the device, scoring waits once for 2,048 texts, and packed texts in half precision get the
kernel for texts of any length. Not seen: numbers, speed, memory, NCCL, the loading of weights onto a GPU.
"""

import collections
import ctypes
import os
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

library = ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)  # before torch, which looks for CUDA once

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
warnings.filterwarnings("ignore", category=FutureWarning)

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from qlora_moderation.assembly import build_classifier
from qlora_moderation.config import TrainConfig
from qlora_moderation.embedded import build_llama_shape, render_texts
from qlora_moderation.loop import Loop
from qlora_moderation.plan import build_plan, load_material
from qlora_moderation.sample import build_sample, write_sample
from qlora_moderation.scoring import score_pairs
from qlora_moderation.taxonomy import Taxonomy

library.pretend_cuda()
DEVICE, LAYERS, STEPS = torch.device("cuda:0"), 4, 3
SETTINGS = [
    {"method": method, "gradient_checkpointing": recomputation}
    for method in ("lora", "qlora", "full")
    for recomputation in ("none", "selective", "all")
] + [
    {"method": "qlora", "lora_dropout": 0.1, "gradient_checkpointing": "all"},
    {"method": "lora", "dtype": "float16"},
    {"method": "lora", "dtype": "float32"},
    {"method": "lora", "use_dora": True},
    {"method": "lora", "optim": "adamw_torch", "max_grad_norm": 0.0},
]


class PretendedCuda(TorchDispatchMode):
    """Runs what concerns the GPU without values; counts operations by name, and notes where the host would wait.

    Attributes:
        operations: how often each ran, but for views.
        waits: operation and place of each.
    """

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.forget()

    def forget(self):
        self.operations, self.waits = collections.Counter(), []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        keywords, name = keywords or {}, function.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((arguments, keywords)) if isinstance(leaf, torch.Tensor)]
        target = keywords.get("device")
        to = None if target is None else torch.device(target).type
        pretended = [tensor for tensor in tensors if isinstance(tensor, FakeTensor)]
        if not pretended and to != "cuda":
            return function(*arguments, **keywords)
        crosses = name == "_to_copy" and to is not None and to != tensors[0].device.type
        if (crosses and not keywords.get("non_blocking")) or name in ("_local_scalar_dense", "nonzero", "equal"):
            self.waits.append(f"{name} at {_find_place()}")
        views = any(
            value.alias_info is not None and not value.alias_info.is_write for value in function._schema.returns
        )
        if not views and function.namespace != "prim":
            self.operations[name] += 1
        if name == "_local_scalar_dense":
            return tensors[0].dtype.is_floating_point and 0.0  # a number, or a switch that is off
        if crosses and to == "cpu":
            return torch.zeros(tensors[0].shape, dtype=keywords.get("dtype") or tensors[0].dtype)
        arguments, keywords = tree_map(self._imagine, (arguments, keywords))
        with self.fake:
            return function(*arguments, **keywords)

    def _imagine(self, value):
        real = isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor)
        return self.fake.from_tensor(value) if real else value

    def move(self, module):
        """Let weights and buffers of a loaded network lie on the device."""
        moved = {}

        def place(tensor):
            if id(tensor) not in moved:
                with self.fake:
                    moved[id(tensor)] = (torch.empty(tensor.shape, dtype=tensor.dtype, device=DEVICE), tensor)
            return moved[id(tensor)][0]

        for part in module.modules():
            for table in (part._parameters, part._buffers):
                for name, old in table.items():
                    if isinstance(old, nn.Parameter):
                        new = nn.Parameter(place(old), requires_grad=old.requires_grad)
                        new.__dict__.update(old.__dict__)
                        table[name] = new
                    elif old is not None:
                        table[name] = place(old)
                    for state in filter(None, (getattr(old, "quant_state", None),)):
                        for each in filter(None, (state, state.state2)):
                            each.absmax, each.code = place(each.absmax), place(each.code)
                        state.offset = None if state.offset is None else place(state.offset)


def _find_place():
    frames = [frame for frame in traceback.extract_stack() if "qlora_moderation" in frame.filename]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"


def stand_in_for_cuda():
    """Answer what torch asks of CUDA beside tensors: no memory is pinned, nothing is started."""
    torch.Tensor.pin_memory = lambda tensor: tensor
    torch.cuda._lazy_init = lambda: None
    torch.cuda.is_initialized = lambda: True
    torch.cuda.current_device = lambda: 0
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda *_, **__: True


def check(config, rows):
    """Take some steps and score some pairs; returns what was counted in the last step, and what is wrong."""
    cuda = PretendedCuda()
    classifier = build_classifier(config, Taxonomy(), torch.device("cpu"), lambda line: None)
    material = load_material(config, classifier, lambda line: None)
    cuda.move(classifier.model)
    classifier.model.device = DEVICE
    with cuda:
        plan = build_plan(config, len(material.training), torch.device("cpu"))
        loop = Loop(config, classifier, material, plan, lambda line: None)
        classifier.model.train()
        for step in range(1, STEPS + 1):
            cuda.forget()
            record = loop.take_step(step)
        operations, faults = cuda.operations, [f"a step waits: {wait}" for wait in cuda.waits if loop.reads_late]
        if loop.reads_late and record["loss"].device != DEVICE:
            faults.append("the loss does not lie on the device")
        kernels, stock = operations["_varlen_attn"], operations["_safe_softmax"]
        half, packed = config.dtype != "float32", classifier.layout == "packed"
        if packed and half and (stock or kernels < LAYERS or operations["_varlen_attn_backward"] < LAYERS):
            faults.append(f"{kernels} calls of the kernel for texts of any length, {stock} of another attention")
        cuda.forget()
        scores = score_pairs(classifier, rows["prompt"], rows["response"])
        if len(cuda.waits) != 1 or scores.logits.shape != (len(rows["prompt"]), len(Taxonomy().categories)):
            faults.append(f"scoring waits {len(cuda.waits)} times: {', '.join(cuda.waits)}")
    return operations, faults


def main():
    """Check every setting; exit code 1 where one has a fault."""
    stand_in_for_cuda()
    failed = False
    print(f"torch {torch.__version__}; operations without views of a step of 16 pairs, {LAYERS} layers of width 64")
    print("| setting | operations | attention kernels | faults |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as place:
        data = write_sample(Path(place) / "data", seed=0)["train"]
        texts = build_sample(seed=0)["train"][:300]
        shape = {"hidden_size": 64, "num_layers": LAYERS, "vocab_size": 600, "steps": 0}
        backbone = build_llama_shape(Path(place) / "backbone", render_texts(texts), **shape, log=lambda line: None)
        rows = {name: [row[name] for row in texts[:100]] for name in ("prompt", "response")}
        for setting in SETTINGS:
            base = {"dtype": "bfloat16", "layout": "packed", "learning_rate": 1e-3, "max_steps": STEPS, "use_cpu": True}
            paths = {"model_name_or_path": str(backbone), "train_data_name_or_path": str(data), "output_dir": place}
            config = TrainConfig(
                **paths, **base | {"max_length": 128, "cache_dir": None, "eval_strategy": "no"} | setting
            )
            name = ", ".join(str(value) if key == "method" else f"{key} {value}" for key, value in setting.items())
            try:
                operations, faults = check(config, rows)
            except Exception as error:
                traceback.print_exc()
                operations, faults = collections.Counter(), [f"{type(error).__name__}: {error}".splitlines()[0]]
            failed = failed or bool(faults)
            print(f"| {name} | {operations.total()} | {operations['_varlen_attn']} | {'; '.join(faults)} |", flush=True)
    print("check of the CUDA path: " + ("FAILED" if failed else "passed"))
    return int(failed)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
