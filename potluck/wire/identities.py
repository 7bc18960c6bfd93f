"""Who somebody is: `node:kitchen-5f2a`, `coordinator:attic-1f00ba`, `client:9c3e61b02d47`. Pure.

Everybody says it of themselves, and nobody checks it yet: it is for the log, and decides nothing.
"""

from __future__ import annotations

import re
from typing import Literal

from potluck.wire.topics import NODE_ID

Role = Literal["node", "coordinator", "client"]

ANONYMOUS = "anonymous"
"""In the log, in the place of an identity: of a caller that does not say who it is."""
CALLER_HEADER = "Potluck-Caller"
"""Of an HTTP request: the identity of who sends it."""

IDENTITY_PATTERN = rf"^[a-z]{{1,16}}:{NODE_ID.pattern}$"
_IDENTITY = re.compile(IDENTITY_PATTERN)


def identity(role: Role, name: str) -> str:
    """Raises ValueError for a name that an identity cannot have."""
    found = f"{role}:{name}"
    if not is_identity(found):
        raise ValueError(f"{found[:80]!r} is no identity")
    return found


def is_identity(text: str) -> bool:
    """Whether that is one, of whatever role: there may be more of them in a later version."""
    return _IDENTITY.fullmatch(text) is not None
