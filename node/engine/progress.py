"""Whether a process makes progress: by the processor time that it used and the bytes that it read, not by the clock alone.

On a twentieth of a core, everything takes twenty times as long, and nothing is wrong. A process that hangs uses almost nothing on
any machine.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import psutil

SHARE = 0.005
"""Share of a core. It is a tenth of a quota of a twentieth. An engine at rest, which sends a sign of life each second, uses 0.0002."""
READ_BYTES_PER_SECOND = 16 * 1024
"""Slower than any disk or network from which an engine could start."""
LONGEST_STEP_SECONDS = 5.0
"""If more time lies between two looks, we stood still ourselves, maybe with the whole machine. That says nothing of the process."""


@dataclass(frozen=True)
class Reading:
    cpu_seconds: float = 0.0
    bytes_read: int = 0


def read(pid: int) -> Reading:
    """The reading of a process and its children; zeros if it has ended, and no bytes if the system does not tell them."""
    cpu_seconds, bytes_read = 0.0, 0
    try:
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            cpu_seconds += sum(one.cpu_times()[:4])  # user and system, also of its children that have ended
            if hasattr(one, "io_counters"):
                counters = one.io_counters()
                bytes_read += counters.read_bytes + getattr(counters, "read_chars", 0)
    except psutil.Error:
        pass  # it has ended, or may not be read: what was found so far counts
    return Reading(cpu_seconds, bytes_read)


@dataclass
class Progress:
    """For how long a process made no progress. `look` must be called often. Pure."""

    limit_seconds: float
    """Within this time it must use SHARE of a core, or read READ_BYTES_PER_SECOND, on average."""
    still_seconds: float = 0.0
    _last: float | None = None
    _mark: Reading = field(default_factory=Reading)

    @property
    def stuck(self) -> bool:
        return self.still_seconds > self.limit_seconds

    def look(self, now: float, reading: Reading | None = None, *, further: bool = False) -> None:
        """Take a new reading. `further`: the process is known to make progress from another source."""
        step = 0.0 if self._last is None else min(now - self._last, LONGEST_STEP_SECONDS)
        first, self._last = self._last is None, now
        self.still_seconds += step
        if reading is None:
            reading = self._mark
        cpu_seconds, bytes_read = (
            reading.cpu_seconds - self._mark.cpu_seconds,
            reading.bytes_read - self._mark.bytes_read,
        )
        enough = SHARE * self.limit_seconds, READ_BYTES_PER_SECOND * self.limit_seconds
        if first or further or cpu_seconds >= enough[0] or bytes_read >= enough[1]:
            self.still_seconds, self._mark = 0.0, reading
        elif cpu_seconds < 0 or bytes_read < 0:  # a child ended, and its numbers are gone
            self._mark = reading
