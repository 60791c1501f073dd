"""The process around the routes: its socket, its log, its signals.

In: a configuration. Out: an exit code.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Coroutine, Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from qlora_moderation.errors import ConfigError
from qlora_moderation.serving.config import ServeConfig
from qlora_moderation.serving.keys import Keys, load_keys

if TYPE_CHECKING:
    from qlora_moderation.serving.engine import Engine
    from qlora_moderation.serving.service import Service

_log = logging.getLogger("qlora_moderation.serving")
_SWITCH_SECONDS = 0.0005
_PACKAGES = {"fastapi": "fastapi", "uvicorn": "uvicorn", "prometheus_client": "prometheus-client"}


def check_packages() -> None:
    """Check that the server's own packages are installed.

    Raises:
        ConfigError: names those that are missing and the extra that brings them.
    """
    missing = [name for module, name in _PACKAGES.items() if find_spec(module) is None]
    if missing:
        raise ConfigError(f"serve needs {', '.join(missing)}; pip install -c scripts/constraints.txt -e '.[serve]'")


def serve(config: ServeConfig) -> int:
    """Serve until a signal comes.

    SIGTERM and SIGINT finish what was accepted; a second one, or the timeout, does not wait for it. SIGHUP reads keys and
    thresholds again.

    Returns:
        0 when everything accepted was answered, else 128 plus the signal.

    Raises:
        ModerationError: packages, keys, address or model cannot be used.
    """
    check_packages()
    keys = load_keys(config)
    _set_up_log(config)
    _share_cores()
    with contextlib.closing(_open_socket(config)) as listener:
        code, is_idle = asyncio.run(_serve(config, keys, listener))
    if not is_idle:
        # a load or a forward cannot be interrupted, and Python would wait for its thread
        logging.shutdown()
        sys.stdout.flush()
        os._exit(code)
    return code


def _open_socket(config: ServeConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    # asyncio switches Nagle's algorithm off where a socket names its protocol, and else each answer is 40 ms late
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((config.host, config.port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"--host {config.host} --port {config.port}: cannot listen there ({error.strerror or error}); give another port"
        ) from None
    return listener


def _share_cores() -> None:
    """Let torch's threads give their cores away when they wait for each other; read when torch is imported.

    By default they spin for milliseconds. Beside anything else on one of the cores, the threads of these very requests among
    it, a forward then takes many times as long: 0.6 s instead of 40 ms were seen with one busy process on two cores. Python,
    too, must let go sooner than after 5 ms: whatever reads and refuses requests keeps every forward from its next operation.
    """
    sys.setswitchinterval(_SWITCH_SECONDS)
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def _set_up_log(config: ServeConfig) -> None:
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    # what uvicorn has to say are faults of connections; its word on requests would hold paths and queries
    for log, level in ((_log, config.log_level.upper()), (logging.getLogger("uvicorn"), "WARNING")):
        log.handlers[:] = [handler]
        log.setLevel(level)
        log.propagate = False


async def _serve(config: ServeConfig, keys: Keys, listener: socket.socket) -> tuple[int, bool]:
    """Return the exit code, and whether no thread is at work any more."""
    import uvicorn

    from qlora_moderation.serving.app import build_app
    from qlora_moderation.serving.service import Service

    class Server(uvicorn.Server):
        """Uvicorn without its signals, which end the process by the signal and know no state in between."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    def load() -> Engine:
        from qlora_moderation.serving.engine import load_engine

        engine = load_engine(config)
        # torch and transformers leave very many objects behind, which each full collection would visit while clients wait
        gc.collect()
        gc.freeze()
        return engine

    signals: asyncio.Queue[int] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signals.put_nowait, number)
    service = Service(config, keys, load)
    loop.add_signal_handler(signal.SIGHUP, service.reload)
    # uvicorn's own access log would hold paths and queries; the routes log for themselves
    settings: dict[str, Any] = {"log_config": None, "access_log": False, "server_header": False, "proxy_headers": False}
    # clients that keep connections idle for less than this never meet one that is being closed
    settings |= {"timeout_keep_alive": 75, "timeout_graceful_shutdown": 5}
    server = Server(uvicorn.Config(build_app(service), **settings, ws="none", lifespan="on"))
    host = f"[{config.host}]" if ":" in config.host else config.host
    asking = "with" if keys.digests else "without"
    _log.info("listening on http://%s:%d, %s keys", host, listener.getsockname()[1], asking)
    serving = asyncio.create_task(server.serve([listener]))
    try:
        code = await _wait_for_end(service, serving, signals)
    finally:
        server.should_exit = True
        await serving
    _log.info("stopped")
    return code, service.batcher.is_idle


async def _wait_for_end(service: Service, serving: asyncio.Task[None], signals: asyncio.Queue[int]) -> int:
    """Return the exit code once there is nothing left to do.

    Raises:
        Exception: why the model could not be loaded, or no longer scores.
    """
    number = await _first(signals.get(), service.failed.wait(), serving)
    if service.failure is not None:
        raise service.failure
    if number is None:
        return 1
    stopping = asyncio.create_task(service.stop())
    again = await _first(signals.get(), stopping)
    if again is not None:
        service.batcher.queue.give_up()
        return 128 + again
    return 0 if stopping.result() else 128 + number


async def _first(signalled: Coroutine[Any, Any, int], *others: Awaitable[Any]) -> int | None:
    """Wait for a signal or something else; return the signal where it came first."""
    waiting = asyncio.ensure_future(signalled)
    tasks = [asyncio.ensure_future(other) for other in others]
    await asyncio.wait((waiting, *tasks), return_when=asyncio.FIRST_COMPLETED)
    if waiting.done():
        return waiting.result()
    waiting.cancel()
    return None
