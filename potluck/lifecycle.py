"""How a daemon starts, reports to systemd, and stops: signals, sd_notify, and children that die with their parent."""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import faulthandler
import gc
import logging
import os
import platform
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn, TypeVar

from potluck import __version__, logs, reloading
from potluck.errors import expected
from potluck.logs import fields
from potluck.settings import CoordinatorSettings, NodeSettings

log = logging.getLogger(__name__)

S = TypeVar("S", NodeSettings, CoordinatorSettings)

_PR_SET_PDEATHSIG = 1
REPORT_SECONDS = 1.0
"""How often `report` reports; a WatchdogSec must be several times as long."""
LATE_SECONDS = 5.0
"""A loop that turns so much later than it should twice in a row does not feed the watchdog."""
STALLED_SECONDS = 120.0
"""So late may a step towards the broker be. A broker that does not answer is no reason to end: only a bus that has stopped trying."""
START_SECONDS = 90
"""How long a daemon may take until it reports at all (TimeoutStartSec in the units)."""
SILENT_SECONDS = 8
"""How long a daemon that reports may be silent before systemd ends it (WatchdogSec in the units), also before it is ready."""

FILES = 65_536
"""The most open files that a daemon needs: a higher limit would only let others make it use more memory."""

_notify_address = ""
_watched = False
_ready = False


def notify(state: str) -> None:
    """Send systemd `READY=1`, `STOPPING=1`, `STATUS=...` (sd_notify(3)). Does nothing outside of a unit."""
    address = _notify_address or os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    # The listener may be gone, or may not read now (`potluck up` after Ctrl-Z): the daemon must neither end nor wait.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as sock:
        try:
            sock.sendto(state.encode(), address)
        except OSError as error:
            log.debug("supervisor not told %s", fields(state=state, reason=error.strerror))


def is_service() -> bool:
    """Whether systemd started this daemon. (`potluck up` listens too, but at an address that is not a path.)"""
    return "/" in _notify_address


def in_older_unit() -> bool:
    """Whether systemd started this daemon by a unit of before its last upgrade: such a unit has no RuntimeDirectory.

    The start of the machine waits for such a unit, and has no other limit than the time that we ask for.
    """
    return is_service() and not os.environ.get("RUNTIME_DIRECTORY")


def ready() -> None:
    """Tell systemd, once, that this daemon is on the bus."""
    global _ready
    if not _ready:
        _ready = True
        notify("READY=1")


async def report(standing: Callable[[], tuple[str, str]], unwell: Callable[[], str]) -> NoReturn:
    """Report to systemd until cancelled: the daemon's status, and that it is well.

    `standing` gives the state, which is shown with the time since it last changed, and a remark, which may change all the time.
    `unwell` says what hangs; "": nothing. A daemon that is well and on time feeds the watchdog (WATCHDOG=1). Before `ready`, it asks
    for more time to start. systemd ends a daemon that does neither for long. Being late once is forgiven: a slow disk may do that.
    """
    state, since, said, told = "", "", "", ""
    loop = asyncio.get_running_loop()
    late_seconds, late_before = 0.0, False
    while True:
        now, remark = standing()
        if now != state:
            state, since = now, time.strftime("%Y-%m-%d %H:%M:%S")
        text = f"{state} (since {since}){remark}"
        parts = [f"STATUS={text}"] if text != said else []
        late = late_seconds >= LATE_SECONDS
        if late and not late_before:
            # Whatever looks at the time has been standing still with us: it cannot tell yet whether it is well.
            log.warning("not on time %s", fields(late_seconds=round(late_seconds, 1)))
            wrong = ""
        else:
            wrong = f"the event loop was {late_seconds:.1f} s late, again" if late else unwell()
        if not wrong:
            parts += ["WATCHDOG=1"] if _watched else []
            parts += [] if _ready else [_more_time(SILENT_SECONDS)]
        elif wrong != told:
            log.error("not well %s", fields(reason=wrong))
        if parts:
            notify("\n".join(parts))
        said, told, late_before = text, wrong, late
        slept_at = loop.time()
        await asyncio.sleep(REPORT_SECONDS)
        late_seconds = loop.time() - slept_at - REPORT_SECONDS


def _more_time(seconds: float) -> str:
    """For systemd: a start that takes long has not failed before so many seconds are over."""
    return f"EXTEND_TIMEOUT_USEC={round(seconds * 1e6)}"


def pause_after_crashes(seconds: float, crashes: int) -> None:
    """Wait before the start, and tell systemd why. SIGTERM ends the wait and the process."""
    text = f"waits {seconds:.0f} s before it starts: it has ended {crashes} times in a row soon after its start"
    notify(f"STATUS={text}\n{_more_time(seconds + START_SECONDS)}")
    logs.say(logging.WARNING, f"potluck {text}")
    time.sleep(seconds)


