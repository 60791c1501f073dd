"""What a run's record and a report of a bug say of the machine: versions, processor, GPUs; torch is not imported.

In: nothing. Out: a JSON-ready mapping, and lines for `--version`.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = (
    "qlora-moderation", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "tokenizers",
    "safetensors", "scikit-learn", "numpy",
)  # fmt: skip
_MORE_PACKAGES = ("scipy", "pyarrow", "matplotlib", "huggingface-hub", "fastapi", "uvicorn", "ray", "flash-attn")
_DRIVER_SECONDS = 5.0


def find_versions(names: tuple[str, ...]) -> dict[str, str]:
    """Return the versions of the packages that are installed."""
    versions = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def describe_environment() -> dict[str, Any]:
    """Return Python's, the system's and the packages' versions."""
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": find_versions(PACKAGES),
    }


def describe_versions() -> list[str]:
    """Return what a report of a bug needs, as lines; no package is imported and no GPU is touched."""
    versions = find_versions((*PACKAGES, *_MORE_PACKAGES))
    own = versions.pop("qlora-moderation", None)
    facts = {
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "system": platform.platform(),
        "processor": f"{_name_processor()}, {_count_cores()}{_describe_memory()}",
        **versions,
        "CUDA of torch": _find_torch_build(),
        "cuDNN": ", ".join(f"{name} {version}" for name, version in _find_cudnn().items()),
        "GPU": _ask_driver(),
        "variables": ", ".join(f"{name}={os.environ[name]}" for name in _VARIABLES if name in os.environ),
    }
    width = max(map(len, facts))
    lines = [f"{name:{width}}  {fact}" for name, fact in facts.items() if fact]
    return [f"qlora-moderation {own or '(a checkout that is not installed)'}", *lines]


_VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", "PYTORCH_CUDA_ALLOC_CONF", "WORLD_SIZE")


def _name_processor() -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def _count_cores() -> str:
    cores = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    return f"{cores} cores" + (f", {usable} of them usable here" if usable != cores else "")


def _describe_memory() -> str:
    with contextlib.suppress(AttributeError, ValueError, OSError):
        return f", {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
    return ""


def _find_torch_build() -> str:
    """Read `torch/version.py` instead of importing torch, which takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return ""
    with contextlib.suppress(OSError):
        text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
        for kind in ("cuda", "hip"):
            found = re.search(rf"^{kind}\b[^=]*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
            if found:
                return found[1] if kind == "cuda" else f"none (ROCm {found[1]})"
        return "none (a build for the CPU)"
    return ""


def _find_cudnn() -> dict[str, str]:
    return find_versions(("nvidia-cudnn-cu11", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13"))


def _ask_driver() -> str:
    """Return what the driver's own tool says: it answers where torch cannot, too."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "none found (no nvidia-smi)"
    command = [tool, "--query-gpu=name,memory.total,driver_version,compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_DRIVER_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi does not answer ({type(error).__name__})"
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    if done.returncode or not lines:
        return f"nvidia-smi ended with {done.returncode}: {' '.join((done.stderr or done.stdout).split())[:160]}"
    counted = {line: lines.count(line) for line in lines}
    return "; ".join(f"{count} x {line}" for line, count in counted.items()) + " (memory, driver, compute capability)"
