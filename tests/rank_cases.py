"""What the tests of several processes run on each rank; imported by the fork server once."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
import bench_sharding

from qlora_moderation import distributed
from qlora_moderation.assembly import build_classifier
from qlora_moderation.classifier import Classifier, load_classifier
from qlora_moderation.config import EvaluateConfig, MergeConfig, TrainConfig, TuneConfig
from qlora_moderation.distributed import is_main, processes, rank, world_size
from qlora_moderation.errors import Interrupted, ModerationError
from qlora_moderation.evaluate import evaluate
from qlora_moderation.faults import report_fault
from qlora_moderation.loop import Loop
from qlora_moderation.merge import merge_adapter
from qlora_moderation.predict import predict
from qlora_moderation.prediction_config import PredictConfig
from qlora_moderation.scoring import score_pairs
from qlora_moderation.taxonomy import Taxonomy
from qlora_moderation.train import train
from qlora_moderation.tune import tune_model


def silent(_: str) -> None:
    pass


def run_all(cases: list[tuple[str, dict[str, Any]]]) -> list[Any]:
    """Run several cases in one process group: (name of a function of this module, its arguments)."""
    with processes(use_cpu=True, alone=True):
        return [globals()[name](**arguments) for name, arguments in cases]


def learn(options: dict[str, Any]) -> list[str]:
    """Train and return the log."""
    log: list[str] = []
    train(TrainConfig(**options), log.append)
    return log


def predict_rows(options: dict[str, Any]) -> None:
    """Score rows."""
    predict(PredictConfig(**options), silent)


def merge_model(options: dict[str, Any]) -> None:
    """Merge an adapter."""
    merge_adapter(MergeConfig(**options), silent)


def evaluate_model(options: dict[str, Any]) -> None:
    """Evaluate a model."""
    evaluate(EvaluateConfig(**options), silent)


def tune_thresholds(options: dict[str, Any]) -> None:
    """Tune the thresholds of a model."""
    tune_model(TuneConfig(**options), silent)


def score_batches(model: str, batches: list[list[tuple[str, str]]]) -> list[Any]:
    """Score batches of pairs with the ranks together; return the logits of each."""
    classifier = load_classifier(model, use_cpu=True)
    return [score_pairs(classifier, *map(list, zip(*batch, strict=True))).logits for batch in batches]


def run_until_operation(
    job: Callable[[dict[str, Any]], None], options: dict[str, Any], place: str, number: int | None
) -> int:
    """Run a job; SIGKILL this process just before one of its operations on files below a place.

    Args:
        job: function of this module.
        options: of it.
        place: absolute.
        number: of the operation, from 0: opening for writing, renaming, removing, making a directory; None: none.

    Returns:
        How many operations there were.
    """
    seen = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir") or not _is_below(
            arguments[0], place
        ):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)
        seen += 1

    sys.addaudithook(watch)
    job(options)
    return seen


def _is_below(path: Any, place: str) -> bool:
    # shutil.rmtree names files in the directory that it is in
    return isinstance(path, str | os.PathLike) and (not Path(path).is_absolute() or os.fspath(path).startswith(place))


def learn_until(options: dict[str, Any], step: int, number: int, by: int = 0) -> tuple[int, str]:
    """Train, send rank `by` a signal in the middle of `step`; return exit code and status."""
    whole_step = Loop.take_step

    def signalled(self: Loop, now: int) -> dict[str, Any]:
        if now == step and rank() == by:
            os.kill(os.getpid(), number)
        return whole_step(self, now)

    Loop.take_step = signalled
    try:
        train(TrainConfig(**options), silent)
    except Interrupted as stop:
        code = stop.exit_code
    else:
        code = 0
    finally:
        Loop.take_step = whole_step
    distributed.gather_objects(code)  # rank 0 has written by now
    return code, json.loads((Path(options["output_dir"]) / "status.json").read_text())["state"]


def learn_with_full_disk(options: dict[str, Any], step: int, by: int, file_bytes: int = 10**9) -> str:
    """Train; at `step` rank `by` gets no more room for a file than some bytes. Returns what the rank raised."""
    import resource

    from qlora_moderation import export

    whole_step, kept = Loop.take_step, export.FILE_BYTES
    export.FILE_BYTES = file_bytes

    def limited(self: Loop, now: int) -> dict[str, Any]:
        if now == step and rank() == by:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        return whole_step(self, now)

    Loop.take_step = limited
    try:
        train(TrainConfig(**options), silent)
    except ModerationError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        Loop.take_step, export.FILE_BYTES = whole_step, kept
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return "no error"


def open_classifier(options: dict[str, Any]) -> Classifier:
    return build_classifier(TrainConfig(**options), Taxonomy(), torch.device("cpu"), silent)


def score(options: dict[str, Any], prompts: list[str], responses: list[str], budget: int) -> list[Any]:
    """Score all texts, and then the first one, two and none of them: fewer than there are ranks."""
    classifier = open_classifier(options)
    forwards: list[int] = []
    hook = classifier.model.register_forward_pre_hook(lambda _, batch: forwards.append(len(batch[0].last)))
    every = score_pairs(classifier, prompts, responses, max_tokens=budget).logits
    hook.remove()
    few = [score_pairs(classifier, prompts[:n], responses[:n], max_tokens=budget).logits for n in (1, 2, 0)]
    return [every, few, sum(forwards)]


def judge(options: dict[str, Any]) -> dict[str, Any]:
    """Evaluate and return the metrics."""
    from qlora_moderation.config import EvaluateConfig
    from qlora_moderation.evaluate import evaluate

    return evaluate(EvaluateConfig(**options), silent)["metrics"]


def describe_precision(options: dict[str, Any]) -> dict[str, Any]:
    """Return the types that a sharded model computes, keeps and reduces in."""
    from qlora_moderation.adapter import find_head
    from qlora_moderation.sharding import find_layers

    classifier = open_classifier(options)
    model, seen = classifier.model, {}
    layer, head = find_layers(model)[0], find_head(model.classifier)[2]
    layer.register_forward_pre_hook(lambda _, inputs: seen.update(layer=inputs[0].dtype))
    layer.mlp.up_proj.register_forward_hook(
        lambda module, _, out: seen.update(weight=module.weight.dtype, out=out.dtype)
    )
    head.register_forward_hook(lambda module, inputs, out: seen.update(head=module.weight.dtype, logits=out.dtype))
    from qlora_moderation.layout import build_micro_batch

    ids = [window.ids for window in classifier.encoder.encode(["a b c"], ["d e"])]
    logits = model(build_micro_batch(ids, classifier.layout, classifier.pad_id, torch.device("cpu")))
    logits.sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    kept = {p.dtype for p in trained}
    gradients = {p.grad.dtype for p in trained if p.grad is not None}
    return {**seen, "kept": kept, "gradients": gradients, "whole": sum(p.to_local().numel() for p in trained)}


def gather_every_pattern() -> bool:
    """Send an NF4 payload of all 65,536 16-bit patterns, twice over, through fsdp's all-gather in each storage type."""
    from bitsandbytes.nn import Params4bit
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    patterns = torch.arange(65_536, dtype=torch.int32).to(torch.uint16).view(torch.uint8)
    payload = torch.cat([patterns, patterns.flip(0)])
    mesh = init_device_mesh("cpu", (world_size(),))
    for storage in (torch.bfloat16, torch.float16, torch.float32):
        module = torch.nn.Module()
        module.weight = Params4bit(payload.clone().view(storage)[:, None], requires_grad=False, quant_storage=storage)
        module.adapter = torch.nn.Parameter(torch.ones(3, 2))
        fully_shard(module, mesh=mesh)
        module.unshard()
        whole = module.weight.detach().clone().reshape(-1).view(torch.uint8)
        if not torch.equal(whole, payload):
            return False
        module.reshard()
    return True


