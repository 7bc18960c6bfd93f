"""The GPUs of this machine, as its service must see them: drop-ins that come with the package."""

from __future__ import annotations

import grp
from collections.abc import Mapping
from pathlib import Path

from potluck.service import shipped

PRESENT: Mapping[str, Path] = {"nvidia": Path("/proc/driver/nvidia"), "amd": Path("/dev/kfd")}
"""What exists where the driver of a maker's GPUs is loaded."""
NAMES: Mapping[str, str] = {maker: f"20-{maker}.conf" for maker in PRESENT}
_GROUPS = "SupplementaryGroups=render"


def dropins() -> dict[str, str | None]:
    """The drop-ins of a node's unit by file name. None: this machine has no such GPU, and no such drop-in is to be there."""
    return {NAMES[maker]: _text(maker) if path.exists() else None for maker, path in PRESENT.items()}


def _text(maker: str) -> str:
    text = (shipped.folder() / shipped.UNITS / f"{maker}.conf").read_text("utf-8")
    # systemd starts no service with a group that is not there, and its name differs between distributions.
    return text.replace(_GROUPS, f"SupplementaryGroups={' '.join(_groups())}")


def _groups() -> list[str]:
    """The groups that AMD's devices belong to, other than root's."""
    devices = (PRESENT["amd"], *sorted(Path("/dev/dri").glob("renderD*")))
    found = {device.stat().st_gid for device in devices if device.exists()}
    return [_name(number) for number in sorted(found - {0})]


def _name(group: int) -> str:
    try:
        return grp.getgrgid(group).gr_name
    except KeyError:
        return str(group)
