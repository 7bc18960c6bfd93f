"""A filter of system calls (seccomp(2)): no network, no other process, and nothing of the kernel that a model never needs."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from dataclasses import dataclass

SOCKET, CONNECT, SENDTO, SOCKETPAIR = "socket", "connect", "sendto", "socketpair"
AF_UNIX, AF_INET, AF_INET6 = 1, 2, 10
SOCK_STREAM, SOCK_SEQPACKET = 1, 5
NEW_NAMESPACES = 0x7E020000
"""CLONE_NEW* of clone(2): new namespaces of any kind."""

_COMMON = {
    "clone3": 435, "pidfd_send_signal": 424, "pidfd_getfd": 438, "process_madvise": 440, "io_uring_setup": 425,
    "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsconfig": 431,
    "fsmount": 432, "fspick": 433, "mount_setattr": 442, "fchmodat2": 452,
}  # fmt: skip
NUMBERS: dict[str, dict[str, int]] = {
    "x86_64": _COMMON | {
        "socket": 41, "connect": 42, "sendto": 44, "socketpair": 53, "clone": 56, "kill": 62, "tkill": 200, "tgkill": 234,
        "rt_sigqueueinfo": 129, "rt_tgsigqueueinfo": 297, "prlimit64": 302, "ptrace": 101, "process_vm_readv": 310,
        "process_vm_writev": 311, "kcmp": 312, "perf_event_open": 298, "bpf": 321, "userfaultfd": 323, "unshare": 272,
        "setns": 308, "mount": 165, "umount2": 166, "pivot_root": 155, "chroot": 161, "kexec_load": 246,
        "kexec_file_load": 320, "init_module": 175, "finit_module": 313, "delete_module": 176, "keyctl": 250, "add_key": 248,
        "request_key": 249, "swapon": 167, "swapoff": 168, "reboot": 169, "acct": 163, "quotactl": 179,
        "open_by_handle_at": 304, "iopl": 172, "ioperm": 173, "settimeofday": 164, "clock_settime": 227, "sethostname": 170,
        "setdomainname": 171, "syslog": 103, "vhangup": 153, "shmget": 29, "semget": 64, "msgget": 68, "mq_open": 240,
        "shmat": 30, "shmctl": 31, "semop": 65, "semctl": 66, "semtimedop": 220, "msgsnd": 69, "msgrcv": 70, "msgctl": 71,
        "migrate_pages": 256, "move_pages": 279, "sched_setparam": 142, "sched_setscheduler": 144, "sched_setaffinity": 203,
        "sched_setattr": 314, "setpriority": 141, "ioprio_set": 251, "fcntl": 72, "ioctl": 16,
        "truncate": 76, "chmod": 90, "fchmod": 91, "chown": 92, "fchown": 93, "lchown": 94, "utime": 132, "setxattr": 188,
        "lsetxattr": 189, "fsetxattr": 190, "removexattr": 197, "lremovexattr": 198, "fremovexattr": 199, "utimes": 235,
        "fchownat": 260, "futimesat": 261, "fchmodat": 268, "utimensat": 280,
    },
    "aarch64": _COMMON | {
        "socket": 198, "connect": 203, "sendto": 206, "socketpair": 199, "clone": 220, "kill": 129, "tkill": 130,
        "tgkill": 131, "rt_sigqueueinfo": 138, "rt_tgsigqueueinfo": 240, "prlimit64": 261, "ptrace": 117,
        "process_vm_readv": 270, "process_vm_writev": 271, "kcmp": 272, "perf_event_open": 241, "bpf": 280,
        "userfaultfd": 282, "unshare": 97, "setns": 268, "mount": 40, "umount2": 39, "pivot_root": 41, "chroot": 51,
        "kexec_load": 104, "kexec_file_load": 294, "init_module": 105, "finit_module": 273, "delete_module": 106,
        "keyctl": 219, "add_key": 217, "request_key": 218, "swapon": 224, "swapoff": 225, "reboot": 142, "acct": 89,
        "quotactl": 60, "open_by_handle_at": 265, "settimeofday": 170, "clock_settime": 112, "sethostname": 161,
        "setdomainname": 162, "syslog": 116, "vhangup": 58, "shmget": 194, "semget": 190, "msgget": 186, "mq_open": 180,
        "shmat": 196, "shmctl": 195, "semop": 193, "semctl": 191, "semtimedop": 192, "msgsnd": 189, "msgrcv": 188, "msgctl": 187,
        "migrate_pages": 238, "move_pages": 239, "sched_setparam": 118, "sched_setscheduler": 119, "sched_setaffinity": 122,
        "sched_setattr": 274, "setpriority": 140, "ioprio_set": 30, "fcntl": 25, "ioctl": 29,
        "truncate": 45, "setxattr": 5, "lsetxattr": 6, "fsetxattr": 7, "removexattr": 14, "lremovexattr": 15,
        "fremovexattr": 16, "fchmod": 52, "fchmodat": 53, "fchownat": 54, "fchown": 55, "utimensat": 88,
    },
}  # fmt: skip
"""The numbers of the calls that the filter looks at, by machine. A call that a machine does not have is left out."""
_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
X32 = 0x40000000
"""Calls of x86-64's 32-bit interface have this bit: they would pass by the numbers above."""

