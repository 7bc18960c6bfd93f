"""A member is removed while it uses all that it has: each connection ends within 10 s, and none comes back with any right."""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from contextlib import ExitStack, suppress

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from potluck.wire.joining import RENEW_PATH
from potluck.wire.members import MemberRole, RemoveMember
from support import attackers
from support.attacked import Attacked
from support.eventually import eventually
from support.paho_peer import DENIED, DONE, Peer

LIMIT_SECONDS = 10.0


def request() -> str:
    made = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    signed = made.sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())
    return signed.public_bytes(serialization.Encoding.PEM).decode()


async def over(sock: socket.socket, keeps_sending: bytes = b"") -> None:
    """Return when the other side has ended the connection, whatever came before."""

    def read() -> None:
        sock.settimeout(0.2)
        deadline = time.monotonic() + LIMIT_SECONDS
        with suppress(ConnectionError, ssl.SSLError):
            while time.monotonic() < deadline:
                try:
                    if not sock.recv(65536):
                        return
                except TimeoutError:
                    sock.sendall(keeps_sending)
            raise AssertionError("the connection stands still")

    await asyncio.to_thread(read)


async def test_a_node_that_is_removed_loses_all_within_ten_seconds(home: Attacked) -> None:
    where = home.cluster.folder / "leaver"
    home.cluster.join("leaver", where)
    context = attackers.tls(where / "node.pem")
    with ExitStack() as stack:
        peer = await Peer(context, "potluck-leaver", home.cluster.broker_port).connected()
        stack.callback(peer.close)
        assert await peer.publish(home.topics.node("leaver", "outbox"), b"x") == DONE
        # a slow renewal at the coordinator, a connection there that waits, and one at another node
        slow = stack.enter_context(attackers.connection(home.http_port, context))
        slow.sendall(f"POST {RENEW_PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: 9000\r\n\r\n{{".encode())
        waiting = stack.enter_context(attackers.connection(home.http_port, context))
        at_node = stack.enter_context(attackers.connection(home.node_port, context))
        asked = f"GET /blobs/{'0' * 64} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        for sock in (waiting, at_node):
            sock.sendall(asked)
            assert sock.recv(65536).startswith(b"HTTP/1.1 404")
        assert attackers.ask(home.http_port, RENEW_PATH, context, {"request": request()})[0] == 200

        began = time.monotonic()
        home.cluster.ask(RemoveMember(identity="node:leaver"))
        # at the broker: no right, and then no connection
        await eventually(lambda: peer.ended)
        await asyncio.gather(over(slow, b" "), over(at_node))
        assert attackers.ask(home.http_port, RENEW_PATH, context, {"request": request()})[0] in (401, 403)
        assert attackers.ask(home.http_port, f"/blobs/{'0' * 64}", context)[0] == 401

        def at_the_node() -> bool:
            return attackers.ask(home.node_port, f"/blobs/{'0' * 64}", context)[0] == 403

        await eventually(at_the_node)
        waiting.sendall(asked)
        assert not waiting.recv(65536).startswith(b"HTTP/1.1 404")
        again = await Peer(context, "potluck-leaver", home.cluster.broker_port).connected()
        stack.callback(again.close)
        for leaf in ("outbox", "status", "telemetry"):
            assert await again.publish(home.topics.node("leaver", leaf), b"{}") == DENIED
        assert time.monotonic() - began < LIMIT_SECONDS
    assert home.states["node-1"] == "online"


async def test_a_client_that_is_removed_loses_all_within_ten_seconds(home: Attacked) -> None:
    """Two processes at the broker, a stream of events that never ends, an upload, and the tokens that it has made."""
    where = home.cluster.folder / "quitter"
    role: MemberRole = "operator"
    home.cluster.join("quitter", where, role)
    context = attackers.tls(where / "client.pem")
    made = attackers.ask(
        home.http_port, "/v1/control", context, {"type": "CreateBearer", "name": "his", "role": "viewer"}
    )
    token = attackers.ask(home.http_port, "/v1/control", context, {"type": "CreateToken", "role": "operator"})
    assert (made[0], token[0]) == (200, 200)
    assert isinstance(made[1], dict)
    bearer = {"Authorization": f"Bearer {made[1]['bearer']}"}
    assert home.ask("", "/metrics", **bearer)[0] == 200
    with ExitStack() as stack:
        peers = []
        for number in range(2):
            peers.append(await Peer(context, f"potluck-quitter-{number}", home.cluster.client_port).connected())
            stack.callback(peers[-1].close)
        topic = f"{home.topics.root}/clients/quitter/to/coordinator/inbox"
        assert await peers[0].publish(topic, b'{"type": "ListNodes"}') == DONE
        stream = stack.enter_context(attackers.connection(home.http_port, context))
        stream.sendall(b"GET /v1/events HTTP/1.1\r\nHost: x\r\n\r\n")
        assert stream.recv(65536).startswith(b"HTTP/1.1 200")
        upload = stack.enter_context(attackers.connection(home.http_port, context))
        head = f"PUT /blobs/{'1' * 64} HTTP/1.1\r\nHost: x\r\nContent-Length: 50000\r\nExpect: 100-continue\r\n\r\n"
        upload.sendall(head.encode())
        assert upload.recv(65536).startswith(b"HTTP/1.1 100"), "it has begun"
        upload.sendall(b"x")

        began = time.monotonic()
        home.cluster.ask(RemoveMember(identity="client:quitter"))
        await eventually(lambda: all(peer.ended for peer in peers))
        await asyncio.gather(over(stream), over(upload, b"x"))
        assert attackers.ask(home.http_port, "/models", context)[0] == 401
        assert attackers.ask(home.http_port, RENEW_PATH, context, {"request": request()})[0] in (401, 403)
        assert home.ask("", "/metrics", **bearer)[0] == 401
        again = await Peer(context, "potluck-quitter-9", home.cluster.client_port).connected()
        stack.callback(again.close)
        assert await again.publish(topic, b'{"type": "ListNodes"}') == DENIED
        assert time.monotonic() - began < LIMIT_SECONDS
    assert not {"client:quitter", "client:his"} & home.members
    tokens = home.ask("operator", "/v1/control", {"type": "ListTokens"})[1]["tokens"]
    assert not [one for one in tokens if one.get("made_by") == "client:quitter"]
