"""What the nodes send for a round, and what they have promised: pure.

A round ends when all promised results are here, or should be. It goes on without a late node. That node may finish its part, and
is in no round until then. If the parts are numbered, the round waits for all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from potluck.wire.tasks import TrainResult
from potluck.wire.values import BlobRef


@dataclass
class Contributions:
    """`results`: of the open round, by contributor."""

    results: dict[str, TrainResult] = field(default_factory=dict)
    promised: frozenset[str] = frozenset()
    """The nodes for which the round was opened."""
    promised_until: float = 0.0
    """A node that gets a part later than this replaces other nodes, which are all late by then."""
    due: float = 0.0
    """When all parts should be here."""
    parts: int = 0
    """How many parts there are, if they are numbered."""

    def promise(self, node_id: str, at: float, seconds: float, parts: int) -> None:
        """A node got a part, whose result should be here after `seconds`."""
        if not self.promised:
            self.promised_until = at + seconds
        if at < self.promised_until:
            self.promised |= {node_id}
        self.due = max(self.due, at + seconds)
        self.parts = parts

    def over(self, *, in_time: bool) -> bool:
        """Whether the round is to be closed; `in_time`: some part is under way and not late."""
        if self.parts:
            return len(self.results) == self.parts
        # Parts that were given away anew, as all were late, are not waited for once those are here after all.
        here = bool(self.promised) and self.promised <= self.results.keys()
        return bool(self.results) and (here or not in_time)

    def closed(self) -> None:
        self.results, self.promised, self.due = {}, frozenset(), 0.0

    def first_base(self, rates: Mapping[str, float]) -> BlobRef:
        """The weights that most nodes began with: these are the model's own. If equal, those of the faster node."""
        found = self.results
        begun = Counter(result.base.sha256 for result in found.values())
        return found[max(found, key=lambda name: (begun[found[name].base.sha256], rates.get(name, 0.0), name))].base

    def began_elsewhere(self, base: BlobRef) -> dict[str, str]:
        """Contributors that began from other weights than these, and what is wrong with that."""
        return {
            name: f"it began from other weights ({result.base.sha256[:12]}) than the round ({base.sha256[:12]})"
            for name, result in self.results.items()
            if result.base.sha256 != base.sha256
        }

    def kept(self) -> set[str]:
        return {ref.sha256 for part in self.results.values() for ref in (part.base, part.update)}
