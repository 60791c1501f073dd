"""The processes of a run: who am I, and what do the others say. One process is world size 1, not another code path.

In: the variables that torchrun sets. Out: a process group, and the collectives that this library needs. All of them do
nothing where there is no group.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor

from qlora_moderation.errors import ConfigError, Interrupted, SaidByMainError

T = TypeVar("T")
_STEP_TIMEOUT = datetime.timedelta(minutes=30)
_WORK_TIMEOUT = datetime.timedelta(hours=24)  # while rank 0 downloads, tokenises or writes
BUCKET_BYTES = 256 * 2**20
"""Of gradients that replicas add up in one message."""

_patient: dist.ProcessGroup | None = None


def rank() -> int:
    """Return this process's number, 0 to W - 1."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return W."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Say whether this is the process that speaks and writes."""
    return rank() == 0


def launched_processes() -> int:
    """Return how many processes torchrun started; known before they have met."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def silent(_: str) -> None:
    """Take a log line and drop it."""


def current_device(use_cpu: bool) -> torch.device:
    """Return this process's CUDA device where there is one and it is wanted, else the CPU."""
    if use_cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


@contextlib.contextmanager
def processes(use_cpu: bool, alone: bool = False) -> Iterator[torch.device]:
    """Join the processes that torchrun started and yield this one's device.

    Args:
        use_cpu: stay on the CPU; the ranks then talk through gloo, else through NCCL.
        alone: make a group even of one process, as fsdp needs it.

    Raises:
        ConfigError: more processes than GPUs, or only half of the variables.
    """
    global _patient
    several = launched_processes() > 1
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if several and missing:
        raise ConfigError(
            f"WORLD_SIZE is {launched_processes()}, but {', '.join(missing)} is not set; start with torchrun or "
            "scripts/launch.sh, or unset WORLD_SIZE"
        )
    device = take_device(use_cpu)
    cuda = device.type == "cuda"
    if dist.is_initialized() or not (several or alone):
        yield device
        return
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if several:
        dist.init_process_group(backend, timeout=_STEP_TIMEOUT, device_id=device if cuda else None)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    _patient = dist.new_group(backend="gloo", timeout=_WORK_TIMEOUT)
    together = world_size() == 1  # leaving on an error: the others may be waiting in a collective, so say no goodbye
    try:
        yield device
        together = True
    except Interrupted:
        together = True
        raise
    finally:
        group, _patient = _patient, None
        if together:
            dist.barrier(group=group)
            dist.destroy_process_group()


def take_device(use_cpu: bool) -> torch.device:
    """Make the GPU that torchrun means for this process its current one, and return this process's device.

    Raises:
        ConfigError: more processes than GPUs.
    """
    if torch.cuda.is_available() and not use_cpu:
        _take_gpu(int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count())
    return current_device(use_cpu)


def _take_gpu(local_rank: int, gpus: int) -> None:
    if gpus == 1 and "SLURM_PROCID" in os.environ:
        local_rank = 0  # Slurm can show each task a GPU of its own
    if local_rank == gpus:
        raise ConfigError(
            f"{os.environ.get('LOCAL_WORLD_SIZE', local_rank + 1)} processes on a machine with {gpus} GPUs; lower "
            "--nproc_per_node, or stay on the CPU with --use_cpu True"
        )
    if local_rank > gpus:
        raise SaidByMainError("the first process without a GPU says it")
    torch.cuda.set_device(local_rank)


def speaks_first(message: str) -> bool:
    """Say whether no other rank has asked this for the same message: what all ranks meet is reported once."""
    if world_size() == 1:
        return True
    try:
        store: Any = dist.distributed_c10d._get_default_store()
        return store.add(f"said {zlib.crc32(message.encode())}", 1) == 1
    except Exception:  # the process that kept the store has gone: better twice than never
        return True


def first_to_fail() -> int | None:
    """Note that this rank has an error of its own, and return the rank that was the first to say so; None: nobody can tell."""
    own = int(os.environ.get("RANK", "0"))
    if world_size() == 1:
        return own
    try:
        store: Any = dist.distributed_c10d._get_default_store()
        return int(store.compare_set("failed", "", str(own)))
    except Exception:  # the process that kept the store has gone, which it does behind the first to fail
        return None


