"""A request for inference, and the batch in which it is sent to a replica. Pure.

A request belongs to a client. It has the inputs, the deadline, and the function that gets the answer. A batch belongs to a
replica. It has the requests that the replica computes together. Only the endpoint knows the nodes of a replica (`endpoints`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from potluck.errors import PotluckError
from potluck.wire.reports import RequestOutcome
from potluck.wire.values import Tensor

Answer = Callable[[RequestOutcome | PotluckError], None]
"""Gets the answer that ends a request. Today a request has only this one answer."""


@dataclass(eq=False, slots=True)
class Request:
    """What one client asks. It may be tried several times, on several replicas, until it is answered."""

    inputs: tuple[Tensor, ...]
    answer: Answer
    deadline: float
    size_bytes: int
    rows: int = 1
    priority: int = 0
    asked_at: float = 0.0
    attempts: int = 0
    failure: str = ""
    """The error message of the last attempt that failed."""
    crashes: int = 0
    """How many engines died while they computed it. After one, it is computed alone, so that no other request is lost."""
    answered: bool = False
    batch: Batch | None = None
    """The batch that it was last sent in."""
    held_by: str = ""
    """The node that has its inputs; "": the request or a store has them. A replica may be near that node (`Lane.near`)."""
    moving_seconds: float = 0.0
    """How long a replica on another node takes to fetch the inputs."""
    inputs_lost: bool = False
    """Whether the node that had its inputs is gone."""

    def settle(self, outcome: RequestOutcome | PotluckError) -> None:
        """Answer the request, unless it is answered already. This ends it."""
        if not self.answered:
            self.answered = True
            self.answer(outcome)


@dataclass(eq=False, slots=True)
class Batch:
    """Requests that are sent to a replica together. They may also be in a second batch, for another replica."""

    batch_id: str
    replica_id: str
    requests: list[Request]
    rows: int
    sent_at: float
    objective_seconds: float = 0.0
    """How long an answer of this deployment may take; 0: no objective."""
    out: bool = True
    """Whether the batch was sent and its answer is awaited."""
    twin: Batch | None = None
    """The batch with the same requests, or some of them, at another replica."""
    probe: bool = False
    """Whether it was sent only to learn how long it takes. No request needs its answer, and it is not withdrawn."""

    @property
    def deadline(self) -> float:
        """The latest deadline of its requests."""
        return max([request.deadline for request in self.requests])

    @property
    def wanted(self) -> bool:
        """Whether a request still waits for its answer."""
        return not all(request.answered for request in self.requests)
