"""Which nodes take the steps of synchronous training together, and how many items of a step each one takes: pure.

In each step, all members wait for the slowest one. When a group is formed, all wait for the last engine to start. With shares by
speed, members take equally long for a step. A slow member must bring more in the rest of the job than it costs at the start.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from coordinator.plans.placement import split
from potluck.wire.tasks import SyncTask

KEPT = 0.1
"""Shares stay as they are until one is off by this part of it: each new one must be compiled."""
SLOW = 4.0
"""Nodes that are at most so many times as slow as the fastest are always members: who asks for exact steps wants them shared."""
WORTH_JOINING = 0.1
"""A node that joins must add this share to the speed, at least."""


@dataclass
class Group:
    """The nodes that take steps together. `members`: in the order of their ranks."""

    members: tuple[str, ...] = ()
    formed: int = 0
    """How often a group was formed."""
    formation: str = ""
    batches: dict[str, int] = field(default_factory=dict)
    """Items of a step by member."""
    begins: bool = False
    """Whether the open round formed it."""
    broken: str = ""
    """Why the open round can have no result."""
    tries: int = 0
    """How often in a row a group was formed after the one before broke off."""

    @property
    def whole(self) -> bool:
        """Whether its next round needs no forming, as far as is known here."""
        return bool(self.members) and not self.broken

    def opened(self, task: SyncTask) -> None:
        """Its first member has a part of a round."""
        self.begins = task.begins
        if task.begins:
            self.formed += 1
            self.tries += bool(self.broken)
            self.broken, self.formation = "", task.formation
            self.members = ("",) * len(task.members)
        self.batches = {}

    def leased(self, node_id: str, task: SyncTask) -> None:
        """A member has its part."""
        self.batches[node_id] = task.batches[task.rank]
        if task.begins:
            self.members = (*self.members[: task.rank], node_id, *self.members[task.rank + 1 :])

    def breaks_off(self, reason: str) -> None:
        """The first reason counts: others follow from it."""
        self.broken = self.broken or reason

    def round_closed(self) -> None:
        if self.broken:
            self.members = ()
        self.broken, self.tries = "", 0


def shares(batch: int, rates: Mapping[str, float], before: Mapping[str, int]) -> dict[str, int]:
    """Items of a step by node, in proportion to `rates` (items/s); those of `before` while they are right to a tenth.

    Nodes that would get none are left out.
    """
    found = split(batch, rates)
    if found.keys() != before.keys() or sum(before.values()) != batch:
        return found
    close = all(abs(found[name] - before[name]) <= max(1.0, KEPT * before[name]) for name in found)
    return dict(before) if close else found


def seconds(batch: int, samples: int, rates: Mapping[str, float]) -> float:
    """Seconds that these nodes need for `samples` items, without the exchange of gradients."""
    steps = -(-samples // batch)
    return steps * max(share / rates[name] for name, share in split(batch, rates).items())


def first_members(
    batch: int, samples: int, rates: Mapping[str, float], took: Mapping[str, float]
) -> tuple[list[str], dict[str, str]]:
    """The nodes that form a group, fastest first, and those that are left out, with the reason.

    `took`: seconds that each needs to start an engine and to compile a step there.
    """
    order = sorted(rates, key=lambda name: (-rates[name], name))[:batch]
    taken, left = order[:1], dict[str, str]()
    if not taken:
        return [], {}
    for name in order[1:]:
        before = {one: rates[one] for one in taken}
        waits = max(0.0, took.get(name, 0.0) - max(took.get(one, 0.0) for one in taken))
        if rates[name] * SLOW < rates[order[0]]:
            alone, together = seconds(batch, samples, before), seconds(batch, samples, before | {name: rates[name]})
            if name not in split(batch, before | {name: rates[name]}) or waits + together > alone:
                left[name] = (
                    f"the others take {alone:.0f} s for what is left, and with it {waits + together:.0f} s, of which "
                    f"{waits:.0f} s to start"
                )
                continue
        taken.append(name)
    return taken, left


def worth_joining(
    batch: int, samples: int, members: Mapping[str, float], newcomers: Mapping[str, float], took: Mapping[str, float]
) -> list[str]:
    """Those of the newcomers (items/s by node) for which the group should be formed anew, which all members wait for; maybe none."""
    found, _ = first_members(batch, samples, {**members, **newcomers}, took)
    new = [name for name in found if name not in members]
    added = sum(newcomers[name] for name in new)
    if not new or added < WORTH_JOINING * sum(members.values()):
        return []
    forming = max(took.get(name, 0.0) for name in (*members, *new))
    together = {**members, **{name: newcomers[name] for name in new}}
    return new if forming + seconds(batch, samples, together) < seconds(batch, samples, members) else []
