"""Training by rounds that gives the same bits again (`deterministic=True`): pure.

A round has as many parts as there were nodes at the job's beginning. Each part keeps its data shards and its number of steps for
the whole job. The result of a part depends only on its task. So it does not matter which node does it, or how often a node was
killed meanwhile. The outer step takes the parts in their order. A slow node does a part only if no other node would do it sooner,
and a late part is given to another node too.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from msgspec.structs import replace

from coordinator.plans.decisions import Decision, Lease
from coordinator.plans.job import Attempt
from coordinator.plans.placement import ClusterView, NodeView, assign, split
from coordinator.plans.training.contributions import Contributions
from coordinator.plans.training.local import hopes
from coordinator.plans.training.manner import Manner
from coordinator.plans.training.open_round import part_name
from coordinator.plans.training.sizes import ROUNDS_PER_EPOCH
from potluck.wire.tasks import TrainTask

ALIKE = 1.25
"""Speeds that differ by less than this factor are taken for equal."""


@dataclass
class Fixed(Manner):
    """`contributions`: those of its rounds."""

    contributions: Contributions = field(repr=False)

    def rehearsals(self, nodes: list[NodeView], rates: dict[str, float]) -> dict[str, TrainTask]:
        names, samples, data = self._round_parts(len(nodes))
        tasks = [replace(self._part(n, names, samples, data), weights=None, step=None) for n in range(len(names))]
        return {node.node_id: tasks[place % len(tasks)] for place, node in enumerate(nodes)}

    def parts(self, view: ClusterView, attempts: dict[str, Attempt], in_time: list[Attempt]) -> list[Decision]:
        """Gives parts that no node does to nodes that can begin one, one part for each node."""
        state, found = self.state, self.contributions.results
        begun = state.open.number or found or any(state.open.has(attempt) for attempt in attempts.values())
        if not begun and hopes(state, view, attempts):
            return []
        names, samples, data = self._round_parts(len(view.nodes))
        taken = found.keys() | {state.open.contributor(attempt) for attempt in in_time}
        missing = [number for number, name in enumerate(names) if name not in taken]
        measured = state.measured.rates
        free = sorted(
            (node for node in state.readiness.able(view, attempts).nodes if node.free_slots),
            key=lambda node: (-measured.get(node.node_id, 0.0), node.node_id),
        )
        at_work = {attempt.node_id for attempt in in_time} | {node.node_id for node in free}
        rates = {node_id: measured.get(node_id, 1.0) for node_id in at_work}
        # What the fastest would have done one after the other before a slow one is through with its first is not for that one.
        left = len(names) - len(found)
        worth = [node for node in free if rates[node.node_id] * left * ALIKE >= max(rates.values())]
        return [
            Lease(state.open.numbered(number), node.node_id, self._part(number, names, samples, data))
            for number, node in zip(missing, worth, strict=False)
        ]

    def _round_parts(self, nodes: int) -> tuple[list[str], dict[str, int], dict[str, tuple[int, ...]]]:
        """Names of the parts of the open round, and the samples and data shards of each; before the first, for so many nodes."""
        given = self.state.given
        parts = self.contributions.parts or min(nodes, max(1, given.dataset.count // given.batch))
        names = [part_name(number) for number in range(parts)]
        equal = dict.fromkeys(names, 1.0)
        wanted = max(parts * given.batch, -(-given.dataset.count // ROUNDS_PER_EPOCH))
        wanted = min(wanted, max(1, self.state.epochs.left))
        return names, split(max(wanted, parts), equal), assign(given.counts, equal, {})

    def _part(
        self, number: int, names: list[str], samples: dict[str, int], data: dict[str, tuple[int, ...]]
    ) -> TrainTask:
        given, name = self.state.given, names[number]
        batches = max(1, round(samples[name] / given.batch))
        return replace(
            self.state.task(batches * given.batch, 0.0),
            data=given.shards(data[name]),
            overlap=False,
            part=number,
            parts=len(names),
        )
