"""The kernel's limits for this process: of its control group and the groups above it (cgroups(7), v2 and v1)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True)
class Cgroup:
    """Reads the limits where the kernel shows them; in a container, the root of the tree is the container's own group."""

    root: Path = Path("/sys/fs/cgroup")
    membership: Path = Path("/proc/self/cgroup")

    def cpus(self) -> float:
        """How many CPUs may be used: the lowest quota of all groups; infinite without a quota."""
        lowest = math.inf
        for folder in self._folders("cpu"):
            quota, _, period = read_text(folder / "cpu.max").partition(" ")
            if not quota:
                quota, period = read_text(folder / "cpu.cfs_quota_us"), read_text(folder / "cpu.cfs_period_us")
            if quota.isdigit() and period.isdigit() and int(quota) and int(period):
                lowest = min(lowest, int(quota) / int(period))
        return lowest

    def memory_bytes(self) -> float:
        """The lowest memory limit of all groups; infinite without a limit. Above `memory.high`, everything stands still for long."""
        lowest = math.inf
        for folder in self._folders("memory"):
            for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
                text = read_text(folder / name)
                if text.isdigit():
                    lowest = min(lowest, int(text))
        return lowest

    def memory_left(self) -> float:
        """The memory that the tightest limit still allows; file pages that can be dropped count as free. Infinite without a limit."""
        lowest = math.inf
        for folder in self._folders("memory"):
            for limit, usage, dropped in (
                ("memory.max", "memory.current", "inactive_file"),
                ("memory.high", "memory.current", "inactive_file"),
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
            ):
                allowed, used = read_text(folder / limit), read_text(folder / usage)
                if allowed.isdigit() and used.isdigit():
                    lines = (line.split() for line in read_text(folder / "memory.stat").splitlines())
                    free = sum(int(line[1]) for line in lines if line[:1] == [dropped] and line[1:])
                    lowest = min(lowest, max(0, int(allowed) - int(used) + free))
        return lowest

    def _folders(self, controller: str) -> Iterator[Path]:
        """This process's folders for a controller, and all folders above them, in each tree that may be mounted."""
        paths = {"": "/", controller: "/"}  # paths by controller; v2 has one tree, without a name
        for line in read_text(self.membership).splitlines():
            _, _, rest = line.partition(":")
            names, _, path = rest.partition(":")
            paths.update(dict.fromkeys((name for name in names.split(",") if name in paths), path))
        for tree, path in (
            (self.root, paths[""]),
            (self.root / "unified", paths[""]),
            (self.root / controller, paths[controller]),
        ):
            own = PurePosixPath("/") / path
            for folder in (own, *own.parents):
                yield tree / folder.relative_to("/")


def read_text(path: Path) -> str:
    """The text of a file without white space around it; empty when it cannot be read."""
    try:
        return path.read_text(errors="replace").strip()
    except (OSError, ValueError):
        return ""
