"""A process that confines itself, and what it can then do to the machine; and kernels that cannot confine it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from node.sandbox import landlock

ATTEMPTS = """
import ctypes, errno, json, os, resource, shutil, signal, socket, subprocess, sys, threading
from pathlib import Path
parent, scratch, blobs = os.getppid(), Path(sys.argv[1]), Path(sys.argv[2])
from node.sandbox.confining import confine
from node.sandbox.policy import Confinement
confined = confine(Confinement(mode="auto", reads=(str(blobs),), network="network" in sys.argv), scratch)
libc = ctypes.CDLL(None, use_errno=True)
done = {}
def attempt(name, work):
    try:
        result = work()
        done[name] = "done" if result != -1 else errno.errorcode[ctypes.get_errno()]
    except OSError as error:
        done[name] = errno.errorcode.get(error.errno, str(error))
attempt("read /etc/passwd", lambda: Path("/etc/passwd").read_text())
attempt("list a home", lambda: os.listdir("/root"))
attempt("read the parent's environment", lambda: Path(f"/proc/{parent}/environ").read_bytes())
attempt("write beside scratch", lambda: (scratch.parent / "outside").write_text("x"))
attempt("change a blob", lambda: (blobs / "blob").write_text("x"))
attempt("cut a blob", lambda: os.truncate(blobs / "blob", 0))
attempt("remove a blob", lambda: (blobs / "blob").unlink())
attempt("link a blob and write", lambda: (os.link(blobs / "blob", scratch / "blob"), (scratch / "blob").write_text("x")))
attempt("change the mode of a blob", lambda: os.chmod(blobs / "blob", 0o777))
attempt("signal the parent", lambda: os.kill(parent, 0))
attempt("trace the parent", lambda: libc.ptrace(16, parent, 0, 0))
attempt("limit the parent", lambda: resource.prlimit(parent, resource.RLIMIT_NOFILE, (0, 0)))
attempt("slow the parent", lambda: os.setpriority(os.PRIO_PROCESS, parent, 19))
attempt("stop the parent's turns", lambda: os.sched_setscheduler(parent, os.SCHED_IDLE, os.sched_param(0)))
attempt("memory of others", lambda: libc.shmget(7, 4096, 0o1666))
attempt("signals by a file", lambda: __import__("fcntl").fcntl(1, 8, parent))
attempt("slow itself", lambda: os.nice(1))
attempt("a new namespace", lambda: libc.unshare(0x10000000))
for name in ("AF_INET", "AF_INET6", "AF_UNIX", "AF_NETLINK"):
    attempt(name, lambda: socket.socket(getattr(socket, name), socket.SOCK_STREAM if name != "AF_NETLINK" else socket.SOCK_RAW))
