"""The health of a cluster, also of a broken one: finds out what it can, and names the rest as problems."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

from msgspec import Struct
from msgspec.structs import replace

from potluck.bus.exchange import Envelope
from potluck.client import listings
from potluck.client.connection import Connection
from potluck.client.membership import membership
from potluck.credentials import Credentials
from potluck.errors import PotluckError, TimedOut, Unavailable
from potluck.settings import ClientSettings, is_loopback, typed
from potluck.sole_use import User, clock_text, users_here
from potluck.wire.births import CoordinatorStatus, NodeStatus, NodeTelemetry
from potluck.wire.questions import DeploymentInfo, JobChanged, NodeInfo
from potluck.wording import first

ASK_SECONDS = 5.0
STATUS_SECONDS = 1.0
"""How long to wait for a retained message: it follows its subscription at once."""
TELEMETRY_SECONDS = 6.0
"""How long to listen for nodes: they send every five seconds by default."""
GATEWAY_SECONDS = 2.0
RUNTIMES = ("tensorflow", "litert")
NAMED = 3
"""How many nodes with the same problem are named."""
CLOCK_SECONDS = 3.0
"""Clocks may differ by this much without harm: deadlines are tens of seconds."""


class Health(Struct, frozen=True, kw_only=True):
    """The findings. `problems` are sentences about what is wrong; `remarks` are sentences worth knowing, but no problems."""

    cluster: str
    broker: str = ""
    """`host:port`; "": no broker was reached."""
    coordinator: str = ""
    """`online`, `silent` (it should be there, but does not answer) or `offline`; "" without a broker."""
    since: float = 0.0
    """Since when the coordinator is in that state; 0: unknown."""
    gateway: tuple[str, ...] = ()
    nodes: tuple[NodeInfo, ...] = ()
    waiting: tuple[str, ...] = ()
    """Nodes that send while there is no coordinator."""
    deployments: tuple[DeploymentInfo, ...] = ()
    jobs: tuple[JobChanged, ...] = ()
    """Jobs that have not ended."""
    shortage: str = ""
    """Why the coordinator can store no more blobs."""
    others: tuple[str, ...] = ()
    """Brokers, as `host:port`, of other coordinators that serve a cluster of the same name."""
    clock_ahead_seconds: float = 0.0
    """How far this machine's clock is ahead of the coordinator's; 0 where the coordinator did not say."""
    problems: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def reachable(self) -> bool:
        """Whether any of the cluster answers."""
        return self.coordinator == "online"


async def examine(settings: ClientSettings) -> Health:
    """Look at a cluster, and at its parts on this machine. Raises nothing for what is wrong with it."""
    local = [user for user in users_here() if user.cluster == settings.cluster]
    try:
        connection = Connection.of(membership(settings), needs_coordinator=False)
        async with connection:
            broker = connection.bus.place
            try:
                status = await connection.coordinator(STATUS_SECONDS)
            except Unavailable:
                return await _without_coordinator(connection, broker, local)
            return await _with_coordinator(connection, broker, status, local)
    except PotluckError as error:
        return Health(cluster=settings.cluster, problems=(error.message,))


async def _with_coordinator(
    connection: Connection, broker: str, status: CoordinatorStatus, local: Sequence[User]
) -> Health:
    cluster = connection.settings.cluster
    try:
        async with asyncio.timeout(ASK_SECONDS):
            asked = time.time()
            nodes, sent_at = await listings.nodes(connection)
            ahead = (asked + time.time()) / 2 - sent_at if sent_at else 0.0
            deployments = await listings.deployments(connection)
            jobs = await listings.jobs(connection)
    except (TimeoutError, TimedOut):
        problem = (
            f"the coordinator at {', '.join(status.http)} does not answer: the broker has it as online, but it said nothing "
            f"within {ASK_SECONDS:g} s. It hangs, or is very busy: {_end_it(local) or 'look at its log there, or restart it'}"
        )
        return Health(cluster=cluster, broker=broker, coordinator="silent", gateway=status.http, problems=(problem,))
    reached = await _gateway_reached(status.http, connection.credentials)
    found = Health(
        cluster=cluster, broker=broker, coordinator="online", since=status.since, gateway=status.http, nodes=nodes,
        deployments=deployments, jobs=tuple(job for job in jobs if not job.ended_at), clock_ahead_seconds=ahead,
        shortage=status.shortage, others=status.others,
    )  # fmt: skip
    unreached = (
        []
        if reached
        else [f"the gateway does not answer from here at {', '.join(status.http)}: is there a firewall in between?"]
    )
    return _with(found, [*unreached, *troubles(found, local)], remarks(found))


async def _without_coordinator(connection: Connection, broker: str, local: Sequence[User]) -> Health:
    """Listen for a while: nodes tell that they are there, and since when they miss the coordinator."""
    topics, bus = connection.topics, connection.bus
    lost_at: list[float] = []
    online: dict[str, str] = {}
    heard: set[str] = set()
    changed = asyncio.Event()

    def on_message(envelope: Envelope) -> None:
        match envelope.message:
            case CoordinatorStatus(state="offline", since=since) if since:
                lost_at.append(since)
            case NodeStatus(node_id=node_id, state="online", session=session):
                online[node_id] = session
            case NodeTelemetry(node_id=node_id, coordinator_lost_at=since):
                heard.add(node_id)
                if since:
                    lost_at.append(since)
            case _:
                pass
        changed.set()

    bus.subscribe(topics.coordinator_status, on_message)
    bus.subscribe(topics.node("+", "status"), on_message)
    bus.subscribe(topics.node("+", "telemetry"), on_message, qos=0)
    try:
        async with asyncio.timeout(TELEMETRY_SECONDS):
            await asyncio.sleep(STATUS_SECONDS)
            while not online.keys() <= heard:
                changed.clear()
                await changed.wait()
    except TimeoutError:
        pass  # some nodes did not send: they are gone, or send less often
    since = min(lost_at, default=0.0)
    told = f" since {clock_text(since)}" if since else ""
    cluster = connection.settings.cluster
    here = _end_it(local)
    advice = (
        f"one runs on this machine and hangs, unless it has just started; {here}"
        if here
        else f"start one with `{typed('potluck up', cluster)}` (or the service potluck-coordinator)"
    )
    return Health(
        cluster=cluster,
        broker=broker,
        coordinator="offline",
        since=since,
        waiting=tuple(sorted(heard)),
        problems=(f"the broker answers, but no coordinator of cluster {cluster!r} is there{told}: {advice}",),
    )


def _end_it(local: Sequence[User]) -> str:
    """How to end the coordinator that runs on this machine; "" where none runs."""
    for user in local:
        if user.what == "coordinator" and user.pid:
            return f"look at its log, or end it with `kill -9 {user.pid}`: `potluck up` and systemd start it again"
    return ""


def troubles(found: Health, local: Sequence[User] = ()) -> list[str]:
    """The problems of a cluster whose coordinator answers, the worst first; `local`: its parts on this machine."""
    said = []
    for deployment in found.deployments:
        if deployment.state == "failing":
            why = deployment.reason or next((one.error.message for one in deployment.replicas if one.error), "")
            said.append(f"deployment {deployment.name} fails{f': {why}' if why else ''}")
    if found.others:
        said.append(
            f"other coordinators serve a cluster named {found.cluster!r} on this network, with brokers at {', '.join(found.others)}: "
            "nodes and clients may find any of them; stop all but one, or give each another name with --cluster"
        )
    if found.shortage:
        said.append(f"the coordinator can store no more data, models and results, and jobs wait: {found.shortage}")
    if found.nodes and all(node.state == "offline" for node in found.nodes):
        said.append(f"no node is online: run `{typed('potluck up', found.cluster)}` on each machine")
    elif not found.nodes:
        here = next((user for user in local if user.what != "coordinator"), None)
        said.append(
            f"no node has joined yet, but {here} runs on this machine: if it has just started, try again in a moment, else its log says why"
            if here
            else f"no node has joined yet: run `{typed('potluck up', found.cluster)}` on each machine"
        )
    gone = [node for node in found.nodes if node.state == "offline" and not node.left]
    if gone:
        said.append(
            f"{_nodes(gone)} offline, last seen {clock_text(max(node.seen_at for node in gone))}: "
            + ("is the machine on, and on the network?" if len(gone) == 1 else "are they on, and on the network?")
        )
    silent = [node for node in found.nodes if node.state == "suspect"]
    if silent:
        said.append(f"{_nodes(silent)} silent since {clock_text(max(node.seen_at for node in silent))}")
    for node in found.nodes:
        if node.state == "online" and node.capacity.runtimes.keys().isdisjoint(RUNTIMES):
            said.append(
                f"node {node.node_id} cannot compute: neither TensorFlow nor LiteRT is installed with potluck there (docs/install.md, Extras)"
            )
        if node.shortage:
            said.append(f"node {node.node_id} can store no more data and models: {node.shortage}")
    return [*said, *clocks(found.nodes, found.clock_ahead_seconds)]


def clocks(nodes: Sequence[NodeInfo], ahead_seconds: float | None = None) -> list[str]:
    """Sentences about wrong clocks, and by how much; `ahead_seconds`: how far this machine's is ahead of the coordinator's, if known.

    Where all other clocks agree with each other, the coordinator's is wrong.
    """
    others = {f"node {node.node_id}'s": node.clock_ahead_seconds for node in nodes if node.state == "online"}
    if ahead_seconds is not None:
        others["this machine's"] = ahead_seconds
    wrong = {whose: ahead for whose, ahead in others.items() if abs(ahead) > CLOCK_SECONDS}
    if len(wrong) == len(others) > 1 and max(wrong.values()) - min(wrong.values()) <= CLOCK_SECONDS:
        return [f"the coordinator's clock is {_difference(-min(wrong.values()))} all others: set it (NTP)"]
    return [f"{whose} clock is {_difference(ahead)} the coordinator's: set it (NTP)" for whose, ahead in wrong.items()]


def remarks(found: Health) -> list[str]:
    """Sentences worth knowing that are no problems."""
    said = []
    if found.gateway and all(is_loopback(urlsplit(url).hostname or "") for url in found.gateway):
        said.append(
            "only the coordinator's machine is served. To share it, end `potluck up` there, and type there and on the others:\n"
            f"{typed('potluck up --insecure', found.cluster)}"
        )
    said += [
        f"node {node.node_id} left at {clock_text(node.seen_at)}"
        for node in found.nodes
        if node.state == "offline" and node.left
    ]
    return said


def _nodes(nodes: Sequence[NodeInfo]) -> str:
    """The names of nodes, and the verb after them. Names only a few: there may be very many, and `nodes` has them all."""
    names = first([node.node_id for node in nodes], NAMED)
    return f"node {names} is" if len(nodes) == 1 else f"nodes {names} are"


def _difference(ahead_seconds: float) -> str:
    return f"{abs(ahead_seconds):.0f} s {'ahead of' if ahead_seconds > 0 else 'behind'}"


def _with(found: Health, problems: Sequence[str], said: Sequence[str]) -> Health:
    return replace(found, problems=tuple(problems), remarks=tuple(said))


async def _gateway_reached(urls: Sequence[str], credentials: Credentials) -> bool:
    """Whether one of the addresses answers from here."""
    from potluck.net.http_client import answers  # HTTP is slow to import, and a cluster that is not there needs none

    for url in urls:
        if await answers(f"{url}/v2/health/live", credentials, GATEWAY_SECONDS):
            return True
    return False
