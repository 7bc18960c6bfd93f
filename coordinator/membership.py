"""Who is in the cluster: pure transitions over births, wills and telemetry. Time is an argument.

A member is `online` while messages come from it, `suspect` after half of the timeout without any (it gets no new work),
and `offline` after the whole timeout, or at once by its will.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from math import inf
from typing import Literal

from msgspec.structs import replace as changed

from potluck.wire import codec
from potluck.wire.addresses import is_address, is_place
from potluck.wire.births import OURS, NodeCapacity, NodeStatus, NodeTelemetry, Versions, versions_of
from potluck.wire.questions import NodeInfo
from potluck.wire.values import CLASS_NAMES_LIMIT_BYTES, NODE_DATA_LIMIT, Capacity, NodeData

MemberState = Literal["online", "suspect", "offline"]
ADDRESSES_KEPT = 32
"""How many addresses of a node are kept; a machine has a few."""
WORD_LIMIT = 256
"""How many characters of a name from a node are kept: all of them go into listings."""
LISTED_LIMIT_BYTES = 150 * 1024
"""How large a node may be in a listing, as msgpack, with all class names."""
NAMED_LIMIT = 64
"""How many things of one kind a node may have."""
MEMBERS_LIMIT = 10_000
"""Ids can be made up. Above this number, the member offline the longest is forgotten, first one that never said more than its birth; if all are online, no more nodes may join."""
FORGOTTEN_SECONDS = 60.0
"""How long after its loss a node is forgotten that never sent more than its birth or its capacity: its name may have been made up."""
QUARANTINE_SECONDS = 600.0
"""How long a node gets no jobs, unless it is started again: somebody else may have sent messages in its name."""
VIOLATIONS_LIMIT = 3
"""After this many results that are not what was asked for, a node is in quarantine."""
REBIRTH_SECONDS = 5.0
"""How often a node that sends messages without a birth is asked for it: it sends telemetry as often."""
REBIRTHS_LIMIT = 500
"""How many of them are asked in that time: a thousand nodes are back after 10 s, and made-up names cost little."""
_UNKNOWN = Capacity(hostname="", system="", cores=1, memory_bytes=0)


@dataclass
class Member:
    """A member. Only `seen_at` changes in place, with each message; for any other change, the member is replaced."""

    node_id: str
    session: str
    state: MemberState
    seen_at: float
    http: tuple[str, ...] = ()
    collective: str = ""
    capacity: Capacity = _UNKNOWN
    data: tuple[NodeData, ...] = ()
    data_missing: Mapping[str, str] = field(default_factory=dict)
    software: Mapping[str, str] = field(default_factory=dict)
    telemetry: NodeTelemetry | None = None
    left: bool = False
    """Whether it is offline because it said goodbye."""
    clock_ahead_seconds: float = 0.0
    versions: Versions = OURS
    """The versions of the protocol that it speaks."""
    unreadable: str = ""
    """Why its published capacity cannot be read, if no readable one ever came."""
    violations: int = 0
    """How many results of this session were not what their lease asked for."""
    quarantined: str = ""
    """Why this session gets no jobs for a while."""
    quarantined_at: float = 0.0
    spoke: bool = False
    """Whether it ever sent more than its birth."""

    @property
    def understood(self) -> bool:
        """Whether we speak one of its versions."""
        return OURS.shared(self.versions) > 0

    @property
    def available(self) -> bool:
        """Whether it may get work."""
        return self.state == "online" and self.understood

    @property
    def left_out(self) -> str:
        """The reason for people why it gets no jobs."""
        if not self.understood:
            return f"it speaks version {self.versions} of the protocol, but the coordinator speaks {OURS}: install the same potluck on both"
        return self.quarantined or self.unreadable


@dataclass(frozen=True)
class NodeJoined:
    node_id: str


@dataclass(frozen=True)
class NodeRefused:
    """The node's birth is not taken."""

    node_id: str
    reason: str


