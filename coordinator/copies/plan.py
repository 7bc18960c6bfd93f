"""Decides which node holds a copy of each registered model besides the coordinator. Pure; time is an argument.

Each blob has one holder: if possible on another machine than the coordinator, and of those nodes the one with the fewest
bytes. It stays the holder until it has been away for a while, reports that it cannot hold the blob, or a node on another machine
could replace it. The old holder keeps a blob until the new holder has it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from potluck.wire.values import BlobRef

GONE_SECONDS = 60.0
"""A holder that is away for this long is replaced. That is long: models are large, and most nodes come back."""
REST_SECONDS = 600.0
"""How long not to ask a node again that had no room for a blob."""
RETRY_SECONDS = 30.0
"""How long not to ask a node again that could not fetch a blob."""
RESEND_SECONDS = 10.0
ASKED_LIMIT = 32
"""How many blobs a node is asked to hold at a time: it fetches one after the other."""


@dataclass(frozen=True)
class CopyPlace:
    """An online node. `elsewhere`: on another machine than the coordinator."""

    node_id: str
    elsewhere: bool = True


@dataclass(frozen=True)
class Hold:
    """Ask the node to hold the blob; asking again is harmless."""

    node_id: str
    blob: BlobRef


@dataclass(frozen=True)
class Release:
    node_id: str
    sha256: str


@dataclass
class Copy:
    """`held`: its node has reported it since it joined."""

    node_id: str
    held: bool = False
    asked_at: float | None = None


@dataclass
class Holding:
    """`copies` by hash. `told`: blobs that each node was asked to hold, and not yet to release."""

    copies: dict[str, Copy] = field(default_factory=dict)
    told: dict[str, set[str]] = field(default_factory=dict)
    gone_at: dict[str, float] = field(default_factory=dict)
    resting: dict[tuple[str, str], float] = field(default_factory=dict)

    def plan(self, blobs: Mapping[str, BlobRef], places: Sequence[CopyPlace], now: float) -> list[Hold | Release]:
        """Commands that bring a copy of each of `blobs` (by hash) to a node."""
        online = {place.node_id: place for place in places}
        self._notice(online, blobs, now)
        load: Counter[str] = Counter()
        asked: Counter[str] = Counter()
        for sha256, one in self.copies.items():
            load[one.node_id] += blobs[sha256].size
            asked[one.node_id] += one.asked_at is not None and not one.held
        better = any(place.elsewhere for place in places)
        commands: list[Hold | Release] = []
        for sha256, blob in blobs.items():
            copy = self.copies.get(sha256)
            if copy is None or (better and copy.node_id in online and not online[copy.node_id].elsewhere):
                copy = self._choose(sha256, copy, online, load, blob.size)
            if copy is None or copy.held or copy.node_id not in online:
                continue
            if copy.asked_at is None and asked[copy.node_id] >= ASKED_LIMIT:
                continue
            if copy.asked_at is None or now - copy.asked_at >= RESEND_SECONDS:
                asked[copy.node_id] += copy.asked_at is None
                copy.asked_at = now
                self.told.setdefault(copy.node_id, set()).add(sha256)
                commands.append(Hold(copy.node_id, blob))
        return commands + self._releases(online, blobs)

    def stored(self, node_id: str, sha256: str) -> bool:
        """The node has this blob; returns whether that makes it the holder just now."""
        copy = self.copies.get(sha256)
        if copy is None or copy.node_id != node_id or copy.held or copy.asked_at is None:
            return False
        copy.held = True
        return True

    def failed(self, node_id: str, sha256: str, now: float, rest_seconds: float = REST_SECONDS) -> None:
        """The node cannot hold this blob now: choose another. The node stays in `told`: a command sent twice may still succeed."""
        self.resting[node_id, sha256] = now + rest_seconds
        copy = self.copies.get(sha256)
        if copy is not None and copy.node_id == node_id:
            del self.copies[sha256]

    def joined(self, node_id: str) -> None:
        """The node is here again, and may have lost its blobs: it is asked again for all that it should hold."""
        for copy in self.copies.values():
            if copy.node_id == node_id:
                copy.held, copy.asked_at = False, None

    def check_invariants(self) -> None:
        """Each holder was asked to hold its blob; a blob is released only when another node has it."""
        for sha256, copy in self.copies.items():
            assert copy.asked_at is not None or not copy.held
            assert copy.asked_at is None or sha256 in self.told[copy.node_id]

    def _notice(self, online: Mapping[str, CopyPlace], blobs: Mapping[str, BlobRef], now: float) -> None:
        """Blobs that are no longer registered need no copy; note since when holders are away, and drop those away for too long."""
        for sha256 in self.copies.keys() - blobs.keys():
            del self.copies[sha256]
        holders = {copy.node_id for copy in self.copies.values()}
        self.gone_at = {node_id: self.gone_at.get(node_id, now) for node_id in holders - online.keys()}
        self.resting = {key: until for key, until in self.resting.items() if until > now and key[1] in blobs}
        for sha256, copy in list(self.copies.items()):
            if now - self.gone_at.get(copy.node_id, now) > GONE_SECONDS and self._best(sha256, online, Counter()):
                del self.copies[sha256]

    def _choose(
        self, sha256: str, copy: Copy | None, online: Mapping[str, CopyPlace], load: Counter[str], size: int
    ) -> Copy | None:
        """A copy at the best place, if that is better than the present copy's place."""
        best = self._best(sha256, online, load)
        if best is None or (copy is not None and not best.elsewhere):
            return copy
        if copy is not None:
            load[copy.node_id] -= size
        load[best.node_id] += size
        made = self.copies[sha256] = Copy(best.node_id)
        return made

    def _best(self, sha256: str, online: Mapping[str, CopyPlace], load: Counter[str]) -> CopyPlace | None:
        free = [place for place in online.values() if (place.node_id, sha256) not in self.resting]
        return min(free, key=lambda place: (not place.elsewhere, load[place.node_id], place.node_id), default=None)

    def _releases(self, online: Mapping[str, CopyPlace], blobs: Mapping[str, BlobRef]) -> list[Hold | Release]:
        """Releases of blobs that are no longer registered, or have another holder now."""
        found: list[Hold | Release] = []
        for node_id in sorted(online.keys() & self.told.keys()):
            for sha256 in sorted(self.told[node_id]):
                copy = self.copies.get(sha256)
                if sha256 not in blobs or (copy is not None and copy.held and copy.node_id != node_id):
                    self.told[node_id].discard(sha256)
                    found.append(Release(node_id, sha256))
            if not self.told[node_id]:
                del self.told[node_id]
        return found
