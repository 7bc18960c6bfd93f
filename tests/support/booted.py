"""A machine that systemd has booted: a container (systemd-nspawn) with this machine's own `/usr`, and an `/etc` and `/var` of its own.

Nothing is downloaded, and a boot takes a second. Needs root on Linux with a merged `/usr`, systemd and systemd-nspawn. The container has
no network but its own loopback. It shares the kernel: limits of memory and processor hold only where this machine has cgroup v2 alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil

from potluck.lifecycle import die_with_parent
from support.eventually import eventually_now

T = TypeVar("T")
ROOT = Path(__file__).parents[2]
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
CGROUP_V2 = {"SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"}
"""Control groups in the container are those of today's systems, also where this machine still has cgroup v1. There, systemd in a
container may not notice that the last process of a service has ended, and waits for TimeoutStopSec.
"""
NOT_COUNTED = frozenset(
    map(Path, ("dev", "proc", "run", "sys", "tmp", "usr", "root/.local/share/pipx", "var/cache/fontconfig"))
)
"""Folders that hold nothing of the container's disk; environments that pipx makes and removes; and what libraries of clients leave."""
_ACCOUNTS = {
    "passwd": "root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
    "group": "root:x:0:\nadm:x:4:\ntty:x:5:\nnogroup:x:65534:\n",
}
"""The accounts of an empty system. systemd adds its own at the first boot."""


def why_not() -> str:
    """Why no machine can be booted here; "": it can."""
    if os.geteuid() != 0:
        return "it needs root"
    if missing := [name for name in ("systemd-nspawn", "nsenter", "systemctl") if shutil.which(name) is None]:
        return f"{', '.join(missing)} missing (apt install systemd systemd-container util-linux)"
    if not Path("/bin").is_symlink():
        return "this system has programs outside of /usr"
    return ""


