"""What a member of a closed cluster knows of it, beside its certificate: `cluster.toml` in its folder of credentials.

It holds no secret. It comes from a coordinator, so it is checked when it is made: whoever holds a ClusterFile may use what is in it.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from potluck.errors import InvalidRequest, InvalidSettings
from potluck.security import folder
from potluck.settings_sources import toml
from potluck.wire.addresses import is_place
from potluck.wire.identities import is_identity
from potluck.wire.topics import Topics

NAME: Final = "cluster.toml"
LIMIT_BYTES = 16 * 1024
PLACES = 16
"""How many addresses of each kind it may hold."""
_CLUSTER_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class ClusterFile(Struct, frozen=True, forbid_unknown_fields=False):
    """`brokers` and `http` are `host:port`: the broker's listener for this member, and the coordinator's HTTPS server.

    `identity` is the member's own. Raises InvalidRequest for what no cluster has.
    """

    cluster: str
    cluster_id: str
    brokers: tuple[str, ...]
    http: tuple[str, ...]
    identity: str

    def __post_init__(self) -> None:
        try:
            Topics(self.cluster)
        except InvalidSettings as error:
            raise InvalidRequest(error.message) from error
        if not _CLUSTER_ID.fullmatch(self.cluster_id):
            raise InvalidRequest(f"{self.cluster_id[:80]!r} is no cluster's id")
        if not is_identity(self.identity):
            raise InvalidRequest(f"{self.identity[:80]!r} is no identity")
        for what, places in (("brokers", self.brokers), ("HTTP servers", self.http)):
            if not 0 < len(places) <= PLACES:
                raise InvalidRequest(f"a cluster has 1 to {PLACES} addresses of {what}, not {len(places)}")
            if wrong := [place for place in places if not is_place(place)]:
                raise InvalidRequest(f"{wrong[0][:80]!r} is not host:port")


def read(where: Path) -> ClusterFile:
    """What the folder's file says. Raises InvalidSettings when it is missing, or is none."""
    path = where / NAME
    try:
        with path.open("rb") as file:
            data = file.read(LIMIT_BYTES + 1)
    except OSError as error:
        raise InvalidSettings(f"{path} cannot be read: {error.strerror}: join the cluster again") from error
    try:
        if len(data) > LIMIT_BYTES:
            raise InvalidRequest(f"it has more than {LIMIT_BYTES} bytes")
        return msgspec.convert(tomllib.loads(data.decode()), ClusterFile)
    except (InvalidRequest, tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise InvalidSettings(f"{path} cannot be used: {error}: join the cluster again") from error


def write(where: Path, known: ClusterFile) -> None:
    """Replace the folder's file at once. Raises InvalidSettings."""
    lines = [f"{key} = {toml(value)}\n" for key, value in msgspec.structs.asdict(known).items()]
    folder.write(where / NAME, "".join(lines).encode(), folder.PUBLIC)
