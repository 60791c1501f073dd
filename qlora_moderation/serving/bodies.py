"""Bodies of requests, read within limits.

In: the stream of a request. Out: its bytes. The length that a client announces is checked before anything is read, and what
really comes is counted as it comes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from starlette.requests import Request

from qlora_moderation.serving.faults import RequestError

_BODIES_AT_ONCE = 64  # of full length; shorter ones may be more


class BodyReader:
    """Reads bodies of at most `longest` bytes, and of 64 times as many at once."""

    def __init__(self, longest: int, seconds: float) -> None:
        self.longest = longest
        self.seconds = seconds
        self.held = 0

    @contextlib.asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """Yield the body of a request.

        Raises:
            RequestError: 413 too long, 415 no JSON, 408 too slow, 429 too many bodies at once.
            ClientDisconnect: the client has gone.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise RequestError(
                415, "unsupported_media_type", "send JSON with the header Content-Type: application/json"
            )
        announced = request.headers.get("content-length", "")
        if announced.isdecimal() and len(announced) < 20 and int(announced) > self.longest:
            raise self._too_long()
        parts: list[bytes] = []
        held = 0
        try:
            try:
                async with asyncio.timeout(self.seconds):
                    async for part in request.stream():
                        held += len(part)
                        self.held += len(part)
                        if held > self.longest:
                            raise self._too_long()
                        if self.held > _BODIES_AT_ONCE * self.longest:
                            raise RequestError(429, "busy", "too many long requests at once", retry_after=1)
                        parts.append(part)
            except TimeoutError:
                raise RequestError(408, "timeout", f"the body did not come within {self.seconds:g} s") from None
            yield b"".join(parts)
        finally:
            self.held -= held

    def _too_long(self) -> RequestError:
        return RequestError(413, "too_large", f"the body is longer than {self.longest} bytes; send several requests")
