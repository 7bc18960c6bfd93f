"""The filter of system calls, run by a small interpreter of BPF: what it answers for a call and its arguments."""

from __future__ import annotations

import errno
import re
import socket
import struct
from pathlib import Path

import pytest

from node.sandbox import seccomp
from node.sandbox.policy import Confinement, call_rules
from node.sandbox.seccomp import ALLOW, KILL, NUMBERS, Rules

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}
ALONE = Rules()
GROUP = call_rules(Confinement(network=True), 7, 7, gpus=False)
GPU = call_rules(Confinement(), 7, 7, gpus=True)
OLD = call_rules(Confinement(), 7, 2, gpus=False)


def answer(rules: Rules, name: str | int, *arguments: int, machine: str = "x86_64", arch: int = 0) -> int | str:
    """`ALLOW`, `KILL`, or the number of the error that the call gets."""
    number = NUMBERS[machine][name] if isinstance(name, str) else name
    data = struct.pack("IIQ6Q", number, arch or ARCHITECTURES[machine], 0, *arguments, *[0] * (6 - len(arguments)))
    lines = list(struct.iter_unpack("HBBI", seccomp.program(machine, rules)))
    assert len(lines) < 4096
    value, place = 0, 0
    while True:
        code, yes, no, operand = lines[place]
        place += 1
        match code:
            case 0x20:
                (value,) = struct.unpack_from("I", data, operand)
            case 0x54:
                value &= operand
            case 0x15:
                place += yes if value == operand else no
            case 0x35:
                place += yes if value >= operand else no
            case 0x45:
                place += yes if value & operand else no
            case 0x06:
                return operand if operand in (ALLOW, KILL) else operand & 0xFFFF


@pytest.mark.parametrize("machine", NUMBERS)
def test_what_a_model_needs_passes_and_the_rest_is_refused(machine: str) -> None:
    for name in seccomp.REFUSED:
        if name in NUMBERS[machine]:
            assert answer(ALONE, name, machine=machine) == errno.EPERM, name
    for name in seccomp.WITHOUT_EFFECT:
        if name in NUMBERS[machine]:
            assert answer(ALONE, name, machine=machine) == 0, name
    assert answer(ALONE, "clone3", machine=machine) == errno.ENOSYS
    assert answer(ALONE, 0, machine=machine) == ALLOW
    assert answer(ALONE, "truncate", machine=machine) == ALLOW


def test_calls_of_another_interface_end_the_process() -> None:
    assert answer(ALONE, 0, arch=0x40000003) == KILL  # 32 bits
    assert answer(ALONE, seccomp.X32 | 0) == KILL


def test_threads_and_children_may_start_but_no_namespaces() -> None:
    assert answer(ALONE, "clone", 0x3D0F00) == ALLOW  # a thread, as glibc makes it
    assert answer(ALONE, "clone", 0x4111) == ALLOW  # a child, as vfork makes it
    for new in (0x10000000, 0x40000000, 0x00020000, 0x02000000):
        assert answer(ALONE, "clone", new | 17) == errno.EPERM


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_PACKET, 16, 38])
def test_an_engine_alone_makes_no_socket(family: int) -> None:
    for kind in (1, 2, 3, 5, 1 | 0o2004000):
        assert answer(ALONE, "socket", family, kind) == errno.EACCES
    assert answer(ALONE, "connect", 3) == errno.EACCES


def test_pairs_of_sockets_work_but_not_those_that_can_send_to_any_address() -> None:
    for rules in (ALONE, GROUP, GPU):
        assert answer(rules, "socketpair", 1, 1 | 0o2000000) == ALLOW
        assert answer(rules, "socketpair", 1, 5) == ALLOW
        assert answer(rules, "socketpair", 1, 2) == errno.EACCES
    assert answer(ALONE, "sendto", 3, 1, 1, 0, 0, 0) == ALLOW  # send(2)
    assert answer(ALONE, "sendto", 3, 1, 1, 0, 0x7F00, 16) == errno.EACCES
    assert answer(ALONE, "sendto", 3, 1, 1, 0, 0x7F0000000000, 16) == errno.EACCES


def test_members_of_a_group_use_the_network_and_no_socket_of_this_machine() -> None:
    for family in (socket.AF_INET, socket.AF_INET6):
        assert answer(GROUP, "socket", family, 1) == ALLOW
    assert answer(GROUP, "connect", 3) == ALLOW
    assert answer(GROUP, "socket", socket.AF_UNIX, 1) == errno.EACCES
    assert answer(GROUP, "socket", socket.AF_PACKET, 3) == errno.EACCES


def test_beside_a_gpu_sockets_of_this_machine_are_made_but_never_connected() -> None:
    assert answer(GPU, "socket", socket.AF_UNIX, 5) == ALLOW
    assert answer(GPU, "socket", socket.AF_UNIX, 2) == errno.EACCES
    assert answer(GPU, "socket", socket.AF_INET, 1) == errno.EACCES
    assert answer(GPU, "connect", 3) == errno.EACCES


def test_the_filter_does_what_an_older_landlock_cannot() -> None:
    for name in ("kill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo"):
        assert answer(OLD, name, 7, 9) == ALLOW
        for other in (1, 8, 0, 2**64 - 1):
            assert answer(OLD, name, other, 9) == errno.EPERM
        assert answer(ALONE, name, 1, 9) == ALLOW  # Landlock refuses it
    assert answer(OLD, "pidfd_send_signal", 3, 9) == errno.EPERM
    assert answer(OLD, "truncate") == errno.EPERM


@pytest.mark.parametrize("machine", NUMBERS)
@pytest.mark.parametrize("name", ["prlimit64", "sched_setscheduler", "sched_setparam", "sched_setattr", "move_pages"])
def test_limits_and_priorities_of_others_stay(name: str, machine: str) -> None:
    assert answer(ALONE, name, 0, 7, machine=machine) == ALLOW
    assert answer(ALONE, name, 1, 7, machine=machine) == errno.EPERM


def test_a_process_slows_only_itself() -> None:
    assert answer(ALONE, "sched_setaffinity", 0, 8) == ALLOW
    assert answer(ALONE, "sched_setaffinity", 1234, 8) == 0, "it seems to succeed: libraries do so for their threads"
    for name, this in (("setpriority", 0), ("ioprio_set", 1)):
        assert answer(ALONE, name, this, 0, 5) == ALLOW
        for kind, who in ((this, 1234), (this + 1, 0), (2, 0)):
            assert answer(ALONE, name, kind, who, 5) == errno.EPERM


def test_no_file_sends_signals_to_others() -> None:
    for name, refused in (("fcntl", (8, 15)), ("ioctl", (0x8901, 0x8902))):
        for command in refused:
            assert answer(ALONE, name, 3, command, 1) == errno.EPERM
    assert answer(ALONE, "fcntl", 3, 2, 1) == ALLOW
    assert answer(ALONE, "ioctl", 3, 0x5401) == ALLOW


@pytest.mark.parametrize("machine", NUMBERS)
def test_the_numbers_are_those_of_the_kernel(machine: str) -> None:
    if not HEADERS[machine].exists():
        pytest.skip(f"{HEADERS[machine]} is not here (apt install linux-libc-dev)")
    text = HEADERS[machine].read_text()
    found = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", text))
    for name, number in NUMBERS[machine].items():
        # fchmodat2 is younger than the headers of Debian 12
        if name in found or name != "fchmodat2":
            assert int(found[name]) == number, name
