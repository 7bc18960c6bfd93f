"""What `potluck service` asks of systemd."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from potluck.errors import PotluckError, Unavailable

BOOTED = Path("/run/systemd/system")
"""Exists when systemd runs this machine (sd_booted(3))."""
_SHOWN = "Id,LoadState,ActiveState,SubState,Result,MainPID,NRestarts,StatusText,UnitFileState"


@dataclass(frozen=True)
class UnitState:
    """A unit as systemd sees it. `said` is what the daemon told of itself."""

    name: str
    installed: bool
    state: str
    """`active`, `activating`, `inactive`, `failed`, ..."""
    detail: str
    result: str
    pid: int
    restarts: int
    said: str
    starts_with_machine: bool


def needed() -> None:
    """Raises Unavailable where systemd does not run this machine."""
    if shutil.which("systemctl") is None or not BOOTED.is_dir():
        raise Unavailable(
            "systemd does not run this machine, so it can run no service: let what starts programs here run `potluck up`"
        )


def systemctl(*arguments: str) -> str:
    """Runs systemctl and gives its output. Raises PotluckError with what it said, if it fails."""
    done = subprocess.run(["systemctl", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise PotluckError(f"systemctl {' '.join(arguments)} failed: {done.stderr.strip() or done.returncode}")
    return done.stdout


def states(units: Iterable[str]) -> list[UnitState]:
    """The states of these units, in their order."""
    shown = systemctl("show", f"--property={_SHOWN}", *units)
    return [_state(dict(line.split("=", 1) for line in block.splitlines())) for block in shown.strip().split("\n\n")]


def _state(facts: dict[str, str]) -> UnitState:
    return UnitState(
        name=facts["Id"].removesuffix(".service"),
        installed=facts["LoadState"] != "not-found",
        state=facts["ActiveState"],
        detail=facts["SubState"],
        result=facts["Result"],
        pid=int(facts["MainPID"]),
        restarts=int(facts["NRestarts"]),
        said=facts["StatusText"],
        starts_with_machine=facts["UnitFileState"] == "enabled",
    )


def environment(unit: str) -> dict[str, str]:
    """The environment that systemd would give to the programs of this unit, as far as it is known before they start."""
    manager = systemctl("show-environment").splitlines()
    own = systemctl("show", "--property=Environment", "--value", unit)
    words = [word for line in (*manager, own) for word in _words(line)]
    return dict(word.split("=", 1) for word in words if "=" in word)


def _words(line: str) -> list[str]:
    """The words of a line, which systemd quotes like a shell, with few exceptions."""
    try:
        return shlex.split(line)
    except ValueError:
        return line.split()


def forget(unit: str) -> None:
    """Let systemd forget that a unit has failed."""
    if any(state.state == "failed" for state in states([unit])):
        systemctl("reset-failed", unit)
