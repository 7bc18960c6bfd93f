"""How tests find the last release: no clone lets them pass without it, except where it cannot be had."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from support import release


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "protocol.file.allow=always"]
    command = ["git", "-C", str(folder), *who, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "--quiet")
    for name in ("one", "two", "three"):
        git(folder, "commit", "--quiet", "--allow-empty", "--message", name)
    return folder


@pytest.fixture
def recorded(clone: Path, tmp_path: Path) -> Path:
    path = tmp_path / "recorded.txt"
    path.write_text(git(clone, "rev-parse", "HEAD~2") + "\n")
    return path


def test_the_recorded_commit_and_before_it_the_newest_tag(clone: Path, recorded: Path) -> None:
    assert release.commit(clone, recorded) == git(clone, "rev-parse", "HEAD~2")
    git(clone, "tag", "vague", "HEAD~1")
    git(clone, "tag", "v2", "HEAD")  # the commit of a release is tested against the release before
    assert release.commit(clone, recorded) == git(clone, "rev-parse", "HEAD~2")
    git(clone, "tag", "v1", "HEAD~1")
    assert release.commit(clone, recorded) == git(clone, "rev-parse", "HEAD~1")


def test_a_commit_that_should_be_there_is_missed(clone: Path, recorded: Path) -> None:
    recorded.write_text("0" * 40)
    with pytest.raises(pytest.fail.Exception, match=r"recorded\.txt must name the commit of the last release"):
        release.commit(clone, recorded)


def test_where_it_cannot_be_had_the_reason_is_named(clone: Path, recorded: Path, tmp_path: Path) -> None:
    shallow = tmp_path / "shallow"
    git(tmp_path, "clone", "--quiet", "--depth", "1", clone.as_uri(), str(shallow))
    with pytest.raises(pytest.skip.Exception, match=r"this clone is shallow \(git fetch --unshallow --tags\)"):
        release.commit(shallow, recorded)
    with pytest.raises(pytest.skip.Exception, match="this is no git repository"):
        release.commit(tmp_path, recorded)


def test_this_repository_has_it() -> None:
    assert len(release.commit()) == 40
