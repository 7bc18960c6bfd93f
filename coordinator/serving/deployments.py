"""Deployments: which replicas there should be, and where. Pure; time is an argument.

A deployment wants a number of replicas, each on a different node. A replica that is lost or fails is replaced. The new node
has memory for it, has the fewest replicas of all such nodes, and is the fastest of these.

A new deployment fails, with the error, when loading fails three times in a row, or when two nodes (or the only one) report an
error that a retry cannot mend. A deployment that was ready once is never given up. If it ends the engines of three nodes, or
of one node three times, within an hour, it is not loaded again in that hour. If another model ended the engine, the replica
is loaded again at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from msgspec.structs import replace

from coordinator.plans.placement import RUNTIME_OF
from potluck.crashes import Crashes
from potluck.errors import CodeNotAllowed, EngineFailed, InvalidRequest, ModelCrashed, OutOfMemory
from potluck.wire.jobs import Deploy
from potluck.wire.questions import ReplicaInfo
from potluck.wire.values import BlobRef, ErrorInfo, ModelFormat, Signature

FAILURES_LIMIT = 3
RETRY_SECONDS = 5.0
"""How long a node rests after its replica failed. It doubles with each failure, up to FAILURES_LIMIT."""


def name_of(replica_id: str) -> str:
    """The deployment of a replica, taken from the replica's id (`Deployment.plan` makes it)."""
    return replica_id.split("/", 1)[0]


ReplicaState = Literal["loading", "ready", "failed"]
Parking = Literal["idle", "evicted", "withdrawn"]
State = Literal["loading", "ready", "failing", "idle", "evicted", "withdrawn", "retired"]


@dataclass(frozen=True)
class Place:
    """A node that could hold a replica."""

    node_id: str
    gflops: float
    free_bytes: int | None = None
    """Free memory; None: not known."""
    runtimes: frozenset[str] = frozenset({"tensorflow"})

    def fits(self, need_bytes: int) -> bool:
        return self.free_bytes is None or self.free_bytes >= need_bytes


@dataclass
class Replica:
    replica_id: str
    node_id: str
    state: ReplicaState = "loading"
    error: ErrorInfo | None = None
    asked_at: float | None = None
    warm_rows: int = 0
    held: bool = False
    """Whether the node held the replica before it was asked to load it."""

    def info(self) -> ReplicaInfo:
        return ReplicaInfo(
            replica_id=self.replica_id,
            node_id=self.node_id,
            state=self.state,
            error=self.error,
            warm_rows=self.warm_rows,
        )


@dataclass(frozen=True)
class Load:
    """Ask the node to load (again): the command is idempotent."""

    name: str
    replica_id: str
    node_id: str
    model: BlobRef
    format: ModelFormat = "keras"


@dataclass(frozen=True)
class Unload:
    replica_id: str
    node_id: str