REFUSED = (
    # other processes
    "ptrace", "process_vm_readv", "process_vm_writev", "pidfd_getfd", "process_madvise", "kcmp", "perf_event_open",
    "shmget", "shmat", "shmctl", "semget", "semop", "semctl", "semtimedop", "msgget", "msgsnd", "msgrcv", "msgctl", "mq_open",
    "migrate_pages",
    # other namespaces and file systems
    "unshare", "setns", "mount", "umount2", "pivot_root", "chroot", "open_tree", "move_mount", "fsopen", "fsconfig",
    "fsmount", "fspick", "mount_setattr", "open_by_handle_at", "quotactl",
    # large parts of the kernel that have often been attacked
    "bpf", "userfaultfd", "io_uring_setup", "io_uring_enter", "io_uring_register", "keyctl", "add_key", "request_key",
    # the machine itself
    "kexec_load", "kexec_file_load", "init_module", "finit_module", "delete_module", "swapon", "swapoff", "reboot", "acct",
    "iopl", "ioperm", "settimeofday", "clock_settime", "sethostname", "setdomainname", "syslog", "vhangup",
)  # fmt: skip
WITHOUT_EFFECT = (
    "chmod", "fchmod", "fchmodat", "fchmodat2", "chown", "fchown", "lchown", "fchownat", "setxattr", "lsetxattr",
    "fsetxattr", "removexattr", "lremovexattr", "fremovexattr", "utime", "utimes", "futimesat", "utimensat",
)  # fmt: skip
"""Calls that seem to succeed and do nothing: Landlock does not refuse them, and libraries that copy or unpack files expect them."""
_OWN_ONLY = ("sched_setparam", "sched_setscheduler", "sched_setattr", "move_pages", "prlimit64")
"""Calls whose first argument is a process: 0 is this one."""
_F_SETOWN, _F_SETOWN_EX, _FIOSETOWN, _SIOCSPGRP = 8, 15, 0x8901, 0x8902
"""Commands that let a file send signals to another process."""
_TO_OTHERS = ("kill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo")

_LOAD, _EQUAL, _GREATER_EQUAL, _ANY_BIT, _AND, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
ALLOW, KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCHITECTURE = 0, 4

_libc = ctypes.CDLL(None, use_errno=True)
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2


@dataclass(frozen=True)
class Rules:
    """`families`: of sockets that may be made; without `connect`, none can be connected. `own_pid` above 0: only it gets signals.

    `truncate`: whether files may be cut by their names.
    """

    families: tuple[int, ...] = ()
    connect: bool = False
    own_pid: int = 0
    truncate: bool = True


def known(machine: str) -> bool:
    """Whether there is a filter for this machine (`platform.machine()`)."""
    return machine in NUMBERS