def is_lost_contact(error: BaseException | None) -> bool:
    """Say whether an error, or what it followed from, only tells that another rank has gone."""
    signs = ("Connection closed by peer", "Connection reset by peer", "gloo/transport", "NCCL communicator was aborted")
    while error is not None:
        if isinstance(error, dist.DistError | ConnectionError) or any(sign in str(error) for sign in signs):
            return True
        error = error.__context__
    return False


def patient_group() -> dist.ProcessGroup | None:
    """Return the group for words and files: on the CPU, and in no hurry."""
    return _patient


def on_main(work: Callable[[], T]) -> T:
    """Let rank 0 do `work` and hand its result, which must be picklable, to all ranks.

    Raises:
        SaidByMainError: on the other ranks, where the work failed; rank 0 raises the error itself.
    """
    if world_size() == 1:
        return work()
    answer: list[Any] = [False, None]
    if not is_main():
        dist.broadcast_object_list(answer, src=0, group=_patient)
        if not answer[0]:
            raise SaidByMainError("rank 0 stopped")
        return answer[1]
    try:
        answer = [True, work()]
    finally:
        dist.broadcast_object_list(answer, src=0, group=_patient)
    return answer[1]


def gather_objects(value: T) -> list[T]:
    """Return every rank's picklable `value`, in the order of the ranks."""
    values: list[Any] = [value]
    if world_size() > 1:
        values = [None] * world_size()
        dist.all_gather_object(values, value, group=_patient)
    return values


def raise_together(error: Exception | None) -> None:
    """Let an error that some ranks met stop all: the first of them speaks.

    Raises:
        Exception: the given one on the first rank that has one, `SaidByMainError` on the others.
    """
    failed = [index for index, fails in enumerate(gather_objects(error is not None)) if fails]
    if failed and error is not None and failed[0] == rank():
        raise error
    if failed:
        raise SaidByMainError(f"rank {failed[0]} stopped")


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Add up a tensor over all ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def highest_over_ranks(number: int) -> int:
    """Return the highest of the ranks' numbers; nothing waits for a GPU."""
    if world_size() == 1:
        return number
    box = torch.tensor([number])  # on the CPU
    dist.all_reduce(box, dist.ReduceOp.MAX)
    return int(box)


def sum_gradients(parameters: Sequence[torch.nn.Parameter], bucket_bytes: int = BUCKET_BYTES) -> None:
    """Add up the gradients of replicated parameters over all ranks, in fp32 and in as few messages as `bucket_bytes` allows.

    A parameter without a gradient counts as zero, so that all ranks send the same whatever texts they had.
    """
    bucket: list[torch.nn.Parameter] = []
    size = 0
    for parameter in parameters:
        bucket.append(parameter)
        size += 4 * parameter.numel()
        if size >= bucket_bytes:
            _sum_bucket(bucket)
            bucket, size = [], 0
    if bucket:
        _sum_bucket(bucket)


def _sum_bucket(bucket: Sequence[torch.nn.Parameter]) -> None:
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1).float() for p in bucket])
    dist.all_reduce(flat)
    for parameter, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
        parameter.grad = part.view_as(parameter).to(parameter.dtype)


def gather_full(tensor: torch.Tensor) -> torch.Tensor:
    """Return the whole of a tensor that may be sharded; all ranks take part."""
    whole: Any = tensor.detach()
    return whole.full_tensor() if isinstance(whole, DTensor) else whole


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this rank holds of a tensor that may be sharded."""
    part: Any = tensor.detach()
    return part.to_local() if isinstance(part, DTensor) else part


def add_whole(tensor: torch.Tensor, whole: torch.Tensor) -> None:
    """Add `whole`, which all ranks hold, to a tensor that may be sharded; each rank adds its part, without a message."""
    if isinstance(tensor, DTensor):
        whole = distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None)
    own = local_part(tensor)
    own.add_(local_part(whole).to(own.device))
