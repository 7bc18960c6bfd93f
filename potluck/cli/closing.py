"""How `potluck up` treats closed clusters: whether this machine is a member of one, may found one, or must be let in first."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace

from potluck.cli import here
from potluck.cli.plan import Plan
from potluck.client.membership import OPERATOR
from potluck.credentials import FOLDER
from potluck.errors import InvalidSettings, Unavailable
from potluck.net.addresses import lan_addresses
from potluck.net.broker import find_mosquitto
from potluck.net.discovery import Discovery, Service
from potluck.settings import Listen, NetworkSettings, short_hostname
from potluck.wire.topics import NODE_ID

if TYPE_CHECKING:
    from potluck.security.cluster_file import ClusterFile
    from potluck.wire.members import CreateToken

EVERYWHERE = "0.0.0.0"  # noqa: S104 - members only are let in
HERE_SECONDS = 0.7
"""An mDNS query hears of services on the same machine within this time."""


def member(plan: Plan) -> ClusterFile | None:
    """What this machine's node knows of the closed cluster that it belongs to; None: it belongs to none.

    Raises InvalidSettings where that cannot be read, and where the user asks for something else.
    """
    where = here.path_of(plan.state_dir, "node") / FOLDER
    if not (where / "node.pem").exists():
        return None
    from potluck.security import cluster_file

    known = cluster_file.read(where)
    if plan.network.cluster not in (known.cluster, NetworkSettings().cluster):
        raise _wrong(f"--cluster {plan.network.cluster}", known.cluster, where)
    if plan.listen.insecure:
        raise _wrong("--insecure", known.cluster, where)
    return known


def _wrong(given: str, cluster: str, where: Path) -> InvalidSettings:
    return InvalidSettings(
        f"{given} was given, but this machine belongs to the closed cluster {cluster!r}, by the credentials in {where}: leave it out, or give "
        "another --state-dir"
    )


def founded(plan: Plan) -> bool:
    """Whether this machine has the CA of a closed cluster: it leads it. Raises InvalidSettings where the user asks for something else."""
    where = here.path_of(plan.state_dir, "coordinator") / FOLDER
    if not (where / "ca.key").exists():
        return False
    if plan.listen.insecure:
        raise _wrong("--insecure", plan.network.cluster, where)
    return True


def known_name(state_dir: Path | None) -> str:
    """The name that this machine's node has in its closed cluster; "": it is a member of none."""
    from potluck.security import cluster_file

    where = here.path_of(state_dir, "node") / FOLDER
    try:
        return cluster_file.read(where).identity.partition(":")[2] if (where / "node.pem").exists() else ""
    except InvalidSettings:
        return ""  # it cannot be used: to join mends it


def own_name(state_dir: Path | None) -> str:
    """The name of this machine's node: the one that it has already, or a new one."""
    if name := known_name(state_dir):
        return name
    file = here.path_of(state_dir, "node") / "node-id"
    try:
        kept = file.read_text(errors="replace").strip()
    except OSError:
        kept = ""
    return kept if NODE_ID.fullmatch(kept) else new_name()


def new_name() -> str:
    return f"{short_hostname()}-{uuid.uuid4().hex[:6]}"


def as_closed(plan: Plan, cluster: str) -> Plan:
    """The plan of a machine in this closed cluster: it listens on the network, unless the user said where."""
    listen = plan.listen if plan.asked else Listen(host=EVERYWHERE)
    return dataclasses.replace(plan, closed=True, listen=listen, network=replace(plan.network, cluster=cluster))


def why_not() -> str:
    """Why this machine cannot found a closed cluster; "": it can."""
    if not lan_addresses():
        return "this machine is on no network"
    if find_mosquitto() is None:
        return "to serve the network, install mosquitto (apt install mosquitto) and start this again"
    return ""


async def look(plan: Plan) -> Service | None:
    """A coordinator of this cluster's name, on this machine's loopback or on the network; None: there is none."""
    window = plan.network.discovery.window_seconds

    async def heard(host: str, seconds: float) -> Service | None:
        with contextlib.suppress(Unavailable):  # no multicast: nothing can be seen there
            async with Discovery(plan.network.cluster, listen_host=host) as discovery:
                return await discovery.wait_for(lambda one: one.role == "coordinator" and one.broker_port > 0, seconds)
        return None

    seeking = [asyncio.create_task(heard("127.0.0.1", HERE_SECONDS))]
    if lan_addresses():
        seeking.append(asyncio.create_task(heard(EVERYWHERE, window)))
    try:
        for first in asyncio.as_completed(seeking):
            if (found := await first) is not None:
                return found
        return None
    finally:
        for task in seeking:
            task.cancel()
        await asyncio.gather(*seeking, return_exceptions=True)


async def new_token(plan: Plan, question: CreateToken, since: float) -> str:
    """A join token of the cluster that this machine leads, whose coordinator was started at `since` (Unix time). Raises PotluckError."""
    from potluck.client import operating

    where = here.path_of(plan.state_dir, "coordinator") / OPERATOR
    return await operating.new_token(where, plan.network.cluster, question, since)


async def enrol_node(plan: Plan, since: float) -> None:
    """Make this machine's node a member of the cluster that this machine leads. Raises PotluckError."""
    from potluck.client import operating
    from potluck.enrolment import enrol
    from potluck.wire import tokens

    name = own_name(plan.state_dir)
    token = tokens.parse(await new_token(plan, operating.own_node(name), since))
    (await enrol(token, name)).save_as("node", here.folder_of(plan.state_dir, "node") / FOLDER)
