"""The server's parts and its state: loading, ready, draining, stopped.

In: a configuration. Out: what the routes ask, and the tasks that run beside them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qlora_moderation.errors import CheckpointError, ConfigError
from qlora_moderation.serving.batcher import Batcher
from qlora_moderation.serving.bodies import BodyReader
from qlora_moderation.serving.config import ServeConfig
from qlora_moderation.serving.faults import EngineFaultError, RequestError
from qlora_moderation.serving.instruments import Instruments
from qlora_moderation.serving.keys import Keys, load_keys
from qlora_moderation.serving.rule import Rule, RuleFile

if TYPE_CHECKING:
    from qlora_moderation.serving.engine import Engine

_log = logging.getLogger("qlora_moderation.serving")
State = Literal["loading", "ready", "draining", "stopping"]


class Service:
    """One model behind the routes.

    Attributes:
        state: `loading` until the model answers; `draining` after a request to stop, while new work is still taken;
            `stopping` when it is not.
        failure: why the model could not be loaded, or no longer scores.
        failed: set with it.
        active: requests let in and not answered.
    """

    def __init__(self, config: ServeConfig, keys: Keys, load: Callable[[], Engine]) -> None:
        self.config = config
        self.instruments = Instruments()
        self.batcher = Batcher(config, self.instruments)
        self.bodies = BodyReader(config.max_body_bytes, config.request_timeout)
        self.state: State = "loading"
        self.failure: BaseException | None = None
        self.failed = asyncio.Event()
        self.active = 0
        self._keys = keys
        self._load = load
        self._rules: RuleFile | None = None
        self._started = int(time.time())
        self.instruments.watch(
            lambda: self.batcher.pairs,
            lambda: self.batcher.queue.tokens,
            lambda: float(self.state == "ready" and self.is_alive),
        )

    @property
    def is_alive(self) -> bool:
        """Whether the model answers, as far as is known."""
        return not self.batcher.broken

    @property
    def rule(self) -> Rule:
        """The thresholds in use."""
        assert self._rules is not None
        return self._rules.rule

    def check_key(self, authorization: str | None) -> None:
        """Let a client in, or not.

        Raises:
            RequestError: 401.
        """
        if not self._keys.admit(authorization):
            raise RequestError(401, "invalid_api_key", "send a valid key: Authorization: Bearer KEY")

    @contextlib.contextmanager
    def let_in(self, authorization: str | None) -> Iterator[Engine]:
        """Yield the engine to a request for verdicts, which the server then finishes before it stops.

        Raises:
            RequestError: 401 without a valid key, and what `_check_open` raises.
        """
        self.check_key(authorization)
        engine = self._check_open()
        self.active += 1
        try:
            yield engine
        finally:
            self.active -= 1

    def _check_open(self) -> Engine:
        """Return the engine where new work is taken now.

        Raises:
            RequestError: 503 before the model is loaded and when the server stops, 429 when too much is waiting.
        """
        if self.state == "stopping":
            raise RequestError(503, "stopping", "the server is stopping; ask another one", retry_after=1)
        if self.state == "loading" or self.batcher.engine is None:
            raise RequestError(503, "loading", "the model is being loaded; come again", retry_after=2)
        self.batcher.check_room()
        return self.batcher.engine

    def describe_model(self) -> dict[str, Any]:
        """Return the model in OpenAI's shape, with what this server knows beside it."""
        model = {
            "id": self.config.model_name,
            "object": "model",
            "created": self._started,
            "owned_by": "qlora-moderation",
        }
        if self.batcher.engine is None:
            return model
        limits = {
            "body_bytes": self.config.max_body_bytes,
            "text_characters": self.config.max_text_length,
            "texts": self.config.max_texts,
            "tokens": self.batcher.queue.max_tokens,
        }
        return {**model, **self.batcher.engine.describe(), "limits": limits, "thresholds": self.rule.shown}

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Load the model and score, while the block runs."""
        tasks = [asyncio.create_task(self._run())]
        if self.config.reload_seconds:
            tasks.append(asyncio.create_task(self._watch_rules()))
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.batcher.close()

    async def _run(self) -> None:
        started = time.monotonic()
        try:
            engine = await self.batcher.load(self._load)
        except Exception as error:
            self.failure = error
            self.failed.set()
            return
        classifier = engine.classifier
        self._rules = RuleFile(Path(self.config.model_path), classifier.taxonomy, classifier.thresholds)
        self._show_rule()
        _log.info("model %s loaded in %.1f s: %s", self.config.model_name, time.monotonic() - started, engine.explain())
        _log.info("thresholds %s: %s", self.rule.version, self.rule.thresholds.describe())
        if self.state == "loading":
            self.state = "ready"
            _log.info("ready")
        try:
            await self.batcher.run()
        except Exception as error:  # without its loop the server would take requests and answer none
            self.failure = EngineFaultError(error)
            self.failed.set()

    async def _watch_rules(self) -> None:
        while True:
            await asyncio.sleep(self.config.reload_seconds)
            # in a thread, since a network disk may keep one waiting
            if self._rules is not None and await asyncio.to_thread(self._rules.has_changed):
                self.reload_rules()

    def reload(self) -> None:
        """Read keys and thresholds again; what is broken stays as it was."""
        try:
            self._keys = load_keys(self.config)
        except ConfigError as error:
            _log.error("the keys stay as they were: %s", error)
        self.reload_rules()

    def reload_rules(self) -> None:
        """Read the thresholds again; a broken file leaves the old ones in use."""
        if self._rules is None:
            return
        try:
            changed = self._rules.read()
        except CheckpointError as error:
            self.instruments.reloads.labels("failed").inc()
            self.instruments.intact.set(0)
            _log.error("thresholds %s stay in use: %s", self.rule.version, error)
            return
        self.instruments.intact.set(1)
        self.instruments.reloads.labels("changed" if changed else "unchanged").inc()
        if changed:
            self._show_rule()
        said = self.rule.thresholds.describe() if changed else "unchanged"
        _log.info("thresholds %s: %s", self.rule.version, said)

    def _show_rule(self) -> None:
        self.instruments.thresholds.clear()
        self.instruments.thresholds.labels(self.rule.version, self.rule.thresholds.rule).set(1)

    async def stop(self) -> bool:
        """Take new work for the time that load balancers need, finish what was accepted; say whether all was finished."""
        self.state = "draining"
        _log.info("stopping: %d requests to answer", self.active)
        await asyncio.sleep(self.config.drain_seconds)
        self.state = "stopping"
        try:
            async with asyncio.timeout(self.config.shutdown_timeout):
                while self.active:
                    await asyncio.sleep(0.01)
        except TimeoutError:
            _log.error("%d requests unanswered after %g s", self.active, self.config.shutdown_timeout)
            self.batcher.queue.give_up()
            return False
        return True
