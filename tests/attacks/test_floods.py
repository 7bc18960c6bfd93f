"""Whoever holds connections, sends without end, or asks without end, keeps nobody else out."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from potluck.wire.joining import CA_PATH, JOIN_PATH
from support import attackers
from support.attacked import QUOTA_BYTES, Attacked
from support.eventually import eventually
from support.paho_peer import DONE

ELSEWHERE = "127.0.0.2"
HUNDREDS = 400
BORN = 300
TRICKLE_SECONDS = 20.0
ENDLESS_PIECES = 1200
"""Of 64 KiB: more than any body may have."""


def client_hello() -> bytes:
    """The first bytes of a TLS handshake."""
    coming, going = ssl.MemoryBIO(), ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        attackers.tls().wrap_bio(coming, going).do_handshake()
    return going.read()


@contextmanager
def half_open(port: int, count: int) -> Iterator[list[socket.socket]]:
    """So many connections from ELSEWHERE whose handshakes stop, each after another byte."""
    hello, made = client_hello(), []
    try:
        for number in range(count):
            made.append(socket.create_connection((attackers.HERE, port), attackers.LIMIT_SECONDS, (ELSEWHERE, 0)))
            with suppress(ConnectionError):
                made[-1].sendall(hello[: number % len(hello)])
        yield made
    finally:
        for sock in made:
            sock.close()


async def works(home: Attacked) -> None:
    """Members of each kind get what they ask for, on new connections."""
    assert (await asyncio.to_thread(home.ask, "ann", "/models"))[0] == 200
    ann, nora = await home.peer("ann"), await home.peer("nora")
    try:
        root = f"{home.topics.root}/clients/ann"
        await ann.subscribe(f"{root}/works/inbox")
        asked = json.dumps({"type": "ListNodes", "reply_to": f"{root}/works/inbox"}).encode()
        assert await ann.publish(f"{root}/to/coordinator/inbox", asked) == DONE
        await eventually(lambda: bool(ann.got))
        assert b"NodesListed" in ann.got[0][1]
        assert await nora.publish(home.topics.node("nora", "outbox"), b"x") == DONE
    finally:
        ann.close()
        nora.close()
    answer = await asyncio.to_thread(attackers.ask, home.node_port, f"/blobs/{'0' * 64}", home.tls("nora"))
    assert answer[0] == 404


@pytest.mark.parametrize("door", ["http_port", "node_port", "broker_port", "client_port"])
async def test_hundreds_of_handshakes_that_stop_keep_no_member_out(home: Attacked, door: str) -> None:
    port = getattr(home, door, 0) or getattr(home.cluster, door)
    began = time.monotonic()
    with half_open(port, HUNDREDS):
        await works(home)
    assert home.states["node-1"] == "online"
    assert time.monotonic() - began < 30


async def test_strangers_whose_bodies_trickle_are_hung_up_on(home: Attacked) -> None:
    """A byte now and then. How long members may take is tested with bodies and blobs."""

    def trickle(path: str, method: str) -> bytes:
        said = b""
        deadline = time.monotonic() + TRICKLE_SECONDS
        with suppress(ConnectionError, ssl.SSLError), attackers.connection(home.http_port, home.tls("")) as sock:
            sock.settimeout(0.25)
            sock.sendall(f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 60000\r\n\r\n".encode())
            while time.monotonic() < deadline:
                with suppress(TimeoutError):
                    if not (data := sock.recv(4096)):
                        return said
                    said += data
                sock.sendall(b"x")
            raise AssertionError(f"{path} may go on for ever; it said {said!r}")
        return said

    asked = ((f"/blobs/{'1' * 64}", "PUT", b"401"), (JOIN_PATH, "POST", b"408"), ("/v1/control", "POST", b"401"))
    slow = [asyncio.create_task(asyncio.to_thread(trickle, path, method)) for path, method, _ in asked]
    await works(home)
    for said, (_, _, status) in zip(await asyncio.gather(*slow), asked, strict=True):
        assert said.split()[1] == status


async def test_a_body_without_end_is_refused_and_fills_no_disk(home: Attacked) -> None:
    state = home.cluster.folder / "coordinator"

    def on_disk() -> int:
        return sum(path.stat().st_size for path in (state / "blobs").rglob("*") if path.is_file())

    def endless(path: str, who: str, method: str) -> tuple[bytes, int]:
        """What is answered; and the most that there was on the disk meanwhile."""
        piece, most = b"10000\r\n" + b"x" * 0x10000 + b"\r\n", 0
        with attackers.connection(home.http_port, home.tls(who)) as sock:
            sock.sendall(
                f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
            )
            for _ in range(ENDLESS_PIECES):
                try:
                    sock.sendall(piece)
                except ConnectionError:
                    break
                most = max(most, on_disk())
            return sock.recv(4096), most

    before = on_disk()
    for path, who, method, status in (
        (f"/blobs/{'1' * 64}", "ann", "PUT", b"507"),
        (f"/blobs/{'1' * 64}", "mallory", "PUT", b"403"),
        (JOIN_PATH, "", "POST", b"413"),
        ("/v1/control", "ann", "POST", b"413"),
        ("/v1/control", "", "POST", b"401"),
    ):
        said, most = await asyncio.to_thread(endless, path, who, method)
        assert said.split()[1] == status, path
        assert most <= before + 2 * QUOTA_BYTES, path
    assert on_disk() <= before
    await works(home)


async def test_a_flood_of_questions_for_the_ca_keeps_nobody_out(home: Attacked) -> None:
    stop = asyncio.Event()

    def flood() -> int:
        count = 0
        with (
            suppress(ConnectionError, ssl.SSLError),
            attackers.connection(home.http_port, attackers.tls(), at=ELSEWHERE) as sock,
        ):
            while not stop.is_set():
                sock.sendall(f"GET {CA_PATH} HTTP/1.1\r\nHost: x\r\n\r\n".encode() * 20)
                count += sock.recv(65536).count(b"200 OK")
        return count

    floods = [asyncio.create_task(asyncio.to_thread(flood)) for _ in range(4)]
    try:
        await works(home)
        await asyncio.to_thread(home.cluster.join, "late", home.cluster.folder / "late", "viewer")
    finally:
        stop.set()
        counts = await asyncio.gather(*floods)
    assert sum(counts) > 100, "this was no flood"


async def test_births_without_end_disturb_no_other_node(home: Attacked) -> None:
    """A node is born again and again, and then speaks in sessions that nobody knows, which asks for its rebirth each time."""
    mallory = await home.peer("mallory")
    asked: list[bytes] = []
    try:
        await mallory.subscribe(home.topics.node("mallory", "inbox"))
        for number in range(BORN):
            status = {"type": "NodeStatus", "node_id": "mallory", "session": f"s{number}", "state": "online"}
            mallory.send(home.topics.node("mallory", "status"), json.dumps(status).encode(), retain=True)
        for number in range(BORN):
            said = {
                "type": "NodeTelemetry", "node_id": "mallory", "session": f"t{number}", "cpu_percent": 1.0, "memory_used_bytes": 1,
                "memory_available_bytes": 1,
            }  # fmt: skip
            mallory.send(home.topics.node("mallory", "telemetry"), json.dumps(said).encode())
        # when the last of them is heard, and what was asked before it is answered, all rebirths were asked for
        gone = {"type": "NodeStatus", "node_id": "mallory", "session": f"s{BORN - 1}", "state": "offline"}
        await mallory.publish(home.topics.node("mallory", "status"), json.dumps(gone).encode(), retain=True)
        await eventually(lambda: home.states.get("mallory") == "offline")
        await works(home)
        await eventually(lambda: bool(mallory.got))
        asked = [payload for _, payload in mallory.got]
        # it is asked once in five seconds
        assert 1 <= len(asked) <= 3
        assert all(b"Sealed" in payload for payload in asked)
        assert home.states["node-1"] == "online"
        assert "node lost node=node-1" not in home.log()
    finally:
        await mallory.publish(home.topics.node("mallory", "status"), b"", retain=True)
        mallory.close()
