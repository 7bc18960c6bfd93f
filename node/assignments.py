"""The leases that this node holds: pure transitions `(event) -> effects`. No clock, no input or output.

A lease is queued, then it runs, then its outcome is reported until the coordinator acknowledges it. Every event may come
twice (QoS 1, resends). Commands from an older coordinator of the same cluster are ignored, once a newer one was seen.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from potluck.wire.commands import AcknowledgeResult, LeaseShard, WithdrawLease
from potluck.wire.reports import LeaseRefused, LeaseRenewed, LeaseTaken, ShardFailed, ShardFinished
from potluck.wire.values import ErrorInfo

FENCE_SECONDS = 15.0
"""For this long after its coordinator was last heard, an epoch keeps older ones out. Coordinators send their status every 5 s."""
CLUSTERS_KNOWN = 16
QUEUE_LIMIT = 3
"""Most leases held and not reported yet: one runs, meanwhile the blobs of the others are fetched."""

RESEND_TURNS = 4
"""An outcome is reported again after 1, 2 and 4 turns, and then after every fourth: a coordinator that is behind should not get more to read.
The pauses stay well below the time after which a lease without news is given to another node."""

REPORTS_RENEWED = 30
"""For how many turns the lease of an outcome is renewed until the outcome is acknowledged: longer than the pauses between reports. Not for
ever, because a coordinator that cannot read the outcome must give the lease to another node."""
REPORTS_RENEWED_AT_ONCE = 5
"""With those that are not reported yet, as many as a coordinator reads of one message."""

LeaseState = Literal["queued", "running", "reporting"]
Outcome = ShardFinished | ShardFailed


@dataclass(frozen=True)
class Send:
    """Publish on the node's outbox."""

    message: LeaseTaken | LeaseRefused | LeaseRenewed | ShardFinished | ShardFailed


@dataclass(frozen=True)
class Prefetch:
    """Begin to fetch the blobs of a lease that waits for another to end."""

    lease: LeaseShard


@dataclass(frozen=True)
class Run:
    """Give this lease to the engine: no other lease is running."""

    lease: LeaseShard


@dataclass(frozen=True)
class Stop:
    """Stop the running lease: it was withdrawn."""

    attempt_id: str


@dataclass(frozen=True)
class GiveUp:
    """Fetch no more for this lease: it was withdrawn while it waited."""

    attempt_id: str


Effect = Send | Prefetch | Run | Stop | GiveUp


@dataclass
class _Held:
    lease: LeaseShard
    state: LeaseState = "queued"
    done: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    stage: str = ""
    outcome: Outcome | None = None
    turns: int = 0
    """How often it was due to report the outcome again."""
    turns_held: int = 0
    """How often leases were renewed since there is an outcome."""
    renewals: int = 0
    """How often this one was renewed then."""


