"""Closed-loop clients for benchmarks of serving, in their own process: each asks again as soon as it has its answer.

`clients.py http URL BODY_FILE CLIENTS SECONDS`: one open connection per client, with JSON from a file.
`clients.py mqtt BROKER CLUSTER MODEL CLIENTS SECONDS [CONNECTIONS]`: tasks of one process that call `AsyncClient.infer` with
a row of 64 numbers, on one connection or on the given number.

Prints one JSON object. All clients are one process with one event loop, and check only the status of an answer
(MQTT: `AsyncClient` also makes an array of it).
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

WARM_SECONDS = 1.0
ANSWER_SECONDS = 60.0


@dataclass
class Tally:
    """Requests answered after the warm-up: when (on the clock of `time.perf_counter`), and how long each took."""

    begin: float
    end: float
    finished: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def add(self, started: float) -> None:
        now = time.perf_counter()
        if self.begin <= now <= self.end:
            self.finished.append(now)
            self.seconds.append(now - started)

    def told(self) -> dict[str, Any]:
        ordered = sorted(self.seconds)
        at = {f"p{p}_ms": 1000 * ordered[min(len(ordered) - 1, len(ordered) * p // 100)] for p in (50, 95, 99)}
        rate = len(ordered) / (self.end - self.begin)
        return {"per_second": rate, **at, "failures": len(self.failures), "failure": self.failures[:1]}


def tally(seconds: float) -> Tally:
    begin = time.perf_counter() + WARM_SECONDS
    return Tally(begin, begin + seconds)


async def ask_in_turn(ask: Callable[[], Awaitable[Any]], into: Tally) -> None:
    """One client: one question after the other until the time is over."""
    while (started := time.perf_counter()) < into.end:
        try:
            await ask()
        except Exception as error:  # noqa: BLE001 - any error is a failed request
            into.failures.append(f"{type(error).__name__}: {error}")
            await asyncio.sleep(0.01)
            continue
        into.add(started)


class HttpClient(asyncio.Protocol):
    """One connection of HTTP/1.1 that sends the same request again and again."""

    def __init__(self, request: bytes, into: Tally) -> None:
        self._request = request
        self._into = into
        self._buffer = bytearray()
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._ask()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self._into.failures.append(f"the connection was lost: {error}")
            self.done.set_result(None)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head = self._buffer.find(b"\r\n\r\n")
        if head < 0:
            return
        fields = bytes(self._buffer[:head]).lower()
        at = fields.find(b"content-length:")
        if at >= 0:
            whole = len(self._buffer) >= head + 4 + int(fields[at + 15 :].split(b"\r\n", 1)[0])
        else:
            whole = self._buffer.endswith(b"0\r\n\r\n")  # chunked
        if whole:
            if fields.split(b" ", 2)[1] == b"200":
                self._into.add(self._started)
            else:
                self._into.failures.append(bytes(self._buffer[:300]).decode(errors="replace"))
            self._buffer.clear()
            self._ask()

    def _ask(self) -> None:
        self._started = time.perf_counter()
        if self._started < self._into.end:
            self._transport.write(self._request)
        elif not self.done.done():
            self.done.set_result(None)
            self._transport.close()


async def over_http(url: str, body: bytes, clients: int, seconds: float) -> Tally:
    where = urlsplit(url)
    request = (
        f"POST {where.path} HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode() + body
    into = tally(seconds)
    loop = asyncio.get_running_loop()
    made = [
        await loop.create_connection(lambda: HttpClient(request, into), where.hostname, where.port)
        for _ in range(clients)
    ]
    async with asyncio.timeout(WARM_SECONDS + seconds + ANSWER_SECONDS):
        await asyncio.gather(*(client.done for _, client in made))
    return into


async def over_mqtt(broker: str, cluster: str, model: str, clients: int, seconds: float, connections: int) -> Tally:
    import numpy as np

    from potluck.client import AsyncClient

    row = np.random.default_rng(0).random((1, 64), np.float32)
    async with AsyncExitStack() as stack:
        made = [await stack.enter_async_context(AsyncClient(broker, cluster=cluster)) for _ in range(connections)]
        into = tally(seconds)
        async with asyncio.TaskGroup() as tasks:
            for number in range(clients):
                client = made[number % connections]
                tasks.create_task(ask_in_turn(lambda client=client: client.infer(model, row), into))  # type: ignore[misc]
    return into


def main(kind: str, *arguments: str) -> None:
    if kind == "http":
        url, body, clients, seconds = arguments
        run = over_http(url, Path(body).read_bytes(), int(clients), float(seconds))
    else:
        broker, cluster, model, clients, seconds, *rest = arguments
        run = over_mqtt(broker, cluster, model, int(clients), float(seconds), int(rest[0]) if rest else 1)
    print(json.dumps(asyncio.run(run).told()))


if __name__ == "__main__":
    main(*sys.argv[1:])
