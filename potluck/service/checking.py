"""Reads a service's settings as its daemon will: in a process of its own, without the environment of whoever installs it.

That environment may have POTLUCK_* variables and a PYTHONPATH of a person, which the service will not have.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import msgspec

from potluck.errors import InvalidSettings, PotluckError
from potluck.settings import LAMBDA, CoordinatorSettings, NodeSettings
from potluck.settings_sources import load

Daemon = Literal["node", "coordinator"]
KINDS: Mapping[Daemon, type[CoordinatorSettings] | type[NodeSettings]] = {
    "coordinator": CoordinatorSettings,
    "node": NodeSettings,
}
SECONDS = 60.0
"""How long it may take: it is far below a second, unless the machine is out of memory."""


class Read(msgspec.Struct, frozen=True):
    """What a daemon reads from its file: its settings, as JSON, and where the modules of `allow_code` are."""

    settings: msgspec.Raw
    code: tuple[str, ...]


def settings(
    daemon: Daemon, file: Path, environment: Mapping[str, str]
) -> tuple[CoordinatorSettings | NodeSettings, list[Path]]:
    """The settings in this file for a daemon that gets this environment, and the files and folders of the code that they allow.

    Raises InvalidSettings.
    """
    # `-P` and `/`: the folder of whoever installs is no place for modules.
    command = [sys.executable, "-P", "-m", __name__, daemon, str(file)]
    try:
        done = subprocess.run(
            command, env=dict(environment), cwd="/", capture_output=True, check=False, timeout=SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise PotluckError(f"the settings in {file} could not be read within {SECONDS:g} s: try again") from error
    said = done.stderr.decode(errors="replace").strip()
    if done.returncode == InvalidSettings.exit_code:
        raise InvalidSettings(said)
    if done.returncode:
        raise PotluckError(f"the settings in {file} could not be read: {said or done.returncode}")
    read = msgspec.json.decode(done.stdout, type=Read)
    return msgspec.json.decode(read.settings, type=KINDS[daemon]), [Path(place) for place in read.code]


def _main(daemon: Daemon, file: str) -> None:
    try:
        found = load(KINDS[daemon], file)
    except InvalidSettings as error:
        sys.stderr.write(error.message)
        sys.exit(error.exit_code)
    allowed = found.allow_code if isinstance(found, NodeSettings) else ()
    code = tuple(place for name in allowed if name != LAMBDA for place in _places(name))
    sys.stdout.buffer.write(msgspec.json.encode(Read(msgspec.Raw(msgspec.json.encode(found)), code)))


def _places(name: str) -> list[str]:
    """Where Python finds the package that a module is in, or the module itself."""
    spec = find_spec(name.partition(".")[0])
    if spec is None:
        return []
    return list(spec.submodule_search_locations or ([spec.origin] if spec.has_location and spec.origin else []))


if __name__ == "__main__":
    _main(*sys.argv[1:])  # type: ignore[arg-type]
