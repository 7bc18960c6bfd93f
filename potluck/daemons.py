"""Starts a daemon: `potluck-node`, `potluck-coordinator`, or `python -P -m potluck.daemons NAME [ARGUMENT...]`.

The daemons' packages are named `node` and `coordinator`, and other packages may have these names. A `node.py` on PYTHONPATH is then
imported instead of ours, and another distribution may overwrite our files. So this is checked before any of them is imported.
"""

from __future__ import annotations

import csv
import hashlib
import importlib
import logging
import os
import signal
import sys
from base64 import urlsafe_b64encode
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import NoReturn

import potluck
from potluck import backoff, lifecycle, logs, reloading
from potluck.errors import InvalidSettings

MARK = 'PART_OF = "potluck"'
"""A line in the `__init__.py` of each daemon's package."""


def check(name: str) -> None:
    """Raises InvalidSettings where the package that Python finds by this name does not belong to this installation."""
    ours = Path(potluck.__file__).parents[1] / name / "__init__.py"
    spec = find_spec(name)
    if spec is None or spec.origin is None:  # no such package, or a folder without __init__.py
        raise InvalidSettings(f"potluck's package {name!r} should be at {ours} but is not: install potluck again")
    found = Path(spec.origin)
    if found.resolve() != ours.resolve():
        raise InvalidSettings(
            f"Python finds {found} by the name {name!r}, but potluck's package is {ours}: remove the other one from PYTHONPATH or uninstall "
            "it, or install potluck in a virtual environment of its own"
        )
    if MARK not in found.read_text(encoding="utf-8", errors="replace"):
        raise _lost(found, name, "another distribution")
    site = Path(potluck.__file__).parents[1]
    for distribution, path in _claimed(name, site):
        raise _lost(path, name, distribution)


def _lost(path: Path, name: str, to: str) -> InvalidSettings:
    return InvalidSettings(
        f"{path} is not potluck's any more: {to} has a package {name!r}, and its files replaced potluck's at "
        f"{Path(potluck.__file__).parent}; uninstall it and install potluck again, best in a virtual environment of its own"
    )


def _claimed(name: str, site: Path) -> Iterator[tuple[str, Path]]:
    """(another distribution, a file of our package that it has replaced), from the lists of installed files.

    Checks only files that our own list has. A checkout has no list: its owner may change the files.
    """
    own = site / f"potluck-{potluck.__version__}.dist-info" / "RECORD"
    hashes = {path: digest for path, digest in _recorded(own) if path.startswith(f"{name}/") and digest}
    for record in sorted(site.glob("*.dist-info/RECORD")) if hashes else ():
        if record == own or f"\n{name}/".encode() not in b"\n" + record.read_bytes():
            continue
        for path, _ in _recorded(record):
            if path in hashes and _digest(site / path) != hashes[path]:
                yield record.parent.name.removesuffix(".dist-info"), site / path


def _recorded(record: Path) -> Iterator[tuple[str, str]]:
    """(path, digest) of each file of a distribution, from its RECORD (PyPA, recording installed projects); none without a RECORD."""
    if record.is_file():
        with record.open(newline="", encoding="utf-8", errors="replace") as file:
            yield from ((row[0], row[1]) for row in csv.reader(file) if len(row) > 1)


def _digest(path: Path) -> str:
    """A file's digest as a RECORD has it; empty for a missing file."""
    if not path.is_file():
        return ""
    return "sha256=" + urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).rstrip(b"=").decode()


def start(name: str) -> None:
    """Run the daemon of this name with the arguments of the command line."""
    reloading.wait_for_start()
    signal.signal(signal.SIGTERM, _end_in_order)
    crashes = backoff.crashes()
    if pause_seconds := backoff.pause_seconds(crashes):
        lifecycle.pause_after_crashes(pause_seconds, crashes)
    try:
        check(name)
    except InvalidSettings as error:
        logs.say(logging.ERROR, f"potluck-{name}: {error.message}")
        sys.exit(error.exit_code)
    importlib.import_module(f"{name}.__main__").main()
    backoff.ended_in_order()


def _end_in_order(number: int, frame: FrameType | None) -> NoReturn:
    """SIGTERM before the daemon runs: nothing has to be put down yet, and a stop is no crash.

    Without the interpreter's end: an exception may come to nothing in the midst of an import.
    """
    backoff.ended_in_order()
    os._exit(0)


def node() -> None:
    """`potluck-node`."""
    start("node")


def coordinator() -> None:
    """`potluck-coordinator`."""
    start("coordinator")


if __name__ == "__main__":
    start(sys.argv.pop(1))
