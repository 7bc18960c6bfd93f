"""Credentials on disk. A key and its certificate are one file, so that a renewal that is cut off never leaves one without the other.

| file           | mode | what                                                        |
|----------------|------|-------------------------------------------------------------|
| `<name>.pem`   | 0600 | private key and certificate of `node`, `coordinator`, ...   |
| `ca.key`       | 0600 | the CA's private key, only on the coordinator's machine     |
| `ca.crt`       | 0644 | the CA's certificate                                        |
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from potluck import whole_files
from potluck.errors import InvalidSettings

CA_CERTIFICATE = "ca.crt"
CA_KEY = "ca.key"
SECRET = 0o600
PUBLIC = 0o644
_FOLDER = 0o700


def pair(folder: Path, name: str) -> Path:
    """The file with the key and the certificate of `name`."""
    return folder / f"{name}.pem"


def write(path: Path, data: bytes, mode: int = SECRET, owner: int = -1) -> None:
    """Replace a file at once: a reader sees the old or the new bytes, also after a power cut. Makes its folder, 0700.

    `owner`: the user id of its new owner; -1: us. Raises InvalidSettings.
    """
    try:
        path.parent.mkdir(mode=_FOLDER, parents=True, exist_ok=True)
        whole_files.write(path, data, mode, owner=owner)
    except OSError as error:
        raise InvalidSettings(f"{path} cannot be written: {error.strerror}") from error


def write_pair(folder: Path, name: str, key: bytes, certificate: bytes) -> None:
    """Store a key and its certificate (both PEM), and replace those before."""
    write(pair(folder, name), key + certificate)


def secret(path: Path) -> bytes:
    """The bytes of a file that only we may read. Raises InvalidSettings when it is missing, or when others can read it.

    systemd gives the files of LoadCredential to the service's group too (systemd.exec(5)), in a folder that nobody else can enter.
    """
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            data = file.read()
    except OSError as error:
        raise InvalidSettings(f"the key {path} cannot be read: {error.strerror}") from error
    if found.st_uid not in (0, os.geteuid()):
        raise InvalidSettings(f"the key {path} belongs to another user: whoever can read it can pose as this machine")
    by_systemd = str(path.parent) == os.environ.get("CREDENTIALS_DIRECTORY")
    if stat.S_IMODE(found.st_mode) & (0o037 if by_systemd else 0o077):
        raise InvalidSettings(
            f"the key {path} can be read by other users: type chmod 600 {path}; "
            "if they may have read it, remove this member from the cluster and join again"
        )
    return data


def public(path: Path) -> bytes:
    """The bytes of a file that anyone may read, and only we may write: who changes the CA's certificate decides whom we trust.

    Raises InvalidSettings.
    """
    try:
        with path.open("rb") as file:
            found, folder = os.fstat(file.fileno()), path.parent.stat()
            data = file.read()
    except OSError as error:
        raise InvalidSettings(f"the certificate {path} cannot be read: {error.strerror}") from error
    for where, state in ((path, found), (path.parent, folder)):
        if state.st_uid not in (0, os.geteuid()) or stat.S_IMODE(state.st_mode) & 0o022:
            raise InvalidSettings(
                f"{where} can be written by other users, who could let this machine trust another cluster: "
                f"type chmod go-w {where}, and see that it belongs to you or root"
            )
    return data


def certificate_of(both: bytes) -> bytes:
    """The certificate in a pair. Raises InvalidSettings when there is none."""
    begin = both.find(b"-----BEGIN CERTIFICATE-----")
    if begin < 0:
        raise InvalidSettings("a file of credentials holds no certificate: join the cluster again")
    return both[begin:]
