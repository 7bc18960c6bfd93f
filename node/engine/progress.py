"""Whether a process gets any further: by the processor time that it used and the bytes that it read, not by the clock alone.

On a twentieth of a core all takes twenty times as long, and nothing is wrong. What hangs uses next to nothing, whatever the machine.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import psutil

SHARE = 0.005
"""Of a core. A tenth of what a quota of a twentieth leaves; an engine at rest, which says every second that it is there, uses 0.0002."""
READ_BYTES_PER_SECOND = 16 * 1024
"""Slower than any disk or network from which an engine could start."""
LONGEST_STEP_SECONDS = 5.0
"""When we look less often, we stood still ourselves, maybe with the whole machine: that says nothing of the process."""


@dataclass(frozen=True)
class Reading:
    cpu_seconds: float = 0.0
    bytes_read: int = 0


def read(pid: int) -> Reading:
    """Of a process and its children; nothing where it has ended, and no bytes where the system does not tell them."""
    cpu_seconds, bytes_read = 0.0, 0
    try:
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            cpu_seconds += sum(one.cpu_times()[:4])  # user and system, also of its children that have ended
            if hasattr(one, "io_counters"):
                counters = one.io_counters()
                bytes_read += counters.read_bytes + getattr(counters, "read_chars", 0)
    except psutil.Error:
        pass  # it has ended, or may not be looked at: then what was found counts
    return Reading(cpu_seconds, bytes_read)


@dataclass
class Progress:
    """For how long a process got no further. `look` must be called often; it is pure but for what it is told."""

    limit_seconds: float
    """What it must get further within: by SHARE of a core, or so many bytes, on average."""
    still_seconds: float = 0.0
    _last: float | None = None
    _mark: Reading = field(default_factory=Reading)

    @property
    def stuck(self) -> bool:
        return self.still_seconds > self.limit_seconds

    def look(self, now: float, reading: Reading | None = None, *, further: bool = False) -> None:
        """What there is to see now; `further` where it is known otherwise that it goes on."""
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
        elif cpu_seconds < 0 or bytes_read < 0:  # a child is gone with what it had used
            self._mark = reading
