"""Packages that are installed here, as wheels again: for installations without a package index."""

from __future__ import annotations

import base64
import hashlib
import re
import zipfile
from collections.abc import Iterable
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

_OF_THE_INSTALLER = {"INSTALLER", "REQUESTED", "RECORD", "direct_url.json", "uv_cache.json"}


def locked(names: Iterable[str], target: Path) -> str:
    """Wheels of these packages in the folder `target`, and the text of a lock file for them. Leaves out what is not installed here."""
    lines = []
    for name in names:
        try:
            found = distribution(name)
        except PackageNotFoundError:  # for another system
            continue
        wheel = _packed(found, target)
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        lines.append(f"{name}=={found.version} --hash=sha256:{digest}\n")
    return "".join(lines)


def names_in(lock: Path) -> list[str]:
    """The packages that a lock file names."""
    return sorted(set(re.findall(r"(?m)^([A-Za-z0-9._-]+)==", lock.read_text(encoding="utf-8"))))


def _packed(found: Distribution, target: Path) -> Path:
    """A wheel (PyPA, binary distribution format) of the files that the installer put beside each other."""
    name = re.sub(r"[-_.]+", "_", found.metadata["Name"]).lower()
    tags = [tag.split("-") for tag in re.findall(r"(?m)^Tag: (\S+)$", found.read_text("WHEEL") or "")]
    assert tags, f"{name} was not installed from a wheel"
    tag = "-".join(".".join(dict.fromkeys(kinds)) for kinds in zip(*tags, strict=True))
    wheel = target / f"{name}-{found.version}-{tag}.whl"
    info, record = "", []
    with zipfile.ZipFile(wheel, "w") as archive:  # stored: unpacked again in a moment
        for path in found.files or ():
            if path.parts[0] == ".." or "__pycache__" in path.parts or path.name in _OF_THE_INSTALLER:
                continue
            content = path.locate().read_bytes()
            archive.writestr(str(path), content)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            record.append(f"{path},sha256={digest},{len(content)}\n")
            if path.name == "METADATA" and path.parent.suffix == ".dist-info":
                info = str(path.parent)
        archive.writestr(f"{info}/RECORD", "".join(record) + f"{info}/RECORD,,\n")
    return wheel