@dataclass(frozen=True)
class NodeUnknown:
    """The node sends messages, but its birth is missing: it was refused or lost, or a forged message replaced it."""

    node_id: str


@dataclass(frozen=True)
class NodeLost:
    """The node is gone, or is back with a new session: what its old session held is lost."""

    node_id: str
    reason: str


class Rebirths:
    """Which nodes to ask for their births now: each one seldom, and not too many at once, since names can be made up."""

    def __init__(self) -> None:
        self._asked: set[str] = set()
        self._began = -inf

    def due(self, node_id: str, now: float) -> bool:
        if not 0 <= now - self._began < REBIRTH_SECONDS:  # the clock may have been set back
            self._asked, self._began = set(), now
        if node_id in self._asked or len(self._asked) >= REBIRTHS_LIMIT:
            return False
        self._asked.add(node_id)
        return True


Change = NodeJoined | NodeRefused | NodeUnknown | NodeLost


@dataclass
class Membership:
    """The members by node id. Every method returns the changes, for others to act on."""

    timeout_seconds: float
    members: dict[str, Member] = field(default_factory=dict)
    _at: dict[str, str] = field(default_factory=dict)
    """Node ids by HTTP address."""
    _watchers: list[set[str]] = field(default_factory=list)

    def watch(self) -> set[str]:
        """A set that gets the ids of members whose work a change affects, at first all members; the caller removes ids from it."""
        watcher = set(self.members)
        self._watchers.append(watcher)
        return watcher

    def online(self) -> list[Member]:
        """Members that may get work, ordered by id."""
        return sorted((m for m in self.members.values() if m.available), key=lambda m: m.node_id)

    def get(self, node_id: str) -> Member | None:
        return self.members.get(node_id)

    def node_at(self, url: str) -> str:
        """The member that last sent this HTTP address; "" for none."""
        return self._at.get(url.rstrip("/"), "")

    def data(self) -> dict[str, dict[str, NodeData]]:
        """Data sets that live on members that may get work: by name and node."""
        found: dict[str, dict[str, NodeData]] = {}
        for member in self.online():
            for data in member.data:
                found.setdefault(data.name, {})[member.node_id] = data
        return found

    def on_status(self, status: NodeStatus, now: float) -> list[Change]:
        """A birth or a will. A stale will (of another session than the present one) changes nothing."""
        http = tuple(filter(is_address, status.http[:ADDRESSES_KEPT]))
        software = _short(status.software)
        versions = versions_of(status)
        collective = status.collective if is_place(status.collective) else ""
        known = self.members.get(status.node_id)
        if status.state == "offline":
            if known is None or known.session != status.session or known.state == "offline":
                return []
            self._put(replace(known, state="offline", left=status.left))
            return [NodeLost(status.node_id, "it left" if status.left else "it went offline")]
        if not 0 < len(status.session) <= WORD_LIMIT:
            return [NodeRefused(status.node_id, f"its session must have 1 to {WORD_LIMIT} characters")]
        if known is None and not self._room():
            reason = f"{MEMBERS_LIMIT} nodes are online: there are too many, or somebody makes up names"
            return [NodeRefused(status.node_id, reason)]
        changes: list[Change] = []
        for url in known.http if known is not None else ():
            if self._at.get(url) == status.node_id:
                del self._at[url]
        self._at.update(dict.fromkeys(http, status.node_id))
        if known is not None and known.session == status.session and known.state == "online":
            self._put(
                replace(
                    known,
                    http=http,
                    collective=collective,
                    software=software,
                    versions=versions,
                    seen_at=now,
                )
            )
            return []
        if known is not None and known.session != status.session and known.state != "offline":
            changes.append(NodeLost(status.node_id, "it was started again"))
        known = known or Member(status.node_id, "", "offline", 0.0)  # keep its capacity and data
        self._put(
            replace(
                known,
                session=status.session,
                state="online",
                seen_at=now,
                http=http,
                collective=collective,
                software=software,
                telemetry=None,
                left=False,
                versions=versions,
                violations=known.violations if known.session == status.session else 0,
                quarantined=known.quarantined if known.session == status.session else "",
            )
        )
        return [*changes, NodeJoined(status.node_id)]

    def on_capacity(self, message: NodeCapacity, now: float) -> list[Change]:
        if message.node_id not in self.members and not self._room():
            return []
        # Retained capacity may arrive before the birth.
        known = self.members.get(message.node_id) or Member(message.node_id, "", "offline", now)
        data, missing = _listable(message)
        self._put(replace(known, capacity=_bounded(message.capacity), data=data, data_missing=missing, unreadable=""))
        return []

    def on_unreadable_capacity(self, node_id: str, reason: str, now: float) -> None:
        """The node's capacity cannot be read; it keeps the one known before, if any."""
        if node_id not in self.members and not self._room():
            return
        known = self.members.get(node_id) or Member(node_id, "", "offline", now)
        if known.capacity is _UNKNOWN:
            self._put(replace(known, unreadable=f"its capacity cannot be read: {reason[:200]}"))

    def _put(self, member: Member) -> None:
        self.members[member.node_id] = member
        self._tell(member.node_id)

    def _tell(self, node_id: str) -> None:
        for watcher in self._watchers:
            watcher.add(node_id)

    def _room(self) -> bool:
        """Whether there is room for one more member; an offline member may be forgotten for it."""
        if len(self.members) < MEMBERS_LIMIT:
            return True
        gone = min(
            (one for one in self.members.values() if one.state == "offline"),
            key=lambda one: (one.spoke, bool(one.session), one.seen_at),  # those that may have been made up come first
            default=None,
        )
        if gone is None:
            return False
        self._forget(gone)
        return True

    def _forget(self, member: Member) -> None:
        del self.members[member.node_id]
        self._tell(member.node_id)
        for url in member.http:
            if self._at.get(url) == member.node_id:
                del self._at[url]

    def violated(self, node_id: str, reason: str) -> bool:
        """A result of the node was not what its lease asked for; returns whether that puts it into quarantine."""
        known = self.members.get(node_id)
        if known is None or known.quarantined:
            return False
        count = known.violations + 1
        words = (
            f"{count} of its results were not what was asked for (last: {reason}): start it again when that is repaired"
        )
        quarantined = words if count >= VIOLATIONS_LIMIT else ""
        self._put(replace(known, violations=count, quarantined=quarantined, quarantined_at=known.seen_at))
        return count >= VIOLATIONS_LIMIT

    def quarantine(self, node_id: str, reason: str) -> None:
        """Give the node no jobs for a while, or until it is started again."""
        if (known := self.members.get(node_id)) is not None and not known.quarantined:
            self._put(replace(known, quarantined=reason, quarantined_at=known.seen_at))

    def quarantined(self) -> dict[str, str]:
        """Members in quarantine, and why."""
        return {one.node_id: one.quarantined for one in self.online() if one.quarantined}

    def on_telemetry(self, telemetry: NodeTelemetry, now: float) -> list[Change]:
        """A message of the present session brings a silent member back."""
        known = self.members.get(telemetry.node_id)
        if known is None or known.session != telemetry.session:
            return [NodeUnknown(telemetry.node_id)]
        ahead = telemetry.sent_at - now if telemetry.sent_at else 0.0
        self.members[telemetry.node_id] = replace(
            known, state="online", seen_at=now, telemetry=telemetry, spoke=True, left=False, clock_ahead_seconds=ahead
        )
        gave_way = known.telemetry is not None and known.telemetry.gives_way
        if known.state != "online" or telemetry.gives_way != gave_way:
            self._tell(telemetry.node_id)
        return [NodeJoined(telemetry.node_id)] if known.state == "offline" else []

    def heard(self, node_id: str, now: float) -> list[Change]:
        """Any message of a node shows that it lives, unless its will came since."""
        known = self.members.get(node_id)
        if known is not None and known.state == "online":
            known.seen_at = now
        elif known is not None and known.state != "offline":
            self._put(replace(known, state="online", seen_at=now))
        return []

    def tick(self, now: float) -> list[Change]:
        """Time has passed: silent members become suspects, and then are lost."""
        changes: list[Change] = []
        for member in list(self.members.values()):
            silent = now - member.seen_at
            if member.quarantined and now - member.quarantined_at > QUARANTINE_SECONDS:
                member = replace(member, violations=0, quarantined="")
                self._put(member)
            never = not member.spoke and member.state == "offline"
            if never and silent > self.timeout_seconds + FORGOTTEN_SECONDS:
                self._forget(member)
            elif member.state != "offline" and silent > self.timeout_seconds:
                self._put(replace(member, state="offline"))
                changes.append(NodeLost(member.node_id, f"nothing was heard of it for {silent:.0f} s"))
            elif member.state == "online" and silent > self.timeout_seconds / 2:
                self._put(replace(member, state="suspect"))
        return changes

    def infos(self, after: str = "") -> Iterator[NodeInfo]:
        """The members after `after` by id, as clients see them; each is made only when it is asked for."""
        for node_id in sorted(self.members):
            if node_id > after and self.members[node_id].session:
                yield _fitting(_info(self.members[node_id]))