@dataclass
class Deployment:
    """`name` is `model:version`; `wanted` 0 means one on every node."""

    name: str
    model: BlobRef
    wanted: int
    format: ModelFormat = "keras"
    signature: Signature | None = None
    replicas: dict[str, Replica] = field(default_factory=dict)
    failures: int = 0
    error: ErrorInfo | None = None
    made: int = 0
    settled: bool = False
    """Whether a replica was ready once. From then on, loading is retried without end."""
    resting: dict[str, float] = field(default_factory=dict)
    """Nodes that failed, and the time until which they rest."""
    refused: dict[str, ErrorInfo] = field(default_factory=dict)
    """Nodes that cannot hold a replica, and why: code not allowed, too little memory, or an error while loading."""
    short: set[str] = field(default_factory=set)
    """Nodes that ran out of memory once. Other models may be the cause."""
    hopeless: set[str] = field(default_factory=set)
    """Nodes that reported an error of the model that a retry cannot mend."""
    crashes: Crashes = field(default_factory=Crashes)
    """Engines that this model ended, on all nodes."""
    crashing: bool = False
    """Whether it ended too many engines."""
    need_bytes: int = 0
    """Memory that one replica needs."""
    cramped: dict[str, int] = field(default_factory=dict)
    """Nodes that lack only the memory for a missing replica, and how much memory they have free."""
    asked: Deploy | None = None
    """What the user asked for."""
    parked: Parking | None = None
    """Why it holds no replicas until it gets a request; `reason` says more."""
    reason: str = ""
    retired: bool = False
    """Whether another version took its place. It is removed when its last requests are answered."""

    @property
    def ready(self) -> list[Replica]:
        return [replica for replica in self.replicas.values() if replica.state == "ready"]

    @property
    def failing(self) -> bool:
        """Whether loading fails repeatedly, or the model ends engines; `error` says how."""
        return self.failures >= FAILURES_LIMIT or self.crashing

    @property
    def failed(self) -> bool:
        """Whether loading was given up."""
        return self.failing and not self.settled

    @property
    def pinned(self) -> bool:
        """Whether the user asked for a least number of replicas. Then it always keeps some."""
        return self.asked is not None and self.asked.min_replicas > 0

    @property
    def least(self) -> int:
        """The least number of replicas while it gets requests."""
        if self.asked is not None and self.asked.max_replicas:
            return max(1, self.asked.min_replicas)
        return self.wanted or 1

    def suited(self, places: Sequence[Place]) -> list[Place]:
        """The places with a runtime for the model's format."""
        return [place for place in places if RUNTIME_OF[self.format] in place.runtimes]

    def room(self, places: Sequence[Place]) -> list[Place]:
        """The places where one more replica could be loaded now."""
        here = {replica.node_id for replica in self.replicas.values()}
        return [
            place
            for place in self.suited(places)
            if place.node_id not in here | self.refused.keys() and place.fits(self.need_bytes)
        ]

    @property
    def put_away(self) -> bool:
        """Whether it is retired, or parked until it gets a request."""
        return bool(self.parked) or self.retired

    def state(self, places: Sequence[Place]) -> State:
        """Its state, as one word."""
        if self.retired:
            return "retired"
        if self.parked:
            return self.parked
        if self.failing:
            return "failing"
        return "ready" if self.complete(places) else "loading"

    def target(self, places: Sequence[Place]) -> int:
        """How many replicas to have. A node that is silent is no place, but its replica counts until the node is lost."""
        if self.parked:
            return 0
        if self.wanted:
            return self.wanted
        held = {replica.node_id for replica in self.replicas.values()}
        fit = {place.node_id for place in self.suited(places) if place.fits(self.need_bytes)}
        return len(fit - self.refused.keys() | held)

    def complete(self, places: Sequence[Place]) -> bool:
        """Whether all wanted replicas are ready."""
        return len(self.ready) >= max(1, self.target(places))

    def plan(
        self, places: Sequence[Place], load: dict[str, int], now: float, resend_seconds: float, *, busy: bool = False
    ) -> list[Load | Unload]:
        """Commands that bring the replicas nearer to the wanted number. `load`: replicas of all deployments, by node.

        While a parked deployment is `busy` with requests, it keeps its replicas.
        """
        commands: list[Load | Unload] = []
        if self.crashing and not self.crashes.too_many(now):
            self.crashing, self.error = False, None
        places = self.suited(places)
        here = {replica.node_id for replica in self.replicas.values()}
        allowed = [place for place in places if place.node_id not in self.refused]
        if self.settled and places and not allowed and not self.replicas and self.hopeless:
            # A deployment that was ready once is never given up: all nodes that could not load it are tried again.
            self.refused = {node_id: why for node_id, why in self.refused.items() if node_id not in self.hopeless}
            self.hopeless.clear()
            allowed = [place for place in places if place.node_id not in self.refused]
        if places and not allowed and not self.replicas:
            self.failures = FAILURES_LIMIT
        places = allowed
        self.cramped = {}
        missing = self.target(places) - len(self.replicas)
        if missing > 0 and not self.failed and not self.crashing:
            able = [
                place for place in places if place.node_id not in here and self.resting.get(place.node_id, 0.0) <= now
            ]
            free = [place for place in able if place.fits(self.need_bytes)]
            if len(free) < missing:
                self.cramped = {place.node_id: place.free_bytes or 0 for place in able if place not in free}
            free.sort(key=lambda place: (load.get(place.node_id, 0), -place.gflops, place.node_id))
            for place in free[:missing]:
                self.made += 1
                replica = Replica(f"{self.name}/{place.node_id}/{self.made}", place.node_id)
                self.replicas[replica.replica_id] = replica
        elif missing < 0 and not (self.parked and busy):
            surplus = sorted(
                self.replicas.values(),
                key=lambda replica: (replica.state == "ready" or replica.held, replica.replica_id),
            )
            for replica in surplus[:-missing]:
                del self.replicas[replica.replica_id]
                commands.append(Unload(replica.replica_id, replica.node_id))
        for replica in self.replicas.values():
            if replica.state == "loading" and (replica.asked_at is None or now - replica.asked_at >= resend_seconds):
                replica.asked_at = now
                commands.append(Load(self.name, replica.replica_id, replica.node_id, self.model, self.format))
        return commands

    def loaded(self, replica_id: str, signature: Signature, warm_rows: int = 0) -> bool:
        """Note that a replica is loaded. Returns whether it is one of ours and became ready just now."""
        replica = self.replicas.get(replica_id)
        self.signature = self.signature or signature
        if replica is None or replica.state == "ready":
            return False
        replica.state, replica.error, replica.warm_rows = "ready", None, warm_rows
        self.failures, self.settled = 0, True
        self.short.discard(replica.node_id)
        if not self.crashing:
            self.error = None
        return True

    def adopt(self, replica_id: str, node_id: str, places: Sequence[Place]) -> bool:
        """Whether a replica that a node holds is one of ours, or can become one. If it can, it becomes one at once.

        It then replaces a replica that is not loaded yet, on this node or another.
        """
        if replica_id in self.replicas:
            return self.replicas[replica_id].node_id == node_id
        # `plan` makes ids like this: any other id is of another node.
        if not replica_id.startswith(f"{self.name}/{node_id}/"):
            return False
        settled = [replica.node_id for replica in self.replicas.values() if replica.state == "ready" or replica.held]
        if node_id in settled or len(settled) >= self.target(places) or self.failed or self.crashing:
            return False
        for other in [replica for replica in self.replicas.values() if replica.node_id == node_id]:
            del self.replicas[other.replica_id]
        self.replicas[replica_id] = Replica(replica_id, node_id, held=True)
        return True

    def lost(self, replica_id: str, error: ErrorInfo | None, now: float) -> bool:
        """A replica is gone. With an `error`, its node rests for a while; if it was loading, that counts as a failure.

        The node does not rest if the replica was ready and another model ended the engine (EngineFailed).
        """
        replica = self.replicas.pop(replica_id, None)
        if replica is None:
            return False
        node_id, loading = replica.node_id, replica.state == "loading"
        if error is None or (error.code == EngineFailed.code and not loading):
            return True
        if error.code == CodeNotAllowed.code or (error.code == OutOfMemory.code and node_id in self.short):
            self.refused[node_id] = error
            self.error = error
            return True
        if loading and not error.retryable and (self.ready or not self.settled):
            # A fault of the model shows on other nodes too: a second node must report it, or has shown that there is none.
            self.refused[node_id] = error
            self.hopeless.add(node_id)
            self.resting[node_id] = now + RETRY_SECONDS * 2**FAILURES_LIMIT
            if not self.ready:
                self.error = error
                self.failures = FAILURES_LIMIT if len(self.hopeless) > 1 else self.failures
            return True
        if error.code == OutOfMemory.code:
            self.short.add(node_id)
        if loading:
            self.failures = min(FAILURES_LIMIT, self.failures + 1) if error.retryable else FAILURES_LIMIT
            self.error = error
        if error.code == ModelCrashed.code or (error.code == OutOfMemory.code and not loading):
            self.crashes.add(now, f"node {node_id}: {error.message}")
            self.crashing = self.crashes.too_many(now)
            self.error = replace(error, message=self.crashes.summary) if self.crashing else error
        self.resting[node_id] = now + RETRY_SECONDS * 2 ** max(0, self.failures - 1)
        return True

    def node_lost(self, node_id: str) -> list[str]:
        """Forget a lost node. Returns the replicas that were on it."""
        gone = [replica.replica_id for replica in self.replicas.values() if replica.node_id == node_id]
        for replica_id in gone:
            del self.replicas[replica_id]
        self.resting.pop(node_id, None)
        self.refused.pop(node_id, None)
        self.short.discard(node_id)
        self.hopeless.discard(node_id)
        return gone

    def check_invariants(self) -> None:
        """Each node has at most one replica, and there are no more than wanted plus those about to be removed."""
        nodes = [replica.node_id for replica in self.replicas.values()]
        assert len(nodes) == len(set(nodes))
        assert all(replica.replica_id == key for key, replica in self.replicas.items())


def replicas_at_first(asked: Deploy) -> int:
    """Replicas of a deployment before its load is known. Raises InvalidRequest if the wishes contradict each other."""
    if 0 < asked.rollback_factor <= 1:
        raise InvalidRequest(f"rollback_factor must be above 1, or 0 (never), not {asked.rollback_factor}")
    if not asked.max_replicas:
        if asked.min_replicas:
            raise InvalidRequest("min_replicas needs max_replicas: between them the number follows the load")
        return asked.replicas
    if asked.min_replicas > asked.max_replicas:
        raise InvalidRequest(f"min_replicas, {asked.min_replicas}, is more than max_replicas, {asked.max_replicas}")
    if asked.min_replicas and asked.idle_seconds:
        raise InvalidRequest(
            f"with min_replicas {asked.min_replicas} it is never without replicas, so idle_seconds can do nothing: leave one out"
        )
    return min(max(asked.replicas, asked.min_replicas, 1), asked.max_replicas)
