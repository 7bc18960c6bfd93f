"""What each kind of member gets from a node's HTTP server."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from node.guests import Guests, refusal
from potluck.net.peers import identity_of

GONE = "node:gone"


def shown(identity: str, *roles: str) -> dict[str, Any]:
    return {"subject": ((("commonName", identity),), *((("organizationalUnitName", role),) for role in roles))}


def asked(certificate: dict[str, Any], method: str, path: str) -> str:
    return refusal(certificate, method, path, {GONE, "client:gone"}.__contains__)


@pytest.mark.parametrize(
    ("certificate", "blobs", "inputs"),
    [
        (shown("node:n2"), True, False),
        (shown("coordinator:attic"), True, False),
        (shown("client:ann", "viewer"), False, False),
        (shown("client:ann", "user"), True, True),
        (shown("client:ann", "operator"), True, True),
        (shown("client:ann"), False, False),
        (shown("client:ann", "viewer", "operator"), False, False),
        (shown("node:n2", "operator"), True, False),
        (shown("broker:attic"), False, False),
        (shown(GONE), False, False),
        (shown("client:gone", "operator"), False, False),
        (shown("no identity", "operator"), False, False),
        ({}, False, False),
    ],
)
def test_who_may(certificate: dict[str, Any], blobs: bool, inputs: bool) -> None:
    for method, path, may in (
        ("GET", "/blobs/00", blobs),
        ("HEAD", "/blobs/00", blobs),
        ("GET", "/inputs/x", blobs and not inputs),
        ("POST", "/inputs", inputs),
    ):
        assert (asked(certificate, method, path) == "") is may, (method, path)


def test_a_connection_lasts_no_longer_than_its_certificate() -> None:
    """Else whoever was removed could come back when its certificate, and with it its place in the list of the removed, has ended."""
    certificate = shown("node:n2") | {"notAfter": "Nov 30 12:00:00 2026 GMT"}
    assert identity_of(certificate, 1796040000.0) == "node:n2"
    assert identity_of(certificate, 1796040001.0) == ""
    assert asked(shown("node:n2") | {"notAfter": "Nov 30 12:00:00 2020 GMT"}, "GET", "/blobs/00")


async def test_nobody_comes_in_before_the_removed_are_known() -> None:
    """The list is kept in memory only: after a restart, a removed member could be the first who asks."""
    known = False
    guests = Guests(lambda identity: identity == GONE, lambda: known)

    async def here(request: web.Request) -> web.StreamResponse:
        return web.Response()

    async def answered(identity: str) -> int:
        transport = Mock()
        transport.get_extra_info = {"peercert": shown(identity)}.get
        return (await guests.middleware(make_mocked_request("GET", "/blobs/00", transport=transport), here)).status

    assert [await answered("node:n2"), await answered(GONE)] == [503, 503]
    known = True
    assert [await answered("node:n2"), await answered(GONE)] == [200, 403]