def program(machine: str, rules: Rules) -> bytes:
    """The filter, in classic BPF for seccomp(2)."""
    lines = [_load(_ARCHITECTURE), _if(_EQUAL, _ARCHITECTURES[machine], 1, 0), _give(KILL), _load(_NUMBER)]
    if machine == "x86_64":
        lines += [_if(_GREATER_EQUAL, X32, 0, 1), _give(KILL)]

    def when(name: str, *body: bytes) -> None:
        """The body, which must end by an answer, for this call."""
        if name in NUMBERS[machine]:
            lines.extend([_if(_EQUAL, NUMBERS[machine][name], 0, len(body)), *body])

    not_permitted, no_access = _give(_ERROR | errno.EPERM), _give(_ERROR | errno.EACCES)
    for name in REFUSED if rules.truncate else (*REFUSED, "truncate"):
        when(name, not_permitted)
    for name in WITHOUT_EFFECT:
        when(name, _give(_ERROR))
    # Its flags are in memory, where a filter cannot look. Libraries then take clone.
    when("clone3", _give(_ERROR | errno.ENOSYS))
    when("clone", _load(_argument(0)), _if(_ANY_BIT, NEW_NAMESPACES, 0, 1), not_permitted, _give(ALLOW))
    for name in _OWN_ONLY:
        when(name, _load(_argument(0)), _if(_EQUAL, 0, 0, 1), _give(ALLOW), not_permitted)
    # Libraries choose processors for their threads by number. A filter cannot tell such a number from another process's.
    when("sched_setaffinity", _load(_argument(0)), _if(_EQUAL, 0, 0, 1), _give(ALLOW), _give(_ERROR))
    for name, this in (("setpriority", 0), ("ioprio_set", 1)):
        kind = [_load(_argument(0)), _if(_EQUAL, this, 1, 0), not_permitted]
        when(name, *kind, _load(_argument(1)), _if(_EQUAL, 0, 0, 1), _give(ALLOW), not_permitted)
    if rules.own_pid:
        for name in _TO_OTHERS:
            when(name, _load(_argument(0)), _if(_EQUAL, rules.own_pid, 0, 1), _give(ALLOW), not_permitted)
        for name in ("tkill", "pidfd_send_signal"):
            when(name, not_permitted)
    # A datagram can be sent to any socket's address without connecting.
    kinds = [_load(_argument(1)), _do(_AND, 0xF), _if(_EQUAL, SOCK_STREAM, 1, 0), _if(_EQUAL, SOCK_SEQPACKET, 0, 1)]
    when(SOCKETPAIR, *kinds, _give(ALLOW), no_access)
    checks = [_load(_argument(0))]
    others = [family for family in rules.families if family != AF_UNIX]
    for family in others:
        checks += [_if(_EQUAL, family, 0, 1), _give(ALLOW)]
    if AF_UNIX in rules.families:
        checks += [_if(_EQUAL, AF_UNIX, 1, 0), no_access, *kinds, _give(ALLOW)]
    when(SOCKET, *checks, no_access)
    if not rules.connect:
        when(CONNECT, no_access)
        low, high = _argument(4), _argument(4) + 4
        when(
            SENDTO, _load(low), _if(_EQUAL, 0, 0, 2), _load(high), _if(_EQUAL, 0, 1, 0), no_access, _give(ALLOW)
        )  # fmt: skip
    for name, commands in (("fcntl", (_F_SETOWN, _F_SETOWN_EX)), ("ioctl", (_FIOSETOWN, _SIOCSPGRP))):
        one, other = commands
        when(name, _load(_argument(1)), _if(_EQUAL, one, 1, 0), _if(_EQUAL, other, 0, 1), not_permitted, _give(ALLOW))
    lines.append(_give(ALLOW))
    return b"".join(lines)


def apply(filter_program: bytes) -> None:
    """Filter the calls of this thread and all that it starts, for ever. Needs `no_new_privs`. Raises OSError."""
    code = ctypes.create_string_buffer(filter_program, len(filter_program))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(filter_program) // 8, ctypes.addressof(code)))
    if _libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, header, 0, 0):
        raise OSError(ctypes.get_errno(), f"seccomp: {os.strerror(ctypes.get_errno())}")


def _argument(place: int) -> int:
    """Where the lower half of an argument is, in struct seccomp_data of a little-endian machine."""
    return 16 + 8 * place


def _load(offset: int) -> bytes:
    return struct.pack("HBBI", _LOAD, 0, 0, offset)


def _do(operation: int, value: int) -> bytes:
    return struct.pack("HBBI", operation, 0, 0, value)


def _if(test: int, value: int, skip_true: int, skip_false: int) -> bytes:
    return struct.pack("HBBI", test, skip_true, skip_false, value)


def _give(answer: int) -> bytes:
    return struct.pack("HBBI", _RETURN, 0, 0, answer)
