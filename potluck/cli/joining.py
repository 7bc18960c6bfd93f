"""How a machine joins: who starts the coordinator where there is none, and how the daemons are kept running."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import signal
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack

from potluck import lifecycle
from potluck.cli import closing, here
from potluck.cli.notices import Notices
from potluck.cli.plan import Plan, already
from potluck.credentials import Credentials
from potluck.errors import GaveWay, NotAuthenticated, Unavailable
from potluck.logs import fields
from potluck.net.addresses import lan_addresses, reachable_addresses
from potluck.net.discovery import Discovery, Service, closed_text
from potluck.settings import ClientSettings, is_loopback, parse_address, typed
from potluck.sole_use import sole_use
from potluck.wire.addresses import address

log = logging.getLogger(__name__)

LAUNCHER = ("-P", "-m", "potluck.daemons")
WAIT_FOR_ELECTED_SECONDS = 15.0
STOP_SECONDS = 15.0
TOLD_SECONDS = 1.5
"""A daemon's status is shown when it has lasted this long: short-lived ones on the way would only alarm."""
CLAIM = "0-"
"""Ids that begin like this sort before every random id, which are hexadecimal."""
CLAIM_SECONDS = 1.0
NODES_SEEN_SECONDS = 0.3
"""A machine's node is visible by mDNS at most this much later than its coordinator."""
HERE_SECONDS = 1.0
"""An mDNS query hears of services on the same machine within this time."""
BACKOFF_SECONDS = (0.5, 30.0)
STEADY_SECONDS = 60.0
"""After a daemon has run this long, its back-off starts again from the beginning."""
TRIES = 6
"""After this many ends in a row, each before STEADY_SECONDS, a daemon is given up: another process may use its state folder."""
GAVE_WAY = GaveWay.exit_code
PERMANENT = (2, 5)
"""Exit codes of daemons for which a restart cannot help: wrong settings, and an address that the user chose and that cannot be used."""


def elected(own_id: str, others: Sequence[str]) -> bool:
    """Whether this candidate starts the coordinator: the smallest id does."""
    return all(own_id <= other for other in others)


