"""Clearing what an engine left."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from node.scratch import clear


def test_deep_closed_and_linked_folders_go(tmp_path: Path) -> None:
    scratch, outside = tmp_path / "scratch", tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("stays")
    scratch.mkdir()
    (scratch / "link").symlink_to(outside)
    (scratch / "closed").mkdir()
    (scratch / "closed" / "file").write_text("goes")
    (scratch / "closed").chmod(0)
    here = os.open(scratch, os.O_RDONLY)
    for _ in range(3000):  # deeper than paths and Python's stack may be
        os.mkdir("d", dir_fd=here)
        deeper = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = deeper
    os.close(here)
    clear(scratch)
    assert not scratch.exists()
    assert (outside / "file").read_text() == "stays"


def test_a_link_in_its_place_goes_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_text("stays")
    (tmp_path / "scratch").symlink_to(tmp_path / "outside")
    clear(tmp_path / "scratch")
    clear(tmp_path / "nothing")
    assert [path.name for path in tmp_path.iterdir()] == ["outside"]
    assert (tmp_path / "outside" / "file").exists()


def test_a_link_that_takes_a_folders_place_meanwhile_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that the engine left behind changes what is being cleared."""
    scratch, outside = tmp_path / "scratch", tmp_path / "outside"
    for folder in (scratch / "a", scratch / "b", outside / "sub"):
        folder.mkdir(parents=True)
    (outside / "file").write_text("stays")
    outside.chmod(0o755)
    rename = os.rename

    def swapped(*given: Any, **options: Any) -> None:
        rename(*given, **options)
        for number, path in enumerate(scratch.iterdir()):
            if path.is_dir() and not path.is_symlink() and path.name.startswith("."):
                rename(path, tmp_path / f"away-{number}-{path.name}")
                path.symlink_to(outside)

    monkeypatch.setattr(os, "rename", swapped)
    clear(scratch)
    assert sorted(path.name for path in outside.iterdir()) == ["file", "sub"]
    assert outside.stat().st_mode & 0o777 == 0o755
    assert not scratch.exists()
