"""What waits for the model, and how much of it may.

In: the windows of requests. Out: what the next forward takes of them, and their scores once all windows came back. All of it
belongs to the event loop's thread, so there are no locks.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from qlora_moderation.serving.faults import EngineShortageError, RequestError
from qlora_moderation.serving.planning import plan_batch

if TYPE_CHECKING:
    from qlora_moderation.scoring import CutPairs, Scores


@dataclasses.dataclass(eq=False, repr=False)
class Job:
    """The windows of one request: the first `begun` were handed to the model, `done` came back."""

    cut: CutPairs
    lengths: list[int]
    logits: np.ndarray
    answer: asyncio.Future[Scores]
    queued: float
    begun: int = 0
    done: int = 0

    def receive(self, start: int, stop: int, logits: np.ndarray) -> None:
        """Take the logits [stop - start, C] of some windows; the last ones are the answer."""
        self.logits[start:stop] = logits
        self.done += stop - start
        if self.done < len(self.lengths) or self.answer.done():
            return
        if np.isfinite(self.logits).all():
            self.answer.set_result(self.cut.collect(self.logits))
        else:
            self.fail(RequestError(500, "not_finite", "the model gave no finite number; there is no verdict"))

    def fail(self, error: Exception) -> None:
        """Answer with an error, unless there is an answer."""
        if self.answer.done():
            return
        if isinstance(error, EngineShortageError):
            error = RequestError(503, "out_of_memory", "the device ran out of memory; send less", retry_after=1)
        elif not isinstance(error, RequestError):
            error = RequestError(500, "model_failed", "the model failed on this request; there is no verdict")
        self.answer.set_exception(error)


class Part(NamedTuple):
    """What one forward takes of a request."""

    job: Job
    start: int
    stop: int


class Queue:
    """Requests whose windows wait.

    Attributes:
        tokens: of the windows not yet handed to the model.
        max_tokens: above this, nothing more is taken.
        headroom: once full, this much must be free again.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.max_tokens = 0
        self.headroom = 0
        self._waiting: dict[Job, None] = {}  # in the order of arrival; leaving it takes no search
        self._open: set[Job] = set()  # queued and not answered
        self._refusing = False  # it was full, and the headroom is not there again

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def is_full(self) -> bool:
        """Whether nothing more is taken."""
        # near the brim each request would be tokenised in vain, at the cost of the ones that are being scored
        self._refusing = self._refusing and self.tokens > self.max_tokens - self.headroom
        return self._refusing or 0 < self.max_tokens <= self.tokens

    def takes(self, tokens: int) -> bool:
        """Say whether there is room for so many tokens more; an empty queue has it always."""
        if not self.tokens or self.tokens + tokens <= self.max_tokens:
            return True
        self._refusing = True
        return False

    def add(self, cut: CutPairs, lengths: list[int], categories: int) -> Job:
        """Let windows of these lengths wait."""
        logits = np.empty((len(lengths), categories), dtype=np.float32)
        job = Job(cut, lengths, logits, asyncio.get_running_loop().create_future(), time.monotonic())
        self._waiting[job] = None
        self._open.add(job)
        self.tokens += sum(lengths)
        return job

    def take(self, max_tokens: int, most: int) -> list[Part]:
        """Take what the next forward runs: at most so many tokens and windows; nothing where nothing waits."""
        jobs = list(self._waiting)
        counts = plan_batch([job.lengths for job in jobs], [job.begun for job in jobs], max_tokens, most)
        parts = [Part(job, job.begun, job.begun + count) for job, count in zip(jobs, counts, strict=True) if count]
        for job, start, stop in parts:
            self.tokens -= sum(job.lengths[start:stop])
            job.begun = stop
            if stop == len(job.lengths):
                del self._waiting[job]
        return parts

    def forget(self, job: Job) -> None:
        """Drop what is left of a request, if anything is."""
        self._waiting.pop(job, None)
        self.tokens -= sum(job.lengths[job.begun :])
        job.begun = len(job.lengths)
        self._open.discard(job)

    def give_up(self) -> None:
        """Answer what is left with 503."""
        for job in self._open:
            job.fail(RequestError(503, "stopped", "the server was stopped", retry_after=1))
