"""What an engine may reach, from what its node asks for."""

from __future__ import annotations

from pathlib import Path

from node.sandbox import landlock
from node.sandbox.policy import Confinement, Python, call_rules, file_rules
from node.sandbox.seccomp import AF_UNIX

PYTHON = Python(
    ("/venv", "/usr"), ("/venv/lib/site-packages", "", "/", "/home/u/checkout"), ("/cache/keras",), ("", "/cuda/lib")
)
SCRATCH = Path("/state/scratch/work")


def rules(asked: Confinement, *devices: str) -> dict[str, int]:
    return {str(path): rights for path, rights in file_rules(asked, PYTHON, SCRATCH, [Path(one) for one in devices])}


def test_it_reads_code_libraries_and_blobs_and_writes_only_to_its_own_folder() -> None:
    given = rules(Confinement(reads=("/state/blobs",)), "/dev/null")
    for place in (
        "/venv",
        "/usr",
        "/venv/lib/site-packages",
        "/home/u/checkout",
        "/cache/keras",
        "/cuda/lib",
        "/state/blobs",
    ):
        assert given[place] == landlock.READ
    assert given[str(SCRATCH)] == landlock.WRITE
    assert not landlock.WRITE & landlock.EXECUTE
    assert given["/dev/null"] == landlock.DEVICE
    writable = [place for place, rights in given.items() if rights & landlock.WRITE_FILE]
    assert writable == ["/dev/null", str(SCRATCH)]


def test_nothing_gives_the_whole_disk() -> None:
    assert {"/", "", ".", "/etc", "/home", "/dev", "/run", "/var", "/tmp"}.isdisjoint(rules(Confinement()))


def test_names_of_hosts_are_read_only_by_members_of_a_group() -> None:
    assert "/etc/hosts" not in rules(Confinement())
    assert rules(Confinement(network=True))["/etc/hosts"] == landlock.READ


def test_devices_of_gpus_may_be_controlled_and_nothing_be_made_beside_them() -> None:
    given = rules(Confinement(), "/dev/nvidia0", "/dev/shm")
    assert given["/dev/nvidia0"] & landlock.IOCTL_DEV
    assert not given["/dev/nvidia0"] & landlock.MAKE_REG
    assert given["/dev/shm"] & landlock.MAKE_REG


def test_a_kernel_that_can_refuse_less_is_asked_for_less() -> None:
    assert landlock.handled(2) & landlock.REFER
    assert not landlock.handled(2) & landlock.TRUNCATE
    assert landlock.handled(3) & landlock.TRUNCATE
    assert not landlock.handled(4) & landlock.IOCTL_DEV
    assert landlock.handled(7) & landlock.IOCTL_DEV
    # What no rule gives must be refused, so every right that exists must be handled: those to make devices, too.
    assert landlock.handled(2) == 2**14 - 1


def test_the_filter_follows_the_kernel_and_the_settings() -> None:
    assert call_rules(Confinement(), 5, 7, gpus=False) == call_rules(Confinement(), 6, 6, gpus=False)
    assert call_rules(Confinement(), 5, 5, gpus=False).own_pid == 5
    assert call_rules(Confinement(), 5, 0, gpus=False).truncate is False
    assert call_rules(Confinement(network=True), 5, 7, gpus=False).connect
    # Who may connect has no sockets of this machine, with a GPU neither.
    assert AF_UNIX in call_rules(Confinement(), 5, 7, gpus=True).families
    assert AF_UNIX not in call_rules(Confinement(network=True), 5, 7, gpus=True).families
