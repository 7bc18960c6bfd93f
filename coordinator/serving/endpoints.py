"""How batches reach a replica, and which node answers for it.

Whoever routes requests knows a replica by its id, and asks its endpoint about nodes. Today each replica is on one node. A replica that is
a chain of stages on several nodes needs another kind of endpoint: batches go to the first stage, and the last stage answers.
"""

from __future__ import annotations

from typing import Protocol

from coordinator.serving.batches import Batch
from potluck.bus.outbox import Outbox
from potluck.wire.messages import CancelInference, RunInference
from potluck.wire.topics import Topics

VALID_LEAST_SECONDS = 0.005
"""A batch is never said to have less time left: 0 would mean that nothing is said."""


class Endpoint(Protocol):
    """The way to one replica, while it is ready. A batch may be lost on the way: the sender waits for its answers, and asks again."""

    @property
    def replica_id(self) -> str: ...

    @property
    def nodes(self) -> frozenset[str]:
        """All nodes that the replica is on. If one of them is lost, the replica is. If one connects again, its batches are asked again."""
        ...

    @property
    def takes_at(self) -> str:
        """The node that batches go to: inputs that are already there need not be moved."""
        ...

    @property
    def answers_from(self) -> str:
        """The node that answers. Answers of other nodes are ignored."""
        ...

    def send(self, batch: Batch) -> None:
        """Compute it. Answered by `InferenceFinished`, with the batch's id, from `answers_from`."""
        ...

    def withdraw(self, batch: Batch) -> None:
        """Nobody waits for this batch any more: do not begin with it."""
        ...


class OneNode:
    """The endpoint of a replica on one node. QoS 0: we ask again for a late batch sooner than the broker would send it again."""

    def __init__(self, replica_id: str, node_id: str, *, topics: Topics, outbox: Outbox) -> None:
        self.replica_id = replica_id
        self.takes_at = self.answers_from = node_id
        self.nodes = frozenset((node_id,))
        self._inbox = topics.node(node_id, "inbox")
        self._outbox = outbox

    def send(self, batch: Batch) -> None:
        self._outbox.publish(self._inbox, run_inference(batch), qos=0)

    def withdraw(self, batch: Batch) -> None:
        self._outbox.publish(self._inbox, CancelInference(id=batch.batch_id, replica_id=self.replica_id), qos=0)


def run_inference(batch: Batch) -> RunInference:
    """The batch as a message."""
    until = batch.deadline
    return RunInference(
        id=batch.batch_id,
        replica_id=batch.replica_id,
        expires=until,
        valid_seconds=max(VALID_LEAST_SECONDS, until - batch.sent_at),
        requests=tuple([request.inputs for request in batch.requests]),
        objective_seconds=batch.objective_seconds,
    )