class Joining:
    """One machine's daemons. `say` gets a line for people."""

    def __init__(self, plan: Plan, say: Callable[[str], None]) -> None:
        self._plan = plan
        self._say = say
        self._credentials = Credentials.of_client()
        self._leads = False
        """Whether this machine has the CA of its closed cluster."""
        self._children: list[Child] = []

    async def run(self, stop: asyncio.Event) -> None:
        """Join or start a cluster, keep the daemons running until `stop`, then end them in order.

        Raises Unavailable when a daemon cannot be kept running, and Conflict where this machine has a node already.
        """
        self._plan.check_free()
        with sole_use(here.folder_of(self._plan.state_dir, "up"), "up", self._plan.network.cluster):
            await self._run(stop)

    async def _run(self, stop: asyncio.Event) -> None:
        stopping = asyncio.create_task(stop.wait(), name="stop")
        working = asyncio.create_task(self._work(), name="daemons")
        try:
            await asyncio.wait((stopping, working), return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                self._say("stopping")
        finally:
            working.cancel()
            stopping.cancel()
            # The node ends first: it gives its leases back while the coordinator can still take them.
            for child in reversed(self._children):
                await child.stop()
            await asyncio.wait((working, stopping))
        if not working.cancelled() and (error := working.exception()) is not None:
            raise first_of(error)

    async def _work(self) -> None:
        async with AsyncExitStack() as claims, asyncio.TaskGroup() as tasks:
            await self._choose()
            network = self._plan.network
            if self._plan.closed:
                await self._work_closed(claims, tasks)
            elif network.seeds:
                self._say(f"joining cluster {network.cluster!r} at {', '.join(network.seeds)}")
                await self._check_alone_at_seeds()
            else:
                self._say(f"looking for cluster {network.cluster!r} ({network.discovery.window_seconds:g} s)")
                around = await self._look_around(claims)
                if await self._settle(claims):
                    await self._start_coordinator(tasks)
                for other in around.services("coordinator") if around is not None else ():
                    if not here.is_here(other):
                        self._say(
                            f"cluster {other.cluster!r} is on this network too, at {other.host}: this machine does not join it"
                        )
                await claims.aclose()
            tasks.create_task(self._child("node").run(), name="node")
            self._say_who_is_served()
            self._say(f"this machine's node starts; Ctrl-C ends it. {self._how_to_look()}")

    def _how_to_look(self) -> str:
        """What shows the cluster; a node's machine alone may not ask a closed one."""
        from potluck.client.membership import credentials_of

        cluster = self._plan.network.cluster
        status = typed("potluck status", cluster)
        if (
            not self._plan.closed
            or closing.founded(self._plan)
            or credentials_of(ClientSettings(cluster=cluster)) is not None
        ):
            return f"`{status}` shows the cluster"
        create = typed("potluck token create --role user", cluster)
        return f"`{status}` on the coordinator's machine shows the cluster; to ask it from here, join with a token of `{create}` too"

    async def _choose(self) -> None:
        """Find out whether this machine belongs to a closed cluster, or shall found one; else everything stays as asked for.

        Raises NotAuthenticated where there is a closed cluster that it does not belong to.
        """
        plan = self._plan
        known, self._leads = closing.member(plan), closing.founded(plan)
        if known is not None or self._leads:
            self._plan = closing.as_closed(plan, known.cluster if known is not None else plan.network.cluster)
            return
        if plan.asked or plan.network.seeds or not plan.network.discovery.enabled:
            return
        found = await closing.look(plan)
        if found is not None and found.ca:
            raise NotAuthenticated(closed_text(plan.network.cluster, found.host))
        if found is not None:
            return
        if why := closing.why_not():
            self._say(f"only this machine will be served: {why}")
            return
        self._plan = closing.as_closed(plan, plan.network.cluster)

    async def _work_closed(self, claims: AsyncExitStack, tasks: asyncio.TaskGroup) -> None:
        """Start what this machine is in its closed cluster: its coordinator, and what its node needs. Raises PotluckError."""
        from potluck.client import operating

        plan = self._plan
        cluster, known = plan.network.cluster, closing.member(plan)
        if known is not None:
            self._say(f"this machine is {known.identity} of the closed cluster {cluster!r}")
        founds = known is None and not self._leads
        if founds:
            self._say(f"looking for cluster {cluster!r} ({plan.network.discovery.window_seconds:g} s)")
            if not await self._settle(claims):
                raise NotAuthenticated(closed_text(cluster))
        if founds or self._leads:
            began = time.time()
            await self._start_coordinator(tasks)
            if known is None:
                await closing.enrol_node(plan, began)
            if founds:
                token = await closing.new_token(plan, operating.shared(), began)
                self._say(
                    f"this machine founded the closed cluster {cluster!r}. To let others in, type there within an hour (at most "
                    f"{operating.SHARED_USES}), once potluck is installed:\n    potluck join {token}"
                )
            else:
                self._say(f"`{typed('potluck token create', cluster)}` makes a token that lets another machine join")
        await claims.aclose()

    async def _look_around(self, until: AsyncExitStack) -> Discovery | None:
        """The network's services where this machine only serves itself: a user who forgot --insecure is told what is there."""
        if not self._plan.private or not lan_addresses():
            return None
        with contextlib.suppress(Unavailable):  # no multicast: nothing can be seen then
            return await until.enter_async_context(Discovery(self._plan.network.cluster, listen_host="0.0.0.0"))  # noqa: S104 - only looks
        return None

    async def _start_coordinator(self, tasks: asyncio.TaskGroup) -> None:
        for user in here.users(self._plan.state_dir, ("coordinator",)):
            raise already(str(user))
        self._plan.check_ports()
        tasks.create_task(self._child("coordinator").run(), name="coordinator")
        found = await self._coordinator_service()
        gateway = address(found.host, found.port, "https" if self._plan.closed else self._credentials.scheme)
        self._say(f"started the broker {found.host}:{found.broker_port} and the gateway {gateway}")

    def _say_who_is_served(self) -> None:
        plan = self._plan
        if not plan.private:
            return
        if all(is_loopback(parse_address(seed)[0]) for seed in plan.network.seeds):
            what = "only this machine is served"
        else:
            what = "this node listens on this machine only: the other nodes of its cluster cannot fetch what they need from it"
        here_too, others = plan.shared(), plan.shared(elsewhere=True)
        where = "here and on the other machines" if others == here_too else "here"
        self._say(
            f"{what}. To share it, end this with Ctrl-C, and on a network that you trust type {where}:\n    {here_too}"
        )
        if others != here_too:
            self._say(f"and on the other machines:\n    {others}")

    def _child(self, daemon: str) -> Child:
        command = [sys.executable, *LAUNCHER, daemon, *self._plan.flags(daemon)]
        child = Child(daemon, command, self._say, self._plan.environment(daemon))
        self._children.append(child)
        return child

    async def _coordinator_service(self) -> Service:
        async with self._discovery() as discovery:
            found = await discovery.wait_for(_is_coordinator, WAIT_FOR_ELECTED_SECONDS)
        if found is None:
            raise Unavailable(
                f"the coordinator was started, but mDNS does not show it within {WAIT_FOR_ELECTED_SECONDS:g} s: "
                "its log above says why; --log-level INFO says more"
            )
        return found

    async def _settle(self, claims: AsyncExitStack) -> bool:
        """Whether this machine shall start the coordinator; False when one is there.

        Every machine that looks announces a candidate with a random id. After the window the smallest id wins. The winner claims the
        place: it announces a candidate whose id sorts before all others, for as long as `claims` lasts. A machine that comes while the
        coordinator starts therefore waits for it. Of two claims at once, the smaller id holds.
        """
        own_id = uuid.uuid4().hex[:12]
        window = self._plan.network.discovery.window_seconds
        given_up: set[str] = set()
        async with self._discovery() as discovery:
            await discovery.advertise(self._candidate(own_id))
            while True:
                found = await self._found(discovery, window)
                await self._check_alone(discovery)
                if found:
                    return False
                rivals = self._rivals(discovery, own_id, given_up)
                if elected(own_id, rivals):
                    claim_id = f"{CLAIM}{own_id}"
                    claim = await claims.enter_async_context(self._discovery())
                    await claim.advertise(self._candidate(claim_id))
                    if await self._found(discovery, CLAIM_SECONDS):
                        return False
                    rivals = [rival for rival in self._rivals(discovery, own_id, given_up) if rival.startswith(CLAIM)]
                    if elected(claim_id, rivals):
                        self._say("found none: this machine starts a broker and a coordinator")
                        return True
                    await claim.withdraw()
                self._say("found none yet; another machine is about to start it: waiting")
                if await self._found(discovery, WAIT_FOR_ELECTED_SECONDS):
                    return False
                given_up.update(rivals)  # the rivals may have left without a word: choose again without them

    async def _check_alone(self, discovery: Discovery) -> None:
        """Raises Conflict where this machine already has a node of this cluster, started by another user or from another folder."""
        if self._plan.state_dir is not None:
            return
        await discovery.wait_for(lambda one: one.role == "node", NODES_SEEN_SECONDS)
        if (node := await here.node_here(discovery.services("node"), self._credentials)) is not None:
            at = address(node.host, node.port, self._credentials.scheme)
            raise already(f"the node {node.id} (cluster {node.cluster!r}) at {at}")

    async def _check_alone_at_seeds(self) -> None:
        """The same check where mDNS was not used yet."""
        if self._plan.state_dir is not None or not self._plan.network.discovery.enabled:
            return
        with contextlib.suppress(Unavailable):  # no multicast: nothing can be seen then
            async with self._discovery() as discovery:
                await discovery.wait_for(lambda one: one.role == "node" and here.is_here(one), HERE_SECONDS)
                await self._check_alone(discovery)

    def _rivals(self, discovery: Discovery, own_id: str, given_up: set[str]) -> list[str]:
        ours = {own_id, f"{CLAIM}{own_id}"}
        return [found.id for found in discovery.services("candidate") if found.id not in ours | given_up]

    async def _found(self, discovery: Discovery, seconds: float) -> bool:
        closed = self._plan.closed
        found = await discovery.wait_for(lambda one: _is_coordinator(one) and (closed or not one.ca), seconds)
        if (
            found is None
            and (other := next(filter(_is_coordinator, discovery.services("coordinator")), None)) is not None
        ):
            raise NotAuthenticated(
                f"{closed_text(other.cluster, other.host)}. For an open cluster beside it, give another name with --cluster"
            )
        if found is not None:
            self._say(f"found its coordinator at {found.host} (broker {found.host}:{found.broker_port})")
        return found is not None

    def _discovery(self) -> Discovery:
        return Discovery(self._plan.network.cluster, listen_host=self._plan.listen.host)

    def _candidate(self, own_id: str) -> Service:
        return Service(
            id=own_id,
            cluster=self._plan.network.cluster,
            role="candidate",
            host=reachable_addresses(self._plan.listen.host)[0],
            port=0,
            broker_port=0,
        )


class Child:
    """A daemon's process: restarted with back-off when it ends; `stop` ends it. The kernel ends it when we die.

    `say` gets its status whenever that changes.
    """

    def __init__(
        self, name: str, command: list[str], say: Callable[[str], None], environment: Mapping[str, str] | None = None
    ) -> None:
        self._environment = dict(environment or {})
        self._name = name
        self._command = command
        self._say = say
        self._process: asyncio.subprocess.Process | None = None
        self._telling: asyncio.TimerHandle | None = None
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """Run the daemon until `stop`, a cancel, or until it gives way. Raises Unavailable: wrong settings, or it ended early TRIES times."""
        delay = BACKOFF_SECONDS[0]
        tries: int | None = TRIES
        with Notices(self._told) as notices:
            while not self._stopping.is_set():
                started = time.monotonic()
                status = await self._run_once(notices.environment)
                if self._stopping.is_set():
                    return
                if status == GAVE_WAY:
                    self._say(
                        f"the {self._name} gave way to another one that was there first: this machine joins its cluster"
                    )
                    return
                if status in PERMANENT:
                    raise Unavailable(f"the {self._name} cannot run: its output above says why")
                if time.monotonic() - started > STEADY_SECONDS:
                    delay, tries = BACKOFF_SECONDS[0], None
                elif tries is not None:
                    tries -= 1
                    if not tries:
                        raise Unavailable(f"the {self._name} ended {TRIES} times in a row: its output above says why")
                how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
                self._say(f"the {self._name} ended {how}: it starts again within {delay:g} s")
                await asyncio.sleep(random.uniform(delay / 2, delay))
                delay = min(2 * delay, BACKOFF_SECONDS[1])

    async def _run_once(self, environment: Mapping[str, str]) -> int:
        # Its own session: Ctrl-C reaches only us, and we end the daemons in order.
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.DEVNULL,
            env={**os.environ, **self._environment, **environment},
            preexec_fn=lifecycle.die_with_parent(),
            start_new_session=True,
        )
        return await self._process.wait()

    def _told(self, text: str) -> None:
        """Pass a status on after a while, unless another status came since. Drop it when the daemon has ended: its output says the same."""
        if self._telling is not None:
            self._telling.cancel()

        def say() -> None:
            if self._process is not None and self._process.returncode is None and not self._stopping.is_set():
                self._say(text)

        self._telling = asyncio.get_running_loop().call_later(TOLD_SECONDS, say)

    async def stop(self) -> None:
        """Send SIGTERM, wait a while, then send SIGKILL."""
        self._stopping.set()
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await process.wait()
        except TimeoutError:
            log.warning("daemon killed %s", fields(daemon=self._name, reason=f"no end within {STOP_SECONDS:g} s"))
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


def first_of(error: BaseException) -> BaseException:
    """The first error in a group of errors."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _is_coordinator(service: Service) -> bool:
    return service.role == "coordinator" and service.broker_port > 0