def _keep_from_children() -> None:
    """Remove systemd's variables from the environment: children (a broker, an engine) must not report to systemd for us."""
    global _notify_address, _watched
    _notify_address = os.environ.pop("NOTIFY_SOCKET", "")
    microseconds, process = os.environ.pop("WATCHDOG_USEC", ""), os.environ.pop("WATCHDOG_PID", "")
    _watched = bool(microseconds) and process in ("", str(os.getpid()))  # sd_watchdog_enabled(3)


def raise_file_limit() -> int:
    """Raise this process's limit of open files as far as allowed (setrlimit(2)), to at most FILES; never lowers it. Returns the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(hard, FILES)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError) as error:  # the system has another limit besides
        log.warning("limit of open files not raised %s", fields(limit=soft, wanted=wanted, reason=error))
        return soft
    return wanted


def stop_event(loop: asyncio.AbstractEventLoop) -> asyncio.Event:
    """An event that SIGTERM or SIGINT sets; the second signal ends the process at once."""
    event = asyncio.Event()

    def on_signal(number: int) -> None:
        if event.is_set():
            os._exit(128 + number)
        event.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    return event


def die_with_parent() -> Callable[[], None] | None:
    """A `preexec_fn` for subprocess: the kernel kills the child (SIGKILL) when its parent's thread ends (prctl(2)); None except on Linux.

    Loads the library here, before the fork: after it, only async-signal-safe work is allowed.
    """
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    parent = os.getpid()

    def set_death_signal() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # the parent died before prctl took effect
            os._exit(1)

    return set_death_signal


def software() -> dict[str, str]:
    """The versions of potluck and Python in this process, by name, for a birth."""
    return {"potluck": __version__, "python": platform.python_version()}


def add_daemon_arguments(parser: argparse.ArgumentParser, *, port_default: str = "any free one") -> None:
    """Add the flags that all daemons have."""
    parser.add_argument("--config", metavar="FILE", help="settings in TOML (examples in configs/)")
    parser.add_argument("--cluster", metavar="NAME", help="the cluster's name (default: default)")
    parser.add_argument("--listen", metavar="ADDRESS", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, help=f"HTTP port (default: {port_default})")
    parser.add_argument(
        "--insecure", action="store_true", default=None, help="allow --listen beyond loopback, without encryption"
    )
    parser.add_argument("--state-dir", metavar="FOLDER", help="where to keep everything that must last")
    parser.add_argument("--no-discovery", dest="discovery", action="store_false", default=None, help="do not use mDNS")
    parser.add_argument("--log-level", metavar="LEVEL", help="DEBUG, INFO, WARNING or ERROR (default: INFO)")


def daemon_flags(arguments: argparse.Namespace) -> dict[str, object]:
    """The values of these flags by the names of the settings; None for a flag that was not given."""
    return {
        "cluster": arguments.cluster,
        "listen.host": arguments.listen,
        "listen.port": arguments.port,
        "listen.insecure": arguments.insecure,
        "state_dir": arguments.state_dir,
        "discovery.enabled": arguments.discovery,
        "log_level": arguments.log_level,
    }


def run_daemon(name: str, read_settings: Callable[[], S], serve: Callable[[S], Coroutine[Any, Any, None]]) -> None:
    """Read the settings, set up the logs, serve, and exit: with the exit code of the PotluckError that ended the daemon, if one did.

    Any other error is a defect: it is logged with its traceback, and the exit code is 1.
    """
    reloading.wait_for_start()
    logs.configure("INFO")  # for errors in the settings
    _keep_from_children()
    faulthandler.enable()  # systemd ends a hanging daemon by SIGABRT: this prints where it hangs
    try:
        settings = read_settings()
        logs.configure(settings.log_level)
        raise_file_limit()
        if settings.listen.insecure:
            log.warning("INSECURE: %s listens on %s without encryption or identities", name, settings.listen.host)
        # Imported objects stay for ever. Without this, each full collection looks at all of them, and nobody is answered meanwhile.
        gc.collect()
        gc.freeze()
        asyncio.run(serve(settings))
    except Exception as error:
        known = expected(error)
        if known is None:
            log.critical("%s ended by a defect of potluck", name, exc_info=True)
            notify("STATUS=ended by a defect of potluck: its log has a traceback")
            sys.exit(1)
        logs.say(logging.ERROR, f"{name}: {known.message}")
        notify(f"STATUS={known.message}")
        sys.exit(known.exit_code)
