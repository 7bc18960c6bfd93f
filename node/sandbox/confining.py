"""An engine confines itself: files, network and system calls. It must have only one thread, and have loaded nothing of others."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from node.sandbox import landlock, namespace, policy, seccomp
from node.sandbox.policy import CALLS, FILES, NETWORK, Confinement

_PR_SET_NO_NEW_PRIVS = 38
_NVIDIA = Path("/proc/driver/nvidia/version")
_PACKAGES = ("potluck", "node", "tensorflow", "keras", "numpy", "ai_edge_litert")
"""Packages that may lie outside of `sys.path`: in a checkout, or behind links."""


@dataclass(frozen=True)
class Confined:
    """What holds, of `files`, `network` and `calls`, and what does not, each with the reason."""

    held: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


def confine(asked: Confinement, scratch: Path, modules: Sequence[str] = ()) -> Confined:
    """Confine this process as far as the kernel can. `modules`: those of users that it will import.

    With mode `auto`, nothing is confined beside a GPU: with GPUs it was never tried, and their drivers need much of the machine. Ends the process, with a sentence for the node's log, if the mode is `required` and something is missing.
    """
    if asked.mode == "off":
        return Confined()
    held: list[str] = []
    missing: list[str] = []
    devices = _devices(policy.DEVICES)
    gpus = _gpus()
    if gpus and asked.mode == "auto":
        return Confined(
            missing=(f'{FILES}, {NETWORK} and {CALLS} (with GPUs it was not tried: sandbox = "required" does)',)
        )
    python = _python(modules)
    ctypes.CDLL(None).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    apart = ""
    if not asked.network:
        try:
            namespace.leave_network()
        except OSError as error:
            apart = str(error.strerror)
    abi = landlock.abi()
    if abi < landlock.ABI_LEAST:
        missing.append(f"{FILES} (Landlock of Linux 5.19 or newer is not there, or not allowed)")
    else:
        try:
            rules = policy.file_rules(asked, python, scratch, [*devices, *gpus])
            landlock.restrict(abi, rules, network=asked.network)
            held.append(FILES)
        except OSError as error:
            abi = 0
            missing.append(f"{FILES} ({error.strerror})")
    machine = platform.machine()
    try:
        namespace.drop_capabilities()
        if not seccomp.known(machine):
            raise OSError(0, f"seccomp: no filter for {machine}")
        seccomp.apply(seccomp.program(machine, policy.call_rules(asked, os.getpid(), abi, gpus=bool(gpus))))
        held.append(CALLS)
    except OSError as error:
        missing.append(f"{CALLS} ({error.strerror})")
    if not asked.network:
        # Where no program may make a namespace, the filter alone keeps it from the network.
        if apart and CALLS not in held:
            missing.append(f"{NETWORK} ({apart})")
        else:
            held.append(NETWORK)
    if asked.mode == "required" and missing:
        raise SystemExit(
            f"this node's settings say that the sandbox is required, but this machine cannot keep engines from "
            f'{", ".join(missing)}: take a newer Linux, or let the service use it, or write sandbox = "auto"'
        )
    if FILES in held:
        # Libraries look for their settings and caches there; those of the user's own home cannot be read.
        os.environ["HOME"] = os.environ["XDG_CACHE_HOME"] = os.environ["XDG_CONFIG_HOME"] = str(scratch)
    return Confined(tuple(held), tuple(missing))


def _python(modules: Sequence[str]) -> policy.Python:
    """Where this process finds code, with every link followed."""
    folders: list[str] = []
    for name in dict.fromkeys([*_PACKAGES, *(module.partition(".")[0] for module in modules)]):
        found = importlib.util.find_spec(name)
        if found is None:
            continue
        places = found.submodule_search_locations or ([found.origin] if found.origin else [])
        folders += [str(Path(place).resolve()) for place in places if Path(place).exists()]
    return policy.Python(
        prefixes=(sys.prefix, sys.base_prefix, sys.exec_prefix),
        path=tuple(sys.path),
        packages=tuple(folders),
        libraries=tuple(os.environ.get("LD_LIBRARY_PATH", "").split(":")),
    )


def _gpus() -> list[Path]:
    """The devices of GPUs. NVIDIA's library makes one of them at its first use, which it cannot do later: so it is made now."""
    if _NVIDIA.exists() and not Path("/dev/nvidia-uvm").exists() and (program := shutil.which("nvidia-modprobe")):
        with suppress(OSError, subprocess.TimeoutExpired):  # then TensorFlow finds no GPU, and the node says so
            subprocess.run([program, "-u", "-c", "0"], check=False, stdin=subprocess.DEVNULL, timeout=30)
    found = _devices(policy.GPUS)
    return found if any(device.name != "shm" for device in found) else []


def _devices(patterns: Sequence[str]) -> list[Path]:
    return [device for pattern in patterns for device in sorted(Path("/dev").glob(pattern))]