class Machine:
    """One container in `folder`. `overlaid`: it may write to its `/usr`, and this machine does not see that."""

    def __init__(self, folder: Path, *, shown: Mapping[Path, Path] | None = None, overlaid: bool = False) -> None:
        """`shown` are folders of this machine that the container sees read-only, and where: {place there: place here}."""
        self.root = folder / "root"
        self._shown = dict(shown or {})
        self._overlaid = overlaid
        self._output = folder / "console"
        self._name = f"potluck-{uuid.uuid4().hex[:8]}"
        self._process: subprocess.Popen[bytes] | None = None
        self._leader = 0
        self._lay()

    def _lay(self) -> None:
        """An empty system, as after a first installation."""
        for name in (
            "etc/systemd/system",
            "home",
            "opt",
            "root",
            "srv",
            "var/cache",
            "var/lib",
            "var/log",
            "run",
            "tmp",
            "usr",
        ):
            (self.root / name).mkdir(parents=True)
        (self.root / "root").chmod(0o700)
        for link in Path("/").iterdir():
            if link.is_symlink() and str(link.readlink()).lstrip("/").startswith("usr/"):
                (self.root / link.name).symlink_to(link.readlink())
        etc = self.root / "etc"
        for name, text in _ACCOUNTS.items():
            (etc / name).write_text(text)
        for name in ("alternatives", "ld.so.cache", "nsswitch.conf", "ssl"):
            here = Path("/etc", name)
            if here.is_dir():
                shutil.copytree(here, etc / name, symlinks=True)
            elif here.exists():
                shutil.copy2(here, etc / name)
        shutil.copy2("/etc/os-release", etc / "os-release")
        (etc / "hosts").write_text("127.0.0.1 localhost\n")
        (etc / "hostname").write_text("booted\n")
        (etc / "machine-id").write_text("")
        (etc / "systemd/system/default.target").symlink_to("/usr/lib/systemd/system/multi-user.target")

    # --- on and off

    def boot(self) -> None:
        """Returns once systemd answers; `settled` waits for the end of the boot."""
        assert self._process is None, "it runs"
        usr = "--overlay=/usr::/usr" if self._overlaid else "--bind-ro=/usr"
        command = [
            "systemd-nspawn", "--quiet", "--boot", f"--directory={self.root}", f"--machine={self._name}",
            "--register=no", "--keep-unit", "--private-network", "--console=pipe", "--link-journal=no", "--resolv-conf=off",
            "--timezone=off", "--rlimit=RLIMIT_NOFILE=1024:524288", usr,
            *(f"--bind-ro={here}:{there}" for there, here in self._shown.items()),
        ]  # fmt: skip
        with self._output.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                env=os.environ | CGROUP_V2,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                preexec_fn=die_with_parent(),
            )
        self._leader = self.until(self._find_leader, 20)
        self._answer()

    def reboot(self) -> None:
        """As `systemctl reboot` does it."""
        assert self._process is not None
        self.run("systemctl", "--no-block", "reboot")
        self._process.wait(60)
        self._process = None
        self.boot()

    def _answer(self) -> None:
        self.until(lambda: self.run("systemctl", "is-system-running", check=False) not in ("", "offline"), 20)

    def _find_leader(self) -> int:
        assert self._process is not None
        assert self._process.poll() is None, self._output.read_text(errors="replace")[-2000:]
        for child in psutil.Process(self._process.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):  # one that nspawn starts in between
                if Path(child.exe()).name == "systemd":
                    return child.pid
        return 0

    def settled(self, seconds: float = 60) -> str:
        """How the boot ended: `running`, or `degraded` and the like, with the units that failed."""
        state = self.run("systemctl", "is-system-running", "--wait", check=False, seconds=seconds)
        if state != "degraded":
            return state
        failed = self.run("systemctl", "list-units", "--failed", "--plain", "--no-legend", check=False)
        return (
            f"{state}: {failed}\n{self.run('journalctl', '--priority', 'warning', '--no-pager', check=False)[-2000:]}"
        )

    def shut_down(self) -> None:
        if self._process is None:
            return
        process, self._process = self._process, None
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)  # nspawn asks systemd to power off
            try:
                process.wait(60)
            except subprocess.TimeoutExpired as error:
                process.kill()
                process.wait(10)
                said = self._output.read_text(errors="replace")
                raise AssertionError(f"it does not power off:\n{said[-2000:]}") from error

    # --- inside

    def inside(self, *command: str | Path) -> list[str]:
        """The command that runs this one in the container, as root with an empty environment."""
        environment = ["env", "-i", "HOME=/root", f"PATH={PATH}", "LANG=C.UTF-8"]
        spaces = ("--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--root", "--wd")
        return ["nsenter", f"--target={self._leader}", *spaces, "--", *environment, *map(str, command)]

    def run(self, *command: str | Path, check: bool = True, seconds: float = 60) -> str:
        """What it prints on standard output. Raises AssertionError with all that it said, if it fails."""
        done = subprocess.run(
            self.inside(*command),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=seconds,
        )
        if check and done.returncode:
            said = f"{done.stdout}{done.stderr}"
            raise AssertionError(f"exit status {done.returncode} of {shlex.join(map(str, command))}:\n{said[-4000:]}")
        return done.stdout.strip()

    def fails(self, *command: str | Path, seconds: float = 60) -> tuple[int, str]:
        """The exit status, and all that it said."""
        done = subprocess.run(
            self.inside(*command),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=seconds,
        )
        return done.returncode, done.stdout + done.stderr

    def until(self, check: Callable[[], T], seconds: float = 20) -> T:
        """The first true value of `check()`; AssertionError after so many seconds."""
        return eventually_now(check, seconds)

    def path(self, inside: str | Path) -> Path:
        """Where this machine sees a path of the container's disk."""
        return self.root / str(inside).lstrip("/")

    def facts(self, unit: str, *names: str) -> dict[str, str]:
        """Properties of a unit."""
        shown = self.run("systemctl", "show", f"--property={','.join(names)}", unit)
        return dict(line.split("=", 1) for line in shown.splitlines())

    def fact(self, unit: str, name: str) -> str:
        return self.facts(unit, name)[name]

    def pid(self, unit: str) -> int:
        """Its main process, as the container numbers it; 0: none."""
        return int(self.fact(unit, "MainPID"))

    def log(self, unit: str = "", since: float = 0.0) -> str:
        """The journal of this boot, or what one unit said, from a time on (seconds since 1970)."""
        arguments = [*((f"--unit={unit}",) if unit else ()), *((f"--since=@{since:.6f}",) if since else ())]
        return self.run("journalctl", "--boot", "--no-pager", "--output=short-monotonic", *arguments)

    def files(self) -> set[str]:
        """All that is on the container's disk; with an overlay, also what is new in its `/usr`.

        Without the folders that systemd makes anew at each boot for its own login service (PrivateTmp).
        """
        places = {str(path.relative_to(self.root)) for path in _below(self.root, NOT_COUNTED)}
        places = {place for place in places if not re.search(r"/systemd-private-\w+-systemd-", place)}
        if self._overlaid:
            places |= set(self.run("find", "/usr", "-newer", "/etc/machine-id", "-not", "-type", "d").splitlines())
        return places

    def listening(self) -> set[tuple[str, str, int]]:
        """(`tcp` or `udp`, address, port) of all sockets that something from elsewhere could reach, if the network were there."""
        lines = self.run("ss", "--no-header", "--numeric", "--listening", "--tcp", "--udp").splitlines()
        found = set()
        for line in lines:
            kind, _, _, _, local, *_ = line.split()
            address, _, port = local.rpartition(":")
            found.add((kind, address.partition("%")[0].strip("[]"), int(port)))
        return found


