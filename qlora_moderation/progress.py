"""How far a long run over rows is: a bar on a terminal, else a line now and then.

In: rows and tokens done. Out: words for a person, and the stop that a signal asked for.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType

from tqdm import tqdm

from qlora_moderation.errors import Interrupted
from qlora_moderation.interruption import StopSignals

_SECONDS = 30.0
_FIRST_SECONDS = 5.0  # so that a short run tells of itself, too


class Progress:
    """Tells of rows done, and stops between forwards when a signal was noted.

    Args:
        rows: to be done.
        signals: entered.
        log: takes the lines; None: nothing is told.
    """

    def __init__(self, rows: int, signals: StopSignals, log: Callable[[str], None] | None) -> None:
        visible = log is not None and sys.stderr.isatty()
        self._bar = tqdm(total=rows, unit="row", unit_scale=True, disable=not visible, dynamic_ncols=True)
        self._rows, self._signals, self._log = rows, signals, None if visible else log
        self._say = self._bar.write if visible else log or (lambda line: None)
        self._rows_done = self._tokens_done = 0
        self._started = time.monotonic()
        self._told = self._started - _SECONDS + _FIRST_SECONDS

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def tick(self, windows: int = 0) -> None:
        """Look for a signal; called at every forward.

        Raises:
            Interrupted: one was noted.
        """
        if self._signals.noted:
            self._say(
                f"{self._rows_done:,} of {self._rows:,} rows are scored and kept, the block at work is dropped; the same "
                "command goes on from there"
            )
            raise Interrupted(self._signals.noted)

    def done(self, rows: int, tokens: int) -> None:
        """Count rows that are written, and tell of them when it is time."""
        self._rows_done += rows
        self._tokens_done += tokens
        now = time.monotonic()
        elapsed = max(now - self._started, 1e-9)
        self._bar.set_postfix_str(f"{self._tokens_done / elapsed:,.0f} tokens/s", refresh=False)
        self._bar.update(rows)
        ends = self._rows_done == self._rows
        if self._log is not None and (now - self._told >= _SECONDS or ends):
            self._told = now
            self._log(
                f"{self._rows_done:,} of {self._rows:,} rows  {self._rows_done / elapsed:,.0f} rows/s  "
                f"{self._tokens_done / elapsed:,.0f} tokens/s  "
                f"{describe_left(elapsed, self._rows_done, self._rows - self._rows_done)}"
            )


def describe_left(elapsed: float, done: int, left: int) -> str:
    """Return how long the rest takes at the pace so far.

    Args:
        elapsed: seconds.
        done: units done in that time.
        left: units to be done.
    """
    seconds = int(elapsed / max(1, done) * left)
    return f"{seconds // 3600}:{seconds % 3600 // 60:02d}:{seconds % 60:02d} left"
