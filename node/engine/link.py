"""The socket to an engine, on its node's side: cuts the stream into frames and gives each to the code that waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from node.engine import frames
from potluck.errors import BadMessage, EngineFailed, PotluckError

OnProgress = Callable[[int, dict[str, float]], None]


class EngineLink(asyncio.Protocol):
    """`on_heard` is called with each frame, and with None for a piece of a frame."""

    def __init__(self, on_heard: Callable[[frames.FromEngine | None], None]) -> None:
        self.started: asyncio.Future[frames.Started] = asyncio.get_running_loop().create_future()
        self._on_heard = on_heard
        self._transport: asyncio.Transport | None = None
        self._splitter = frames.FrameSplitter()
        self._waiting: dict[int, tuple[asyncio.Future[frames.Frame], OnProgress | None]] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._on_heard(None)
        try:
            for body in self._splitter.feed(data):
                self._dispatch(frames.from_engine(body))
        except BadMessage as error:
            self.fail(EngineFailed(f"the engine sent what cannot be read: {error.message}"))
            self.close()

    def _dispatch(self, frame: frames.FromEngine) -> None:
        self._on_heard(frame)
        match frame:
            case frames.Heartbeat():
                return
            case frames.Started():
                if not self.started.done():
                    self.started.set_result(frame)
                return
            case _:
                pass
        waiter, on_progress = self._waiting.get(frame.number, (None, None))
        if isinstance(frame, frames.TaskProgressed):
            if on_progress is not None:
                on_progress(frame.done, frame.metrics)
        elif waiter is not None and not waiter.done():
            waiter.set_result(frame)

    def expect(self, number: int, on_progress: OnProgress | None) -> asyncio.Future[frames.Frame]:
        waiter: asyncio.Future[frames.Frame] = asyncio.get_running_loop().create_future()
        self._waiting[number] = (waiter, on_progress)
        return waiter

    def forget(self, number: int) -> None:
        self._waiting.pop(number, None)

    def fail(self, error: PotluckError) -> None:
        for waiter, _ in self._waiting.values():
            if not waiter.done():
                waiter.set_exception(error)

    def send(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()
