"""Keys on disk: who may read them, and what a crash leaves."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from potluck.errors import InvalidSettings
from potluck.security import folder


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_modes(tmp_path: Path) -> None:
    where = tmp_path / "identity"
    folder.write_pair(where, "node", b"key\n", b"certificate\n")
    folder.write(where / folder.CA_CERTIFICATE, b"ca", folder.PUBLIC)
    assert (mode(where), mode(where / "node.pem"), mode(where / "ca.crt")) == (0o700, 0o600, 0o644)
    assert folder.secret(folder.pair(where, "node")) == b"key\ncertificate\n"
    assert folder.public(where / "ca.crt") == b"ca"


@pytest.mark.parametrize("bits", [0o640, 0o604, 0o620, 0o610])
def test_a_key_that_others_can_use_is_refused(tmp_path: Path, bits: int) -> None:
    path = tmp_path / "node.pem"
    folder.write(path, b"key")
    path.chmod(bits)
    with pytest.raises(InvalidSettings, match=rf"chmod 600 {path}"):
        folder.secret(path)


def test_systemd_gives_a_credential_to_the_services_group_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "join-token"
    folder.write(path, b"token", 0o440)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert folder.secret(path) == b"token"
    path.chmod(0o444)
    with pytest.raises(InvalidSettings, match="can be read by other users"):
        folder.secret(path)


@pytest.mark.parametrize("which", ["file", "folder"])
def test_a_ca_that_others_can_change_is_refused(tmp_path: Path, which: str) -> None:
    path = tmp_path / "identity" / folder.CA_CERTIFICATE
    folder.write(path, b"ca", folder.PUBLIC)
    loose = path if which == "file" else path.parent
    loose.chmod(loose.stat().st_mode | 0o020)
    with pytest.raises(InvalidSettings, match=rf"chmod go-w {loose},"):
        folder.public(path)


def test_a_key_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "node.pem"
    folder.write(path, b"key")
    owner = path.stat().st_uid
    if owner == 0:
        os.chown(path, 12345, -1)
        owner = 12345
    monkeypatch.setattr("os.geteuid", lambda: owner + 1)
    with pytest.raises(InvalidSettings, match="belongs to another user"):
        folder.secret(path)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match=r"node\.pem cannot be read: No such file"):
        folder.secret(tmp_path / "node.pem")
    with pytest.raises(InvalidSettings, match=r"ca\.crt cannot be read"):
        folder.public(tmp_path / "ca.crt")
    with pytest.raises(InvalidSettings, match="holds no certificate"):
        folder.certificate_of(b"-----BEGIN PRIVATE KEY-----")


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "node.pem"
    folder.write(path, b"old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InvalidSettings, match="No space left"):
        folder.write(path, b"new")
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["node.pem"]
    monkeypatch.undo()
    folder.write(path, b"new")
    assert path.read_bytes() == b"new"
