"""Which nodes are ready for a job's rounds: pure.

A node warms up before any round knows of it: its engine starts, it builds the model, loads data, compiles a step and takes a few.
That may take a second or minutes, and no round waits for it. Its measurements tell what a round will cost on that node.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass, field

from coordinator.plans.job import Attempt
from coordinator.plans.placement import ClusterView, NodeView
from coordinator.plans.training.costs import ASSUMED_BANDWIDTH, bandwidth_of
from potluck.wire.tasks import WarmUpResult
from potluck.wire.values import BlobRef

WARM_UP = "warm-up"
"""The id of the shard that makes a node ready."""
AGAIN_SECONDS = 60.0
"""A node that was too slow to take part is measured again after so long, and after twice that each time."""
SLOWEST = 8.0
"""Of nodes that were not measured, those whose processors are so many times as slow are expected to be ready later than the others."""


@dataclass
class Readiness:
    """Which nodes are ready for one job. `ready`: when each was last measured (Unix time in seconds)."""

    ready: dict[str, float] = field(default_factory=dict)
    measurements: dict[str, int] = field(default_factory=dict)
    """How often each has warmed up."""
    took: dict[str, float] = field(default_factory=dict)
    """Seconds from the lease until each was ready for the first time: an engine's start is among them."""
    first_at: float = 0.0
    """When the first was ready."""

    def warmed_up(self, attempt: Attempt, at: float) -> None:
        node_id = attempt.node_id
        self.ready[node_id] = at
        self.measurements[node_id] = self.measurements.get(node_id, 0) + 1
        self.took.setdefault(node_id, at - attempt.leased_at)
        self.first_at = self.first_at or at

    def measured(self, node_id: str, at: float) -> None:
        """A node did a part, which measures it as well as another warm-up would."""
        if node_id in self.ready:
            self.ready[node_id] = at

    def lost(self, node_id: str) -> None:
        """A node's engine is gone, or may be."""
        self.ready.pop(node_id, None)

    def needing(self, nodes: Iterable[NodeView], attempts: dict[str, Attempt]) -> list[NodeView]:
        """The nodes that should warm up: they are not ready, and do nothing for this job."""
        busy = {attempt.node_id for attempt in attempts.values()}
        return [
            node for node in nodes if node.free_slots and node.node_id not in self.ready and node.node_id not in busy
        ]

    def able(self, view: ClusterView, attempts: dict[str, Attempt]) -> ClusterView:
        """The nodes that would begin with what they are given: ready, and not at work on a part that is late."""
        busy = {attempt.node_id for attempt in attempts.values() if of_rounds(attempt)}
        nodes = (node for node in view.nodes if node.node_id in self.ready and node.node_id not in busy)
        return ClusterView(tuple(nodes), view.now, view.resting)

    def hopes(
        self,
        now: float,
        attempts: dict[str, Attempt],
        share: float,
        seconds: float,
        among: Container[str] | None = None,
        least: float = 0.0,
    ) -> bool:
        """Whether others (of some nodes only) may still be ready within this share of the time that the first took, between so
        many seconds at least and at most."""
        warming = (attempt.node_id for attempt in attempts.values() if attempt.shard_id == WARM_UP)
        coming = any(among is None or node_id in among for node_id in warming)
        return coming and now < self.first_at + min(seconds, max(least, share * min(self.took.values(), default=0.0)))

    def alike(self, view: ClusterView) -> set[str]:
        """The nodes that get ready about as soon as those that are: far slower ones are waited for in vain."""
        best = max((node.gflops for node in view.nodes if node.node_id in self.ready), default=0.0)
        return {node.node_id for node in view.nodes if node.gflops * SLOWEST >= best or not node.gflops}

    def stale(self, node_id: str, now: float) -> bool:
        """Whether a node that was too slow may have become faster, so that it is worth measuring again."""
        patience = AGAIN_SECONDS * 2.0 ** (self.measurements.get(node_id, 1) - 1)
        return now - self.ready.get(node_id, now) >= patience


def of_rounds(attempt: Attempt) -> bool:
    """Whether an attempt is a part of some round, or gets its node ready for one."""
    return attempt.shard_id == WARM_UP or attempt.shard_id.startswith("round-")


def beside(result: WarmUpResult, model: BlobRef) -> float:
    """Seconds that a node's first part will take beside computing: setting weights, writing an update, and fetching the weights."""
    return result.beside_seconds + model.size / (bandwidth_of(result) or ASSUMED_BANDWIDTH)
