"""Requests of many clients in the same forwards, under a token budget, with a bounded queue.

In: pairs of one request. Out: their scores. All state belongs to the event loop's thread, so there are no locks; texts are
tokenised and scored in threads beside it, in as many forwards at once as the engine says. What runs in a thread is handed over
without arguments, because asyncio shows arguments in its debug log.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from qlora_moderation.serving.config import ServeConfig
from qlora_moderation.serving.faults import EngineFaultError, EngineShortageError, RequestError, invalid
from qlora_moderation.serving.instruments import Instruments
from qlora_moderation.serving.planning import plan_batch

if TYPE_CHECKING:
    from qlora_moderation.scoring import CutPairs, Scores
    from qlora_moderation.serving.engine import Engine

T = TypeVar("T")
_log = logging.getLogger("qlora_moderation.serving")
_FORWARDS_IN_QUEUE = 32
_LEAST_QUEUE = 32768  # tokens: a text of the longest length allowed must fit
_PROBE_SECONDS = 5.0


@dataclasses.dataclass(eq=False, repr=False)
class _Job:
    """The windows of one request: the first `begun` were handed to the model, `done` came back."""

    cut: CutPairs
    lengths: list[int]
    logits: np.ndarray
    answer: asyncio.Future[Scores]
    queued: float
    begun: int = 0
    done: int = 0


class _Part(NamedTuple):
    """What one forward takes of a request."""

    job: _Job
    start: int
    stop: int


class Batcher:
    """The queue in front of one engine.

    Attributes:
        engine: None until it is loaded.
        broken: a forward failed, so did a probe after it, and none has succeeded since.
        pairs: accepted and not answered.
        tokens: accepted and not handed to the model.
    """

    def __init__(self, config: ServeConfig, instruments: Instruments) -> None:
        self.engine: Engine | None = None
        self.broken = False
        self.pairs = 0
        self.tokens = 0
        self._config = config
        self._instruments = instruments
        self._waiting: list[_Job] = []
        self._open: set[_Job] = set()  # queued and not answered
        self._preparing = 0
        self._refusing = False  # the queue was full, and a forward's worth of room is not there again
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

    @property
    def max_queue_tokens(self) -> int:
        """Tokens beyond which requests are refused."""
        assert self.engine is not None
        return self._config.max_queue_tokens or max(_LEAST_QUEUE, _FORWARDS_IN_QUEUE * self.engine.token_budget)

    async def load(self, load: Callable[[], Engine]) -> Engine:
        """Load the engine, and make room for as many forwards at once as it allows."""
        self.engine = await self._run_beside(load)
        self._scoring.shutdown(wait=False)
        self._scoring = ThreadPoolExecutor(self.engine.forwards_at_once, "scoring")
        return self.engine

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
        # near the brim each request would be tokenised in vain, at the cost of the ones that are being scored
        self._refusing = self._refusing and self.tokens > self.max_queue_tokens - self._headroom
        full = self._refusing or (self.tokens and self.tokens >= self.max_queue_tokens)
        if self.pairs + pairs > self._config.max_queue_pairs or full:
            raise self._busy()

    @property
    def _headroom(self) -> int:
        assert self.engine is not None
        return min(self.engine.token_budget, self.max_queue_tokens // 8)

    def _busy(self) -> RequestError:
        assert self.engine is not None
        wait = math.ceil(self.tokens / (self._rate * self.engine.forwards_at_once)) if self._rate else 1
        return RequestError(429, "busy", "too much is waiting; come again later", retry_after=min(max(wait, 1), 60))

    async def score(self, questions: Sequence[str], answers: Sequence[str]) -> Scores:
        """Score the pairs of one request; cancelled, it gives up what the model has not begun.

        Raises:
            RequestError: 422 too many tokens, 429 no room, 500 or 503 the model failed.
        """
        engine = self.engine
        assert engine is not None
        self.check_room(len(questions))
        self.pairs += len(questions)
        try:
            cut = await self._tokenize(engine, questions, answers)
            lengths = [len(window.ids) for window in cut.windows]
            if sum(lengths) > self.max_queue_tokens:
                raise invalid(
                    "input", f"is {sum(lengths)} tokens in windows; at most {self.max_queue_tokens} are taken at once"
                )
            if self.tokens and self.tokens + sum(lengths) > self.max_queue_tokens:
                self._refusing = True
                raise self._busy()
            logits = np.empty((len(lengths), len(engine.names)), dtype=np.float32)
            job = _Job(cut, lengths, logits, asyncio.get_running_loop().create_future(), time.monotonic())
            self._waiting.append(job)
            self._open.add(job)
            self.tokens += sum(lengths)
            self._changed.set()
            try:
                return await job.answer
            finally:
                self._forget(job)
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

    def _forget(self, job: _Job) -> None:
        if job in self._waiting:
            self._waiting.remove(job)
        self.tokens -= sum(job.lengths[job.begun :])
        job.begun = len(job.lengths)
        self._open.discard(job)

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
            jobs = list(self._waiting)
            if not jobs:  # all of them were given up, or taken by another loop
                continue
            lengths, begun = [job.lengths for job in jobs], [job.begun for job in jobs]
            taken = plan_batch(lengths, begun, self._budget, self._config.max_windows_per_micro_batch)
            counted = [(job, count) for job, count in zip(jobs, taken, strict=True) if count]
            await self._score([_Part(job, job.begun, job.begun + count) for job, count in counted])

    @property
    def _budget(self) -> int:
        """Tokens of the next forward: what waits is shared with idle loops, and forwards are brief until much waits."""
        assert self.engine is not None
        share = math.ceil(self.tokens / (1 + self._resting))
        return min(self.engine.token_budget, share, max(self.engine.brief_budget, share // 4))

    async def _wait_for_work(self) -> None:
        """Return when a forward is full, or something waits and nothing more is about to come, or has come too slowly."""
        while not self._waiting:
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), _PROBE_SECONDS if self.broken else None)
            except TimeoutError:
                await self._probe()
        until = time.monotonic() + self._config.batch_wait_ms / 1000
        assert self.engine is not None
        while self._preparing and self.tokens < self.engine.token_budget and self._waiting:
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), until - time.monotonic())
            except TimeoutError:
                return

    async def _score(self, batch: list[_Part]) -> None:
        for job, start, stop in batch:
            if not start:
                self._instruments.queue_seconds.observe(time.monotonic() - job.queued)
            self.tokens -= sum(job.lengths[start:stop])
            job.begun = stop
            if stop == len(job.lengths):
                self._waiting.remove(job)
        error = await self._forward(batch)
        if error is not None and len(batch) > 1:
            # one request must not take the others down with it
            for part in batch:
                alone = await self._forward([part])
                if alone is not None:
                    self._fail(part.job, alone)
        elif error is not None:
            self._fail(batch[0].job, error)
        if error is not None:
            await self._probe()

    async def _forward(self, batch: list[_Part]) -> Exception | None:
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
        rest = logits
        for job, start, stop in batch:
            job.logits[start:stop], rest = rest[: stop - start], rest[stop - start :]
            job.done += stop - start
            if job.done == len(job.lengths) and not job.answer.done():
                if np.isfinite(job.logits).all():
                    job.answer.set_result(job.cut.collect(job.logits))
                else:
                    job.answer.set_exception(
                        RequestError(500, "not_finite", "the model gave no finite number; there is no verdict")
                    )
        return None

    def _fail(self, job: _Job, error: Exception) -> None:
        if not job.answer.done():
            if isinstance(error, EngineShortageError):
                found = RequestError(503, "out_of_memory", "the device ran out of memory; send less", retry_after=1)
            else:
                found = RequestError(500, "model_failed", "the model failed on this request; there is no verdict")
            job.answer.set_exception(found)
        self._forget(job)

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

    def give_up(self) -> None:
        """Answer what is left with 503."""
        for job in list(self._open):
            if not job.answer.done():
                job.answer.set_exception(RequestError(503, "stopped", "the server was stopped", retry_after=1))

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
