"""Stopping on request: SIGTERM and SIGINT end a run at a step boundary that all ranks agree on.

In: signals. Out: the number of the one that all ranks act on; the caller writes what going on needs and raises `Interrupted`.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType


class Terminated(KeyboardInterrupt):
    """SIGTERM where no `StopSignals` waits for it: the job ends here, and removes what is half-written on its way out."""


@contextlib.contextmanager
def unwinding() -> Iterator[None]:
    """Let SIGTERM raise `Terminated` while the block runs, as SIGINT raises `KeyboardInterrupt`; ignored, it stays so."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated

    alone = threading.current_thread() is not threading.main_thread()
    if alone or signal.getsignal(signal.SIGTERM) is signal.SIG_IGN:
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class StopSignals:
    """While it is entered, SIGTERM and SIGINT are noted; a second SIGINT acts at once.

    A second SIGTERM does not: batch systems and torchrun both send one, and the first may still be at work. Entered
    outside the main thread it notes nothing, as Python handles signals in the main thread alone.
    """

    def __init__(self) -> None:
        self._noted = 0
        self._interrupts = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal() returned
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt
        self._noted = self._noted or number

    @property
    def noted(self) -> int:
        """The signal that this process has noted, 0 where none was."""
        return self._noted

    def agreed(self) -> int:
        """Return the signal that any rank has noted, 0 where none has; all ranks ask at the same step."""
        from qlora_moderation.distributed import highest_over_ranks  # and torch with it

        return highest_over_ranks(self._noted)
