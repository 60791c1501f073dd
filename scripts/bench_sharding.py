#!/usr/bin/env python
"""What several processes cost and gain, measured on this machine: bytes on the wire, pairs a second, memory while loading.

    python scripts/bench_sharding.py [wire] [speed] [memory] [--rows FILE]

Everything runs on the CPU through gloo, each process with one thread. Rows default to the embedded sample.
"""

import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

COMMON = {"eval_strategy": "no", "use_cpu": True, "head_prior": False, "learning_rate": 1e-3}


@contextlib.contextmanager
def counted_bytes():
    """Yield a mapping that fills with the bytes this rank sends, by collective, as ring algorithms send them.

    An all-gather or reduce-scatter of n bytes sends (W - 1) / W of them from each rank, an all-reduce twice that.
    """
    import torch.distributed as dist

    part = (dist.get_world_size() - 1) / dist.get_world_size()
    # fsdp calls the first of each pair from torch 2.13 on, the second before
    whole = {"all_gather_single": (part, 0), "all_gather_into_tensor": (part, 0), "reduce_scatter_single": (part, 1)}
    whole |= {"reduce_scatter_tensor": (part, 1), "all_reduce": (2 * part, 0)}
    sent: dict[str, float] = {}
    inside: list[str] = []

    def count(name, original, share, place):
        def counted(*arguments, **more):
            tensor = [*arguments, *more.values()][place]
            if not inside and tensor.numel() > 1:  # not the loss and the flags, nor one collective through another
                sent[name] = sent.get(name, 0.0) + share * tensor.numel() * tensor.element_size()
            inside.append(name)
            try:
                return original(*arguments, **more)
            finally:
                inside.pop()

        return counted

    originals = {name: getattr(dist, name) for name in whole if hasattr(dist, name)}
    for name, original in originals.items():
        setattr(dist, name, count(name, original, *whole[name]))
    try:
        yield sent
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def bytes_of_a_step(options):
    """Train, and return what this rank sent in the last step."""
    from qlora_moderation.config import TrainConfig
    from qlora_moderation.loop import Loop
    from qlora_moderation.train import train

    last = {}
    whole_step = Loop.take_step

    def take_step(self, step):
        with counted_bytes() as sent:
            record = whole_step(self, step)
        last.clear()
        last.update(sent)
        return record

    Loop.take_step = take_step
    try:
        train(TrainConfig(**options), lambda line: None)
    finally:
        Loop.take_step = whole_step
    return dict(last)


def theory(options, processes):
    """Return (ddp, fsdp) bytes a rank must send in a step of one micro-batch: gradients; weights twice and gradients."""
    import torch

    from qlora_moderation.assembly import build_classifier
    from qlora_moderation.config import TrainConfig
    from qlora_moderation.taxonomy import Taxonomy

    model = build_classifier(TrainConfig(**options), Taxonomy(), torch.device("cpu"), lambda line: None).model
    size = {name: p.numel() * p.element_size() for name, p in model.named_parameters()}
    trained = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    layers = sum(number for name, number in size.items() if ".layers." in name)
    part = (processes - 1) / processes
    # a layer is gathered for the forward and again for the backward pass, what lies around the layers once
    return 2 * part * trained, part * (sum(size.values()) + layers + trained)


def load(options):
    """Return the highest memory of this process while it loads, above what the imports took: (all, anonymous) bytes."""
    from qlora_moderation.assembly import build_classifier
    from qlora_moderation.config import TrainConfig
    from qlora_moderation.distributed import gather_objects, processes
    from qlora_moderation.taxonomy import Taxonomy

    config, highest, done = TrainConfig(**options), {"all": 0, "anonymous": 0}, threading.Event()
    with processes(True, alone=config.sharding == "fsdp") as device:
        import bitsandbytes  # noqa: F401 - imported now, so that it does not count

        def read():
            lines = Path("/proc/self/status").read_text().splitlines()
            found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss")}
            return {"all": sum(found.values()), "anonymous": found["RssAnon"]}

        def watch():
            while not done.wait(0.005):
                for key, value in read().items():
                    highest[key] = max(highest[key], value)

        before = read()
        watcher = threading.Thread(target=watch)
        watcher.start()
        started = time.monotonic()
        classifier = build_classifier(config, Taxonomy(), device, lambda line: None)
        seconds = time.monotonic() - started
        done.set()
        watcher.join()
        after = read()
        del classifier
        mine = {key: highest[key] - before[key] for key in highest} | {"kept": after["all"] - before["all"]}
        return gather_objects(mine | {"seconds": seconds})


