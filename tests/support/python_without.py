"""A Python without some packages, like a machine where they are not installed: an environment with links to our other packages."""

from __future__ import annotations

import sys
import venv
from collections.abc import Sequence
from pathlib import Path


def python_without(folder: Path, packages: Sequence[str]) -> Path:
    """Make an environment in `folder` with all packages of this process except `packages` (and their metadata); returns its Python."""
    venv.create(folder, symlinks=True, with_pip=False)
    [site] = folder.glob("lib/python3*/site-packages")
    sources = [Path(entry) for entry in sys.path if entry.endswith("site-packages")]
    left_out = tuple(name.lower().replace("-", "_") for name in packages)
    for entry in (entry for source in sources for entry in source.iterdir()):
        name = entry.name.lower().replace("-", "_")
        # The target of a .pth file is in sys.path, and so among the sources; or it is potluck itself.
        if entry.suffix == ".pth" or name.startswith(left_out) or (site / entry.name).exists():
            continue
        (site / entry.name).symlink_to(entry)
    (site / "potluck.pth").write_text(f"{Path(__file__).parents[2]}\n")
    return folder / "bin" / "python"
