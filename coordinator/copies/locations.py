"""The holders of blobs, as far as nodes have reported them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain, islice

from coordinator.membership import Membership

PEERS_NAMED = 8
"""How many nodes are named as holders of a blob, besides ourselves."""
MANY = 64
"""Where more nodes have a blob, the named ones change."""
HOLDERS_LIMIT = 100_000
"""How many blobs' holders are remembered, the newest; others are still available from us."""


class Holders:
    """Only in memory. `urls`: our own addresses for blobs."""

    def __init__(self, membership: Membership, urls: Callable[[], tuple[str, ...]]) -> None:
        self._membership = membership
        self._urls = urls
        self._nodes: dict[str, dict[str, None]] = {}
        self._turn = 0

    def stored(self, node_id: str, blobs: Iterable[str]) -> None:
        """A node now has these blobs."""
        for sha256 in blobs:
            self._nodes.setdefault(sha256, {})[node_id] = None
        while len(self._nodes) > HOLDERS_LIMIT:
            del self._nodes[next(iter(self._nodes))]

    def nodes(self, sha256: str) -> tuple[str, ...]:
        """Base URLs of online nodes that have a blob; of very many, some in turn, so that no node is asked by all."""
        known = self._nodes.get(sha256, {})
        if len(known) <= MANY:
            looked_at: Iterable[str] = sorted(known)
        else:
            self._turn += PEERS_NAMED
            first = self._turn % len(known)
            looked_at = chain(islice(known, first, None), islice(known, first))
        members = map(self._membership.get, looked_at)
        there = (url for member in members if member and member.state == "online" for url in member.http[:1])
        return tuple(islice(there, PEERS_NAMED))

    def of(self, sha256: str) -> tuple[str, ...]:
        """Base URLs of a blob's holders: the nodes first, so that the coordinator's link is the last resort."""
        return self.nodes(sha256) + self.ours()

    def ours(self) -> tuple[str, ...]:
        """Our own addresses: we have every blob that our messages name."""
        return self._urls()

    def few(self, sha256: str) -> tuple[str, ...]:
        """`nodes` for messages that name many blobs: one node for each blob, not always the same."""
        nodes = self.nodes(sha256)
        chosen = int(sha256[-8:], 16) % len(nodes) if nodes else 0
        return nodes[chosen : chosen + 1]