def worker(job, options):
    """Run in each process of torchrun; rank 0 prints the result as the last line."""
    result = {"wire": lambda: bytes_in_group(options), "load": lambda: load(options), "train": lambda: learn(options)}[
        job
    ]()
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(result))


def bytes_in_group(options):
    from qlora_moderation.distributed import processes

    with processes(True, alone=True):
        return bytes_of_a_step(options)


def learn(options):
    """Train and return the seconds of each step but the first."""
    from qlora_moderation.config import TrainConfig
    from qlora_moderation.train import train

    train(TrainConfig(**options), lambda line: None)
    lines = (Path(options["output_dir"]) / "metrics.jsonl").read_text().splitlines()
    elapsed = [json.loads(line)["elapsed_seconds"] for line in lines]
    return [after - before for before, after in itertools.pairwise(elapsed)]


def launch(processes, job, options):
    """Run a worker in `processes` processes with one thread each and return its result."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    start = [sys.executable] if processes == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    more = [] if processes == 1 else [f"--nproc_per_node={processes}"]
    command = [*start, *more, str(Path(__file__)), "--worker", job, json.dumps(options)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command[:6])} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def build(place, texts, **shape):
    """Build a LLaMA with random weights."""
    from qlora_moderation.embedded import build_llama_shape

    return str(build_llama_shape(place, texts, steps=0, log=lambda line: None, **shape))


def show_wire(root, rows, texts):
    """Print bytes a rank and step, beside theory, with the extrapolation to 8 processes."""
    backbone = build(root / "wire", texts, hidden_size=256, num_layers=4, vocab_size=1000)
    print("\nbytes sent by each rank in a step of one micro-batch (LLaMA of 4 layers and width 256, fp32)")
    print("| method | sharding | W = 2 | W = 4 | counted / theory | W = 8, extrapolated |\n|---|---|---|---|---|---|")
    for method in ("lora", "qlora", "full"):
        for index, kind in enumerate(("ddp", "fsdp")):
            counted, ratios = [], []
            for processes in (2, 4):
                options = COMMON | {"model_name_or_path": backbone, "train_data_name_or_path": rows, "method": method}
                options |= {"output_dir": str(root / f"wire-{method}-{kind}-{processes}"), "max_steps": 2}
                options |= {"per_device_train_batch_size": 16 // processes, "max_tokens_per_micro_batch": 8192}
                counted.append(sum(launch(processes, "wire", options | {"sharding": kind}).values()))
                ratios.append(counted[-1] / theory(options, processes)[index])
            eight = theory(options, 8)[index] * ratios[-1]
            shown = " | ".join(f"{number / 2**20:.2f} MiB" for number in counted)
            ratio = ", ".join(f"{ratio:.3f}" for ratio in ratios)
            print(f"| {method} | {kind} | {shown} | {ratio} | {eight / 2**20:.2f} MiB |", flush=True)


def show_speed(root, rows, texts, pairs=128, steps=6, repeats=2):
    """Print pairs a second of 1 process and of 2, each process with one thread, in turns; medians over the steps."""
    backbone = build(root / "speed", texts, hidden_size=512, num_layers=4, vocab_size=4000)
    print(
        f"\npairs a second, {pairs} pairs a step, LLaMA of 4 layers and width 512, fp32, one thread a process; in turns"
    )
    print("| method | 1 process | 2, ddp | gain | 2, fsdp | gain |\n|---|---|---|---|---|---|")
    for method in ("lora", "qlora", "full"):
        seconds: dict[str, list[float]] = {"none": [], "ddp": [], "fsdp": []}
        for repeat in range(repeats):
            for kind in seconds:
                processes = 1 if kind == "none" else 2
                options = COMMON | {"model_name_or_path": backbone, "train_data_name_or_path": rows, "method": method}
                options |= {"output_dir": str(root / f"speed-{method}-{kind}-{repeat}"), "max_steps": steps}
                options |= {"sharding": kind, "per_device_train_batch_size": pairs // processes}
                seconds[kind] += launch(processes, "train", options)
        speed = {kind: pairs / statistics.median(times) for kind, times in seconds.items()}
        shown = " | ".join(f"{speed[kind]:.1f} | {speed[kind] / speed['none']:.2f}" for kind in ("ddp", "fsdp"))
        print(f"| {method} | {speed['none']:.1f} | {shown} |", flush=True)


def show_memory(root, rows, texts):
    """Print the peak memory of each rank while a model of about 1 GB is loaded."""
    backbone = build(root / "memory", texts, hidden_size=1024, num_layers=20, vocab_size=1000)
    size = sum(path.stat().st_size for path in Path(backbone).glob("*.safetensors"))
    print(f"\npeak memory while loading a checkpoint of {size / 2**30:.2f} GiB (fp32), above the imports; GiB")
    print("in brackets: without pages of the checkpoint's own file, which the system may drop")
    print(
        "| method | processes | sharding | rank 0 | other ranks, highest | all ranks | kept afterwards, highest | seconds |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for method in ("lora", "qlora"):
        for processes, kind in ((1, "none"), (2, "ddp"), (2, "fsdp"), (4, "ddp"), (4, "fsdp")):
            options = COMMON | {"model_name_or_path": backbone, "train_data_name_or_path": rows, "method": method}
            ranks = launch(processes, "load", options | {"output_dir": str(root / "none"), "sharding": kind})

            def show(some, ranks=ranks, combine=max):
                every, anonymous = (combine(ranks[i][key] for i in some) / 2**30 for key in ("all", "anonymous"))
                return f"{every:.2f} ({anonymous:.2f})"

            others = show(range(1, processes)) if processes > 1 else ""
            every = show(range(processes), combine=sum)
            kept, seconds = max(rank["kept"] for rank in ranks) / 2**30, max(rank["seconds"] for rank in ranks)
            shown = f"{show([0])} | {others} | {every} | {kept:.2f} | {seconds:.0f}"
            print(f"| {method} | {processes} | {kind} | {shown} |", flush=True)


def main():
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], json.loads(sys.argv[3]))
        return
    from qlora_moderation.embedded import render_texts
    from qlora_moderation.sample import build_sample

    arguments = sys.argv[1:]
    rows = None
    if "--rows" in arguments:
        place = arguments.index("--rows")
        rows = str(Path(arguments[place + 1]).resolve())
        del arguments[place : place + 2]
    parts = {"wire": show_wire, "speed": show_speed, "memory": show_memory}
    unknown = [name for name in arguments if name not in parts]
    if unknown:
        sys.exit(f"error: {unknown[0]}: give any of {', '.join(parts)}, and --rows FILE")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        sample = build_sample(seed=0)["train"]
        if rows is None:
            rows = str(root / "rows.jsonl")
            Path(rows).write_text("".join(json.dumps(row) + "\n" for row in sample), encoding="utf-8")
        texts = render_texts(sample) if rows.startswith(folder) else render_file(rows)
        for name in arguments or parts:
            parts[name](root, rows, texts)


def render_file(rows):
    from qlora_moderation.data import load_pairs
    from qlora_moderation.taxonomy import Taxonomy

    taxonomy = Taxonomy()
    pairs = load_pairs(rows, taxonomy)
    return [taxonomy.render(*pair) for pair in zip(pairs.prompts, pairs.responses, strict=True)]


if __name__ == "__main__":
    main()
