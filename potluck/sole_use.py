"""A state folder has one user at a time, named in its lock. The lock ends with its process, however that ends."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from potluck.errors import Conflict, InvalidSettings
from potluck.logs import fields

log = logging.getLogger(__name__)

TRIES = 5
"""Another process that checks a lock holds it for a moment. So a taken lock is tried this many times, ..."""
AGAIN_SECONDS = 0.05
"""... with this pause in between."""
SUFFIX = ".lock"
WHATS = ("up", "node", "coordinator")
"""What can have a lock."""
LOCKS = Path("/proc/locks")
"""All locks on this machine, with the processes that hold them (proc(5)); exists only on Linux."""


class User(Struct, frozen=True):
    """The user of a folder. `what` is one of WHATS; `pid` is 0 where it is unknown.

    `broker` is the `host:port` of its last connection, `folder` is the folder that it uses; "" where unknown.
    """

    what: str
    cluster: str = ""
    pid: int = 0
    since: float = 0.0
    host: str = ""
    broker: str = ""
    folder: str = ""

    @property
    def elsewhere(self) -> bool:
        """Whether the user is on another machine: the folder is on a network disk."""
        return bool(self.host) and self.host != socket.gethostname()

    def __str__(self) -> str:
        """`node (pid 17, cluster 'default', since 10:31)`."""
        known = (
            f"on {self.host}" if self.elsewhere else "",
            f"pid {self.pid}" if self.pid else "",
            f"cluster {self.cluster!r}" if self.cluster else "",
            f"since {clock_text(self.since)}" if self.since else "",
        )
        told = ", ".join(filter(None, known))
        what = "`potluck up`" if self.what == "up" else self.what
        return f"{what} ({told})" if told else what


def clock_text(at: float) -> str:
    """The local time of day, with the date if it was not today: `10:31`, `Nov 3 10:31`."""
    then = time.localtime(at)
    return time.strftime("%H:%M" if then[:3] == time.localtime()[:3] else "%b %d %H:%M", then)


@contextmanager
def sole_use(folder: Path, what: str, cluster: str) -> Iterator[Callable[[str], None]]:
    """Hold a state folder's lock: two daemons of a kind would delete each other's files. Raises Conflict, saying who has the lock.

    Call the yielded function with the broker's `host:port`, so that others can read it from the lock.
    Daemons of different kinds may share a folder (systemd's StateDirectory of a unit that runs `potluck up`).
    """
    try:
        descriptor = os.open(lock_of(folder, what), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise InvalidSettings(
            f"the state folder {folder} cannot be written to: {error.strerror}: choose one with --state-dir"
        ) from error
    try:
        if not _taken(descriptor):
            holder = _read(descriptor)
            raise Conflict(
                f"the state folder {folder} is in use by another {holder or User(what)}: end that one, or choose another folder with --state-dir"
            )
        user = User(what, cluster, os.getpid(), time.time(), socket.gethostname())

        def tell(broker: str) -> None:
            text = msgspec.json.encode(replace(user, broker=broker))
            # In one write: others may read it at any time.
            os.pwrite(descriptor, text.ljust(os.fstat(descriptor).st_size), 0)

        try:
            os.ftruncate(descriptor, 0)
            tell("")
        except OSError as error:
            raise InvalidSettings(
                f"nothing can be written to the state folder {folder}: {error.strerror}: make room on its disk, or choose another folder with "
                "--state-dir"
            ) from error
        yield tell
    finally:
        os.close(descriptor)


def user_of(folder: Path, what: str) -> User | None:
    """The user of a state folder for `what`; None if nobody uses it, or we may not look."""
    try:
        descriptor = os.open(lock_of(folder, what), os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        log.debug("lock not looked at %s", fields(folder=folder, reason=error.strerror))
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return replace(_read(descriptor) or User(what), folder=str(folder.resolve()))
    finally:
        os.close(descriptor)
    return None


def users_here() -> list[User]:
    """Processes of this user on this machine that hold a lock of ours, in any folder. Empty where LOCKS cannot be read."""
    try:
        lines = LOCKS.read_text().splitlines()
    except OSError as error:
        log.debug("locks not looked at %s", fields(reason=error.strerror))
        return []
    # `1: FLOCK  ADVISORY  WRITE 17 fe:00:5694883 0 EOF`
    pids = {words[4] for line in lines if len(words := line.split()) > 4 and words[1] == "FLOCK"}
    places = {place for pid in pids for place in _locks_of(pid)}
    return [user for folder, what in sorted(places) if (user := user_of(folder, what)) is not None]


def _locks_of(pid: str) -> Iterator[tuple[Path, str]]:
    """(folder, what) of the locks that a process has open. Empty for a process that is gone or another user's."""
    try:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            path = link.readlink()
            if path.suffix == SUFFIX and path.stem in WHATS:
                yield path.parent, path.stem
    except OSError as error:
        log.debug("locks of a process not looked at %s", fields(pid=pid, reason=error.strerror))


def lock_of(folder: Path, what: str) -> Path:
    """The file to lock."""
    return folder / f"{what}{SUFFIX}"


def _taken(descriptor: int) -> bool:
    for left in reversed(range(TRIES)):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if left:
                time.sleep(AGAIN_SECONDS)
        else:
            return True
    return False


def _read(descriptor: int) -> User | None:
    try:
        return msgspec.json.decode(os.pread(descriptor, 4096, 0), type=User)
    except msgspec.DecodeError:
        return None  # it has the lock, and is about to write who it is
