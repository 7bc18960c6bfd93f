"""Whose updates are of use: pure.

An update that went too far is left out, and a node whose updates are no use three times in a row is left out for good.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from coordinator.plans.placement import NodeView
from potluck.wire.tasks import TrainResult

EXPLODED = 10.0
"""An update is left out when it is so many times as large as is usual among the others, for its samples."""
REJECTIONS_LIMIT = 3


@dataclass
class Trust:
    """`rejections`: updates in a row that were of no use, by node."""

    rejections: dict[str, int] = field(default_factory=dict)
    quarantined: dict[str, str] = field(default_factory=dict)
    """Nodes that are left out, and why."""
    usual: float = 0.0
    """The size of an update for each sample, the median of a round, as large as it ever was."""

    def reject(self, node_id: str, reason: str) -> None:
        self.rejections[node_id] = self.rejections.get(node_id, 0) + 1
        if self.rejections[node_id] >= REJECTIONS_LIMIT:
            self.quarantined[node_id] = reason

    def closed(self, results: Mapping[str, TrainResult], rejected: Mapping[str, str]) -> None:
        """A round was closed with these results, but for those that were rejected."""
        for node_id in results.keys() - rejected.keys():
            self.rejections.pop(node_id, None)
        for node_id, reason in rejected.items():
            self.reject(node_id, reason)
        used = [one for node_id, one in results.items() if node_id not in rejected]
        if len(used) > 1:  # one alone is held against nobody
            self.usual = max(self.usual, statistics.median_low(one.norm / max(1, one.samples) for one in used))

    def too_far(self, results: Mapping[str, TrainResult]) -> dict[str, str]:
        """Of a round's results those that went too far, and why: farther, too, than updates of this job ever did. Where little is left to
        learn, those of a node that has just come are many times as large as the others', and good.
        """
        found = exploded({key: (result.norm, result.samples) for key, result in results.items()})
        return {key: reason for key, reason in found.items() if results[key].norm > self.usual * results[key].samples}

    def trusted(self, nodes: Sequence[NodeView]) -> Sequence[NodeView]:
        """Without those in quarantine; better all of them than none."""
        return [node for node in nodes if node.node_id not in self.quarantined] or nodes


def exploded(norms: dict[str, tuple[float, int]]) -> dict[str, str]:
    """Of updates by node, as (norm, samples): those that went too far, and why. Never all of them.

    An update grows with its samples, at most in proportion; so each is compared with what the median of the others would be
    for as many samples.
    """
    found: dict[str, str] = {}
    for node_id, (norm, samples) in norms.items():
        others = sorted(
            other * max(1.0, samples / count)
            for key, (other, count) in norms.items()
            if key != node_id and other > 0 and count > 0
        )
        if others and norm > EXPLODED * others[len(others) // 2]:
            times = norm / others[len(others) // 2]
            found[node_id] = f"its update was {times:.0f} times as large as those of the other nodes"
    return found if len(found) < len(norms) else {}