def find_changed_bytes(options: dict[str, Any]) -> tuple[int, str]:
    """Return how many payloads the guard checks, and what it says when one rank's slice has one other bit."""
    from qlora_moderation.sharding import check_nf4_bytes

    classifier = open_classifier(options)
    count = check_nf4_bytes(classifier.model, classifier.sharding)
    if rank() == world_size() - 1:
        name = list(classifier.sharding.checksums)[1]
        slice_ = classifier.model.get_submodule(name).weight.to_local()
        slice_.reshape(-1).view(torch.uint8)[5] ^= 1
    try:
        check_nf4_bytes(classifier.model, classifier.sharding)
    except ModerationError as error:
        return count, f"{type(error).__name__}: {error}"
    return count, "no error"


def load_and_compare(options: dict[str, Any]) -> dict[str, Any]:
    """Return what this rank holds after loading: bytes of weights, and its gathered weights' checksums."""
    from qlora_moderation.distributed import gather_full, local_part
    from qlora_moderation.sharding import checksum_bytes

    classifier = open_classifier(options)
    held = sum(local_part(p).numel() * p.element_size() for p in classifier.model.parameters())
    whole = {name: checksum_bytes(gather_full(p)) for name, p in classifier.model.named_parameters()}
    buffers = {name: float(b.double().sum()) for name, b in classifier.model.named_buffers()}
    return {"held": held, "whole": whole, "buffers": buffers, "kind": classifier.sharding.kind}


