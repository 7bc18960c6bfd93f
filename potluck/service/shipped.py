"""What comes with the package beside its modules: example settings and systemd units."""

from __future__ import annotations

from pathlib import Path

import potluck
from potluck.errors import NotFound

UNITS = "systemd"


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
