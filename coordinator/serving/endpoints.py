"""How batches reach a replica, and which node answers for it.

The code that routes requests knows a replica by its id, and asks the replica's endpoint about nodes. Today each replica is on
one node. A replica that is a chain of stages on several nodes would need another kind of endpoint: batches would go to the
first stage, and the last stage would answer.
"""

from __future__ import annotations

from typing import Protocol

from coordinator.serving.batches import Batch
from potluck.bus.outbox import Outbox
from potluck.wire.commands import CancelInference, RunInference
from potluck.wire.topics import Topics

VALID_LEAST_SECONDS = 0.005
"""The least time left that a batch is sent with: 0 would mean that no time is given."""


class Endpoint(Protocol):
    """The way to one ready replica. A batch may be lost on the way: the sender waits for the answers, and asks again."""

    @property
    def replica_id(self) -> str: ...

    @property
    def nodes(self) -> frozenset[str]:
        """All nodes of the replica. If one is lost, the replica is lost. If one reconnects, its batches are sent again."""
        ...

    @property
    def takes_at(self) -> str:
        """The node that batches go to. Inputs that are already on that node are not moved."""
        ...

    @property
    def answers_from(self) -> str:
        """The node that answers. Answers of other nodes are ignored."""
        ...

    def send(self, batch: Batch) -> None:
        """Send the batch. The node `answers_from` answers with `InferenceFinished`, which has the batch's id."""
        ...

    def withdraw(self, batch: Batch) -> None:
        """Tell the replica that no request waits for this batch any more: it should not begin with it."""
        ...


class OneNode:
    """The endpoint of a replica on one node. QoS 0: a late batch is asked again sooner than the broker would resend it."""

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
