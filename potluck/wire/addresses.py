"""Addresses of blob holders: `http://host:port`, and nothing else. Pure, and the only place that writes such an address.

The sender of a message names the holders, and we ask them. An address with a path, a query or a user would let any sender
make this machine send any request to anyone. So we add the path ourselves.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from ipaddress import ip_address
from typing import Literal

from potluck.errors import InvalidRequest

Scheme = Literal["http", "https"]

_LABEL = "[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_PLACE = re.compile(rf"(?:\[[0-9A-Fa-f:.]{{2,45}}\]|{_LABEL}(?:\.{_LABEL})*\.?):[0-9]{{1,5}}")
_SCHEME = re.compile("https?://")
_LIMIT = 300
NO_ADDRESS = "is not an http://host:port address"


def address(host: str, port: int, scheme: Scheme) -> str:
    """The address of a server at this host and port."""
    return f"{scheme}://{place(host, port)}"


def place(host: str, port: int) -> str:
    """`host:port`; `[host]:port` for an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_address(text: str) -> bool:
    """Whether the text is such an address. Host names are as in the DNS (RFC 1123, 2.1), others in their ASCII form."""
    scheme = _SCHEME.match(text)
    return scheme is not None and len(text) <= _LIMIT and is_place(text[scheme.end() :].removesuffix("/"))


def placed(text: str) -> tuple[str, str] | None:
    """(scheme, `host:port`) of an address; None: it is none."""
    if not is_address(text):
        return None
    scheme, _, rest = text.partition("://")
    return scheme, rest.removesuffix("/")


def is_place(text: str) -> bool:
    """Whether the text is `host:port`, as in an address."""
    if len(text) > _LIMIT or not _PLACE.fullmatch(text):
        return False
    host, _, port = text.rpartition(":")
    try:
        if host.startswith("[") or host.rstrip(".").rpartition(".")[2].isdigit():  # no top-level domain is a number
            ip_address(host.strip("[]"))
    except ValueError:
        return False
    return int(port) < 65536


def check_holders(holders: Iterable[str], what: str) -> None:
    """Raises InvalidRequest if a holder of `what` is not an address."""
    for holder in holders:
        if not is_address(holder):
            raise InvalidRequest(f"{what} names the holder {holder[:80]!r}, which {NO_ADDRESS}")
