"""What this node is in a closed cluster, and how it becomes a member with the join token that a service was given."""

from __future__ import annotations

import asyncio
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace

from node import identity
from potluck import lifecycle
from potluck.credentials import FOLDER, Credentials
from potluck.errors import InvalidSettings, Overloaded, PotluckError, Unavailable
from potluck.logs import fields
from potluck.settings import NetworkSettings, NodeSettings, state_folder

if TYPE_CHECKING:
    from potluck.security.cluster_file import ClusterFile

log = logging.getLogger(__name__)

TOKEN = "join-token"  # noqa: S105 - the name of a file
NO_TOKEN = "none"  # noqa: S105
"""What systemd gives where there is no token (SetCredential in the unit)."""
TRY_AGAIN_SECONDS = 10.0


@dataclass(frozen=True)
class Member:
    """A node of a closed cluster: `where` is the folder with its credentials."""

    where: Path
    known: ClusterFile
    credentials: Credentials

    @property
    def node_id(self) -> str:
        return self.known.identity.partition(":")[2]

    def settings(self, given: NodeSettings) -> NodeSettings:
        """The settings of a daemon that is this member. Raises InvalidSettings for those of somebody else."""
        for what, wanted, ours in (
            ("node_id", given.node_id, self.node_id),
            ("cluster", given.cluster, self.known.cluster),
        ):
            if wanted not in ("", ours) and (what, wanted) != ("cluster", NetworkSettings().cluster):
                raise InvalidSettings(
                    f"{what} is {wanted!r}, but this node is {self.node_id!r} of the closed cluster {self.known.cluster!r}, by the "
                    f"credentials in {self.where}: leave {what} out, or give another --state-dir"
                )
        if given.listen.insecure:
            raise InvalidSettings(
                f"--insecure (listen.insecure), but this node is a member of a closed cluster, by the credentials in {self.where}: leave it "
                "out, or give another --state-dir"
            )
        return replace(
            given,
            cluster=self.known.cluster,
            node_id=self.node_id,
            seeds=tuple(dict.fromkeys((*given.seeds, *self.known.brokers))),
        )


def of(folder: Path) -> Member | None:
    """The member whose credentials are in this state folder; None: no closed cluster was joined.

    Raises InvalidSettings for credentials that cannot be used, and InvalidRequest for those that have ended: such a node does not become
    one of an open cluster by itself.
    """
    where = folder / FOLDER
    if not (where / "node.pem").exists():
        return None
    from potluck.security import cluster_file

    known = cluster_file.read(where)
    credentials = Credentials.load(where, "node")
    if credentials.identity != known.identity:
        raise InvalidSettings(
            f"{where} has the certificate of {credentials.identity}, and says that it is {known.identity}: join the cluster again"
        )
    return Member(where, known, credentials)


def given_token() -> str:
    """The join token that systemd hands to this service (LoadCredential; systemd.exec(5)); "": there is none."""
    from potluck.wire.tokens import LIMIT

    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    if not folder:
        return ""
    try:
        with (Path(folder) / TOKEN).open("rb") as file:
            text = file.read(LIMIT + 1).decode("ascii", "replace").strip()
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise InvalidSettings(f"the join token in {folder} cannot be read: {error.strerror}") from error
    return "" if text == NO_TOKEN else text


async def join(settings: NodeSettings, text: str, stop: asyncio.Event) -> None:
    """Become a member with this token, unless it was tried before; returns then, or when `stop` is set.

    It tries until the coordinator answers: a machine that starts may have no network yet. A node that is a member already stays what it
    is if the token lets nobody in. Raises InvalidSettings otherwise, and InvalidRequest for what is no token.
    """
    from potluck import enrolment
    from potluck.security import certificates, folder
    from potluck.wire import tokens

    token = tokens.parse(text)
    state = state_folder(settings.state_dir, "node")
    where = state / FOLDER
    answer = enrolment.tried(where, token)
    if answer is not None and (_is_member(state) or not answer):
        return
    name = identity.node_id(settings.node_id, state)
    kept = where / "joining.key"
    if kept.exists():  # an answer may have been lost with the process that waited for it
        key = folder.secret(kept)
    else:
        key = certificates.new_key()
        folder.write(kept, key)
    trouble = ""

    async def admitted() -> None:
        nonlocal trouble
        while True:
            try:
                (await enrolment.enrol(token, name, key=key)).save_as("node", where)
            except (Unavailable, Overloaded) as error:
                if error.message != trouble:
                    log.warning("not a member yet, trying again %s", fields(reason=error.message))
                trouble = error.message
                await asyncio.sleep(TRY_AGAIN_SECONDS)
            except PotluckError as error:  # a restart with this token would change nothing
                enrolment.note_tried(where, token, error.message)
                if not _is_member(state):
                    raise InvalidSettings(f"this machine cannot join: {error.message}") from error
                log.error("not joined anew, and a member as before %s", fields(reason=error.message))
                return
            else:
                enrolment.note_tried(where, token)
                kept.unlink(missing_ok=True)
                log.info("node became a member %s", fields(node=name))
                return

    tasks = {
        "join": asyncio.create_task(admitted(), name="join"),
        "stop": asyncio.create_task(stop.wait(), name="stop"),
        "report": asyncio.create_task(
            lifecycle.report(
                lambda: (f"node {name} asks to join a closed cluster", f": {trouble}" if trouble else ""), str
            ),
            name="report",
        ),
    }
    try:
        await asyncio.wait((tasks["join"], tasks["stop"]), return_when=asyncio.FIRST_COMPLETED)
        if tasks["join"].done():
            tasks["join"].result()
    finally:
        for task in tasks.values():
            task.cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)


def _is_member(state: Path) -> bool:
    """Whether the credentials there can be used."""
    try:
        return of(state) is not None
    except PotluckError as error:
        log.warning("credentials that cannot be used are replaced %s", fields(reason=error.message))
        return False
