"""The engine's process: `python -m node.engine FD THREADS SCRATCH MEMORY CONFINEMENT [ALLOWED CODE...]`, started by `node.engine.process` alone."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from node.sandbox.confining import confine
from node.sandbox.policy import Confinement


def main() -> None:
    scratch, allowed = Path(sys.argv[3]), sys.argv[6:]
    confined = confine(msgspec.json.decode(sys.argv[5], type=Confinement), scratch, allowed)
    # Imported only now: numpy starts threads, and a sandbox holds only for the thread that makes it and those it starts later.
    from node.engine import program

    program.run(
        int(sys.argv[1]),
        threads=int(sys.argv[2]),
        scratch=scratch,
        memory_bytes=int(sys.argv[4]),
        confined=confined,
        allowed=allowed,
    )


if __name__ == "__main__":
    main()
