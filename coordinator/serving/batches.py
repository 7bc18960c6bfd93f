"""A request for inference, and the batch in which it is sent to a replica. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from potluck.errors import PotluckError
from potluck.wire.messages import RequestOutcome, Tensor

Answer = Callable[[RequestOutcome | PotluckError], None]


@dataclass(eq=False, slots=True)
class Request:
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
    """The node that has its inputs, where they are not in the request and a node has them."""
    moving_seconds: float = 0.0
    """What it takes another node to fetch them."""
    inputs_lost: bool = False
    """That node is gone."""

    def settle(self, outcome: RequestOutcome | PotluckError) -> None:
        """Answer it, unless that was done."""
        if not self.answered:
            self.answered = True
            self.answer(outcome)


@dataclass(eq=False, slots=True)
class Batch:
    batch_id: str
    replica_id: str
    node_id: str
    requests: list[Request]
    rows: int
    sent_at: float
    out: bool = True
    """Whether it is on its way, and waited for."""
    twin: Batch | None = None
    """The same requests, or some of them, at another replica."""
    probe: bool = False
    """Sent to learn how long it takes: nobody needs its answer, and it is not withdrawn."""

    @property
    def wanted(self) -> bool:
        """Whether anybody waits for its answer."""
        return not all(request.answered for request in self.requests)
