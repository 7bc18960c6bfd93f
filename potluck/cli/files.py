"""`potluck files`: where this installation keeps the example settings and the systemd units."""

from __future__ import annotations

from pathlib import Path

import typer

import potluck
from potluck.errors import NotFound

UNITS = "systemd"


def files() -> None:
    """Print the folder with `configs/` (every setting, explained) and `systemd/` (units of the daemons)."""
    typer.echo(folder())


def folder() -> Path:
    """The folder: a checkout itself, else `share/potluck` where the installer put it. Raises NotFound when the installer left it out."""
    from importlib.metadata import files as installed

    checkout = Path(potluck.__file__).parents[1]
    if (checkout / UNITS).is_dir():
        return checkout
    for file in installed("potluck") or ():
        if file.parent.name == UNITS and (found := Path(str(file.locate())).resolve()).is_file():
            return found.parents[1]
    raise NotFound("this installation came without configs/ and systemd/: copy them from the sources of potluck")
