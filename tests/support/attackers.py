"""What somebody has who attacks a closed cluster: the standard library, and perhaps a certificate. None of it is our client's code."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

LIMIT_SECONDS = 10.0
CONNECT = b"\x10\x1a\0\x04MQTT\x04\x02\0\x3c\0\x0epotluck-attack"
"""MQTT 3.1.1, a clean session."""
CONNACK = 0x20
HERE = "127.0.0.1"


def tls(pair: Path | None = None) -> ssl.SSLContext:
    """A context that believes every server. `pair`: a file with a key and its certificate; None: whoever asks has none."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if pair is not None:
        context.load_cert_chain(pair)
    return context


def says(port: int, data: bytes, context: ssl.SSLContext | None, *, at: str = HERE) -> bytes:
    """The first of what a server answers to these bytes; b"": it hangs up. `context` None: without TLS. Raises TimeoutError."""
    with suppress(ssl.SSLError, ConnectionError), connection(port, context, at=at) as sock:
        sock.sendall(data)
        return sock.recv(65536)
    return b""


@contextmanager
def connection(port: int, context: ssl.SSLContext | None, *, at: str = HERE) -> Iterator[socket.socket]:
    """Raises ssl.SSLError."""
    sock = socket.create_connection((HERE, port), LIMIT_SECONDS, (at, 0))
    if context is not None:
        # not in `wrap_socket`: what fails there is closed by nobody
        sock = context.wrap_socket(sock, do_handshake_on_connect=False)
    with sock:
        if isinstance(sock, ssl.SSLSocket):
            sock.do_handshake()
        yield sock


def ask(
    port: int,
    path: str,
    context: ssl.SSLContext,
    body: bytes | dict[str, Any] | None = None,
    *,
    method: str = "",
    at: str = HERE,
    **headers: str,
) -> tuple[int, dict[str, Any] | bytes]:
    """The status of the answer, and its body, decoded if it is JSON. Without a `body`, it is a GET. Raises OSError."""
    connection = http.client.HTTPSConnection(HERE, port, timeout=LIMIT_SECONDS, context=context, source_address=(at, 0))
    sent = {name.replace("_", "-"): text for name, text in headers.items()}
    if isinstance(body, dict):
        body, sent = json.dumps(body).encode(), {"Content-Type": "application/json"} | sent
    try:
        connection.request(method or ("GET" if body is None else "POST"), path, body, sent)
        answer = connection.getresponse()
        said = answer.read()
        if answer.headers.get_content_type() == "application/json":
            return answer.status, json.loads(said)
        return answer.status, said
    finally:
        connection.close()
