"""Runs a function in W processes that talk through gloo, as torchrun would start them.

A fork server imports the heavy libraries once; every case then costs a fork, not an import.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

_TESTS = Path(__file__).resolve().parent
# the fork server imports before it hears of this process's path
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(_TESTS.parent), str(_TESTS), os.environ.get("PYTHONPATH")])
)
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["qlora_moderation.train", "torch.distributed.checkpoint", "bitsandbytes", "rank_cases"]
)


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any, timeout: float = 180.0) -> list[Any]:
    """Call `function(*arguments)` on every rank and return what each returned.

    Raises:
        AssertionError: a rank failed; with its traceback.
    """
    ranks = start_ranks(world_size, function, *arguments)
    try:
        return collect(ranks, timeout)
    finally:
        for process, _ in ranks:
            process.kill()
            process.join()


def start_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[tuple[Any, Any]]:
    """Start the ranks and return (process, connection) of each; `collect` waits for them."""
    port = find_port()
    started = []
    for rank in range(world_size):
        ours, theirs = _context.Pipe(duplex=False)
        process = _context.Process(
            target=_serve, args=(theirs, rank, world_size, port, function, arguments), daemon=True
        )
        process.start()
        theirs.close()
        started.append((process, ours))
    return started


def collect(ranks: list[tuple[Any, Any]], timeout: float = 180.0) -> list[Any]:
    """Return what each rank returned."""
    results: dict[int, Any] = {}
    waiting = {connection: index for index, (_, connection) in enumerate(ranks)}
    while waiting:
        ready = wait(list(waiting), timeout)
        assert ready, f"ranks {sorted(waiting.values())} did not answer within {timeout} s"
        for connection in ready:
            index = waiting.pop(connection)
            try:
                succeeded, value = connection.recv()
            except EOFError:
                ranks[index][0].join(10)
                succeeded, value = False, f"died with exit code {ranks[index][0].exitcode}"
            assert succeeded, f"rank {index}: {value}"
            results[index] = value
    return [results[index] for index in range(len(ranks))]


def find_port() -> int:
    """Return a TCP port that is free at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _serve(
    connection: Any, rank: int, world_size: int, port: int, function: Callable[..., Any], arguments: Any
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "HF_HUB_OFFLINE": "1",
    }
    import torch

    from qlora_moderation.cli import _silence_libraries

    _silence_libraries()
    torch.set_num_threads(1)
    try:
        connection.send((True, function(*arguments)))
    except BaseException:
        connection.send((False, traceback.format_exc()))
        sys.exit(1)
