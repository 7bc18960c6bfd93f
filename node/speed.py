"""When to measure a machine's speed again: one short measurement beside other work says too little. Pure.

It is measured a few more times in the first minutes, at growing intervals, and only while the machine is idle. The best result counts:
other work makes a measurement lower, and nothing makes it higher. After that, never again: a machine at rest does nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

WAITS_SECONDS = (10.0, 20.0, 40.0, 80.0, 160.0)
"""The pause before each measurement; if the machine is busy then, the same pause again."""
IDLE_SHARE = 0.1
"""A machine is idle if its processors work at most this share of the time."""
BETTER = 1.05
"""A result this many times better than the known speed is worth telling."""
AGREEING = 2
"""After this many results in a row that are not better, no better result is expected."""


@dataclass
class Speed:
    """`gflops`: the best so far; 0 where nothing could be measured."""

    gflops: float
    _left: list[float] = field(default_factory=lambda: list(WAITS_SECONDS))
    _agreed: int = 0

    @property
    def wait_seconds(self) -> float | None:
        """Seconds until the next look at the machine; None: never again."""
        return self._left[0] if self._left and self._agreed < AGREEING else None

    def measured(self, gflops: float) -> bool:
        """Take a result from the idle machine (0: it failed); returns whether it is so much better that others should know."""
        self._left.pop(0)
        better = gflops > BETTER * self.gflops
        self._agreed = 0 if better or not gflops else self._agreed + 1
        if better:
            self.gflops = gflops
        return better


def idle(busy_seconds: float, all_seconds: float) -> bool:
    """Whether a machine is idle, whose processors worked `busy_seconds` of `all_seconds` together."""
    return all_seconds > 0.0 and busy_seconds <= IDLE_SHARE * all_seconds
