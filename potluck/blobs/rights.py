"""Who may get and put blobs. Pure: whoever composes a server chooses the rules."""

from __future__ import annotations

from typing import Protocol


class Rights(Protocol):
    """`identity`: as in `client:ann`; "": nobody knows who asks."""

    def allowed(self, identity: str, sha256: str) -> bool:
        """Whether they may get this blob. It must not matter whether the blob is here."""

    def may_put(self, identity: str, size: int) -> bool:
        """Whether they may send so many bytes; 0: it is not known yet. Quotas are the store's."""


class _Open:
    def allowed(self, identity: str, sha256: str) -> bool:
        return True

    def may_put(self, identity: str, size: int) -> bool:
        return True


class _AtANode:
    def allowed(self, identity: str, sha256: str) -> bool:
        return identity.partition(":")[0] in ("node", "coordinator")

    def may_put(self, identity: str, size: int) -> bool:
        return identity.partition(":")[0] == "client"


OPEN: Rights = _Open()
"""For open clusters."""
AT_A_NODE: Rights = _AtANode()
"""For a node of a closed cluster: nodes and coordinators get blobs, and clients send inputs."""
