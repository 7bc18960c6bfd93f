"""How to add an extra (`potluck[parquet]`) to this installation: a command that works for the place potluck came from.

pip would look up the bare name on an index, which has no potluck, or another project with that name.
"""

from __future__ import annotations

import json
import platform
import re
import shlex
import sys
from importlib.metadata import Distribution, distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

_REQUIREMENT = re.compile(
    r"""(?P<package>[^;]+?)\s*;\s*(\(?(?P<marker>.*?)\)?\s+and\s+)?extra\s*==\s*["'](?P<extra>[^"']+)["']"""
)
_MACHINE = re.compile(r"""platform_machine\s*(?P<sign>[=!]=)\s*["'](?P<machine>[^"']*)["']""")


def install(*extras: str) -> str:
    """The command that adds these extras here, ready to paste into a shell on this machine.

    It names the folder, wheel or address of this installation (PEP 610). Where that is gone or was not recorded, it names the extras'
    own packages.
    """
    found = list(distributions(name="potluck"))
    recorded = [(one, text) for one in found if (text := one.read_text("direct_url.json"))]
    # A checkout that is the current folder has its own metadata, which do not say where potluck came from.
    chosen, text = recorded[0] if recorded else (found[0], "{}")
    source = _source(json.loads(text), ",".join(extras))
    return shlex.join([*_installer(chosen), *(source or _packages(chosen, extras))])


def _source(url: dict[str, Any], extras: str) -> list[str]:
    """pip's name for the place that `direct_url.json` names; empty where it no longer exists."""
    address = str(url.get("url", ""))
    if not address.startswith("file:"):
        vcs = url.get("vcs_info")
        if vcs:
            address = f"{vcs['vcs']}+{address}@{vcs['commit_id']}"
        return [f"potluck[{extras}] @ {address}"] if address else []
    path = Path(unquote(urlsplit(address).path))
    if not (path.is_file() or (path / "pyproject.toml").is_file()):
        return []
    editable = ["--editable"] if url.get("dir_info", {}).get("editable") else []
    return [*editable, f"{path}[{extras}]"]


def _packages(potluck: Distribution, extras: tuple[str, ...]) -> list[str]:
    """The packages that the extras install on this machine."""
    packages: dict[str, None] = {}
    for line in potluck.requires or ():
        found = _REQUIREMENT.fullmatch(line)
        if found is None or found["extra"] not in extras:
            continue
        machine = _MACHINE.fullmatch(found["marker"] or "")
        if machine is None:
            packages[f"{found['package']}; {found['marker']}" if found["marker"] else found["package"]] = None
        elif (machine["machine"] == platform.machine()) == (machine["sign"] == "=="):
            packages[found["package"]] = None
    return list(packages)


def _installer(potluck: Distribution) -> list[str]:
    """The install command: pip of this environment, or uv, whose environments have no pip."""
    if find_spec("pip") is None and (potluck.read_text("INSTALLER") or "").strip() == "uv":
        return ["uv", "pip", "install", "--python", sys.executable]
    return [sys.executable, "-m", "pip", "install"]
