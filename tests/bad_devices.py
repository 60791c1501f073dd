"""Bad devices: types, GPUs and processes that are not there."""

from __future__ import annotations

import torch
from workbench import case


@case("--dtype bfloat16: this cpu device has no bfloat16 units; use --dtype float32")
def a_type_that_the_device_lacks(bench):
    bench.monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    return bench.train(dtype="bfloat16")


@case("processes on a machine with 2 GPUs; lower --nproc_per_node, or stay on the CPU with --use_cpu True")
def more_processes_than_gpus(bench):
    bench.monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    bench.monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    bench.monkeypatch.setenv("LOCAL_RANK", "2")
    return bench.train(use_cpu=False)


@case("WORLD_SIZE is 2, but RANK, MASTER_ADDR, MASTER_PORT is not set; start with torchrun or scripts/launch.sh")
def processes_that_cannot_meet(bench):
    bench.monkeypatch.setenv("WORLD_SIZE", "2")
    return bench.train()


@case("merge runs in one process; start it without torchrun")
def several_processes_for_one_job(bench):
    bench.monkeypatch.setenv("WORLD_SIZE", "2")
    return bench.merge()
