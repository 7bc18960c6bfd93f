"""How the nodes share a training job's data: pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from coordinator.plans.events import RoundPlanned
from coordinator.plans.placement import assign


@dataclass
class Sharing:
    """`assigned`: indexes of data shards by node; `shares`: the speeds that it is based on, as shares of the sum."""

    assigned: dict[str, tuple[int, ...]] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    slow: dict[str, str] = field(default_factory=dict)
    """Nodes left out of the last round because they bring less than they cost, and why."""
    slow_at: float = 0.0
    """When that was found."""

    def planned(self, event: RoundPlanned) -> None:
        self.assigned, self.shares = dict(event.assigned) or self.assigned, dict(event.shares) or self.shares
        self.slow, self.slow_at = event.slow, event.at

    def has(self, node_id: str, indexes: tuple[int, ...]) -> None:
        """A node has a part with these data."""
        self.assigned[node_id] = indexes

    def rehearses(self, node_id: str, indexes: tuple[int, ...]) -> None:
        """A node gets ready with these data: they are there, where it has none for its parts yet."""
        self.assigned.setdefault(node_id, indexes)

    def assignment(
        self, counts: Sequence[int], rates: Mapping[str, float]
    ) -> tuple[dict[str, tuple[int, ...]], dict[str, float]]:
        """Data shards by speed, and the shares that they rest on; kept as they are while the same nodes hold them and no share has
        moved by a third."""
        total = sum(rates.values())
        shares = {node_id: rate / total for node_id, rate in rates.items()}
        same_nodes = self.shares.keys() == shares.keys()
        if not same_nodes or any(abs(shares[name] - self.shares[name]) > self.shares[name] / 3 for name in shares):
            return assign(counts, rates, self.assigned), shares
        return self.assigned, self.shares
