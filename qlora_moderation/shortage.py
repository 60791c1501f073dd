"""The answer to a device that ran out of memory: what was asked for, what was foreseen, what to turn.

In: torch's error and what was decided. Out: one line. Beside steps 6 to 9.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from qlora_moderation.activations import EstimateError
from qlora_moderation.capacity import Capacity
from qlora_moderation.config import TrainConfig
from qlora_moderation.errors import ModerationError
from qlora_moderation.memory import is_shortage
from qlora_moderation.recomputation import Recomputation

_CLEARLY_LESS = 0.9
_LEAST_TOKENS = 256  # below it every kernel waits for the next


class ShortageError(ModerationError):
    """A device has less memory than a step or a forward needs."""


@contextlib.contextmanager
def training_shortage(config: TrainConfig, capacity: Capacity, loading: bool = False) -> Iterator[None]:
    """Turn an out-of-memory error of a training run into one line.

    Args:
        config: of the run.
        capacity: what was decided.
        loading: there are only weights yet, so that what saves activations does not help.

    Raises:
        ShortageError: with the estimate beside the allocation, and the options that are left to turn.
    """
    try:
        yield
    except Exception as error:
        if not is_shortage(error):
            raise
        knobs = [*([] if loading else _list_step_knobs(config, capacity)), *_list_weight_knobs(config, capacity)]
        raise ShortageError(
            f"--output_dir {config.output_dir}: training ran out of memory on {capacity.device_type} with {_allocated()} of "
            f"{capacity.memory / 2**30:.2f} GiB; the estimate was {capacity.describe()}; {_advise(knobs)}"
        ) from None


@contextlib.contextmanager
def scoring_shortage(place: str, knob: str, now: int, least: int) -> Iterator[None]:
    """Turn an out-of-memory error of scoring into one line.

    Args:
        place: what the line begins with.
        knob: the option that says how much one forward takes.
        now: its value.
        least: the lowest that makes sense.

    Raises:
        ShortageError: with the value to use.
    """
    try:
        yield
    except Exception as error:
        if not is_shortage(error):
            raise
        lower = max(least, now // 2)
        advice = _advise([f"{knob} {lower}"] if lower < now else [])
        raise ShortageError(
            f"{place}: scoring ran out of memory with {_allocated()} at {knob} {now}; {advice}"
        ) from None


@contextlib.contextmanager
def loading_shortage(place: str, device: torch.device) -> Iterator[None]:
    """Turn an out-of-memory error of opening a model for scoring into one line.

    Raises:
        ShortageError: with what is left to do.
    """
    try:
        yield
    except Exception as error:
        if not is_shortage(error):
            raise
        advice = "use one with more memory" + ("" if device.type == "cpu" else ", or stay on the CPU with use_cpu")
        raise ShortageError(
            f"{place}: its weights do not fit into the memory of this device, {device}, with {_allocated()}; {advice}"
        ) from None


def _list_step_knobs(config: TrainConfig, capacity: Capacity) -> list[str]:
    """Return the options that make a step smaller and still can be turned, the cheapest first, with the value to use."""
    setting, knobs = capacity.setting, []
    if setting.recomputation != "all":
        knobs.append(f"--gradient_checkpointing {_find_mode(capacity)}")
    tokens = max(config.max_length, setting.tokens // 2, _LEAST_TOKENS)
    if tokens < setting.tokens:
        knobs.append(f"--max_tokens_per_micro_batch {tokens}")
    return knobs


def _list_weight_knobs(config: TrainConfig, capacity: Capacity) -> list[str]:
    """Return the options that make the weights smaller and still can be turned."""
    methods = []
    if config.method != "qlora" and capacity.blueprint.spec.kind == "decoder":
        methods.append("--method qlora")
    if capacity.setting.processes > 1 and capacity.setting.sharding != "fsdp":
        methods.append("--sharding fsdp")
    return [" / ".join(methods)] if methods else []


def _find_mode(capacity: Capacity) -> Recomputation:
    """Return `selective` where it saves enough, else `all`."""
    if capacity.setting.recomputation == "none":
        with contextlib.suppress(EstimateError):
            now, then = capacity.estimate(), capacity.estimate(recomputation="selective")
            # what ran out although it was foreseen to fit needs clearly less, not just an estimate that fits
            if then.fits(capacity.memory, capacity.device_type) and then.total <= _CLEARLY_LESS * now.total:
                return "selective"
    return "all"


def _advise(knobs: list[str]) -> str:
    if not knobs:
        return "no option is left to turn; use a device with more memory, or more of them"
    return f"use {', or '.join(knobs)}"


def _allocated() -> str:
    if not torch.cuda.is_initialized():
        return "an unknown allocation"
    return f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB allocated"
