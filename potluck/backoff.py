"""A service that crashes again and again starts again after growing pauses.

Before systemd 254 the pause between restarts is always the same. From 254 on it can grow (RestartSteps), but it never shrinks again
while the service runs: after a year with six crashes, each later restart takes a minute. So the daemon counts by itself, in
systemd's RuntimeDirectory: in memory, removed when the service is stopped, and kept over a restart (RuntimeDirectoryPreserve).
"""

from __future__ import annotations

import os
import time
from pathlib import Path

SHORT_LIFE_SECONDS = 60.0
"""Whoever lived longer has not failed at its start: counting begins again."""
LONGEST_SECONDS = 60.0
FILE = "starts"


def pause_seconds(crashes: int) -> float:
    """How long to wait after so many short lives in a row: 0, 0, 2, 4, 8, ..., 60 s. The first crash may be chance."""
    return 0.0 if crashes < 2 else min(LONGEST_SECONDS, 2.0 ** min(crashes - 1, 16))


def crashes() -> int:
    """How many lives of this service in a row were short until now. Notes that another begins, after its pause. 0 outside of a unit."""
    folder = os.environ.get("RUNTIME_DIRECTORY", "").split(":")[0]
    if not folder:
        return 0
    file, now = Path(folder) / FILE, time.monotonic()
    count = _short_lives(file, now)
    try:
        file.write_text(f"{count} {now + pause_seconds(count)}\n")
    except OSError:
        # Nobody can count there (a full /run): starting matters more.
        return 0
    return count


def ended_in_order() -> None:
    """A stop or restart that somebody asked for is no crash: counting begins again."""
    if folder := os.environ.get("RUNTIME_DIRECTORY", "").split(":")[0]:
        (Path(folder) / FILE).unlink(missing_ok=True)


def _short_lives(file: Path, now: float) -> int:
    try:
        count, begun_at = file.read_text().split()
        return int(count) + 1 if now - float(begun_at) < SHORT_LIFE_SECONDS else 0
    except (OSError, ValueError):
        return 0
