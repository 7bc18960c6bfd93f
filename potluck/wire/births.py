"""What nodes and the coordinator say of themselves: retained births, their wills, and telemetry."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple, TypeVar

from msgspec import Meta
from msgspec.structs import replace

from potluck.wire.values import Capacity, Count, Epoch, Message, NodeData, Part, UnixTime

PROTOCOL_VERSION = 1
"""The newest version of the protocol that this program speaks."""
OLDEST_VERSION = 1
"""The oldest one. Programs one version apart must understand each other, so it stays one behind for a while."""


class Versions(NamedTuple):
    """The versions of the protocol that a program speaks, from the oldest to the newest."""

    oldest: int
    newest: int

    def shared(self, other: Versions) -> int:
        """The newest version that both speak; 0: none."""
        found = min(self.newest, other.newest)
        return found if found >= max(self.oldest, other.oldest) else 0

    def __str__(self) -> str:
        return f"{self.oldest}" if self.oldest == self.newest else f"{self.oldest} to {self.newest}"


OURS = Versions(OLDEST_VERSION, PROTOCOL_VERSION)


class CoordinatorStatus(Message, frozen=True):
    """Retained on `coordinator/status`; the will carries the same `session` and state `offline`."""

    session: str
    epoch: Epoch
    state: Literal["online", "offline"]
    http: tuple[str, ...] = ()
    version: int = 1
    """The oldest version of the protocol that it speaks. The default is not ours: what is not on the wire is version 1, for ever."""
    software: dict[str, str] = {}
    """Versions of `potluck` and `python`, by name."""
    since: UnixTime = 0.0
    """When it came into this state; 0 in a will, which cannot know that."""
    shortage: str = ""
    """Why it can store no more blobs, so that jobs wait: its disk is full; "": it can."""
    cluster_id: str = ""
    """The id of the journal, drawn at random, because two clusters may have the same name. Empty in a will."""
    founded: UnixTime = 0.0
    """When that journal began."""
    empty: bool = False
    """Whether that journal is still empty: no job, no model."""
    others: tuple[str, ...] = ()
    """Brokers (`host:port`) of other coordinators that serve a cluster of the same name on another bus."""
    newest_version: int = 0
    """The newest version of the protocol that it speaks; 0: it speaks only `version`."""
    closed: bool = False
    """Whether only members with certificates may take part. It is a remark for people: nobody is less careful because of it."""


class Revoked(Part, frozen=True):
    identity: str
    until: UnixTime
    """When its last certificate ends: nobody need remember it longer."""


class Standing(Message, frozen=True):
    """What a CoordinatorProof proves: the body that its seal covers. Never sent by itself."""

    session: str
    epoch: Epoch
    cluster_id: str
    revoked: tuple[Revoked, ...] = ()
    """Members whose certificates are valid still, and who are none any more."""


class CoordinatorProof(Message, frozen=True):
    """Retained on `coordinator/proof` in closed clusters, and sent again when it changes: whose commands nodes carry out.

    `certificate`: that of the key that signs commands, by the cluster's CA (DER). `seal`, `body` and `signature` as in `Sealed`; the
    body is a `Standing`, and the seal is for the purpose of proofs, and for every audience.
    """

    certificate: bytes
    seal: bytes
    body: bytes
    signature: bytes


class NodeStatus(Message, frozen=True):
    """Retained on `nodes/<id>/status`. A stale will never kills a live node: its `session` differs."""

    node_id: str
    session: str
    state: Literal["online", "offline"]
    http: tuple[str, ...] = ()
    version: int = 1
    """The oldest version of the protocol that it speaks. The default is not ours: what is not on the wire is version 1, for ever."""
    collective: str = ""
    """`host:port` of its engine for synchronous training; empty where it must not take part."""
    software: dict[str, str] = {}
    """Versions by name: `potluck` and `python` of the daemon, and the runtimes of its engines (`Capacity.runtimes`)."""
    left: bool = False
    """Whether it is offline because it was ended in order; never in a will."""
    newest_version: int = 0
    """As in CoordinatorStatus."""


_S = TypeVar("_S", CoordinatorStatus, NodeStatus)


def versions_of(status: CoordinatorStatus | NodeStatus) -> Versions:
    """The versions of the protocol that its sender speaks."""
    return Versions(status.version, max(status.version, status.newest_version))


def in_our_versions(status: _S) -> _S:
    """The status, which says what we speak."""
    return replace(status, version=OURS.oldest, newest_version=OURS.newest if OURS.newest > OURS.oldest else 0)


class NodeCapacity(Message, frozen=True):
    """Retained on `nodes/<id>/capacity`."""

    node_id: str
    capacity: Capacity
    data: tuple[NodeData, ...] = ()
    """Data sets that live on it, and stay there."""
    data_missing: dict[str, str] = {}
    """Unavailable data sets that its settings name: the reason, by name."""


class NodeTelemetry(Message, frozen=True):
    """JSON, QoS 0, on `nodes/<id>/telemetry`, every few seconds."""

    node_id: str
    session: str
    cpu_percent: Annotated[float, Meta(ge=0, le=1e6)]
    memory_used_bytes: Count
    memory_available_bytes: Count
    attempts: tuple[str, ...] = ()
    replicas: tuple[str, ...] = ()
    gpu_percent: tuple[float, ...] = ()
    serving: bool = False
    """Whether the engine for replicas runs: its memory is not available any more."""
    gives_way: bool = False
    """Whether the node's jobs stand still, so that inference meets its objective."""
    sent_at: UnixTime = 0.0
    """The time by the node's clock; 0: unknown."""
    coordinator_lost_at: UnixTime = 0.0
    """Since when the node knows no online coordinator; 0: it knows one."""
    shortage: str = ""
    """Why it can store no more blobs: its disk is full; "": it can."""


AnyBirth = CoordinatorStatus | Standing | CoordinatorProof | NodeStatus | NodeCapacity | NodeTelemetry
"""Everything that nodes and the coordinator say of themselves."""
