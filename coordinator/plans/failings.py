"""What nodes fail at in a job, who is left out for it, and when it ends the job: pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from msgspec.structs import replace

from coordinator.plans.placement import ClusterView, NodeView
from potluck.errors import CodeNotAllowed, EngineFailed, OutOfMemory, PeerLost
from potluck.wire.failures import as_error
from potluck.wire.values import ErrorInfo

OPINION_SECONDS = 30.0
"""How long another node has to show that the job can be done, or to agree that it cannot."""
REST_SECONDS = 1.0
"""A node that reported an error rests for twice as long, and twice that after the next in a row."""


@dataclass
class Failings:
    """`in_a_row`: attempts of each node that ended with an error, since any has succeeded."""

    in_a_row: dict[str, int] = field(default_factory=dict)
    last_error: ErrorInfo | None = None
    hopeless: dict[str, ErrorInfo] = field(default_factory=dict)
    """Errors from nodes that trying again cannot mend. One node may be wrong (it may lack a library): it gets no more of the job while
    there are others. When two nodes report one, the job ends."""
    hopeless_at: float = 0.0
    """When the first node reported one."""
    done_by: set[str] = field(default_factory=set)
    """Nodes that have done something for the job."""
    touched_at: float = 0.0
    """When an attempt last ended with a result or with its own error."""
    resting: dict[str, float] = field(default_factory=dict)
    """Nodes that reported an error, and until when they get nothing of this job."""
    refused: dict[str, ErrorInfo] = field(default_factory=dict)
    """Nodes that do not allow the model's code, or lack the memory, and their errors: they get nothing of this job."""
    short: set[str] = field(default_factory=set)
    """Nodes whose last attempt ended for lack of memory; after a second time, they are left out."""

    def done(self, node_id: str, at: float, *, succeeded: bool) -> None:
        """An attempt came to a result. To be ready is not yet to have `succeeded`."""
        self.done_by.add(node_id)
        self.touched_at = at
        if succeeded:
            self.in_a_row.clear()
            self.short.discard(node_id)

    def failed(self, node_id: str, error: ErrorInfo, at: float) -> None:
        """An attempt came to an error of its own."""
        self.touched_at = at
        if error.code == PeerLost.code:
            return
        if error.code == CodeNotAllowed.code or (error.code == OutOfMemory.code and node_id in self.short):
            self.refused[node_id] = error
            return
        if error.code == OutOfMemory.code:
            self.short.add(node_id)
        if error.code == EngineFailed.code:
            error = replace(error, message=f"node {node_id}: {error.message}")
        self.last_error = error
        self.in_a_row[node_id] = times = self.in_a_row.get(node_id, 0) + 1
        # The node rests, so that the job is not tried only on a node where everything fails at once.
        self.resting[node_id] = at + REST_SECONDS * 2**times
        if not error.retryable:
            self.hopeless_at = self.hopeless_at or at
            self.hopeless.setdefault(node_id, error)

    def takers(self, view: ClusterView, participants: AbstractSet[str], *, at_work: bool) -> ClusterView:
        """The nodes that may get something of the job. `participants`: those that ever did; `at_work`: some do something for it.

        Raises CodeNotAllowed or OutOfMemory, by the first node that was left out for it, when all nodes are left out.
        """
        nodes: Sequence[NodeView] = view.nodes
        if self.refused:
            nodes = [node for node in nodes if node.node_id not in self.refused]
        if view.nodes and not nodes and participants <= self.refused.keys():
            reason = self.refused[view.nodes[0].node_id]
            what = "runs this model" if reason.code == CodeNotAllowed.code else "can do this job"
            raise as_error(reason, f"no node {what}: {reason.message}")
        if not (self.refused or self.hopeless or self.resting):
            return view
        others = [node for node in nodes if node.node_id not in self.hopeless]
        if others and not self._stuck(others, view.now, at_work=at_work):
            nodes = others
        resting = frozenset(node.node_id for node in nodes if self.resting.get(node.node_id, 0.0) > view.now)
        return ClusterView(tuple(node for node in nodes if node.node_id not in resting), view.now, resting)

    def fatal(
        self, limit: int, view: ClusterView, participants: AbstractSet[str], at_work: Iterable[str]
    ) -> ErrorInfo | None:
        """The error that the job must end with: one that trying again cannot mend, or too many in a row of a node, with nobody else
        among those `at_work`."""
        if self.hopeless and not self._other_opinion(view, participants):
            return next(iter(self.hopeless.values()))
        if max(self.in_a_row.values(), default=0) < limit:
            return None
        # A working node that has not failed so often may still succeed: when all die once, the job may still be possible.
        hope = any(self.in_a_row.get(node_id, 0) < limit for node_id in at_work)
        return None if hope else self.last_error

    def _other_opinion(self, view: ClusterView, participants: AbstractSet[str]) -> bool:
        """Whether a node's error that cannot be mended may be that node's own trouble, and another node can still show it.

        A node that has done something for the job is waited for, even while it is away. Others are waited for only a limited time: the
        user waits to hear of a mistake.
        """
        if len(self.hopeless) > 1:
            return False
        if not view.nodes or self.done_by - self.hopeless.keys():
            return True
        others = {node.node_id for node in view.nodes} | participants
        return (
            bool(others - self.hopeless.keys() - self.refused.keys()) and view.now - self.hopeless_at < OPINION_SECONDS
        )

    def _stuck(self, others: Sequence[NodeView], now: float, *, at_work: bool) -> bool:
        """Whether the nodes that never called the job hopeless have room for it, but do nothing: the rest may need a node that did."""
        seconds = now - self.touched_at if self.hopeless and not at_work else 0.0
        # A node without room may be busy with other jobs, or refuse its leases: it is waited for, but not for ever.
        return seconds >= (OPINION_SECONDS if all(node.free_slots for node in others) else 10 * OPINION_SECONDS)
