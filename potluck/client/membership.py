"""Which credentials a client uses: those of a closed cluster, if there are some for it; else none, and only an open cluster lets it in.

They are looked for in this order, for the cluster that is named:

1. the folder that the user named (`credentials`, `--credentials`, `POTLUCK_CREDENTIALS`); `none`: no credentials at all;
2. `~/.config/potluck/<cluster>/`, where `potluck join` puts them;
3. on the coordinator's machine `<state>/operator/` of its coordinator, for those who may read it: root, and the user of `potluck up`;
   not where the user names a broker.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from msgspec.structs import replace

from potluck.credentials import FOLDER, Credentials
from potluck.errors import InvalidSettings
from potluck.net.side import OPEN, Side, ca_hint
from potluck.settings import ClientSettings, NetworkSettings
from potluck.sole_use import users_here

if TYPE_CHECKING:
    from potluck.security.cluster_file import ClusterFile

NONE = "none"
OPERATOR = "operator"
PAIR = "client.pem"
SERVICE_STATES = (Path("/var/lib/private/potluck-coordinator"), Path("/var/lib/potluck-coordinator"))
"""The coordinator's state folder as a system service: with DynamicUser, and without."""


@dataclass(frozen=True)
class Membership:
    """A client's place in a cluster. `settings` are the given ones, as they are for it."""

    settings: ClientSettings
    credentials: Credentials
    where: Path | None = None
    """The folder with the credentials; None: the cluster is open."""
    known: ClusterFile | None = None
    side: Side = OPEN
    role: str = ""
    """What the certificate says that we may do, as in `potluck.wire.roles`."""
    ours: bool = False
    """Whether we renew the certificate; the coordinator renews its machine's operator's."""

    @property
    def name(self) -> str:
        """The client's name in a closed cluster; "": the cluster is open."""
        return "" if self.known is None else self.known.identity.partition(":")[2]


def config_folder() -> Path:
    """The folder with the user's settings and credentials (XDG base directory specification)."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or str(Path("~/.config").expanduser())) / "potluck"


def membership(settings: ClientSettings) -> Membership:
    """The membership of a client with these settings. Raises InvalidSettings for credentials that were named, or are there, and cannot be
    used, and InvalidRequest for a certificate that has ended: such a client does not ask in plain.
    """
    if settings.credentials == NONE:
        return Membership(settings, Credentials.of_client())
    if settings.credentials:
        return _member(settings, Path(settings.credentials).expanduser())
    where = credentials_of(settings)
    return Membership(settings, Credentials.of_client()) if where is None else _member(settings, where)


def credentials_of(settings: ClientSettings) -> Path | None:
    """The folder with this user's credentials for commands; None: there are none."""
    return next((where for where in _places(settings) if (where / PAIR).exists()), None)


def _places(settings: ClientSettings) -> Iterator[Path]:
    from potluck.security import cluster_file

    cluster = settings.cluster
    yield config_folder() / cluster
    if settings.seeds:
        return
    for where in _operators(cluster):
        try:
            if (where / PAIR).exists() and cluster_file.read(where).cluster == cluster:
                yield where
        except (OSError, InvalidSettings):  # another user's, or of another cluster that is being founded
            continue


def _operators(cluster: str) -> Iterator[Path]:
    base = Path(os.environ.get("XDG_STATE_HOME") or str(Path("~/.local/state").expanduser()))
    yield base / "potluck" / "coordinator" / OPERATOR
    if os.geteuid() == 0:
        yield from (state / OPERATOR for state in SERVICE_STATES)
    for user in users_here():
        if user.what == "coordinator" and user.cluster == cluster and user.folder and not user.elsewhere:
            yield Path(user.folder) / OPERATOR


def _member(settings: ClientSettings, where: Path) -> Membership:
    from potluck.security import certificates, cluster_file, folder

    known = cluster_file.read(where)
    if settings.cluster not in (known.cluster, NetworkSettings().cluster):
        raise InvalidSettings(
            f"the credentials in {where} are for cluster {known.cluster!r}, and {settings.cluster!r} was asked for: leave --cluster out"
        )
    credentials = _loaded(where)
    if credentials.identity != known.identity:
        raise InvalidSettings(
            f"{where} has the certificate of {credentials.identity}, and says that it is {known.identity}: join the cluster again"
        )
    ca = (where / folder.CA_CERTIFICATE).read_bytes()
    return Membership(
        settings=replace(settings, cluster=known.cluster),
        credentials=credentials,
        where=where,
        known=known,
        side=Side(ca_hint(certificates.read(ca).fingerprint), client=True),
        role=certificates.read(folder.certificate_of(_bytes(where / PAIR))).unit,
        ours=not (where.parent / FOLDER / folder.CA_KEY).exists(),
    )


def _loaded(where: Path) -> Credentials:
    """The credentials in a folder. Root may use those of the coordinator's service, whose user has no other process."""
    if os.geteuid() != 0 or where not in [state / OPERATOR for state in SERVICE_STATES]:
        return Credentials.load(where, "client")
    from potluck.security import folder

    with TemporaryDirectory() as copy:
        for name, mode in ((PAIR, folder.SECRET), (folder.CA_CERTIFICATE, folder.PUBLIC)):
            folder.write(Path(copy) / name, _bytes(where / name), mode)
        return Credentials.load(Path(copy), "client")


def _bytes(path: Path) -> bytes:
    """A file's bytes. Never those of a file elsewhere: the service's user may write this folder, and root reads it."""
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
            return file.read(1 << 20)
    except OSError as error:
        raise InvalidSettings(f"{path} cannot be read: {error.strerror}") from error
