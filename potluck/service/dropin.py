"""The drop-in of a unit: what differs between machines. The units themselves are installed as they are shipped."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterable
from pathlib import Path

import potluck
from potluck.errors import InvalidSettings, NotFound
from potluck.settings import ServiceSettings

HIDDEN = tuple(map(Path, ("/home", "/root", "/run/user")))
"""Folders that a service does not see (ProtectHome). What it needs there is shown to it, and nothing else."""
OWN = tuple(map(Path, ("/tmp", "/var/tmp")))  # noqa: S108 - only named
"""Folders of which a service has its own (PrivateTmp)."""
_HEAD = "# Written by `potluck service install`, and again by the next one. Put your own lines beside it: `systemctl edit {unit}`.\n"


def program(name: str) -> Path:
    """The path of one of our programs, in the environment that runs this one. Raises NotFound."""
    found = Path(sys.executable).with_name(name)
    if not found.is_file():
        raise NotFound(
            f"{found} is not there: a service needs potluck in an environment of its own (pipx, uv tool, or python3 -m venv)"
        )
    return found


def roots() -> list[Path]:
    """The folders that running our programs needs: the environment, its interpreter, and our packages. None lies in another."""
    places = [Path(sys.prefix), Path(sys.base_prefix), Path(potluck.__file__).parents[1]]
    places += [Path(path) for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    hop = Path(sys.executable)
    while hop.is_symlink():
        hop = hop.parent / hop.readlink()
        # Only the folder that the link is in: above ~/.local/bin is all of ~/.local.
        places.append(Path(os.path.normpath(hop)).parent)
    return outermost([*places, *(place.resolve() for place in places)])


def outermost(places: Iterable[Path]) -> list[Path]:
    """Those of these files and folders that exist and do not lie in another of them."""
    found: list[Path] = []
    for place in sorted(set(places), key=lambda place: len(place.parts)):
        if place.exists() and not any(place.is_relative_to(outer) for outer in found):
            found.append(place)
    return found


def check_readable(places: Iterable[Path]) -> None:
    """Raises InvalidSettings for a folder that the service's user, who is nobody else's, could not read there."""
    for place in places:
        if any(place.is_relative_to(own) for own in OWN):
            raise InvalidSettings(
                f"{place} is a folder for temporary files, and a service has its own: install potluck elsewhere"
            )
        # The folders above a place in a hidden one are made anew for the service, and need not be readable.
        above = () if _hidden(place) else place.parents
        if closed := [folder for folder in above if not folder.stat().st_mode & stat.S_IXOTH]:
            raise InvalidSettings(
                f"the service could not enter {closed[0]}, above {place}: chmod o+x {closed[0]}, or install potluck elsewhere"
            )
        needed = 0o005 if place.is_dir() else 0o004
        if place.stat().st_mode & needed != needed:
            raise InvalidSettings(f"the service could not read {place}: chmod -R go+rX {place}")


def _hidden(place: Path) -> bool:
    return any(place.is_relative_to(hidden) for hidden in HIDDEN)


def check_seen(place: Path) -> None:
    """Raises InvalidSettings for what is in a folder that the service does not see, or of which it has its own."""
    for folder in (*HIDDEN, *OWN):
        if place.is_relative_to(folder):
            raise InvalidSettings(f"the service does not see {place}: move it out of {folder}")


def text(unit: str, command: list[str], places: Iterable[Path], limits: ServiceSettings) -> str:
    """The drop-in for `unit`: its command, what it must see below hidden folders, and its limits."""
    lines = ["[Service]", "ExecStart=", f"ExecStart={' '.join(map(_quoted, command))}"]
    if shown := [str(place) for place in places if _hidden(place)]:
        lines += ["ProtectHome=tmpfs", f"BindReadOnlyPaths={' '.join(map(_quoted, shown))}"]
    if limits.memory_bytes:
        lines.append(f"MemoryMax={limits.memory_bytes}")
    if limits.memory_high_bytes:
        lines.append(f"MemoryHigh={limits.memory_high_bytes}")
    if limits.cpu_percent:
        lines.append(f"CPUQuota={limits.cpu_percent}%")
    return _HEAD.format(unit=unit) + "\n".join(lines) + "\n"


def _quoted(word: str) -> str:
    """A word of a unit's line (systemd.syntax(7)): `%` begins a specifier, `$` a variable."""
    word = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{word}"' if any(sign in word for sign in " \t\"'\\;") else word
