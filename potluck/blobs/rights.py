"""Who may get and put blobs. Pure: whoever composes a server chooses the rules."""

from __future__ import annotations

from collections.abc import Callable
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


class AtANode:
    """For a node of a closed cluster: nodes and coordinators get blobs, and clients send inputs.

    `is_output`: whether a blob is an output of an inference. Clients get these: whoever knows its hash was told it with the answer.
    """

    def __init__(self, is_output: Callable[[str], bool] = lambda sha256: False) -> None:
        self._is_output = is_output

    def allowed(self, identity: str, sha256: str) -> bool:
        kind = identity.partition(":")[0]
        return kind in ("node", "coordinator") or (kind == "client" and self._is_output(sha256))

    def may_put(self, identity: str, size: int) -> bool:
        return identity.partition(":")[0] == "client"


OPEN: Rights = _Open()
"""For open clusters."""
