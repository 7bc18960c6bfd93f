"""The weights that nodes train from, the step that led to them, and how many bytes were sent: pure."""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.plans.events import RoundClosed
from potluck.wire.values import BlobRef, Step


@dataclass
class Exchange:
    """`first`: the weights that the job began from; None for the model's own."""

    first: BlobRef | None
    weights: BlobRef | None = None
    step: Step | None = None
    """The step that led to `weights`, for nodes that have the weights before it."""
    velocity: BlobRef | None = None
    """The outer optimizer's state."""
    agreement: float | None = None
    """How alike the nodes' updates have been until now."""
    optimizer: BlobRef | None = None
    """The optimizer's state in synchronous training, which has no outer one."""
    bytes: int = 0
    """Bytes that nodes and coordinator have sent until now."""
    bytes_before: int = 0
    """Bytes that were sent before this epoch."""

    def __post_init__(self) -> None:
        self.weights = self.weights or self.first

    def closed(self, event: RoundClosed, sent_bytes: int) -> None:
        self.weights, self.velocity, self.agreement = event.weights, event.velocity, event.agreement
        self.optimizer = event.optimizer
        base, update = event.base, event.step
        self.step = Step(base=base, update=update) if base is not None and update is not None else None
        self.bytes += sent_bytes

    def epoch_ended(self) -> None:
        self.bytes_before = self.bytes

    @property
    def bytes_in_epoch(self) -> int:
        return self.bytes - self.bytes_before

    def used_up(self) -> tuple[BlobRef, ...]:
        """Blobs that the next round replaces."""
        found = (self.weights, self.velocity, self.optimizer, self.step.update if self.step is not None else None)
        return tuple(ref for ref in found if ref is not None)

    def kept(self) -> set[str]:
        """Blobs that a round and those after it begin from."""
        return {ref.sha256 for ref in (*self.used_up(), *([self.first] if self.first is not None else []))}