@dataclass
class Assignments:
    """All leases by attempt, in the order in which they came."""

    epoch: int = 0
    """The highest epoch seen from the coordinators of `cluster`."""
    only: str = ""
    """The id of the closed cluster that this node belongs to; "": it is in an open one. Coordinators of a closed cluster prove their epochs,
    so nobody can forge one: a lower one is refused for ever, and another cluster always."""
    announced: bool = False
    """Whether a coordinator has announced itself: from then on only that one commands."""
    cluster: str = ""
    """The id of its journal: epochs of another journal cannot be compared with its own."""
    seen: dict[str, int] = field(default_factory=dict)
    """The highest epochs of clusters that were here before, by id."""
    heard_at: float | None = None
    """When the coordinator of this epoch last announced itself; None: not since the connection or the coordinator was lost."""
    older_at: float | None = None
    """Since when an older coordinator announces itself instead."""
    draining: bool = False
    held: dict[str, _Held] = field(default_factory=dict)
    stopping: str = ""
    """The attempt that the engine is stopping: the next one waits for its end."""

    @property
    def attempt_ids(self) -> tuple[str, ...]:
        return tuple(self.held)

    @property
    def busy(self) -> bool:
        """Whether anything is queued, running, or being stopped."""
        return bool(self.stopping) or any(held.state != "reporting" for held in self.held.values())

    def accepts(self, epoch: int) -> bool:
        """Whether a coordinator of this epoch may command us: the announced one, or the newest one while none was announced."""
        if self.announced or epoch < self.epoch:
            return epoch == self.epoch
        self.epoch = epoch
        return True

    def on_coordinator(self, epoch: int, now: float, cluster: str = "") -> bool:
        """A coordinator of this epoch and cluster (by its id) announces itself; returns whether it may command us.

        In an open cluster, an older epoch may do so once the newer one is silent: otherwise one forged message could keep the real
        coordinator out for ever. The same holds for another cluster; after a disconnect, another cluster may do so at once.
        """
        if self.only and (cluster != self.only or epoch < self.epoch):
            return False
        fenced = self.heard_at is not None and now - self.heard_at <= FENCE_SECONDS
        if self.announced and cluster != self.cluster:
            if fenced or epoch < self.seen.get(cluster, 0):
                return False
            self._turn_to(cluster)
        if epoch < self.epoch:
            since = self.older_at if self.heard_at is None else self.heard_at
            if since is None:
                self.older_at = since = now
            if now - since <= FENCE_SECONDS:
                return False
        self.announced, self.cluster, self.epoch = True, cluster, epoch
        self.heard_at, self.older_at = now, None
        return True

    def on_offline(self, epoch: int, cluster: str = "") -> bool:
        """A coordinator announces that it leaves; returns whether it is the one that commands us. Another may take its place at once."""
        ours = cluster in ("", self.cluster) and epoch >= self.epoch
        if ours:
            self.heard_at = None
        return ours

    def on_disconnected(self) -> None:
        """The bus is gone. Known epochs stay: otherwise a replaced coordinator could command us on the next bus.

        Leases stay too: the same coordinator may come back to them, and another one will withdraw them.
        """
        self.heard_at = self.older_at = None

    def _turn_to(self, cluster: str) -> None:
        """Switch to another cluster; remember the present one's epoch, in case it comes back."""
        epoch = self.seen.pop(cluster, 0)
        self.seen[self.cluster] = self.epoch
        while len(self.seen) > CLUSTERS_KNOWN:
            del self.seen[next(iter(self.seen))]
        self.epoch, self.heard_at, self.older_at = epoch, None, None

    def on_lease(self, lease: LeaseShard) -> list[Effect]:
        """Take a lease, confirm again that we have it, or refuse it."""
        if not self.accepts(lease.epoch) or lease.attempt_id == self.stopping:
            return []  # from a coordinator that has been replaced; or a late copy of a withdrawn lease
        known = self.held.get(lease.attempt_id)
        if known is not None:
            return [Send(known.outcome or LeaseTaken(attempt_id=lease.attempt_id))]
        refusal = self._refusal()
        if refusal is not None:
            return [Send(LeaseRefused(attempt_id=lease.attempt_id, error=refusal))]
        self.held[lease.attempt_id] = _Held(lease)
        return [Send(LeaseTaken(attempt_id=lease.attempt_id)), *(self._next() or [Prefetch(lease)])]

    def on_withdrawn(self, message: WithdrawLease) -> list[Effect]:
        if not self.accepts(message.epoch):
            return []
        held = self.held.pop(message.attempt_id, None)
        if held is None or held.state == "reporting":
            return []
        if held.state == "queued":
            return [GiveUp(message.attempt_id)]
        self.stopping = message.attempt_id
        return [Stop(message.attempt_id)]

    def on_progress(self, attempt_id: str, done: int, metrics: dict[str, float]) -> None:
        held = self.held.get(attempt_id)
        if held is not None:
            held.done, held.metrics, held.stage = done, metrics, ""

    def on_stage(self, attempt_id: str, stage: str) -> list[Effect]:
        """Report a stage before the first item that takes long."""
        held = self.held.get(attempt_id)
        if held is None or held.state != "running" or held.stage == stage:
            return []
        held.stage = stage
        return [Send(_renewed(attempt_id, held))]

    def on_outcome(self, outcome: Outcome) -> list[Effect]:
        """The engine has finished an attempt, in any way. A withdrawn one is not reported."""
        if self.stopping == outcome.attempt_id:
            self.stopping = ""
        effects: list[Effect] = []
        held = self.held.get(outcome.attempt_id)
        if held is not None and held.state != "reporting":
            held.state, held.outcome = "reporting", outcome
            effects.append(Send(outcome))
        return [*effects, *self._next()]

    def on_acknowledged(self, message: AcknowledgeResult) -> list[Effect]:
        if message.epoch and not self.accepts(message.epoch):
            return []  # the newer coordinator must get the outcome, too
        held = self.held.get(message.attempt_id)
        if held is not None and held.state == "reporting":
            del self.held[message.attempt_id]
        return []

    def on_renewal_due(self) -> list[Effect]:
        """Renew all leases in one message, named for the lease that has news."""
        reporting = [one for one in self.held.values() if one.state == "reporting"]
        for one in reporting:
            one.turns_held += 1
        # Most outcomes are acknowledged before the first turn is over. The coordinator has ended those leases, and would say so.
        late = [one for one in reporting if 1 < one.turns_held <= REPORTS_RENEWED]
        late = sorted(late, key=lambda one: one.renewals)[:REPORTS_RENEWED_AT_ONCE]
        for one in late:
            one.renewals += 1
        return self._renewal([*self._unreported(), *(one.lease.attempt_id for one in late)])

    def _unreported(self) -> list[str]:
        return [attempt_id for attempt_id, one in self.held.items() if one.state != "reporting"]

    def _renewal(self, held: list[str]) -> list[Effect]:
        if not held:
            return []
        said = next((attempt_id for attempt_id in held if self.held[attempt_id].state == "running"), held[0])
        also = tuple(attempt_id for attempt_id in held if attempt_id != said)
        return [Send(_renewed(said, self.held[said], also))]

    def on_resend_due(self) -> list[Effect]:
        """A turn to report unacknowledged outcomes again; most of those that wait for long are left out (RESEND_TURNS)."""
        effects: list[Effect] = []
        for held in self.held.values():
            if held.outcome is not None:
                held.turns += 1
                if held.turns in (1, 2) or held.turns % RESEND_TURNS == 0:
                    effects.append(Send(held.outcome))
        return effects

    def on_connected(self) -> list[Effect]:
        """We are on the bus again: renew all leases and report all outcomes, for a coordinator may wait for them."""
        for held in self.held.values():
            held.turns_held = 0
        return [
            *self._renewal(self._unreported()),
            *(Send(held.outcome) for held in self.held.values() if held.outcome is not None),
        ]

    def on_drain(self, *, finishing: bool = False) -> list[Effect]:
        """This node stops: give back every unfinished lease, and take no new one. `finishing`: the one that runs may end first."""
        self.draining = True
        error = self._refusal()
        assert error is not None
        effects: list[Effect] = []
        for attempt_id, held in list(self.held.items()):
            if held.state == "running":
                if finishing:
                    continue
                self.stopping = attempt_id
                effects.append(Stop(attempt_id))
            if held.state != "reporting":
                del self.held[attempt_id]
                effects.append(Send(LeaseRefused(attempt_id=attempt_id, error=error)))
        return effects

    def check_invariants(self) -> None:
        """At most one lease runs; none runs while another is being stopped; every reported lease has an outcome."""
        running = [held for held in self.held.values() if held.state == "running"]
        assert len(running) + bool(self.stopping) <= 1
        assert all((held.outcome is not None) == (held.state == "reporting") for held in self.held.values())
        assert self.stopping not in self.held
        waiting = [held for held in self.held.values() if held.state != "reporting"]
        assert len(waiting) <= QUEUE_LIMIT
        assert not (self.draining and any(held.state == "queued" for held in waiting))
        assert running or self.stopping or not waiting  # a lease waits only for another one

    def _refusal(self) -> ErrorInfo | None:
        if self.draining:
            return ErrorInfo(code="unavailable", message="the node is stopping", retryable=True)
        if sum(held.state != "reporting" for held in self.held.values()) >= QUEUE_LIMIT:
            return ErrorInfo(code="overloaded", message=f"the node holds {QUEUE_LIMIT} leases already", retryable=True)
        return None

    def _next(self) -> list[Effect]:
        if self.stopping or any(held.state == "running" for held in self.held.values()):
            return []
        for held in self.held.values():
            if held.state == "queued":
                held.state = "running"
                return [Run(held.lease)]
        return []


def _renewed(attempt_id: str, held: _Held, also: tuple[str, ...] = ()) -> LeaseRenewed:
    return LeaseRenewed(attempt_id=attempt_id, done=held.done, metrics=held.metrics, stage=held.stage, also=also)
