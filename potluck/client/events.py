"""The events of a cluster: each once and in order, even if connections are lost or the coordinator restarts."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress

from msgspec.structs import replace

from potluck.bus.mqtt import Envelope
from potluck.client.connection import Connection
from potluck.errors import InvalidRequest, PotluckError, TimedOut
from potluck.logs import fields
from potluck.wire.failures import as_error
from potluck.wire.questions import ClusterEvent, EventsListed, FollowEvents, ListEvents, RequestFailed
from potluck.wire.values import Message

log = logging.getLogger(__name__)

ASK_SECONDS = 5.0
"""How often a follower asks again. It continues this soon after it lost a connection or the coordinator."""
FOLLOW_SECONDS = 15.0
"""The coordinator drops a follower that has not asked for this long."""
_LEAVE_SECONDS = 1.0
WAITING_LIMIT = 16
"""Messages that wait to be taken. Later ones are dropped, and asked for again."""


async def events(
    connection: Connection, after: int | None, last: int | None, follow: bool
) -> AsyncGenerator[ClusterEvent, None]:
    """The events after the number `after`, or of these only the newest `last`. With `follow`, also those from now on, without an end.

    Without both numbers: all events that are kept, or with `follow`, only new ones.
    """
    if not follow or after is not None or last is not None:
        question, more = ListEvents(after=after or 0, last=last or 0), True
        while more:
            page = await connection.ask(question, EventsListed)
            for event in page.events:
                yield event
            after, more = page.last, page.more
            question = ListEvents(after=after)
    if follow:
        async with aclosing(_following(connection, after)) as happening:
            async for event in happening:
                yield event


async def _following(connection: Connection, after: int | None) -> AsyncGenerator[ClusterEvent, None]:
    """The events after the number `after` (None: from now on) as they happen. At the beginning it raises TimedOut and the
    coordinator's refusal; later it continues as soon as it can.
    """
    bus = connection.bus
    inbox = connection.topics.client_inbox(f"{bus.client_id}-{uuid.uuid4().hex[:8]}")
    question = FollowEvents(id=uuid.uuid4().hex, reply_to=inbox, seconds=FOLLOW_SECONDS)
    arrived: asyncio.Queue[Message] = asyncio.Queue(WAITING_LIMIT)

    def on_message(envelope: Envelope) -> None:
        if envelope.message.id == question.id:
            with suppress(asyncio.QueueFull):
                arrived.put_nowait(envelope.message)

    bus.subscribe(inbox, on_message)
    limit = time.monotonic() + connection.settings.timeout_seconds
    answered = False
    try:
        while True:
            try:
                await bus.publish(connection.topics.coordinator_inbox, replace(question, after=after))
            except PotluckError:
                if not answered:
                    raise
            ask_at = time.monotonic() + ASK_SECONDS
            while (message := await _next(arrived, ask_at)) is not None:
                if isinstance(message, RequestFailed):
                    if not answered:
                        raise as_error(message.error)
                    continue  # there are too many followers, or the coordinator stops: ask again
                if not isinstance(message, EventsListed):
                    raise InvalidRequest(f"the coordinator answered FollowEvents with {type(message).__name__}")
                answered = True
                if after is not None and message.after > after:
                    break  # an earlier message was lost
                events = message.events
                if after is not None and message.after < after:  # the answer to an earlier question
                    events = tuple(event for event in events if event.number > after)
                    after = max(after, message.last)
                else:
                    after = message.last
                for event in events:
                    yield event
            if not answered and time.monotonic() > limit:
                raise TimedOut(
                    f"no answer to FollowEvents within {connection.settings.timeout_seconds:g} s: is the coordinator of the same version?"
                )
    finally:
        bus.unsubscribe(inbox)
        try:
            async with asyncio.timeout(_LEAVE_SECONDS):
                await bus.publish(connection.topics.coordinator_inbox, replace(question, seconds=0.0), qos=0)
        except (TimeoutError, PotluckError) as error:
            log.info("the coordinator was not told that the client has left %s", fields(reason=str(error)))


async def _next(arrived: asyncio.Queue[Message], until: float) -> Message | None:
    """The next message that arrives before `until` (monotonic clock); None: none arrived."""
    try:
        async with asyncio.timeout(max(0.0, until - time.monotonic())):
            return await arrived.get()
    except TimeoutError:
        return None
