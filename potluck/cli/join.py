"""`potluck join TOKEN`: this machine, or this user, becomes a member of a closed cluster."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from potluck.cli.session import Json, Session, session
from potluck.cli.up import Data, LogLevel

if TYPE_CHECKING:
    from potluck.enrolment import Enrolled
    from potluck.wire.tokens import JoinToken


def join(
    context: typer.Context,
    token: Annotated[
        str,
        typer.Argument(
            help="A join token, from `potluck token create` or the first machine; -: read it from standard input."
        ),
    ],
    name: Annotated[
        str | None,
        typer.Option(
            help="The member's name (default: the node's id; for --client made of the user's and machine's names)."
        ),
    ] = None,
    client: Annotated[
        bool,
        typer.Option("--client", help="The token is for commands of this user, also where a node runs as a service."),
    ] = False,
    state_dir: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where the node keeps its identity and blobs.")
    ] = None,
    data: Data = None,
    log_level: LogLevel = None,
    as_json: Json = False,
) -> None:
    """Join a closed cluster with a token.

    With a node's token, this machine then works for it, as with `potluck up`, until Ctrl-C; where the service potluck-node is installed,
    that one does. With a client's token, this user's commands reach the cluster from now on.
    """
    from potluck.cli.hidden import hide
    from potluck.wire import tokens

    hide(token)
    given = session(context)
    parsed = tokens.parse(sys.stdin.readline() if token == "-" else token)  # noqa: S105
    if not client and state_dir is None and _is_service():
        _hand_over(parsed, name, as_json)
        return
    enrolled = _enrolled(parsed, name, client, given, state_dir)
    if enrolled.role == "node" and client:
        from potluck.errors import InvalidRequest

        raise InvalidRequest(
            "the token is for a node, and --client was given. It is used up: make one with `potluck token create --role user`"
        )
    where = _save(enrolled, given, state_dir)
    if as_json:
        from potluck.cli import output

        output.emit({"identity": enrolled.known.identity, "cluster": enrolled.known.cluster, "credentials": str(where)})
    else:
        from potluck.cli.output import note

        note(
            f"{enrolled.known.identity} is a member of cluster {enrolled.known.cluster!r} now; its credentials are in {where}"
        )
    _go_on(enrolled, given, state_dir, data, log_level)


def _is_service() -> bool:
    """Whether root types this on a machine whose node is a system service."""
    if os.geteuid() != 0:
        return False
    from potluck.service import installing, systemd

    return "node" in installing.installed() and systemd.BOOTED.is_dir()


def _hand_over(token: JoinToken, name: str | None, as_json: bool) -> None:
    from potluck.cli import output
    from potluck.errors import InvalidRequest
    from potluck.service import joining

    if name is not None:
        raise InvalidRequest("the name of the service's node is node_id in /etc/potluck/node.toml: leave --name out")
    known = joining.join(token)
    if as_json:
        output.emit({"identity": known.identity, "cluster": known.cluster, "service": "potluck-node"})
    else:
        output.show(f"potluck-node is {known.identity} of cluster {known.cluster!r} now")


def _enrolled(token: JoinToken, name: str | None, client: bool, given: Session, state_dir: Path | None) -> Enrolled:
    """Raises PotluckError, which says so where this machine or user is a member of the token's cluster already."""
    import asyncio

    from potluck.cli import closing
    from potluck.enrolment import enrol
    from potluck.errors import Conflict, NotAllowed

    first = name or _name(client, state_dir)
    try:
        try:
            return asyncio.run(enrol(token, first))
        except NotAllowed:
            if name or first != closing.known_name(state_dir):
                raise
        # The node was removed: its name comes back to nobody while its last certificate lasts.
        return asyncio.run(enrol(token, closing.new_name()))
    except (Conflict, NotAllowed) as error:
        places = () if name else _folders(given, state_dir, client)
        already = next(filter(None, (_already(token, where) for where in places)), "")
        if not already:
            raise
        raise type(error)(
            already if isinstance(error, Conflict) else f"{error.message}. {already[0].upper()}{already[1:]}"
        ) from error


def _folders(given: Session, state_dir: Path | None, client: bool) -> list[Path]:
    """Where there may be credentials that the join would take the place of."""
    from potluck.cli import here
    from potluck.client.membership import config_folder
    from potluck.credentials import FOLDER

    commands = Path(given.credentials).expanduser() if given.credentials else config_folder() / given.settings().cluster
    return [commands] if client else [here.path_of(state_dir, "node") / FOLDER, commands]


def _already(token: JoinToken, where: Path) -> str:
    """A remark where these are credentials of the token's cluster that are good still; else ""."""
    import time

    from potluck.errors import InvalidRequest, InvalidSettings
    from potluck.security import certificates, cluster_file, folder
    from potluck.settings import typed
    from potluck.wire.tokens import FINGERPRINT_BYTES

    if not where.exists():
        return ""
    try:
        known = cluster_file.read(where)
        role, ca = known.identity.partition(":")[0], folder.public(where / folder.CA_CERTIFICATE)
        certificates.check(folder.certificate_of(folder.secret(where / f"{role}.pem")), ca, time.time())
        if certificates.read(ca).fingerprint[:FINGERPRINT_BYTES] != token.fingerprint:
            return ""
    except (InvalidRequest, InvalidSettings):
        return ""  # not to be used, or late: to join again is right
    if role == "node":
        return f"this machine is {known.identity} of that cluster already: `{typed('potluck up', known.cluster)}` is enough"
    return f"this user is {known.identity} of that cluster already, and need not join again"


def _name(client: bool, state_dir: Path | None) -> str:
    """The name of the member: that of this machine's node, or one that tells whose commands these are, and where."""
    import getpass
    import re
    import uuid

    from potluck.cli.closing import own_name
    from potluck.settings import short_hostname

    if not client:
        return own_name(state_dir)
    user = re.sub(r"[^a-z0-9]", "", getpass.getuser().lower())[:16] or "user"
    return f"{user}-{short_hostname()}-{uuid.uuid4().hex[:6]}"


def _save(enrolled: Enrolled, given: Session, state_dir: Path | None) -> Path:
    """Where the credentials are now."""
    from potluck.cli import here
    from potluck.client.membership import config_folder
    from potluck.credentials import FOLDER

    if enrolled.role == "node":
        where = here.folder_of(state_dir, "node") / FOLDER
    else:
        where = Path(given.credentials).expanduser() if given.credentials else config_folder() / enrolled.known.cluster
    enrolled.save(where)
    return where


def _go_on(
    enrolled: Enrolled, given: Session, state_dir: Path | None, data: list[str] | None, log_level: str | None
) -> None:
    from potluck.cli.output import note
    from potluck.settings import typed

    cluster = enrolled.known.cluster
    if enrolled.role == "client":
        note(f"`{typed('potluck status', cluster)}` shows the cluster")
        return
    from potluck.cli import here
    from potluck.cli.up import run

    if running := here.users(state_dir, ("up", "node")):
        note(f"{running[0]} runs here: end it, and type `{typed('potluck up', cluster)}`")
        return
    run(given, cluster=cluster, state_dir=state_dir, data=data, log_level=log_level)
