"""`potluck files`: where this installation keeps the example settings and the systemd units."""

from __future__ import annotations

import typer


def files() -> None:
    """Print the folder with `configs/` (every setting, explained) and `systemd/` (units of the daemons)."""
    from potluck.service import shipped

    typer.echo(shipped.folder())
