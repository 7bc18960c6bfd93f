"""Our own broker, if there is no other: a private mosquitto, else the embedded amqtt. Each dies with its parent."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import importlib.util
import logging
import os
import pwd
import re
import shutil
import signal
import socket
import stat
import sys
from collections import deque
from collections.abc import Coroutine, Iterable
from pathlib import Path
from typing import Any, Literal

from potluck import extras
from potluck.bus.connecting import reach
from potluck.bus.packets import PACKET_LIMIT_BYTES
from potluck.credentials import Credentials
from potluck.errors import CannotListen, InvalidSettings, PotluckError, Unavailable
from potluck.lifecycle import die_with_parent
from potluck.logs import fields
from potluck.net import broker_rules
from potluck.net.addresses import port_user, taken_text
from potluck.net.broker_rules import Member
from potluck.security.folder import write
from potluck.settings import BrokerSettings, Listen
from potluck.wire.topics import Topics

log = logging.getLogger(__name__)

Kind = Literal["mosquitto", "embedded"]

QUEUED_LIMIT_BYTES = 64 * 2**20
"""How many bytes may wait for a client that does not read."""
CONNECT_SECONDS = 10.0
"""A client must send its CONNECT to the embedded broker within this time."""

_START_SECONDS = 10.0
_STOP_SECONDS = 2.0
_PORT_TRIES = 5
_RELOAD_SECONDS = 0.2
"""From one reload of the rules to the next, at least: thousands of members may join at once. A reload that takes long is followed by as
long a pause, in which messages pass."""
_CONNECTED_LIMIT = 10_000
_NO_TLS = b"potluck"
_SYSTEM_FOLDERS = ("/usr/sbin", "/usr/local/sbin", "/opt/homebrew/sbin")

_MOSQUITTO_CONF = """\
listener {port} {host}
allow_anonymous true
"""
_LIMITS = f"""\
set_tcp_nodelay true
persistence false
max_packet_size {PACKET_LIMIT_BYTES}
max_inflight_messages 100
max_queued_messages 100000
max_queued_bytes {QUEUED_LIMIT_BYTES}
sys_interval 0
log_dest stderr
log_type error
log_type warning
log_type notice
log_type information
"""


class Broker:
    """A broker that runs as a child process. `host` and `port` are where clients on this machine connect."""

    def __init__(self, kind: Kind, host: str, port: int, process: asyncio.subprocess.Process) -> None:
        self.kind: Kind = kind
        self.host = _reachable(host)
        self.port = port
        self.pid = process.pid
        self._process = process
        self._last_lines: deque[str] = deque(maxlen=10)
        self._running = asyncio.Event()
        self._reader = asyncio.create_task(self._read_log(), name=f"broker-log-{port}")

    async def wait(self) -> None:
        """Return when the broker has died or was stopped."""
        await self._process.wait()

    async def stop(self) -> None:
        """End it: first with SIGTERM, then with SIGKILL. Safe to call twice."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
            try:
                await asyncio.wait_for(self._process.wait(), _STOP_SECONDS)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        await self._reader

    async def started(self) -> None:
        """Return once it listens. Raises Unavailable, with its last log lines, when it dies or takes too long."""
        died = asyncio.create_task(self._process.wait(), name="broker-died")
        running = asyncio.create_task(self._running.wait(), name="broker-running")
        try:
            await asyncio.wait({died, running}, timeout=_START_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        finally:
            died.cancel()
            running.cancel()
        if self._running.is_set() and self._process.returncode is None:
            return
        await self.stop()
        said = "; ".join(self._last_lines) or "it said nothing"
        raise Unavailable(f"the {self.kind} broker did not start on port {self.port}: {said}")

    async def _read_log(self) -> None:
        assert self._process.stderr is not None
        while line := await _line(self._process.stderr):
            self._last_lines.append(line)
            log.debug("%s", line)
            if line.endswith("running"):
                self._running.set()
            self._heard(line)

    def _heard(self, line: str) -> None:
        """Act on a line of its log."""


_BROKEN = re.compile(r"(\d+: )?Error(:| opening| found at).*(acl[ _]file|conf)", re.IGNORECASE)
"""What mosquitto logs when it cannot read its rules. Names of clients stand in the log too, but never at its lines' beginning."""
_RELOADING = re.compile(r"(?:\d+: )?Reloading config\.")
_CAME = re.compile(r"(?:\d+: )?New client connected from \S+ as (.*) \(p\d+, c\d+, k\d+, u'([^']*)'\)\.?")
_WENT = re.compile(
    r"(?:\d+: )?(?:"
    r"Client (.*) (?:(?:been )?disconnected(?:: .*|, not authorised| due to .*| by .*)?|closed its connection|"
    r"has exceeded timeout, disconnecting)\."
    r"|Bad socket read/write on client (.*): .*)"
)
_REPLACED = " already connected, closing old connection."
"""How a line ends that tells of an id which is connected anew: it is followed by the line that tells who has it."""
_WHOLE_BYTES = 990
"""mosquitto cuts its lines at 999 bytes. A client with a long id would choose how such a line ends."""


class ClosedBroker(Broker):
    """mosquitto with TLS, client certificates and rules. `port` is for nodes and coordinators, `client_port` for clients.

    It ends when mosquitto cannot read its rules: from then on mosquitto would let every member do everything.
    """

    def __init__(
        self, host: str, port: int, client_port: int, process: asyncio.subprocess.Process, folder: Path, topics: Topics
    ) -> None:
        self.client_port = client_port
        self.fault = ""
        """Why it ended itself; "": it did not."""
        self.client_ids: dict[str, str] = {}
        """Who is connected: the identity, by client id. At most _CONNECTED_LIMIT, and nobody with an id of more than about 900 bytes."""
        self._folder = folder
        self._topics = topics
        self._reloaded = asyncio.Event()
        self._writing = asyncio.Lock()
        self._reloading = asyncio.Lock()
        self._changes: set[asyncio.Task[None]] = set()
        self._reload_at = 0.0
        self._reload_took = 0.0
        super().__init__("mosquitto", host, port, process)

    async def allow(self, members: Iterable[Member]) -> None:
        """Give rights to these members, and to nobody else. Returns when it is so; connections stay, but who is left out can do nothing.

        Raises InvalidSettings when the rules cannot be written, and Unavailable when the broker does not take them.
        """
        rules = tuple(members)
        await self._whole(self._allow(rules))

    async def _allow(self, members: tuple[Member, ...]) -> None:
        # One after the other, in the order of the calls: who was left out must not come back with an older list.
        async with self._writing:
            await asyncio.to_thread(_write_rules, self._folder, self._topics, members)
        await self._shared_reload()

    async def reload(self) -> None:
        """Let it read its rules and its certificate again. Returns when it has: whatever it gets later, it judges by them.

        With a certificate that it cannot read, it keeps the one before. Raises Unavailable.
        """
        await self._whole(self._shared_reload())

    async def _whole(self, change: Coroutine[None, None, None]) -> None:
        """Carry a change out also if whoever asked for it is cancelled: others may share it."""
        changing = asyncio.create_task(change, name="broker-rules")
        self._changes.add(changing)
        changing.add_done_callback(self._changes.discard)
        await asyncio.shield(changing)

    async def _shared_reload(self) -> None:
        # who waits here shares the next reload, with all that was written until it begins
        asked_at = asyncio.get_running_loop().time()
        async with self._reloading:
            if self._reload_at <= asked_at:
                await self._reload()
            if self._process.returncode is not None or not self._reloaded.is_set():
                raise Unavailable(f"the broker did not take its new rules: {self.fault or 'it does not answer'}")

    async def _reload(self) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(self._reload_at + max(_RELOAD_SECONDS, 2 * self._reload_took) - loop.time())
        await asyncio.to_thread(_give_away, self._folder)
        self._reloaded.clear()
        self._reload_at = loop.time()
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGHUP)
        ended = asyncio.create_task(self._process.wait(), name="broker-ended")
        heard = asyncio.create_task(self._reloaded.wait(), name="broker-reloaded")
        try:
            await asyncio.wait({ended, heard}, timeout=_START_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended.cancel()
            heard.cancel()
        # mosquitto forgets a signal that comes while it reads its rules, and with thousands of members that takes a second.
        if self._reloaded.is_set() and not await self._turns():
            self._reloaded.clear()
        self._reload_took = loop.time() - self._reload_at

    async def _turns(self) -> bool:
        """Whether mosquitto, which has one thread, gets round to other things in time: it hangs up on whatever cannot be TLS."""
        try:
            async with asyncio.timeout(_START_SECONDS):
                reader, writer = await reach((self.host, self.port), Credentials())
                try:
                    writer.write(_NO_TLS)
                    await reader.read()
                finally:
                    writer.close()
        except ConnectionResetError:
            return True
        except OSError:  # and TimeoutError, which is one
            return False
        return True

    def _heard(self, line: str) -> None:
        if _BROKEN.match(line):
            self.fault = self.fault or line
            log.critical("broker ended: without its rules it would let everybody in %s", fields(said=line))
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        elif _RELOADING.fullmatch(line):
            self._reloaded.set()
        elif len(line.encode()) > _WHOLE_BYTES or line.endswith(_REPLACED):
            return
        elif (came := _CAME.fullmatch(line)) is not None:
            if len(self.client_ids) < _CONNECTED_LIMIT:
                self.client_ids[came[1]] = came[2]
        elif (went := _WENT.fullmatch(line)) is not None:
            self.client_ids.pop(went[1] or went[2], None)


async def start_closed_broker(
    settings: BrokerSettings,
    host: str,
    ports: tuple[int, int],
    folder: Path,
    topics: Topics,
    members: Iterable[Member],
) -> ClosedBroker:
    """Start mosquitto for a closed cluster on `ports` of `host` (for daemons, and for clients; 0: a free one). Returns once it listens.

    `folder` holds its certificate and that of the CA (`broker_rules`), and nothing else: it is given to the user that mosquitto runs
    as. Raises Unavailable when there is no mosquitto, CannotListen for a port that is taken, and InvalidSettings for another broker.
    """
    if settings.mode in ("external", "embedded"):
        raise InvalidSettings(
            f"broker.mode is {settings.mode}: a closed cluster needs a mosquitto of its own, whose rules it writes: set it to auto"
        )
    binary = find_mosquitto()
    if binary is None:
        raise Unavailable(
            "a closed cluster needs mosquitto, because the embedded broker knows no identities: install it with "
            "'apt install mosquitto' (or your system's package)"
        )
    port, client_port = (port or _free_port(host) for port in ports)
    names = ("`potluck up --broker-port` (broker.closed_port)", "broker.client_port (POTLUCK_BROKER__CLIENT_PORT)")
    for one, name in zip((port, client_port), names, strict=True):
        if _taken(host, one):
            raise CannotListen(taken_text(host, one, name))
    _write_rules(folder, topics, tuple(members))
    text = broker_rules.configuration(host, port, client_port, _LIMITS + "connection_messages true\n")
    write(folder / broker_rules.CONFIGURATION, text.encode())
    _give_away(folder)
    # Files are named relative to this folder: the user that mosquitto runs as may be kept out of those above it.
    process = await _execute(binary, "-c", broker_rules.CONFIGURATION, cwd=folder, **_as_unprivileged())
    broker = ClosedBroker(host, port, client_port, process, folder, topics)
    try:
        await broker.started()
    except BaseException:
        await broker.stop()
        raise
    log.info("closed broker started %s", fields(host=host, port=port, client_port=client_port, pid=broker.pid))
    return broker


def _write_rules(folder: Path, topics: Topics, members: tuple[Member, ...]) -> None:
    # From the first moment they belong to the user that reads them: a reload may be under way.
    for name, text in (
        (broker_rules.NODE_RULES, broker_rules.node_rules(topics, members)),
        (broker_rules.CLIENT_RULES, broker_rules.client_rules(topics, members)),
    ):
        write(folder / name, text.encode(), owner=_reader())


def _give_away(folder: Path) -> None:
    """Let the user that mosquitto runs as read its files. Raises InvalidSettings.

    That user may write in this folder: what it has put there, such as a link to a file of root, stays whose it is.
    """
    reader = _reader()
    if reader < 0:
        return
    try:
        for path in (folder, *folder.iterdir()):
            with contextlib.suppress(FileNotFoundError):  # a file that is being replaced
                _give(path, reader)
    except OSError as error:
        raise InvalidSettings(f"the broker's folder {folder} cannot be given to its user: {error.strerror}") from error


def _give(path: Path, reader: int) -> None:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a symbolic link, a socket
            return
        raise
    try:
        found = os.fstat(handle)
        if stat.S_ISDIR(found.st_mode) or (stat.S_ISREG(found.st_mode) and found.st_nlink == 1):
            os.fchown(handle, reader, -1)
    finally:
        os.close(handle)


def _reader() -> int:
    """The user id that mosquitto runs as; -1: ours."""
    return pwd.getpwnam(_unprivileged()).pw_uid if os.geteuid() == 0 else -1


async def start_broker(settings: BrokerSettings, listen: Listen, state_dir: Path) -> Broker:
    """Start a broker on `listen.host` and `settings.port` (0: a free one), and return once it listens.

    In mode `auto`, a free port replaces one that is taken. Raises Unavailable when there is no broker to start (the text names
    the package to install), CannotListen for a port that is taken, and InvalidSettings for a mode that starts no broker.
    """
    kind = choose(settings.mode)
    port = settings.port
    _free_port(listen.host)  # raises CannotListen if the address is not ours
    if port and _taken(listen.host, port):
        if settings.mode != "auto":
            text = taken_text(listen.host, port, "--broker-port (broker.port)")
            raise CannotListen(f"{text}, or name the broker that runs there with --seed")
        by = port_user(port) or None
        log.warning("broker port taken, using a free one %s", fields(host=listen.host, port=port, by=by))
        port = 0
    failure: PotluckError | None = None
    for _ in range(_PORT_TRIES):
        chosen = port or _free_port(listen.host)
        broker = Broker(kind, listen.host, chosen, await _spawn(kind, listen.host, chosen, state_dir))
        try:
            await broker.started()
        except Unavailable as error:
            failure = error
            if port or not _taken(listen.host, chosen):
                break  # no other program took the port: trying again would not help
        except BaseException:
            await broker.stop()
            raise
        else:
            log.info("broker started %s", fields(kind=kind, host=listen.host, port=chosen, pid=broker.pid))
            return broker
    assert failure is not None
    raise failure


def choose(mode: str) -> Kind:
    """Which broker would be started. Raises Unavailable where there is none, and InvalidSettings for a mode that starts none."""
    if mode == "external":
        raise InvalidSettings("broker.mode is external: this starts no broker; name one with --seed host")
    if mode in ("auto", "mosquitto") and find_mosquitto():
        return "mosquitto"
    if mode in ("auto", "embedded") and importlib.util.find_spec("amqtt") is not None:
        log.info(
            "the embedded broker (amqtt) is good for trying potluck and for a few nodes: it speaks MQTT 3.1.1 only, and is "
            "slower; install mosquitto for more"
        )
        return "embedded"
    raise Unavailable(
        "there is no MQTT broker to start: install one with 'apt install mosquitto' (or your system's package), or "
        f"the embedded one with {extras.install('broker')}, or name a running one with --seed host"
    )


def find_mosquitto() -> str | None:
    """The path of the mosquitto binary. Debian puts it in a folder that is not in a user's PATH."""
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), *_SYSTEM_FOLDERS))
    return shutil.which("mosquitto", path=path)


