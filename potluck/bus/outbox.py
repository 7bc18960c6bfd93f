"""The messages of a daemon to the bus: one bounded queue, so that code that decides never waits.

A message is sent at once if the connection takes it, no earlier message waits, and nothing has to be on disk first.

No code relies on this for delivery: commands are resent until acknowledged, retained states are published again after every
reconnect, and a client asks again if an answer is lost.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from potluck.bus.mqtt import Bus, Envelope
from potluck.errors import PotluckError
from potluck.logs import fields
from potluck.surviving import as_defect
from potluck.wire.failures import error_info
from potluck.wire.questions import RequestFailed
from potluck.wire.values import Message

log = logging.getLogger(__name__)


class Outbox:
    """Publishes in the order of the calls. If more than `limit` messages wait, new ones are dropped and counted.

    `before` is called once before the messages of one turn of the loop are sent: it writes down what they depend on. An error that
    it raises ends `run`.
    """

    def __init__(self, bus: Bus, limit: int = 10_000, *, before: Callable[[], None] | None = None) -> None:
        self._bus = bus
        self._queue: asyncio.Queue[Callable[[], bool]] = asyncio.Queue(limit)
        self._before = before
        self._waiting = 0
        """Messages in the queue or with the sender."""
        self.dropped = 0

    @property
    def waiting(self) -> int:
        """How many messages wait to be sent."""
        return self._waiting

    def publish(self, topic: str, message: Message, **options: Any) -> None:
        """`options` as in `Bus.publish`."""
        self._send(lambda: self._bus.publish_now(topic, message, **options))

    def clear(self, topic: str) -> None:
        """Remove the retained message of `topic`."""
        self._send(lambda: self._bus.clear_now(topic))

    def reply(self, question: Envelope, answer: Message) -> None:
        self._send(lambda: self._bus.reply_now(question, answer))

    def refuse(self, question: Envelope, error: PotluckError) -> None:
        self.reply(question, RequestFailed(error=error_info(error)))

    async def run(self) -> None:
        """Send until cancelled. Raises what `before` raises."""
        while True:
            send = await self._queue.get()
            if self._before is not None:
                self._before()
            try:
                while not self._over(send):
                    await self._bus.room()
            except PotluckError as error:
                self._drop(error)
            finally:
                self._waiting -= 1
                self._queue.task_done()

    async def drained(self) -> None:
        """Return when everything that was published before has been sent or dropped."""
        await self._queue.join()

    def _send(self, send: Callable[[], bool]) -> None:
        if self._before is None and not self._waiting and self._over(send):
            return
        try:
            self._queue.put_nowait(send)
            self._waiting += 1
        except asyncio.QueueFull:
            self.dropped += 1

    def _over(self, send: Callable[[], bool]) -> bool:
        """Whether the message is done with: sent, or dropped because it can never be sent."""
        try:
            return send()
        except Exception as error:  # noqa: BLE001 - an odd message is lost, and those behind it are not
            self._drop(as_defect(error, "sending"))
            return True

    def _drop(self, error: PotluckError) -> None:
        self.dropped += 1
        log.info("message dropped %s", fields(code=error.code, reason=error.message))
