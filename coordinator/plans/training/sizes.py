"""How many samples a round has, and how many of them each node does at least: pure."""

from __future__ import annotations

import math

from coordinator.plans.training.costs import computing_seconds
from coordinator.plans.training.state import TrainingState

ROUNDS_PER_EPOCH = 2
"""At least so many rounds an epoch, where a round computes for longer than it exchanges weights: on a small data set
many short rounds reach an accuracy in fewer samples."""
PROBE_SECONDS = 5.0
"""The first round's budget, before it is known what rounds cost."""


def round_size(state: TrainingState, rates: dict[str, float]) -> int:
    """Samples of a round that nodes with these rates (items/s) do."""
    spec, count = state.given.spec, state.given.dataset.count
    wanted = max(-(-count // ROUNDS_PER_EPOCH), len(rates) * spec.batch_size)
    left = max(1, state.epochs.left)
    together = sum(rates.values())
    overhead = state.measured.overhead
    budget = spec.round_seconds or computing_seconds(overhead) or PROBE_SECONDS
    wanted = min(max(wanted, round(together * overhead)), max(1, round(together * budget)))
    rounds = max(1, round(left / wanted))  # of one length: no short one at the end of an epoch
    return math.ceil(left / rounds)


def at_least(found: dict[str, int], wanted: int, batch: int) -> dict[str, int]:
    """The samples of each node of a round of `wanted`, such that none has fewer than a batch, or its share of a very small round."""
    few = min(batch, max(1, wanted // len(found)))
    return {node_id: max(samples, few) for node_id, samples in found.items()}


def whole_batches(samples: int, batch: int) -> int:
    """Samples of a part, so that no step trains on a few items only, and every node takes part."""
    return samples if samples < batch else max(1, round(samples / batch)) * batch
