"""Addresses of blob holders: `http://host:port`, and nothing else. Pure.

The sender of a message names the holders, and we ask them. An address with a path, a query or a user would let any sender
make this machine send any request to anyone. So we add the path ourselves.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from ipaddress import ip_address

from potluck.errors import InvalidRequest

_LABEL = "[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_ADDRESS = re.compile(rf"https?://(?:\[[0-9A-Fa-f:.]{{2,45}}\]|{_LABEL}(?:\.{_LABEL})*\.?):[0-9]{{1,5}}/?")
_LIMIT = 300
NO_ADDRESS = "is not an http://host:port address"


def is_address(text: str) -> bool:
    """Whether the text is such an address. Host names are as in the DNS (RFC 1123, 2.1), others in their ASCII form."""
    if len(text) > _LIMIT or not _ADDRESS.fullmatch(text):
        return False
    host, _, port = text.rstrip("/").partition("://")[2].rpartition(":")
    try:
        if host.startswith("[") or host.rstrip(".").rpartition(".")[2].isdigit():  # no top-level domain is a number
            ip_address(host.strip("[]"))
    except ValueError:
        return False
    return int(port) < 65536


def check_holders(holders: Iterable[str], what: str) -> None:
    """Raises InvalidRequest where a holder of `what` is not an address."""
    for holder in holders:
        if not is_address(holder):
            raise InvalidRequest(f"{what} names the holder {holder[:80]!r}, which {NO_ADDRESS}")
