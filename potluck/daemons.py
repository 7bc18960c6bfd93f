"""Starts a daemon: `potluck-node`, `potluck-coordinator`, or `python -P -m potluck.daemons NAME [ARGUMENT...]`.

The daemons' packages are named `node` and `coordinator`, and others may be, too: a `node.py` on PYTHONPATH is imported in place of
ours, and another distribution with such a package writes over our files. So we look before anything of them is imported.
"""

from __future__ import annotations

import importlib
import logging
import sys
from importlib.util import find_spec
from pathlib import Path

import potluck
from potluck import logs
from potluck.errors import InvalidSettings

MARK = 'PART_OF = "potluck"'
"""Stands in the `__init__.py` of each daemon's package."""


def check(name: str) -> None:
    """Raises InvalidSettings where the package that Python finds by this name is not of the same installation as this one."""
    ours = Path(potluck.__file__).parents[1] / name / "__init__.py"
    spec = find_spec(name)
    if spec is None or spec.origin is None:  # none, or a folder without __init__.py
        raise InvalidSettings(f"potluck's package {name!r} should be at {ours} and is not: install potluck again")
    found = Path(spec.origin)
    if found.resolve() != ours.resolve():
        raise InvalidSettings(
            f"Python finds {found} by the name {name!r}, and potluck's is {ours}: take the other out of PYTHONPATH or uninstall "
            "it, or give potluck a virtual environment of its own"
        )
    if MARK not in found.read_text(encoding="utf-8", errors="replace"):
        raise InvalidSettings(
            f"{found} is not potluck's any more: another distribution has a package {name!r}, and its files lie over those of "
            f"potluck at {Path(potluck.__file__).parent}; uninstall it and install potluck again, best in a virtual environment of "
            "its own"
        )


def start(name: str) -> None:
    """Run the daemon of this name with the arguments of the command line."""
    try:
        check(name)
    except InvalidSettings as error:
        logs.say(logging.ERROR, f"potluck-{name}: {error.message}")
        sys.exit(error.exit_code)
    importlib.import_module(f"{name}.__main__").main()


def node() -> None:
    """`potluck-node`."""
    start("node")


def coordinator() -> None:
    """`potluck-coordinator`."""
    start("coordinator")


if __name__ == "__main__":
    start(sys.argv.pop(1))