def _below(folder: Path, without: frozenset[Path]) -> list[Path]:
    found, ways = [], [folder]
    while ways:
        for path in ways.pop().iterdir():
            if path.relative_to(folder) in without:
                continue
            found.append(path)
            if path.is_dir() and not path.is_symlink():
                ways.append(path)
    return found


# --- potluck in it


PYTHON = Path(os.path.realpath(sys.executable))
HOME = Path("/root/.local/share")


def packages() -> dict[Path, Path]:
    """What our programs need of this machine: {place in the container: place here}. The interpreter, and the packages that tests use.

    All of it is in a home folder that is closed to others, as with pipx and uv.
    """
    sites = [Path(path) for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    base = Path(sys.base_prefix)
    own = [site for site in sites if not site.is_relative_to("/usr") and not site.is_relative_to(base)]
    shown = {HOME / f"packages/{number}/site-packages": site for number, site in enumerate(own)}
    return shown if base.is_relative_to("/usr") else {base: base, **shown}


class Installation:
    """potluck in an environment of its own, as pipx makes it: of a wheel, with the packages that are shown to the container."""

    def __init__(self, machine: Machine, wheel: Path | None = None) -> None:
        """Installs or upgrades it; without a wheel, it is what was installed before."""
        self._machine = machine
        self.folder = HOME / "pipx/venvs/potluck"
        self.program = self.folder / "bin/potluck"
        if wheel is not None:
            self._install(machine, wheel)

    def _install(self, machine: Machine, wheel: Path) -> None:
        if not machine.path(self.folder).exists():
            python = f"{sys.base_prefix}/bin/python{sys.version_info.major}.{sys.version_info.minor}"
            machine.run(python, "-m", "venv", "--without-pip", self.folder)
            (site,) = machine.path(self.folder).glob("lib/python*/site-packages")
            shown = [str(place) for place in packages() if place.name == "site-packages"]
            (site / "packages.pth").write_text("\n".join(shown) + "\n")
        shutil.copy2(wheel, machine.path("/root"))
        pip = (
            self.folder / "bin/python",
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-index",
            "--no-deps",
            "--force-reinstall",
        )
        machine.run(*pip, f"/root/{wheel.name}", seconds=120)
        machine.path(f"/root/{wheel.name}").unlink()

    def potluck(self, *arguments: str, seconds: float = 120) -> str:
        return self._machine.run(self.program, *arguments, seconds=seconds)

    def answer(self, *arguments: str, seconds: float = 120) -> Any:
        """What a command says with `--json`."""
        return json.loads(self.potluck(*arguments, "--json", seconds=seconds))

    def python(self, script: str, *arguments: str, seconds: float = 120) -> str:
        """What a script prints: a user's own, whose libraries write into its home."""
        return self._machine.run(*self._script(script, *arguments), seconds=seconds)

    def scripted(self, script: str, *arguments: str) -> list[str]:
        """The command that runs such a script."""
        return self._machine.inside(*self._script(script, *arguments))

    def _script(self, script: str, *arguments: str) -> tuple[str | Path, ...]:
        return ("env", "HOME=/tmp", self.folder / "bin/python", "-c", script, *arguments)


def build_wheel(source: Path, target: Path) -> Path:
    """Through the hook that pip calls (PEP 517), with the backend that is installed here."""
    code = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    command: Sequence[str] = [sys.executable, "-P", "-c", code, str(target)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=True, timeout=120)
    return target / done.stdout.split()[-1]


def copied_sources(target: Path, version: str) -> Path:
    """The sources of this checkout, under another version."""
    target.mkdir()
    for name in ("potluck", "node", "coordinator", "configs", "systemd"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("LICENSE", "README.md"):
        shutil.copy2(ROOT / name, target)
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    changed = re.sub(r'(?m)^version = ".*"$', f'version = "{version}"', text, count=1)
    assert changed != text
    (target / "pyproject.toml").write_text(changed, encoding="utf-8")
    return target