def _short(words: Mapping[str, str]) -> dict[str, str]:
    return {key[:WORD_LIMIT]: value[:WORD_LIMIT] for key, value in islice(words.items(), NAMED_LIMIT)}


def _bounded(capacity: Capacity) -> Capacity:
    """The capacity, limited for a listing with others."""
    return changed(
        capacity,
        hostname=capacity.hostname[:WORD_LIMIT],
        system=capacity.system[:WORD_LIMIT],
        gpus=tuple(changed(gpu, name=gpu.name[:WORD_LIMIT]) for gpu in capacity.gpus[:NAMED_LIMIT]),
        runtimes=_short(capacity.runtimes),
    )


def _listable(message: NodeCapacity) -> tuple[tuple[NodeData, ...], dict[str, str]]:
    """The data sets that live on a node, and the unavailable ones with the reason."""
    missing = _short(message.data_missing)
    found = []
    size = 0
    for data in message.data[:NODE_DATA_LIMIT]:
        size += sum(len(name.encode()) for name in data.format.classes)
        if size <= CLASS_NAMES_LIMIT_BYTES:
            found.append(data)
        else:
            missing[data.name] = (
                f"the class names of the node's data sets are over {CLASS_NAMES_LIMIT_BYTES} bytes: shorten them"
            )
    return tuple(found), missing


