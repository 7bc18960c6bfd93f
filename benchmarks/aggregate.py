"""Takes one outer step in FOLDER with the updates of NODES nodes (0: none); prints this process's peak memory in bytes."""

from __future__ import annotations

import sys
from pathlib import Path

from coordinator.dispatch.outer import Outer, combine


def main() -> None:
    folder, nodes = Path(sys.argv[1]), int(sys.argv[2])
    if nodes:
        updates = [(folder / f"update-{number}", 1) for number in range(nodes)]
        combine(
            folder / "aggregated", updates, None, Outer(1.0, 0.5), "auto",
            step=folder / "step", after=folder / "after", velocity_after=folder / "velocity",
        )  # fmt: skip
    # Not ru_maxrss: a process inherits it from its parent.
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(line for line in lines if line.startswith("VmHWM:"))
    print(int(peak.split()[1]) * 1024)


if __name__ == "__main__":
    main()
