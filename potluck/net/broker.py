"""Our own broker, if there is no other: a private mosquitto, else the embedded amqtt. Each dies with its parent."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import os
import pwd
import shutil
import socket
import sys
from collections import deque
from pathlib import Path
from typing import Any, Literal

from potluck import extras
from potluck.bus.packets import PACKET_LIMIT_BYTES
from potluck.errors import CannotListen, InvalidSettings, PotluckError, Unavailable
from potluck.lifecycle import die_with_parent
from potluck.logs import fields
from potluck.net.addresses import port_user, taken_text
from potluck.settings import BrokerSettings, Listen

log = logging.getLogger(__name__)

Kind = Literal["mosquitto", "embedded"]

QUEUED_LIMIT_BYTES = 64 * 2**20
"""How many bytes may wait for a client that does not read."""
CONNECT_SECONDS = 10.0
"""A client must send its CONNECT to the embedded broker within this time."""

_START_SECONDS = 10.0
_STOP_SECONDS = 2.0
_PORT_TRIES = 5
_SYSTEM_FOLDERS = ("/usr/sbin", "/usr/local/sbin", "/opt/homebrew/sbin")

_MOSQUITTO_CONF = f"""\
listener {{port}} {{host}}
allow_anonymous true
set_tcp_nodelay true
persistence false
max_packet_size {PACKET_LIMIT_BYTES}
max_inflight_messages 100
max_queued_messages 100000
max_queued_bytes {QUEUED_LIMIT_BYTES}
sys_interval 0
connection_messages false
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


async def start_broker(settings: BrokerSettings, listen: Listen, state_dir: Path) -> Broker:
    """Start a broker on `listen.host` and `settings.port` (0: a free one), and return once it listens.

    In mode `auto`, a free port replaces one that is taken. Raises Unavailable when there is no broker to start (the text names
    the package to install), CannotListen for a port that is taken, and InvalidSettings for a mode that starts no broker.
    """
    kind = _choose(settings.mode)
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


def _choose(mode: str) -> Kind:
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
    text = _MOSQUITTO_CONF.format(host=host, port=port)
    if not hasattr(os, "memfd_create"):
        conf = state_dir / "mosquitto.conf"
        conf.write_text(text, encoding="utf-8")
        return await _execute(binary, "-c", str(conf))
    # A file in memory: nothing to clean up, and the user that mosquitto runs as can read it.
    handle = os.memfd_create("mosquitto.conf")
    try:
        os.write(handle, text.encode())
        # We change the user, before mosquitto would: Linux forgets the death signal of a process that changes its user.
        user: dict[str, Any] = {"user": _unprivileged(), "extra_groups": ()} if os.geteuid() == 0 else {}
        return await _execute(binary, "-c", f"/proc/self/fd/{handle}", pass_fds=(handle,), **user)
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
        if text := raw.decode(errors="replace").strip():
            return text
    return ""


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
