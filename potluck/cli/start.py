"""Where the command `potluck` begins. The imports that follow take some tenths of a second, and Ctrl-C may come meanwhile."""

from __future__ import annotations

import sys

from potluck.cli import interrupts


def main() -> None:
    """Run `potluck.cli.main.main`."""
    interrupts.once()
    try:
        from potluck.cli.main import main as run
    except KeyboardInterrupt:
        sys.exit(interrupts.STATUS)
    run()
