"""Questions of clients on the bus: gives messages on `coordinator/inbox` and `jobs/submit` to `Control`, and sends the answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing

from coordinator.control import TAKES_TIME, Control, Later, Stream
from potluck.bus.mqtt import Envelope
from potluck.bus.outbox import Outbox
from potluck.errors import Overloaded
from potluck.surviving import as_defect
from potluck.wire.values import Message

LATER_LIMIT = 100
"""How many questions whose answer takes time may wait; as many may be in work."""


class Requests:
    """`run` must be running for answers that take time and for streams of answers."""

    def __init__(self, outbox: Outbox, control: Control, send: Callable[[Envelope, Message], Awaitable[None]]) -> None:
        """`send` answers a question, and returns when the broker has the answer: in a stream, each waits for the one before."""
        self._outbox = outbox
        self._control = control
        self._send = send
        self._later: asyncio.Queue[tuple[Envelope, Later | Stream]] = asyncio.Queue(LATER_LIMIT)

    def on_request(self, envelope: Envelope) -> None:
        """Handler for the bus."""
        message = envelope.message
        try:
            if isinstance(message, TAKES_TIME) and self._later.full():  # checked before any work is done
                raise Overloaded("too many questions wait for their answers: try again later", retry_after_seconds=1.0)
            answer = self._control.answer(message, envelope.reply_to)
            if isinstance(answer, Later | AsyncGenerator):
                self._later.put_nowait((envelope.without_payload(), answer))
            else:
                self._outbox.reply(envelope, answer)
        except Exception as error:  # noqa: BLE001 - whoever asked hears of it, and nobody else
            self._outbox.refuse(envelope, as_defect(error, type(message).__name__))

    async def drained(self) -> None:
        """Return when the questions that take time, and came before, are answered; streams are not waited for."""
        await self._later.join()

    async def run(self) -> None:
        """Answer the questions that take time, until cancelled."""
        places = asyncio.Semaphore(LATER_LIMIT)
        streams: set[asyncio.Task[None]] = set()
        async with asyncio.TaskGroup() as tasks:
            while True:
                await places.acquire()
                envelope, answer = await self._later.get()
                if isinstance(answer, Later):
                    answering = tasks.create_task(self._answer(envelope, answer), name="question answered later")
                    answering.add_done_callback(lambda _: places.release())
                    answering.add_done_callback(lambda _: self._later.task_done())
                else:
                    places.release()
                    self._later.task_done()
                    # A stream that was asked for again, or is over, may still wait for the broker.
                    if len(streams) >= LATER_LIMIT:
                        self._outbox.refuse(envelope, Overloaded("too many streams are open", retry_after_seconds=1.0))
                        continue
                    streaming = tasks.create_task(self._answer_all(envelope, answer), name="question with many answers")
                    streams.add(streaming)
                    streaming.add_done_callback(streams.discard)

    async def _answer_all(self, envelope: Envelope, answers: Stream) -> None:
        try:
            async with aclosing(answers):
                async for answer in answers:
                    await self._send(envelope, answer)
        except Exception as error:  # noqa: BLE001 - the same
            self._outbox.refuse(envelope, as_defect(error, type(envelope.message).__name__))

    async def _answer(self, envelope: Envelope, later: Later) -> None:
        try:
            self._outbox.reply(envelope, await later.answer())
        except Exception as error:  # noqa: BLE001 - the same
            self._outbox.refuse(envelope, as_defect(error, type(envelope.message).__name__))
