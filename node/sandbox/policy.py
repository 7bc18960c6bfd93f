"""What an engine may reach, from what its node asks for and where its Python is. Nothing here asks the machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from msgspec import Struct

from node.sandbox import landlock
from node.sandbox.seccomp import AF_INET, AF_INET6, AF_UNIX, Rules
from potluck.settings import Sandbox

FILES, NETWORK, CALLS = "files", "network", "calls"
"""What the sandbox keeps an engine from."""

SYSTEM = (
    "/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/nix/store", "/gnu/store", "/run/opengl-driver", "/opt/rocm",
    "/opt/cuda", "/proc", "/sys", "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/ld.so.preload",
    "/etc/localtime", "/etc/timezone", "/etc/locale.alias", "/etc/nsswitch.conf", "/etc/mime.types", "/etc/fonts", "/etc/ssl/certs",
    "/etc/OpenCL", "/etc/nvidia", "/etc/nv_tegra_release",
)  # fmt: skip
NETWORKED = ("/etc/hosts", "/etc/host.conf", "/etc/resolv.conf", "/etc/gai.conf", "/etc/services", "/etc/protocols")
"""What names of hosts need."""
DEVICES = ("null", "zero", "full", "random", "urandom")
GPUS = ("nvidia*", "nvhost*", "nvmap", "nvgpu", "dxg", "kfd", "dri", "shm")
"""Names in /dev, as patterns. NVIDIA's library keeps files in /dev/shm."""


class Confinement(Struct, frozen=True, kw_only=True):
    """What a node asks of its engine's sandbox. `reads`: folders with blobs; `network`: the engine meets others in a group."""

    mode: Sandbox = "off"
    reads: tuple[str, ...] = ()
    network: bool = False


@dataclass(frozen=True)
class Python:
    """Where this process finds code: its environment's and its base's folders, `sys.path`, and folders of packages that lie elsewhere."""

    prefixes: tuple[str, ...]
    path: tuple[str, ...]
    packages: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()
    """Folders of LD_LIBRARY_PATH."""


def file_rules(asked: Confinement, python: Python, scratch: Path, devices: Sequence[Path]) -> list[tuple[Path, int]]:
    """The rules for Landlock: (path, rights). All that is not below one of the paths is refused."""
    read = [*SYSTEM, *python.prefixes, *python.path, *python.packages, *python.libraries, *asked.reads]
    if asked.network:
        read += NETWORKED
    # "" is the folder that the daemon was started in, and a path from the root would allow everything.
    allowed = [(Path(one), landlock.READ) for one in dict.fromkeys(read) if one and Path(one) != Path("/")]
    # Rights add up along a path. So nothing that must not be written may be below the scratch folder.
    given = [(device, landlock.WRITE if device.name == "shm" else landlock.DEVICE) for device in devices]
    return [*allowed, *given, (scratch, landlock.WRITE)]


def call_rules(asked: Confinement, pid: int, abi: int, *, gpus: bool) -> Rules:
    """The rules for the filter of calls, which also does what a Landlock of version `abi` cannot."""
    # NVIDIA's library makes sockets of this machine, which it does not connect. An engine that may connect may have none of them:
    # services of this machine (D-Bus, Docker) would do for it what it may not do itself.
    families = (AF_INET, AF_INET6) if asked.network else (AF_UNIX,) if gpus else ()
    return Rules(
        families=families,
        connect=asked.network,
        own_pid=0 if abi >= landlock.ABI_SCOPES else pid,
        truncate=abi >= landlock.ABI_TRUNCATE,
    )
