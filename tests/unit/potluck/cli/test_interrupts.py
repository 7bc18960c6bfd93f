"""Ctrl-C, and Ctrl-C again while the first one is handled."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from potluck.client.sync import Job, Portal

PROGRAM = """
import sys, time
from potluck.cli import interrupts

class Slow:
    def __del__(self):
        print("cleaning", flush=True)
        sys.stdin.readline()  # until the second signal has come

def work():
    slow = Slow()
    print("working", flush=True)
    time.sleep(60)

interrupts.ORDERLY_SECONDS = float(sys.argv[1])
interrupts.once()
try:
    work()
except KeyboardInterrupt:
    sys.exit(interrupts.STATUS)
"""


@pytest.mark.parametrize(("orderly_seconds", "told"), [(60.0, True), (0.0, False)])
def test_a_second_interrupt_does_not_break_into_the_first(orderly_seconds: float, told: bool) -> None:
    process = subprocess.Popen(
        (sys.executable, "-c", PROGRAM, str(orderly_seconds)),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert process.stdout is not None
    for said in ("working\n", "cleaning\n"):
        assert process.stdout.readline() == said
        process.send_signal(signal.SIGINT)
    if not told:
        assert process.wait(20) == 130, "it may not hang for ever"
    output, errors = process.communicate("\n", timeout=20)
    assert (process.returncode, output, errors) == (130, "", "")


def test_a_command_that_waits_ends_quietly_when_interrupted_twice() -> None:
    """A broker that accepts the connection and says nothing: the client waits for it, in its own thread."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = f"127.0.0.1:{server.getsockname()[1]}"
        process = subprocess.Popen(
            (sys.executable, "-m", "potluck.cli.main", "nodes", "--seed", place),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip
        server.settimeout(30)
        connections = [server.accept() for _ in range(2)]  # it knocks, and then connects
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=30)
        for connection, _ in connections:
            connection.close()
    assert (process.returncode, output, errors) == (130, "", "")


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_what_is_left_half_read_is_let_go_without_a_wait() -> None:
    held = threading.Event()

    class Source:
        """A job of which each `states` takes a while to end."""

        id = "j1"

        async def states(self) -> object:
            try:
                for number in range(3):
                    yield number
            finally:
                held.set()

    portal = Portal()
    states: Iterator[object] = Job(portal, Source()).states()  # type: ignore[arg-type]
    assert next(states) == 0
    del states
    assert held.wait(10)
    states = Job(portal, Source()).states()  # type: ignore[arg-type]
    assert next(states) == 0
    portal.close()
    del states  # after the client is closed: no error is raised that could only be printed


def test_an_interrupt_while_the_program_is_imported_is_quiet_too() -> None:
    program = """
import sys
class Interrupted:
    def find_spec(self, name, path=None, target=None):
        if name == "potluck.cli.main":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupted())
from potluck.cli.start import main
main()
"""
    ended = subprocess.run((sys.executable, "-c", program), capture_output=True, text=True, timeout=30, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")
