"""What a daemon says on the bus: one bounded queue and one sender, so that nobody who decides has to wait.

What can be sent without waiting (QoS 0) is sent at once, unless something waits that was said before it.

Nothing here is relied upon for delivery: commands are resent until acknowledged, retained states are published again after
every reconnect, and a question whose answer is lost is asked again by its client.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from potluck.bus.mqtt import Bus, Envelope
from potluck.errors import PotluckError
from potluck.logs import fields
from potluck.surviving import as_defect
from potluck.wire.messages import ErrorInfo, Message, RequestFailed

log = logging.getLogger(__name__)


class Outbox:
    """Publishes in the order of the calls. When more than `limit` messages wait, new ones are dropped and counted."""

    def __init__(self, bus: Bus, limit: int = 10_000) -> None:
        self._bus = bus
        self._queue: asyncio.Queue[Callable[[], Awaitable[None]]] = asyncio.Queue(limit)
        self._waiting = 0
        """In the queue, or with the sender."""
        self.dropped = 0

    def publish(self, topic: str, message: Message, **options: Any) -> None:
        """`options` as `Bus.publish` has them."""
        if not self._now(lambda: self._bus.publish_now(topic, message, **options)):
            self._put(lambda: self._bus.publish(topic, message, **options))

    def clear(self, topic: str) -> None:
        self._put(lambda: self._bus.clear(topic))

    def reply(self, question: Envelope, answer: Message) -> None:
        if not self._now(lambda: self._bus.reply_now(question, answer)):
            self._put(lambda: self._bus.reply(question, answer))

    def refuse(self, question: Envelope, error: PotluckError) -> None:
        self.reply(question, RequestFailed(error=error_info(error)))

    async def run(self) -> None:
        """Send until cancelled."""
        while True:
            send = await self._queue.get()
            try:
                await send()
            except Exception as error:  # noqa: BLE001 - an odd message is lost, and those behind it are not
                self._drop(as_defect(error, "sending"))
            finally:
                self._waiting -= 1
                self._queue.task_done()

    async def drained(self) -> None:
        """Return when everything that was published before has been sent or dropped."""
        await self._queue.join()

    def _now(self, send: Callable[[], bool]) -> bool:
        """Whether it was dealt with at once."""
        if self._waiting:
            return False
        try:
            return send()
        except Exception as error:  # noqa: BLE001 - the same
            self._drop(as_defect(error, "sending"))
            return True

    def _put(self, send: Callable[[], Awaitable[None]]) -> None:
        try:
            self._queue.put_nowait(send)
            self._waiting += 1
        except asyncio.QueueFull:
            self.dropped += 1

    def _drop(self, error: PotluckError) -> None:
        self.dropped += 1
        log.info("message dropped %s", fields(code=error.code, reason=error.message))


def error_info(error: PotluckError) -> ErrorInfo:
    """An error as it goes on the wire."""
    return ErrorInfo(
        code=error.code,
        message=error.message,
        retryable=error.retryable,
        retry_after_seconds=error.retry_after_seconds,
    )
