"""Where the command `potluck` begins: what follows takes some tenths of a second to import, and Ctrl-C may come meanwhile."""

from __future__ import annotations

import sys

from potluck.cli import interrupts


def main() -> None:
    """Run the command line, as `potluck.cli.main.main` has it."""
    interrupts.once()
    try:
        from potluck.cli.main import main as run
    except KeyboardInterrupt:
        sys.exit(interrupts.STATUS)
    run()
