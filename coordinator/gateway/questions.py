"""Questions to the coordinator over HTTP: a message as on the bus, and its answer.

A browser lets a page of another origin send forms and plain text without asking. It sends other content types only if the server allows
them (WHATWG Fetch, "CORS-safelisted request-header"). These routes take only such other types, and allow no other origin. With DNS
rebinding, the host name of a hostile page means this machine, so a browser takes the page for one of ours. But with each POST from a
page, a browser sends the header `Origin` (WHATWG Fetch, "Origin"): questions with that header are refused.
"""

from __future__ import annotations

from aiohttp import hdrs, web
from msgspec.structs import replace

from coordinator.control import Control, Later
from coordinator.gateway import events
from coordinator.gateway.answers import problem
from coordinator.gateway.asking import Asking
from coordinator.gateway.gate import caller_of_member
from potluck.errors import InvalidRequest
from potluck.net.http import caller_of, media_type
from potluck.surviving import as_defect
from potluck.wire import codec
from potluck.wire.identities import ANONYMOUS
from potluck.wire.questions import FollowEvents, JobEnded
from potluck.wire.roles import Caller
from potluck.wire.tensors import readable
from potluck.wire.values import Message

PATH = "/v1/control"


class Questions:
    """The route of questions that `Control` answers."""

    def __init__(self, control: Control, asking: Asking) -> None:
        self._control = control
        self._asking = asking

    def routes(self) -> list[web.RouteDef]:
        return [web.post(PATH, self._asking.answering(self.ask))]

    async def ask(self, request: web.Request) -> web.Response:
        """Answer in the encoding of the question. A client that names itself may ask again with the same message `id`.

        In a closed cluster every client has a name, and what it says of itself is not read.
        """
        if (kind := media_type(request)) not in codec.CONTENT_TYPES.values():
            return problem(
                415,
                f"the Content-Type is {kind[:80]}: send {' or '.join(codec.CONTENT_TYPES.values())}",
            )
        if hdrs.ORIGIN in request.headers:
            return problem(403, "questions from web pages are refused: ask with a program of your own")
        question, encoding = codec.decode(await self._asking.bodies.read(request))
        answer = await self._answer(question, caller_of_member(request) or _as_it_says(request))
        if isinstance(answer, JobEnded) and encoding == "json":
            answer = readable(answer)
        payload = codec.encode(replace(answer, id=question.id), encoding)
        return web.Response(body=payload, content_type=codec.CONTENT_TYPES[encoding])

    async def _answer(self, question: Message, caller: Caller) -> Message:
        try:
            if isinstance(question, FollowEvents):
                raise InvalidRequest(f"{type(question).__name__} has many answers: GET {events.PATH} gives them")
            answer = self._control.answer(question, caller)
            if isinstance(answer, Later):
                answer = await answer.answer()
            assert isinstance(answer, Message)
            return answer
        except Exception as error:
            raise as_defect(error, type(question).__name__) from error


def _as_it_says(request: web.Request) -> Caller:
    """Who asks in an open cluster. Raises InvalidRequest for a malformed identity."""
    said = caller_of(request)
    return Caller(key="" if said == ANONYMOUS else f"http {said}")
