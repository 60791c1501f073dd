"""Load for a server on loopback: open-loop arrivals and closed loops over plain sockets. Imported by `bench_serve.py`.

The clients must leave the cores to the server, so requests are ready as bytes, and of an answer only status, length and
Retry-After are read.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import time
from collections.abc import Sequence


@dataclasses.dataclass
class Outcome:
    """One request: when it was due, how long its answer took from then on, and its status; 0: no answer."""

    due: float
    seconds: float
    status: int
    retry_after: bool = False


def build_requests(pairs: Sequence[tuple[str, str]]) -> list[bytes]:
    """Return requests for verdicts as bytes."""
    made = []
    for question, answer in pairs:
        body = json.dumps({"input": {"question": question, "answer": answer}}).encode()
        head = ["POST /v1/moderations HTTP/1.1", "Host: bench", "Content-Type: application/json"]
        made.append("\r\n".join([*head, f"Content-Length: {len(body)}", "", ""]).encode() + body)
    return made


class Load:
    """Connections to one server, kept open and used again."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(self, request: bytes, due: float) -> Outcome:
        """Send one request and read its answer."""
        try:
            connection = self._idle.pop() if self._idle else await asyncio.open_connection("127.0.0.1", self.port)
            reader, writer = connection
            writer.write(request)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(head.partition(b"content-length:")[2].split(b"\r\n", 1)[0])
            await reader.readexactly(length)
        except (OSError, asyncio.IncompleteReadError, ValueError):
            return Outcome(due, time.perf_counter() - due, 0)
        if b"connection: close" in head:
            writer.close()
        else:
            self._idle.append(connection)
        return Outcome(due, time.perf_counter() - due, int(head[9:12]), b"retry-after:" in head)

    async def keep_in_flight(
        self, requests: Sequence[bytes], many: int, count: int | None, seconds: float
    ) -> list[Outcome]:
        """Keep `many` requests in flight, until `count` were sent or the time is over."""
        found: list[Outcome] = []
        until, sent = time.perf_counter() + seconds, 0

        async def go_on() -> None:
            nonlocal sent
            while time.perf_counter() < until and (count is None or sent < count):
                sent += 1
                found.append(await self.ask(requests[sent % len(requests)], time.perf_counter()))

        await asyncio.gather(*(go_on() for _ in range(many)))
        return found

    async def arrive(self, requests: Sequence[bytes], rate: float, seconds: float, even: bool = False) -> list[Outcome]:
        """Send `rate` requests a second, at random instants or evenly, whatever the server does with them.

        A time is counted from the instant at which the request was due, so that a late sender hides nothing.
        """
        rng, tasks = random.Random(0), []
        started = due = time.perf_counter()
        while due < started + seconds:
            due += 1 / rate if even else rng.expovariate(rate)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(asyncio.create_task(self.ask(requests[len(tasks) % len(requests)], due)))
        return list(await asyncio.gather(*tasks))

    def close(self) -> None:
        """Close the connections."""
        for _, writer in self._idle:
            writer.close()
        self._idle = []
