"""Requests of many clients in the same forwards, under a token budget, with a bounded queue.

In: pairs of one request. Out: their scores. All state belongs to the event loop's thread, so there are no locks; texts are
tokenised and scored in threads beside it, in as many forwards at once as the engine says. What runs in a thread is handed over
without arguments, because asyncio shows arguments in its debug log.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from qlora_moderation.serving.config import ServeConfig
from qlora_moderation.serving.faults import EngineFaultError, EngineShortageError, RequestError, invalid
from qlora_moderation.serving.instruments import Instruments
from qlora_moderation.serving.queue import Part, Queue

if TYPE_CHECKING:
    from qlora_moderation.scoring import CutPairs, Scores
    from qlora_moderation.serving.engine import Engine

T = TypeVar("T")
_log = logging.getLogger("qlora_moderation.serving")
_FORWARDS_IN_QUEUE = 32
_LEAST_QUEUE = 32768  # tokens: a text of the longest length allowed must fit
_PROBE_SECONDS = 5.0


class Batcher:
    """The queue in front of one engine, and the forwards behind it.

    Attributes:
        engine: None until it is loaded.
        broken: a forward failed, so did a probe after it, and none has succeeded since.
        pairs: accepted and not answered.
        queue: what waits for the model.
    """

    def __init__(self, config: ServeConfig, instruments: Instruments) -> None:
        self.engine: Engine | None = None
        self.broken = False
        self.pairs = 0
        self.queue = Queue()
        self._config = config
        self._instruments = instruments
        self._preparing = 0
        self._changed = asyncio.Event()
        self._rate = 0.0  # tokens a second of one forward
        self._working: set[object] = set()  # what threads load or score
        self._resting = 0  # loops without work
        self._probing = False
        self._scoring = ThreadPoolExecutor(1, "scoring")
        self._tokenizing = ThreadPoolExecutor(2, "tokenizing")

    @property
    def is_idle(self) -> bool:
        """Whether no thread is at work."""
        return not self._working

    async def load(self, load: Callable[[], Engine]) -> Engine:
        """Load the engine, and make room for as many forwards at once as it allows."""
        self.engine = engine = await self._run_beside(load)
        self._scoring.shutdown(wait=False)
        self._scoring = ThreadPoolExecutor(engine.forwards_at_once, "scoring")
        chosen = max(_LEAST_QUEUE, _FORWARDS_IN_QUEUE * engine.token_budget)
        self.queue.max_tokens = self._config.max_queue_tokens or chosen
        self.queue.headroom = min(engine.token_budget, self.queue.max_tokens // 8)
        return engine

    async def _run_beside(self, call: Callable[[], T]) -> T:
        """Run something in a thread that scores."""

        def work() -> T:
            self._working.add(work)
            try:
                return call()
            finally:
                self._working.discard(work)

        return await asyncio.get_running_loop().run_in_executor(self._scoring, work)

    def check_room(self, pairs: int = 1) -> None:
        """Refuse what the queue has no room for.

        Raises:
            RequestError: 429 with the seconds after which to come again.
        """
        if self.pairs + pairs > self._config.max_queue_pairs or self.queue.is_full:
            raise self._busy()

    def _busy(self) -> RequestError:
        assert self.engine is not None
        wait = math.ceil(self.queue.tokens / (self._rate * self.engine.forwards_at_once)) if self._rate else 1
        return RequestError(429, "busy", "too much is waiting; come again later", retry_after=min(max(wait, 1), 60))

    async def score(self, questions: Sequence[str], answers: Sequence[str]) -> Scores:
        """Score the pairs of one request; cancelled, it gives up what the model has not begun.

        Raises:
            RequestError: 422 too many tokens, 429 no room, 500 or 503 the model failed.
        """
        engine, queue = self.engine, self.queue
        assert engine is not None
        self.check_room(len(questions))
        self.pairs += len(questions)
        try:
            cut = await self._tokenize(engine, questions, answers)
            lengths = [len(window.ids) for window in cut.windows]
            if sum(lengths) > queue.max_tokens:
                raise invalid(
                    "input", f"is {sum(lengths)} tokens in windows; at most {queue.max_tokens} are taken at once"
                )
            if not queue.takes(sum(lengths)):
                raise self._busy()
            job = queue.add(cut, lengths, len(engine.names))
            self._changed.set()
            try:
                return await job.answer
            finally:
                queue.forget(job)
        finally:
            self.pairs -= len(questions)

    async def _tokenize(self, engine: Engine, questions: Sequence[str], answers: Sequence[str]) -> CutPairs:
        self._preparing += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._tokenizing, lambda: _muted(lambda: engine.cut(questions, answers)))
        except EngineFaultError as error:
            _log.error("tokenising failed: %s", error)
            raise RequestError(500, "model_failed", "a text could not be tokenised; there is no verdict") from None
        finally:
            self._preparing -= 1
            self._changed.set()

    async def run(self) -> None:
        """Score what is waiting, until cancelled."""
        assert self.engine is not None
        loops = [asyncio.create_task(self._run_forwards()) for _ in range(self.engine.forwards_at_once)]
        try:
            await asyncio.gather(*loops)
        finally:
            for loop in loops:
                loop.cancel()

    async def _run_forwards(self) -> None:
        """Run one forward after the other; several such loops share what is waiting."""
        assert self.engine is not None
        while True:
            self._resting += 1
            try:
                await self._wait_for_work()
            finally:
                self._resting -= 1
            parts = self.queue.take(self._budget, self._config.max_windows_per_micro_batch)
            if parts:  # else all of them were given up, or taken by another loop
                await self._score(parts)

    @property
    def _budget(self) -> int:
        """Tokens of the next forward: what waits is shared with idle loops, and forwards are brief until much waits."""
        assert self.engine is not None
        share = math.ceil(self.queue.tokens / (1 + self._resting))
        return min(self.engine.token_budget, share, max(self.engine.brief_budget, share // 4))

    async def _wait_for_work(self) -> None:
        """Return when a forward is full, or something waits and nothing more is about to come, or has come too slowly."""
        while not self.queue:
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), _PROBE_SECONDS if self.broken else None)
            except TimeoutError:
                await self._probe()
        until = time.monotonic() + self._config.batch_wait_ms / 1000
        assert self.engine is not None
        while self._preparing and self.queue.tokens < self.engine.token_budget and self.queue:
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), until - time.monotonic())
            except TimeoutError:
                return

    async def _score(self, batch: list[Part]) -> None:
        for job, start, _ in batch:
            if not start:
                self._instruments.queue_seconds.observe(time.monotonic() - job.queued)
        error = await self._forward(batch)
        if error is None:
            return
        for part in batch:
            # one request must not take the others down with it
            alone = await self._forward([part]) if len(batch) > 1 else error
            if alone is not None:
                part.job.fail(alone)
                self.queue.forget(part.job)
        await self._probe()

    async def _forward(self, batch: list[Part]) -> Exception | None:
        """Run windows through the model and hand out what it says; return its error where it fails."""
        engine = self.engine
        assert engine is not None
        windows = [window for job, start, stop in batch for window in job.cut.windows[start:stop]]
        tokens = sum(len(window.ids) for window in windows)
        started = time.monotonic()
        try:
            logits = await self._run_beside(lambda: _muted(lambda: engine.score(windows)))
        except (EngineFaultError, EngineShortageError) as error:
            reason = "memory" if isinstance(error, EngineShortageError) else "fault"
            self._instruments.batch_failures.labels(reason).inc()
            _log.error("a forward of %d windows failed: %s", len(windows), str(error) or "out of memory")
            return error
        seconds = time.monotonic() - started
        self.broken = False
        self._rate = tokens / seconds if not self._rate else 0.8 * self._rate + 0.2 * tokens / seconds
        self._instruments.tokens.inc(tokens)
        self._instruments.batch_windows.observe(len(windows))
        self._instruments.batch_tokens.observe(tokens)
        self._instruments.batch_seconds.observe(seconds)
        for job, start, stop in batch:
            job.receive(start, stop, logits[: stop - start])
            logits = logits[stop - start :]
        return None

    async def _probe(self) -> None:
        if self._probing:  # by another loop
            return
        assert self.engine is not None
        self._probing = True
        try:
            alive = await self._run_beside(self.engine.probe)
        finally:
            self._probing = False
        if self.broken == alive:
            _log.log(
                logging.INFO if alive else logging.ERROR, "the model %s", "answers again" if alive else "is broken"
            )
        self.broken = not alive

    def close(self) -> None:
        """Let the threads end; a forward that runs is not waited for."""
        with contextlib.suppress(RuntimeError):
            self._scoring.shutdown(wait=False, cancel_futures=True)
            self._tokenizing.shutdown(wait=False, cancel_futures=True)


def _muted(call: Callable[[], T]) -> T:
    """Run something in a thread whose errors say nothing of the texts: asyncio shows errors in its debug log, too.

    Raises:
        EngineFaultError, EngineShortageError: whatever went wrong, the server goes on.
    """
    try:
        return call()
    except EngineShortageError:
        raise EngineShortageError from None
    except Exception as error:
        raise EngineFaultError(error) from None