async def _spawn(kind: Kind, host: str, port: int, state_dir: Path) -> asyncio.subprocess.Process:
    if kind == "embedded":
        return await _execute(sys.executable, "-P", "-m", "potluck.net.broker_embedded", host, str(port))
    binary = find_mosquitto()
    assert binary is not None
    text = _MOSQUITTO_CONF.format(host=host, port=port) + _LIMITS + "connection_messages false\n"
    if not hasattr(os, "memfd_create"):
        conf = state_dir / "mosquitto.conf"
        conf.write_text(text, encoding="utf-8")
        return await _execute(binary, "-c", str(conf))
    # A file in memory: nothing to clean up, and the user that mosquitto runs as can read it.
    handle = os.memfd_create("mosquitto.conf")
    try:
        os.write(handle, text.encode())
        # We change the user, before mosquitto would: Linux forgets the death signal of a process that changes its user.
        return await _execute(binary, "-c", f"/proc/self/fd/{handle}", pass_fds=(handle,), **_as_unprivileged())
    finally:
        os.close(handle)


async def _execute(*command: str, **options: Any) -> asyncio.subprocess.Process:
    try:
        return await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            preexec_fn=die_with_parent(),
            start_new_session=True,  # Ctrl-C is for the daemon, which stops its broker last
            **options,
        )
    except OSError as error:
        raise Unavailable(f"the broker {command[0]} could not be started: {error.strerror}") from error


async def _line(stream: asyncio.StreamReader) -> str:
    """The next line that is not empty; "" at the end."""
    while raw := await stream.readline():
        text = raw.decode(errors="replace").rstrip("\r\n")
        if text.strip():
            return text
    return ""


def _as_unprivileged() -> dict[str, Any]:
    return {"user": _unprivileged(), "extra_groups": ()} if os.geteuid() == 0 else {}


def _unprivileged() -> str:
    for name in ("mosquitto", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name).pw_name
    return "root"


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _free_port(host: str) -> int:
    with socket.socket(_family(host)) as sock:
        try:
            sock.bind((host, 0))
        except OSError as error:
            raise CannotListen(f"the broker cannot listen on {host}: {error.strerror or error}") from error
        port: int = sock.getsockname()[1]
        return port


def _taken(host: str, port: int) -> bool:
    with socket.socket(_family(host)) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, port))
        except OSError:
            return True
    return False


def _reachable(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared, not bound
