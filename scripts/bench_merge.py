#!/usr/bin/env python
"""Merging at scale: memory and time of a LLaMA-7B-shaped merge, against a plain copy and against NF4 rounding alone.

    python scripts/bench_merge.py FOLDER [--layers 32] [--width 4096] [--feed_forward 11008] [--bin]

Builds a random bfloat16 checkpoint and a QLoRA adapter in FOLDER (13.5 GB, and as much again for each result; removed at the
end), merges with `original` and `dequantized`, each in a process of its own, and prints one table.
"""

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

BLOCK = 8 * 2**20


def build_checkpoint(folder, layers, width, feed_forward, bin_files):
    """Write a LLaMA of the given shape, tensor by tensor, with random weights cut from one buffer."""
    from transformers import LlamaConfig

    from qlora_moderation.embedded import build_tokenizer, render_texts
    from qlora_moderation.sample import build_sample
    from qlora_moderation.tensor_files import TensorWriter, plan_files

    folder.mkdir(parents=True)
    shapes = {"model.embed_tokens.weight": (32000, width)}
    for i in range(layers):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
        shapes |= {f"{layer}mlp.{name}_proj.weight": (feed_forward, width) for name in ("gate", "up")}
        shapes |= {f"{layer}mlp.down_proj.weight": (width, feed_forward)}
        shapes |= {f"{layer}{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (width,), "lm_head.weight": (32000, width)}
    sizes = {name: 2 * torch.Size(shape).numel() for name, shape in shapes.items()}
    largest = max(sizes.values()) // 2
    noise = torch.randn(largest + 10_000_000, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()

    def make(index, name):
        count = sizes[name] // 2
        if len(shapes[name]) == 1:
            return torch.ones(shapes[name], dtype=torch.bfloat16)
        start = (index * 7919) % (len(noise) - count)
        weight = noise[start : start + count].view(shapes[name])
        # what adds to the residual stream starts smaller, as is usual, or else rounding grows from layer to layer
        adds = name.endswith(("o_proj.weight", "down_proj.weight"))
        return (weight / (2 * layers) ** 0.5).bfloat16() if adds else weight

    order = {name: index for index, name in enumerate(shapes)}
    if bin_files:
        where = {}
        for file, names in plan_files(sizes, 10 * 10**9).items():
            part = file.replace("model", "pytorch_model").replace(".safetensors", ".bin")
            torch.save({name: make(order[name], name).clone() for name in names}, folder / part)
            where |= dict.fromkeys(names, part)
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        with TensorWriter(folder, {name: (shape, torch.bfloat16) for name, shape in shapes.items()}) as writer:
            for name in shapes:
                writer.write(name, 0, make(order[name], name))
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=width // 128,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    build_tokenizer(render_texts(build_sample()["train"]), vocab_size=600).save_pretrained(folder)


def build_adapter(folder, base):
    """Write a QLoRA adapter on all linear layers, with factors as large as training makes them."""
    from peft import LoraConfig
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoTokenizer

    from qlora_moderation.metadata import ModelMetadata, Quantization
    from qlora_moderation.taxonomy import Taxonomy
    from qlora_moderation.thresholds import Thresholds

    folder.mkdir()
    config = AutoConfig.from_pretrained(base)
    wide, narrow = config.intermediate_size, config.hidden_size
    generator = torch.Generator().manual_seed(1)
    tensors = {"base_model.model.score.weight": torch.randn(14, narrow, generator=generator) * 0.01}
    for i in range(config.num_hidden_layers):
        for block, name, rows, columns in [
            *(("self_attn", f"{n}_proj", narrow, narrow) for n in "qkvo"),
            *(("mlp", f"{n}_proj", wide, narrow) for n in ("gate", "up")),
            ("mlp", "down_proj", narrow, wide),
        ]:
            layer = f"base_model.model.model.layers.{i}.{block}.{name}"
            tensors[f"{layer}.lora_A.weight"] = torch.randn(16, columns, generator=generator) / columns**0.5
            tensors[f"{layer}.lora_B.weight"] = torch.randn(rows, 16, generator=generator) * 0.002
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    names = {f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")}
    settings = LoraConfig(task_type="SEQ_CLS", r=16, lora_alpha=32, target_modules=names, inference_mode=True)
    settings.base_model_name_or_path = str(base)
    settings.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    taxonomy = Taxonomy()
    metadata = ModelMetadata(
        taxonomy, 512, "qlora", "adapter", str(base), pad_token="<unk>", quantization=Quantization(True, "bfloat16")
    )
    metadata.save(folder)
    Thresholds.default(taxonomy).save(folder, taxonomy)


def copy_plainly(source, target):
    """Copy a checkpoint's weights block by block, to the disk; return (seconds, bytes)."""
    target.mkdir()
    started, total = time.monotonic(), 0
    for file in sorted([*source.glob("*.safetensors"), *source.glob("*.bin")]):
        with file.open("rb", buffering=0) as reader, (target / file.name).open("wb", buffering=0) as writer:
            while block := reader.read(BLOCK):
                writer.write(block)
                total += len(block)
            import os

            os.fsync(writer.fileno())
    return time.monotonic() - started, total


def round_alone(base, function):
    """Round every linear weight of a checkpoint, read beforehand, over all cores; return the seconds of rounding."""
    from qlora_moderation.tensor_files import find_tensors

    places = {name: place for name, place in find_tensors(str(base)).items() if name.endswith("proj.weight")}
    threads, seconds = torch.get_num_threads(), 0.0
    groups = list(places.values())
    with ThreadPoolExecutor(threads, "round", torch.set_num_threads, (1,)) as pool:
        for start in range(0, len(groups), 4 * threads):
            weights = [place.read() for place in groups[start : start + 4 * threads]]
            began = time.monotonic()
            list(pool.map(function, weights))
            seconds += time.monotonic() - began
    torch.set_num_threads(threads)
    return seconds


@dataclasses.dataclass
class Measured:
    seconds: float
    write_seconds: float
    peak_anonymous_gib: float
    max_rss_gib: float
    log: str


def run_merge(adapter, output, base):
    """Merge in a process of its own and watch its memory."""
    command = [
        *("/usr/bin/time", "-v", sys.executable, str(ROOT / "scripts" / "merge_adapter.py"), "--use_cpu", "True"),
        *("--adapter_path", str(adapter), "--output_dir", str(output), "--base", base),
    ]
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    peak = 0

    def watch():
        nonlocal peak
        while process.poll() is None:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            for child in children:
                try:
                    status = Path(f"/proc/{child}/status").read_text()
                except OSError:
                    continue
                peak = max(peak, *(int(x.split()[1]) for x in status.splitlines() if x.startswith("RssAnon")), 0)
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    log = process.communicate()[0]
    watcher.join()
    if process.returncode:
        sys.exit(log)
    rss = int(log.split("Maximum resident set size (kbytes): ")[1].split()[0])
    written = float(log.split(" GB written in ")[1].split(" s")[0])
    shown = log.split("\tCommand being timed")[0]
    return Measured(time.monotonic() - started, written, peak / 2**20, rss / 2**20, shown)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--feed_forward", type=int, default=11008)
    parser.add_argument("--bin", action="store_true", help="write the base as pytorch_model-*.bin of 10 GB")
    given = parser.parse_args()
    folder = given.folder / "bench_merge"
    if folder.exists():
        sys.exit(f"{folder}: exists; remove it or give another folder")
    try:
        base, adapter = folder / "base", folder / "adapter"
        build_checkpoint(base, given.layers, given.width, given.feed_forward, given.bin)
        build_adapter(adapter, base)
        measure(folder, base, adapter)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure(folder, base, adapter):
    from qlora_moderation.nf4 import round_through_nf4, round_with_bitsandbytes

    copies, merges = [], {}
    for kind in ("original", "dequantized"):  # a copy before each: the disk is not equally fast all the time
        copies.append(copy_plainly(base, folder / "copy"))
        shutil.rmtree(folder / "copy")
        merges[kind] = run_merge(adapter, folder / kind, kind)
        print(merges[kind].log, flush=True)
        shutil.rmtree(folder / kind)
    ours = round_alone(base, lambda weight: round_through_nf4(weight, True))
    theirs = round_alone(base, lambda weight: round_with_bitsandbytes(weight, True))
    size = copies[0][1]
    print(f"base: {size / 1e9:.2f} GB, {torch.get_num_threads()} threads")
    print("| | seconds | GB/s | peak anonymous GiB | max RSS GiB |\n|---|---|---|---|---|")
    for index, (seconds, _) in enumerate(copies):
        print(f"| plain copy {index + 1} | {seconds:.1f} | {size / seconds / 1e9:.2f} | | |")
    for kind, found in merges.items():
        memory = f"{found.peak_anonymous_gib:.2f} | {found.max_rss_gib:.2f}"
        print(f"| {kind}, written | {found.write_seconds:.1f} | {size / found.write_seconds / 1e9:.2f} | | |")
        print(f"| {kind}, with proof and start-up | {found.seconds:.1f} | | {memory} |")
    print(f"| NF4 rounding alone, ours | {ours:.1f} | | | |\n| NF4 rounding alone, bitsandbytes | {theirs:.1f} | | | |")
    copied = sum(seconds for seconds, _ in copies) / len(copies)
    written = {kind: found.write_seconds for kind, found in merges.items()}
    print(f"original: {copied / written['original']:.2f} of the speed of a copy (goal 0.5)")
    print(f"dequantized / rounding by bitsandbytes: {written['dequantized'] / theirs:.2f} (goal 1.15)")
    print(f"dequantized / rounding by ours: {written['dequantized'] / ours:.2f}; / (rounding by ours + copy):", end=" ")
    print(f"{written['dequantized'] / (ours + copied):.2f}")


if __name__ == "__main__":
    main()
