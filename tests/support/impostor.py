"""A server that is not what its guests look for, and keeps what they say to it."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class Impostor:
    """`heard`: the first bytes of each connection, under TLS if it has a certificate; `refused`: how many handshakes its guests broke off."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext | None) -> None:
        self.port = int(sock.getsockname()[1])
        self.heard: list[bytes] = []
        self.refused = 0
        self._sock = sock
        self._context = context

    def serve(self) -> None:
        while True:
            try:
                guest, _ = self._sock.accept()
            except OSError:
                return
            guest.settimeout(2.0)
            if self._context is not None:
                guest = self._context.wrap_socket(guest, server_side=True, do_handshake_on_connect=False)
            with guest, suppress(TimeoutError):
                try:
                    if isinstance(guest, ssl.SSLSocket):
                        guest.do_handshake()
                    data = guest.recv(4096)
                except (ssl.SSLError, ConnectionError):
                    self.refused += 1
                    continue
                if data:
                    self.heard.append(data)


@contextmanager
def impostor(pair: Path | None = None) -> Iterator[Impostor]:
    """`pair`: the file with the key and certificate that it shows; None: it has no TLS."""
    context = None
    if pair is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pair)
    with socket.create_server(("127.0.0.1", 0)) as sock:
        made = Impostor(sock, context)
        thread = threading.Thread(target=made.serve, name="impostor")
        thread.start()
        try:
            yield made
        finally:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
            thread.join(5)
