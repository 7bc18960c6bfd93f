"""When a machine's speed is measured again: what was measured once, for a moment, beside other work, says too little. Pure.

A few times more in the first minutes, longer and longer apart, and only while the machine has nothing else to do; the best counts, since
other work makes a measurement lower and nothing makes it higher. Then never again: a machine at rest does nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

WAITS_SECONDS = (10.0, 20.0, 40.0, 80.0, 160.0)
"""Before each measurement; where the machine is busy then, it is waited for as long again."""
IDLE_SHARE = 0.1
"""Of its processors' time, at most, that a machine is at work which counts as idle."""
BETTER = 1.05
"""So many times the speed that is known are worth to be told."""
AGREEING = 2
"""After so many in a row that found nothing better, there is nothing better to be found."""


@dataclass
class Speed:
    """`gflops`: the best so far, 0 where nothing could be measured."""

    gflops: float
    _left: list[float] = field(default_factory=lambda: list(WAITS_SECONDS))
    _agreed: int = 0

    @property
    def wait_seconds(self) -> float | None:
        """Until the machine is to be looked at; None: never again."""
        return self._left[0] if self._left and self._agreed < AGREEING else None

    def measured(self, gflops: float) -> bool:
        """A measurement on the idle machine, 0 where it failed. Whether it is so much better that others should know."""
        self._left.pop(0)
        better = gflops > BETTER * self.gflops
        self._agreed = 0 if better or not gflops else self._agreed + 1
        if better:
            self.gflops = gflops
        return better


def idle(busy_seconds: float, all_seconds: float) -> bool:
    """Whether a machine is, whose processors together worked so many of so many seconds."""
    return all_seconds > 0.0 and busy_seconds <= IDLE_SHARE * all_seconds
