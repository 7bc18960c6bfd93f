"""Events of the cluster, as server-sent events (WHATWG HTML, 9.2), as long as the client stays."""

from __future__ import annotations

import logging
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing

from aiohttp import web

from coordinator.control import Control, Stream
from coordinator.gateway import streaming
from coordinator.gateway.answers import guarded
from coordinator.gateway.gate import caller_of_member
from potluck.errors import InvalidRequest, PotluckError
from potluck.logs import fields
from potluck.wire import codec
from potluck.wire.questions import EventsListed, FollowEvents
from potluck.wire.roles import Caller

log = logging.getLogger(__name__)

PATH = "/v1/events"
LAST_HEADER = "Last-Event-ID"
"""The last event that a browser had before it lost the connection."""
NUMBER_SIGNS = 15
KEEP_ALIVE_SECONDS = 15.0
"""After this long without an event, a sign of life is sent, as the WHATWG advises."""


class FollowedEvents:
    """The route of events."""

    def __init__(self, control: Control) -> None:
        self._control = control

    def routes(self) -> list[web.RouteDef]:
        return [web.get(PATH, guarded(self.follow), allow_head=False)]

    async def follow(self, request: web.Request) -> web.StreamResponse:
        """Events after the number in `Last-Event-ID`, else in `?after=`, else from now on. The `id` of an event is its number."""
        after = _number(request)
        caller, question_id = caller_of_member(request) or Caller(key=f"http {request.remote}"), uuid.uuid4().hex

        def ask() -> Stream:
            question = FollowEvents(id=question_id, after=after, seconds=KEEP_ALIVE_SECONDS)
            answer = self._control.answer(question, caller)
            assert isinstance(answer, AsyncGenerator)
            return answer

        answers = ask()
        response = web.StreamResponse(headers={"Content-Type": streaming.CONTENT_TYPE, "Cache-Control": "no-store"})
        try:
            while True:
                async with aclosing(answers):
                    async for page in answers:
                        assert isinstance(page, EventsListed)
                        if not response.prepared:  # what fails before has a status of its own
                            await response.prepare(request)
                        await response.write(_written(page))
                        after = page.last
                answers = ask()
        except PotluckError as error:  # for example, the coordinator stops: the client comes back with its last number
            if not response.prepared:
                raise
            log.info("an HTTP client follows events no more %s", fields(peer=request.remote, reason=error.message))
        await response.write_eof()
        return response


def _number(request: web.Request) -> int | None:
    """The number of the event to begin after; None: begin with new events. Raises InvalidRequest."""
    text = request.headers.get(LAST_HEADER) or request.query.get("after", "")
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= NUMBER_SIGNS):
        raise InvalidRequest(f"{text[:40]!r} is not the number of an event: {LAST_HEADER} and ?after= take one")
    return int(text)


def _written(page: EventsListed) -> bytes:
    """The bytes of a page. A page without events still tells the client the number to come back with, and that we are here."""
    if not page.events:
        return b": nothing has happened\nid: %d\n\n" % page.last
    return b"".join(streaming.event(one.number, codec.pack(one, "json")) for one in page.events)
