"""Identities of processes: `node:kitchen-5f2a`, `coordinator:attic-1f00ba`, `client:9c3e61b02d47`. Pure.

In a closed cluster a certificate proves it, or a bearer token. In an open one each process states its own: it is only for the log
there, and decides nothing.
"""

from __future__ import annotations

import re
from typing import Literal

from potluck.wire.topics import NODE_ID

Role = Literal["node", "coordinator", "client"]

ANONYMOUS = "anonymous"
"""Stands in the log for a caller that gives no identity."""
CLIENT_ID_PREFIX = "potluck-"
"""How the MQTT client ids begin that are sent in a closed cluster. No identity begins so, because its role has no '-'."""
CALLER_HEADER = "Potluck-Caller"
"""The header of an HTTP request with the identity of its sender."""

IDENTITY_PATTERN = rf"^[a-z]{{1,16}}:{NODE_ID.pattern}$"
_IDENTITY = re.compile(IDENTITY_PATTERN)


def identity(role: Role, name: str) -> str:
    """The identity of this role and name. Raises ValueError for a bad name."""
    found = f"{role}:{name}"
    if not is_identity(found):
        raise ValueError(f"{found[:80]!r} is no identity")
    return found


def is_identity(text: str) -> bool:
    """Whether the text is an identity, of any role: later versions may have more roles."""
    return _IDENTITY.fullmatch(text) is not None
