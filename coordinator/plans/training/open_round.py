"""The round that is open: which attempts are its parts. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from coordinator.plans.job import Attempt


@dataclass
class OpenRound:
    """`number`: of the rounds before it. The shards of a round are `round-3`, or `round-3.0` where its parts are numbered."""

    number: int = 0
    opened_at: float = 0.0
    """When its first part was leased; before that, when the round before was opened."""
    closed_at: float = 0.0
    """When the round before was closed, in this epoch."""
    crew: frozenset[str] = frozenset()
    """The nodes that took part in the last closed round."""

    @property
    def shard_id(self) -> str:
        return f"round-{self.number}"

    def numbered(self, part: int) -> str:
        """The shard of a part that has a number."""
        return f"{self.shard_id}.{part}"

    def has(self, attempt: Attempt) -> bool:
        """Whether an attempt is a part of this round."""
        return attempt.shard_id == self.shard_id or attempt.shard_id.startswith(f"{self.shard_id}.")

    def contributor(self, attempt: Attempt) -> str:
        """What tells the parts apart: their numbers if they have them, else their nodes."""
        number = attempt.shard_id.removeprefix(self.shard_id).removeprefix(".")
        return part_name(int(number)) if number else attempt.node_id

    def seconds(self, at: float) -> float:
        """Seconds from the round before to this time."""
        return max(0.0, at - (self.closed_at or self.opened_at))

    def closed(self, at: float, crew: Iterable[str]) -> None:
        self.number += 1
        self.closed_at = at
        self.crew = frozenset(crew)

    def epoch_ended(self) -> None:
        self.closed_at = 0.0


def part_name(number: int) -> str:
    """Names in the order of the parts."""
    return f"part {number:06}"
