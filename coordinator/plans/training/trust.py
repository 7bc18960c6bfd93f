"""Whose updates are of use: pure.

An update that is far too large is left out. A node whose updates are of no use three times in a row is left out for good.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from coordinator.plans.placement import NodeView
from potluck.wire.tasks import TrainResult

EXPLODED = 10.0
"""An update is left out if it is so many times as large as the usual one of other nodes, for as many samples."""
REJECTIONS_LIMIT = 3


@dataclass
class Trust:
    """`rejections`: updates in a row that were of no use, by node."""

    rejections: dict[str, int] = field(default_factory=dict)
    quarantined: dict[str, str] = field(default_factory=dict)
    """Nodes that are left out, and why."""
    usual: float = 0.0
    """The norm of updates divided by their samples: the median of a round, and of all rounds the largest."""

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
        # One update alone does not tell what is usual.
        if len(used) > 1:
            self.usual = max(self.usual, statistics.median_low(one.norm / max(1, one.samples) for one in used))

    def too_far(self, results: Mapping[str, TrainResult]) -> dict[str, str]:
        """The results whose updates are too large, and why. They are also larger than is usual in this job: when little is left to learn,
        a node that has just come sends updates many times as large as the others', and these are good.
        """
        found = exploded({key: (result.norm, result.samples) for key, result in results.items()})
        return {key: reason for key, reason in found.items() if results[key].norm > self.usual * results[key].samples}

    def trusted(self, nodes: Sequence[NodeView]) -> Sequence[NodeView]:
        """The nodes that are not in quarantine; if all of them are, all."""
        return [node for node in nodes if node.node_id not in self.quarantined] or nodes


def exploded(norms: dict[str, tuple[float, int]]) -> dict[str, str]:
    """The nodes whose updates are far too large, and why; never all of them. `norms`: (norm, samples) by node.

    An update grows with its samples, at most in proportion. So each is compared with the others' norms for as many samples: with
    the median of these.
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
