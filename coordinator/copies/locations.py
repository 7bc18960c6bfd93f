"""Who has which blob, as far as nodes have said: where it is to be had."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain, islice

from coordinator.membership import Membership

PEERS_NAMED = 8
"""Nodes named as holders of a blob, beside ourselves."""
MANY = 64
"""Where more have a blob, not always the same are named."""
OWN_NAMED = 3
"""Of our own addresses, where little can be said."""
HOLDERS_LIMIT = 100_000
"""Blobs whose holders are remembered, the newest; others are still to be had from us."""


class Holders:
    """In memory only. `urls`: where blobs are to be had from us."""

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
        """Base URLs of the nodes that have a blob and are online; of very many, some in turn: no node is asked by all."""
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
        """Base URLs of who has a blob: the nodes first, so that the coordinator's link is the last resort."""
        return self.nodes(sha256) + self._urls()

    def few(self, sha256: str) -> tuple[str, ...]:
        """The same, for messages that name many blobs: of each one of the nodes, not always the same, and ourselves."""
        nodes = self.nodes(sha256)
        chosen = int(sha256[-8:], 16) % len(nodes) if nodes else 0
        return nodes[chosen : chosen + 1] + self._urls()[:OWN_NAMED]