os.close(os.open(scratch / "true", os.O_CREAT | os.O_WRONLY, 0o755))
shutil.copyfile("/bin/true", scratch / "true")
attempt("start what it wrote", lambda: subprocess.run([scratch / "true"]))
attempt("read a blob", lambda: (blobs / "blob").read_text())
attempt("write", lambda: (scratch / "in").write_text("x"))
attempt("move to another folder", lambda: ((scratch / "a").mkdir(), (scratch / "in").rename(scratch / "a/in")))
attempt("copy with its mode", lambda: shutil.copy2(blobs / "blob", scratch / "copy"))
pair = socket.socketpair()
attempt("a pair of sockets", lambda: pair[0].send(b"x"))
attempt("a thread", lambda: threading.Thread(target=print, kwargs={"end": ""}).start())
attempt("a child", lambda: subprocess.run(["/bin/true"], check=True))
attempt("a signal to a child", lambda: subprocess.Popen(["/bin/sleep", "9"]).kill())
attempt("random numbers", lambda: Path("/dev/urandom").open("rb").read(1))
attempt("throw away", lambda: Path("/dev/null").write_text("x"))
attempt("the time zone", lambda: os.stat("/etc/localtime"))
attempt("memory of this machine", lambda: Path("/proc/meminfo").read_text())
print(json.dumps([confined.held, confined.missing, done, os.environ["HOME"]]))
"""
DENIED = {
    "read /etc/passwd": "EACCES", "list a home": "EACCES", "read the parent's environment": "EACCES",
    "write beside scratch": "EACCES", "change a blob": "EACCES", "cut a blob": "EACCES", "remove a blob": "EACCES",
    "signal the parent": "EPERM", "trace the parent": "EPERM", "limit the parent": "EPERM",
    "slow the parent": "EPERM", "stop the parent's turns": "EPERM", "memory of others": "EPERM", "signals by a file": "EPERM",
    "a new namespace": "EPERM",
    "AF_INET": "EACCES", "AF_INET6": "EACCES", "AF_UNIX": "EACCES", "AF_NETLINK": "EACCES", "start what it wrote": "EACCES",
}  # fmt: skip

needs_landlock = pytest.mark.skipif(landlock.abi() < landlock.ABI_SCOPES, reason="needs Landlock of Linux 6.12")


def attempts(folder: Path, *more: str) -> tuple[list[str], list[str], dict[str, str], str]:
    scratch, blobs = folder / "scratch", folder / "blobs"
    for made in (scratch, blobs):
        made.mkdir()
    (blobs / "blob").write_text("bytes")
    command = [sys.executable, "-c", ATTEMPTS, str(scratch), str(blobs), *more]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert run.returncode == 0, run.stderr
    assert (blobs / "blob").read_text() == "bytes"
    assert not (blobs / "blob").stat().st_mode & 0o002
    return json.loads(run.stdout)  # type: ignore[no-any-return]


@needs_landlock
def test_what_a_hostile_engine_would_try(tmp_path: Path) -> None:
    held, missing, done, home = attempts(tmp_path)
    assert held == ["files", "calls", "network"]
    assert missing == []
    assert home == str(tmp_path / "scratch")
    assert {name: done[name] for name in DENIED} == DENIED
    assert done.pop("link a blob and write") in ("EXDEV", "EACCES")
    # It seems to succeed, and `attempts` has looked that nothing has changed.
    assert done.pop("change the mode of a blob") == "done"
    assert {name: what for name, what in done.items() if name not in DENIED and what != "done"} == {}


@needs_landlock
def test_a_member_of_a_group_has_the_network_and_nothing_else_more(tmp_path: Path) -> None:
    held, missing, done, _ = attempts(tmp_path, "network")
    assert held == ["files", "calls"]
    assert missing == []
    assert done["AF_INET"] == done["AF_INET6"] == "done"
    assert {name: done[name] for name in DENIED if name not in ("AF_INET", "AF_INET6")} == {
        name: what for name, what in DENIED.items() if name not in ("AF_INET", "AF_INET6")
    }


def test_to_confine_itself_a_process_needs_nothing_that_starts_threads() -> None:
    script = "import sys, node.sandbox.confining; print('numpy' in sys.modules, 'asyncio' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "False"]


FAKE = """
import sys
from node.sandbox import landlock, namespace, seccomp
def refuse(): raise OSError(1, "Operation not permitted")
landlock.abi = lambda: {abi}
namespace.leave_network = refuse
seccomp.known = lambda machine: {calls}
from pathlib import Path
from node.sandbox.confining import confine
from node.sandbox.policy import Confinement
print(*confine(Confinement(mode=sys.argv[1]), Path(sys.argv[2])).missing, sep=chr(10))
"""


def fake(mode: str, folder: Path, **kernel: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", FAKE.format(**kernel), mode, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_a_kernel_that_has_nothing(tmp_path: Path) -> None:
    run = fake("auto", tmp_path, abi=1, calls=False)
    assert run.returncode == 0, run.stderr
    assert [line.partition(" ")[0] for line in run.stdout.splitlines()] == ["files", "calls", "network"]
    run = fake("required", tmp_path, abi=1, calls=False)
    assert run.returncode == 1
    assert (
        "the sandbox is required, but this machine cannot keep engines from files (Landlock of Linux 5.19" in run.stderr
    )
    assert len(run.stderr.splitlines()) == 1
    assert fake("off", tmp_path, abi=1, calls=False).stdout.strip() == ""


@needs_landlock
def test_without_namespaces_the_filter_alone_keeps_the_network_out(tmp_path: Path) -> None:
    run = fake("required", tmp_path, abi="__import__('ctypes').CDLL(None).syscall(444, None, 0, 1)", calls=True)
    assert (run.returncode, run.stdout.strip()) == (0, ""), run.stderr


ALONE = """
import os, sys
from pathlib import Path
from node.sandbox.confining import confine
from node.sandbox.policy import Confinement
if os.geteuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
print(*confine(Confinement(mode="required"), Path(sys.argv[1])).held)
print(*(line.partition(":")[0].strip() for line in Path("/proc/self/net/dev").read_text().splitlines()[2:]))
print(*(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Cap")))
"""


def may_make_namespaces() -> bool:
    made = subprocess.run(["unshare", "--user", "--net", "true"], capture_output=True, check=False)
    return made.returncode == 0


@needs_landlock
@pytest.mark.skipif(not may_make_namespaces(), reason="this system lets no program make user namespaces")
def test_a_user_without_rights_gets_a_network_of_its_own_and_no_capabilities(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ALONE, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert run.returncode == 0, run.stderr
    held, interfaces, capabilities = run.stdout.splitlines()
    assert held == "files calls network"
    assert interfaces == "lo"
    inherited, permitted, effective, _, ambient = (int(one, 16) for one in capabilities.split())
    assert inherited == permitted == effective == ambient == 0
