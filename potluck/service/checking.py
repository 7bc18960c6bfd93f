"""Reads a service's settings as its daemon will: in a process of its own, without the environment of whoever installs it.

That environment may have POTLUCK_* variables and a PYTHONPATH of a person, which the service will not have.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec

from potluck.errors import InvalidSettings, PotluckError
from potluck.settings import CoordinatorSettings, NodeSettings
from potluck.settings_sources import load

Daemon = Literal["node", "coordinator"]
KINDS: Mapping[Daemon, type[CoordinatorSettings] | type[NodeSettings]] = {
    "coordinator": CoordinatorSettings,
    "node": NodeSettings,
}
SECONDS = 60.0
"""How long it may take: it is far below a second, unless the machine is out of memory."""


def settings(daemon: Daemon, file: Path, environment: Mapping[str, str]) -> CoordinatorSettings | NodeSettings:
    """The settings in this file for a daemon that gets this environment. Raises InvalidSettings."""
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
    return msgspec.json.decode(done.stdout, type=KINDS[daemon])


def _main(daemon: Daemon, file: str) -> None:
    try:
        found = load(KINDS[daemon], file)
    except InvalidSettings as error:
        sys.stderr.write(error.message)
        sys.exit(error.exit_code)
    sys.stdout.buffer.write(msgspec.json.encode(found))


if __name__ == "__main__":
    _main(*sys.argv[1:])  # type: ignore[arg-type]