def _fitting(info: NodeInfo) -> NodeInfo:
    """The info without its largest parts, if it is above LISTED_LIMIT_BYTES: a listing has room for others, too."""
    for name, less in (("data_missing", {}), ("software", {}), ("replicas", ()), ("data", ()), ("capacity", _UNKNOWN)):
        if len(codec.pack(info)) <= LISTED_LIMIT_BYTES:
            break
        info = changed(info, **{name: less})
    return info


def _info(member: Member) -> NodeInfo:
    now = member.telemetry if member.state != "offline" else None  # it no longer does what it last reported
    return NodeInfo(
        node_id=member.node_id,
        state=member.state,
        capacity=member.capacity,
        http=member.http,
        seen_at=member.seen_at,
        cpu_percent=now.cpu_percent if now else 0.0,
        memory_used_bytes=now.memory_used_bytes if now else 0,
        leases=len(now.attempts) if now else 0,
        replicas=now.replicas if now else (),
        data=member.data,
        software=dict(member.software),
        data_missing=dict(member.data_missing),
        gives_way=now is not None and now.gives_way,
        left=member.left,
        left_out=member.left_out,
        clock_ahead_seconds=member.clock_ahead_seconds,
        shortage=now.shortage[:WORD_LIMIT] if now else "",
    )
