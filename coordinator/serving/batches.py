"""A request for inference, and the batch in which it is sent to a replica. Pure.

A request belongs to the client: its inputs, its deadline, and the function that gets its answer. A batch belongs to a replica: the
requests that it computes together. Neither says on which nodes the replica is: its endpoint knows (`endpoints`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from potluck.errors import PotluckError
from potluck.wire.messages import RequestOutcome, Tensor

Answer = Callable[[RequestOutcome | PotluckError], None]
"""Gets the answer of a request: the one that ends it. Today a request has no other."""


@dataclass(eq=False, slots=True)
class Request:
    """What one client asks. Until it is answered it may be tried several times, on several replicas."""

    inputs: tuple[Tensor, ...]
    answer: Answer
    deadline: float
    size_bytes: int
    rows: int = 1
    priority: int = 0
    asked_at: float = 0.0
    attempts: int = 0
    failure: str = ""
    """What the last attempt failed with."""
    crashes: int = 0
    """Engines that died while they computed it: then it is computed alone, so that nobody suffers with it."""
    answered: bool = False
    batch: Batch | None = None
    """With which it was sent last."""
    held_by: str = ""
    """The node that has its inputs; "": they are in the request, or in a store. A replica may be near (`Lane.near`)."""
    moving_seconds: float = 0.0
    """How long a replica elsewhere takes to fetch them."""
    inputs_lost: bool = False
    """That node is gone."""

    def settle(self, outcome: RequestOutcome | PotluckError) -> None:
        """Answer it, unless that was done. This ends it."""
        if not self.answered:
            self.answered = True
            self.answer(outcome)


@dataclass(eq=False, slots=True)
class Batch:
    """What is sent to a replica at once. Its requests may also be in a second batch, for another replica."""

    batch_id: str
    replica_id: str
    requests: list[Request]
    rows: int
    sent_at: float
    objective_seconds: float = 0.0
    """How long an answer of this deployment may take; 0: nobody said."""
    out: bool = True
    """Whether it is on its way, and waited for."""
    twin: Batch | None = None
    """The same requests, or some of them, at another replica."""
    probe: bool = False
    """Sent to learn how long it takes: nobody needs its answer, and it is not withdrawn."""

    @property
    def deadline(self) -> float:
        """The latest deadline of its requests."""
        return max([request.deadline for request in self.requests])

    @property
    def wanted(self) -> bool:
        """Whether anybody waits for its answer."""
        return not all(request.answered for request in self.requests)
