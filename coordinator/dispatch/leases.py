"""The current leases: which node holds which attempt, when it was last heard, and what must be sent again.

Only in memory: a coordinator that restarts leases the attempts in its journal again, and learns from the nodes' renewals.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from msgspec.structs import replace

from coordinator.copies.locations import Holders
from coordinator.membership import Membership
from coordinator.plans.job import Attempt, Job
from coordinator.plans.placement import ClusterView, NodeView
from potluck.bus.outbox import Outbox
from potluck.settings import CoordinatorSettings
from potluck.wire.commands import AcknowledgeResult, ForgetJob, LeaseShard, WithdrawLease
from potluck.wire.refs import hints_for, locate
from potluck.wire.tasks import AnyTask, WarmUpTask
from potluck.wire.topics import Topics
from potluck.wire.values import Message
from potluck.wording import on_nodes

MANY_SHARDS = 100
"""For a lease with more blobs, few holders of each are named: it must fit into a message."""
OWN_NAMED = 3
"""How many of our own addresses the body of a lease names for each blob; one if there are many blobs."""
PAUSES_LIMIT = 4
"""A lease is sent again after 1, 2, 4, 4, ... times `resend_seconds`: a node or broker that is slow should not get more to read."""
BEHIND = 100
"""With more messages that wait to be sent, no command is sent again: its first copy may be among them."""
ROOM_LEASE_SECONDS = 60.0
"""The least time without news after which a lease ends whose result we had no room for: its node only reports again, with long pauses."""
REFUSED_SECONDS = 0.5
REFUSED_LIMIT_SECONDS = 60.0
SLOTS = 2
"""Most attempts on a node: one runs, one is prefetched."""


def _shards(task: AnyTask) -> int:
    """How many blobs of a data set a task names."""
    if isinstance(task, WarmUpTask):
        task = task.task
    return len(getattr(task, "data", ())) + len(getattr(task, "slices", ()))


@dataclass
class Held:
    """An attempt under lease: when its node was last heard of it, and what the node said."""

    job_id: str
    node_id: str
    body: LeaseShard
    """What is leased. It never changes; each send adds its own hints."""
    heard_at: float
    sent_at: float = 0.0
    sends: int = 0
    taken: bool = False
    collecting: bool = False
    """Its result is being fetched: nothing else can end the attempt now."""
    no_room: bool = False
    """Whether we had no room for its result: it is there, and its node offers it again."""
    done: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    stage: str = ""

    def expired(self, now: float) -> bool:
        """Whether it was not renewed in time."""
        limit = max(self.body.lease_seconds, ROOM_LEASE_SECONDS) if self.no_room else self.body.lease_seconds
        return not self.collecting and now - self.heard_at > limit


class Leases:
    """All leases by attempt, and the commands for them."""

    def __init__(
        self,
        *,
        topics: Topics,
        outbox: Outbox,
        membership: Membership,
        settings: CoordinatorSettings,
        epoch: int,
        holders: Holders,
    ) -> None:
        self._topics = topics
        self._outbox = outbox
        self._membership = membership
        self._settings = settings
        self._epoch = epoch
        self._holders = holders
        self._held: dict[str, Held] = {}
        self._of_node: dict[str, set[str]] = {}
        """Attempts by node; a node without attempts is not in it."""
        self._views: dict[str, NodeView] = {}
        """Views of the nodes that can compute, ordered by id; a node's view is renewed when something about the node changes."""
        self._changed = membership.watch()
        self._nodes: tuple[NodeView, ...] = ()
        self._free: set[str] = set()
        """Nodes that can take more attempts."""
        self._refusing: dict[str, tuple[int, float]] = {}
        """How often in a row a node has refused, and until when it is offered nothing."""
        self._resting: dict[str, float] = {}
        """Nodes in `_refusing` whose time is not yet known to be over."""

    def __contains__(self, attempt_id: str) -> bool:
        return attempt_id in self._held

    def get(self, attempt_id: str) -> Held | None:
        return self._held.get(attempt_id)

    def of_node(self, node_id: str) -> list[str]:
        """Attempts that end when this node is lost."""
        return [key for key in self._of_node.get(node_id, ()) if not self._held[key].collecting]

    def hold(self, job: Job, attempt: Attempt, now: float) -> Held:
        """Begin a lease (or continue it, after a restart); the next `send_due` sends it."""
        assert attempt.task is not None
        own = self._holders.ours()[: 1 if _shards(attempt.task) > MANY_SHARDS else OWN_NAMED]
        body = LeaseShard(
            epoch=self._epoch,
            job_id=job.job_id,
            shard_id=attempt.shard_id,
            attempt_id=attempt.attempt_id,
            lease_seconds=self._settings.lease_seconds,
            task=locate(attempt.task, lambda _: own),
        )
        held = self._held[attempt.attempt_id] = Held(job.job_id, attempt.node_id, body, heard_at=now)
        self._of_node.setdefault(attempt.node_id, set()).add(attempt.attempt_id)
        self._changed.add(attempt.node_id)
        return held

    def drop(self, attempt_id: str) -> None:
        """End a lease."""
        held = self._held.pop(attempt_id)
        own = self._of_node[held.node_id]
        own.discard(attempt_id)
        if not own:
            del self._of_node[held.node_id]
        self._changed.add(held.node_id)

    def heard(self, node_id: str, attempt_id: str, now: float) -> Held | None:
        """The lease that its node reported on; None if that node does not have it."""
        held = self._held.get(attempt_id)
        if held is None or held.node_id != node_id:
            return None
        held.heard_at = now
        return held

    def refused(self, node_id: str, now: float) -> None:
        """The node refuses leases: offer it nothing for a while, longer each time."""
        times = self._refusing.get(node_id, (0, 0.0))[0] + 1
        rest_seconds = min(REFUSED_SECONDS * 2.0 ** (times - 1), REFUSED_LIMIT_SECONDS)
        self._refusing[node_id] = times, now + rest_seconds
        self._resting[node_id] = now + rest_seconds
        self._changed.add(node_id)

    def accepted(self, node_id: str) -> None:
        """The node accepts leases again."""
        if self._refusing.pop(node_id, None) is not None:
            self._resting.pop(node_id, None)
            self._changed.add(node_id)

    def expired(self, now: float) -> list[tuple[str, Held]]:
        """Leases that were not renewed in time."""
        return [(key, held) for key, held in self._held.items() if held.expired(now)]

    @property
    def behind(self) -> bool:
        """Whether many messages wait to be sent. Copies of commands would only fill the outbox."""
        return self._outbox.waiting > BEHIND

    def send_due(self, now: float) -> None:
        """Send leases, again if their nodes have not confirmed them."""
        behind = self.behind
        for held in self._held.values():
            if not held.taken and (not held.sends or not behind) and now - held.sent_at >= self._pause_seconds(held):
                self.send(held, now)

    def _pause_seconds(self, held: Held) -> float:
        return self._settings.resend_seconds * min(1 << max(0, held.sends - 1), PAUSES_LIMIT)

    def send(self, held: Held, now: float) -> None:
        held.sent_at = now
        member = self._membership.get(held.node_id)
        if member is not None and member.state != "offline":
            held.sends += 1
            task = held.body.task
            nodes_with = self._holders.few if _shards(task) > MANY_SHARDS else self._holders.nodes
            hints = hints_for(task, nodes_with, self._holders.ours())
            self.command(held.node_id, replace(held.body, hints=hints))

    def withdraw(self, node_id: str, attempt_id: str, reason: str) -> None:
        self.command(node_id, WithdrawLease(epoch=self._epoch, attempt_id=attempt_id, reason=reason))

    def forget(self, job: Job) -> None:
        """Nodes that took part in a job may drop what they keep for it."""
        for node_id in job.participants:
            self.command(node_id, ForgetJob(job_id=job.job_id, epoch=self._epoch))

    def acknowledge(self, node_id: str, attempt_id: str) -> None:
        """We have the outcome of an attempt: its node need not send it again."""
        self.command(node_id, AcknowledgeResult(attempt_id=attempt_id, epoch=self._epoch))

    def command(self, node_id: str, message: Message) -> None:
        self._outbox.publish(self._topics.node(node_id, "inbox"), message)

    def running(self, job: Job) -> dict[str, tuple[Attempt, int, dict[str, float]]]:
        """The reports of a job's open attempts."""
        return {
            attempt_id: (attempt, self._held[attempt_id].done, self._held[attempt_id].metrics)
            for attempt_id, attempt in job.attempts.items()
            if attempt_id in self._held
        }

    def stage(self, job: Job) -> str:
        """What the nodes do before they compute, for people: `starting engine (TensorFlow) on n1, n2`. "" once a node computes."""
        held = [self._held[attempt_id] for attempt_id in job.attempts if attempt_id in self._held]
        if any(one.done for one in held):
            return ""
        return on_nodes((one.stage, one.node_id) for one in held)

    def violated(self, node_id: str, reason: str) -> bool:
        """A result was not what its lease asked for; returns whether the node gets no jobs for a while."""
        return self._membership.violated(node_id, reason)

    def own_items(self, node_id: str, task: AnyTask) -> int | None:
        """The number of items that the node has announced for its own data that the task is about."""
        name = getattr(task, "node_data", None)
        member = self._membership.get(node_id)
        found = [data.count for data in member.data if data.name == name] if name and member is not None else []
        return found[0] if found else None

    def quarantine(self, node_id: str, reason: str) -> None:
        self._membership.quarantine(node_id, reason)

    def quarantined(self) -> dict[str, str]:
        """Nodes that get no jobs, and why."""
        return self._membership.quarantined()

    def view(self, now: float) -> ClusterView:
        """The nodes that can compute, and how many more attempts each can take."""
        self._look_again(now)
        return ClusterView(self._nodes, now)

    def free(self, now: float) -> bool:
        """Whether any node can take more."""
        self._look_again(now)
        return bool(self._free)

    def _look_again(self, now: float) -> None:
        """Renew the views of nodes with changes, or with changes by time alone."""
        for node_id in [node_id for node_id, until in self._resting.items() if until <= now]:
            del self._resting[node_id]
            self._changed.add(node_id)
        if not self._changed:
            return
        count = len(self._views)
        for node_id in self._changed:
            self._free.discard(node_id)
            if (view := self._view_of(node_id, now)) is not None:
                self._views[node_id] = view
                if view.free_slots:
                    self._free.add(node_id)
            else:
                count -= self._views.pop(node_id, None) is not None
        self._changed.clear()
        if len(self._views) > count:
            self._views = dict(sorted(self._views.items()))
        self._nodes = tuple(self._views.values())

    def _view_of(self, node_id: str, now: float) -> NodeView | None:
        """A node's view; None if it is away or cannot compute."""
        member = self._membership.get(node_id)
        if member is None:
            self._refusing.pop(node_id, None)
        if member is None or not member.available or "tensorflow" not in member.capacity.runtimes or member.quarantined:
            return None
        load = len(self._of_node.get(node_id, ()))
        resting = self._refusing.get(node_id, (0, 0.0))[1] > now
        return NodeView(
            node_id,
            member.capacity.gflops,
            free_slots=0 if resting else max(0, SLOTS - load),
            idle=load == 0,
            collective=member.collective,
            data=member.data,
            runtimes=frozenset(member.capacity.runtimes),
            gives_way=member.telemetry is not None and member.telemetry.gives_way,
        )
