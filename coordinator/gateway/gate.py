"""Who may use which route of a closed cluster's HTTP server. Every route is in a table here, also those that others serve.

The sender of a request is whom the certificate of its connection names. Programs without a certificate send a bearer token (RFC 6750).
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from aiohttp import hdrs, web

from coordinator.callers import ANY_MEMBER, Callers, require
from coordinator.gateway.answers import Handler, refused
from potluck.errors import NotAllowed, NotAuthenticated
from potluck.net.http import recognised
from potluck.net.peers import ASKER, kept, peer_identity
from potluck.wire.joining import CA_PATH, JOIN_PATH, RENEW_PATH
from potluck.wire.roles import Caller

ANYBODY: Final = ""
"""What somebody without an identity may do: see that the server lives, and join."""

_V2 = "/v2/models/{model}"
_V1 = "/v1/models/{model}"
_OF_V2 = (_V2, f"{_V2}/versions/{{version}}")
_OF_V1 = (_V1, f"{_V1}/versions/{{version}}", f"{_V1}/labels/{{label}}")

NEEDS: Final[dict[str, str]] = {
    "GET /v2/health/live": ANYBODY,
    f"GET {CA_PATH}": ANYBODY,
    f"POST {JOIN_PATH}": ANYBODY,
    f"POST {RENEW_PATH}": ANY_MEMBER,
    # who may have which blob: `coordinator.blob_rights`
    "GET /blobs/{sha256}": ANY_MEMBER,
    "PUT /blobs/{sha256}": "user",
    "GET /": "viewer",
    "GET /metrics": "viewer",
    "GET /openapi.json": "viewer",
    "GET /v1/events": "viewer",
    # what each question needs: `potluck.wire.roles`
    "POST /v1/control": "viewer",
    "GET /v2": "viewer",
    "GET /v2/health/ready": "viewer",
    "POST /v2/repository/index": "viewer",
    **{f"GET {base}{leaf}": "viewer" for base in _OF_V2 for leaf in ("", "/ready")},
    **{f"POST {base}/infer": "user" for base in _OF_V2},
    **{f"GET {base}{leaf}": "viewer" for base in _OF_V1 for leaf in ("", "/metadata")},
    **{f"POST {base}:{verb}": "user" for base in _OF_V1 for verb in ("predict", "classify", "regress")},
    "GET /models": "viewer",
    "POST /models/{model}/classify": "user",
    "POST /models/{model}/infer": "user",
}
"""The least role for each route. A route that is not here needs an operator: a new one cannot be open by mistake."""

CALLER = kept("potluck caller")
"""Where a request keeps who sent it."""
_BEARER = re.compile(r"(?i:bearer) +([A-Za-z0-9._~+/-]+=*)")
_KEY = "http"
_REFUSED = {401: NotAuthenticated.code, 403: NotAllowed.code}


class Gate:
    """Lets in who may come in. `middleware` stands before all routes; `routes` prepares those that answer before a body is sent."""

    def __init__(self, callers: Callers) -> None:
        self._callers = callers

    @property
    def middleware(self) -> Callable[[web.Request, Handler], Awaitable[web.StreamResponse]]:
        @web.middleware
        async def passed(request: web.Request, handler: Handler) -> web.StreamResponse:
            refusal = self._admit(request)
            response = await handler(request) if refusal is None else refusal
            if response.status in _REFUSED:
                who = peer_identity(request.transport) or f"somebody at {request.remote}"
                self._callers.note(who, f"{request.method} {request.path[:100]}", _REFUSED[response.status])
            return response

        return passed

    def routes(self, routes: Sequence[web.RouteDef]) -> list[web.RouteDef]:
        """The routes, of which none answers an announced body (`Expect: 100-continue`) of somebody who may not send it.

        aiohttp asks these handlers before any middleware.
        """
        return [self._expecting(route) for route in routes]

    def _admit(self, request: web.Request) -> web.Response | None:
        """Note who asks; or the answer to somebody who may not."""
        if CALLER in request:
            return None
        needed = needed_for(request)
        if needed == ANYBODY:
            return None
        try:
            caller = self._caller(request)
            require(caller, needed, f"{request.method} {request.path[:100]}")
        except (NotAuthenticated, NotAllowed) as error:
            return refused(error)
        request[CALLER], request[ASKER] = caller, caller.identity
        recognised(request)
        return None

    def _caller(self, request: web.Request) -> Caller:
        """Raises NotAuthenticated."""
        identity = peer_identity(request.transport)
        said = request.headers.getall(hdrs.AUTHORIZATION, ())
        if identity or not said:
            return self._callers.member(identity, _KEY)
        token = _BEARER.fullmatch(said[0].strip()) if len(said) == 1 else None
        if token is None:
            raise NotAuthenticated("the header Authorization is not understood: write one, as `Bearer <token>`")
        return self._callers.bearer(token[1], _KEY)

    def _expecting(self, route: web.RouteDef) -> web.RouteDef:
        inner = route.kwargs.get("expect_handler")
        if inner is None:
            return route

        async def expect(request: web.Request) -> web.StreamResponse | None:
            refusal = self._admit(request)
            if refusal is not None:
                refusal.force_close()  # the body that was announced will not come
                return refusal
            found: web.StreamResponse | None = await inner(request)
            return found

        return web.RouteDef(route.method, route.path, route.handler, {**route.kwargs, "expect_handler": expect})


def caller_of_member(request: web.Request) -> Caller | None:
    """Who asks in a closed cluster; None: the cluster is open, or the route is for anybody."""
    found: Caller | None = request.get(CALLER)
    return found


def needed_for(request: web.Request) -> str:
    """The least role for a request. What is not there is told to members only."""
    resource = request.match_info.route.resource
    if resource is None:
        return ANY_MEMBER
    method = "GET" if request.method == "HEAD" else request.method
    return NEEDS.get(f"{method} {resource.canonical}", "operator")
