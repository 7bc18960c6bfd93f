"""Questions of clients on the bus: gives messages on `coordinator/inbox` and `jobs/submit` to `Control`, and sends the answers."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from functools import partial

from coordinator.callers import Callers
from coordinator.control import TAKES_TIME, Control, Later, Stream
from potluck.bus.mqtt import Envelope
from potluck.bus.outbox import Outbox
from potluck.errors import NotAllowed, NotAuthenticated, Overloaded
from potluck.surviving import as_defect
from potluck.wire.roles import Caller
from potluck.wire.values import Message

LATER_LIMIT = 100
"""How many questions whose answer takes time may wait; as many may be in work."""
LATER_EACH = 25
"""How many of these one member of a closed cluster may have. In an open cluster, nobody knows whose they are."""


class Requests:
    """`run` must be running for answers that take time and for streams of answers."""

    def __init__(
        self,
        outbox: Outbox,
        control: Control,
        send: Callable[[Envelope, Message], Awaitable[None]],
        callers: Callers | None = None,
    ) -> None:
        """`send` answers a question, and returns when the broker has the answer: in a stream, each waits for the one before.

        `callers`: the members of a closed cluster; None: the cluster is open, and everybody may ask everything.
        """
        self._outbox = outbox
        self._control = control
        self._send = send
        self._callers = callers
        self._pending: Counter[str] = Counter()
        """Questions without an answer yet whose answer takes time, by who asked."""
        self._later: asyncio.Queue[tuple[Envelope, Later | Stream]] = asyncio.Queue(LATER_LIMIT)

    def on_request(self, envelope: Envelope) -> None:
        """Handler for the bus."""
        message = envelope.message
        try:
            caller = self._caller(envelope)
            if isinstance(message, TAKES_TIME):  # checked before any work is done
                self._check_room(envelope.caller)
            answer = self._control.answer(message, caller)
            if isinstance(answer, Later | AsyncGenerator):
                self._later.put_nowait((envelope.without_payload(), answer))
                if envelope.caller and isinstance(answer, Later):  # streams have limits of their own
                    self._pending[envelope.caller] += 1
            else:
                self._outbox.reply(envelope, answer)
        except Exception as error:  # noqa: BLE001 - whoever asked hears of it, and nobody else
            failure = as_defect(error, type(message).__name__)
            if self._callers is not None and isinstance(failure, NotAuthenticated | NotAllowed):
                self._callers.note(envelope.caller, type(message).__name__, failure.code)
            self._outbox.refuse(envelope, failure)

    async def drained(self) -> None:
        """Return when the questions that take time, and came before, are answered; streams are not waited for."""
        await self._later.join()

    def _caller(self, envelope: Envelope) -> Caller:
        """Raises NotAuthenticated."""
        if self._callers is None:
            return Caller(key=envelope.reply_to)
        return self._callers.member(envelope.caller, envelope.reply_to)

    def _check_room(self, identity: str) -> None:
        """Raises Overloaded if no more questions may wait."""
        if self._later.full():
            raise Overloaded("too many questions wait for their answers: try again later", retry_after_seconds=1.0)
        if identity and self._pending[identity] >= LATER_EACH:
            raise Overloaded(
                f"{LATER_EACH} of your questions wait for their answers: try again later", retry_after_seconds=1.0
            )

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
                    answering.add_done_callback(partial(self._answered, envelope.caller))
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

    def _answered(self, identity: str, _: asyncio.Task[None]) -> None:
        if identity:
            self._pending[identity] -= 1
            if not self._pending[identity]:
                del self._pending[identity]

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