def choose(options: dict[str, Any], memory: int) -> tuple[str, str]:
    """Return the sharding that `auto` chooses on a device with so much memory."""
    from qlora_moderation import capacity

    kept = capacity.device_memory
    capacity.device_memory = lambda device: memory
    try:
        chosen = open_classifier(options).sharding
    finally:
        capacity.device_memory = kept
    return chosen.kind, chosen.reason


def count_bytes(options: dict[str, Any]) -> dict[str, float]:
    """Train and return the bytes that this rank sent in the last step, by collective."""
    return bench_sharding.bytes_of_a_step(options)


def agree_on_errors(kind: str) -> str:
    """Let a work fail on rank 0, or on rank 1 alone; return what this rank raises."""
    from qlora_moderation.errors import DataError

    def fail() -> None:
        raise DataError("row 7 is broken")

    try:
        if kind == "main":
            distributed.on_main(fail)
        else:
            distributed.raise_together(DataError("rank 1 has no disk") if rank() == 1 else None)
    except ModerationError as error:
        return f"{type(error).__name__}: {error}"
    return f"no error {is_main()}"


def report_odd_faults() -> str:
    """Let rank 1 fail, and rank 0 behind it with something that does not look like lost contact; return what each prints."""
    heard = io.StringIO()
    with contextlib.redirect_stderr(heard):
        if rank() == 1:
            report_fault(ValueError("rank 1 has lost its mind"), "train")
        dist.barrier()
        if rank() == 0:
            report_fault(KeyError("a buffer"), "train")
    return heard.getvalue().strip()


def sum_some_gradients() -> list[list[float]]:
    """Rank r has gradients r + 1, and none for the second parameter on rank 0."""
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (3, 2, 1)]
    for index, parameter in enumerate(parameters):
        if index != 1 or rank() > 0:
            parameter.grad = torch.full_like(parameter, rank() + 1.0)
    distributed.sum_gradients(parameters, bucket_bytes=16)
    return [parameter.grad.tolist() for parameter in parameters]


def learn_in_small_files(options: dict[str, Any], file_bytes: int) -> int:
    """Train; weights are written in files of so many bytes. Returns the bytes of whole tensors that this rank wrote."""
    from qlora_moderation import export

    written: list[int] = []
    save = export.save_file

    def noting(tensors: dict[str, torch.Tensor], *arguments: Any, **more: Any) -> None:
        written.append(sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))
        save(tensors, *arguments, **more)

    kept, export.FILE_BYTES, export.save_file = export.FILE_BYTES, file_bytes, noting
    try:
        train(TrainConfig(**options), silent)
    finally:
        export.FILE_BYTES, export.save_file = kept, save
    return sum(written)


def fail(options: dict[str, Any]) -> str:
    """Train and return what this rank raised."""
    try:
        train(TrainConfig(**options), silent)
    except ModerationError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def learn_elsewhere(options: dict[str, Any], root: str) -> str:
    """Train where each rank has a working directory of its own, and a relative `output_dir`."""
    own = Path(root) / f"machine-{rank()}"
    own.mkdir()
    os.chdir(own)
    return fail(options)
