"""The engine's end of the socket to its parent."""

from __future__ import annotations

import socket
import threading

from node.engine import frames
from node.engine.answering import failed
from potluck.errors import BadMessage

RECEIVE_BYTES = 1 << 16


class Channel:
    """Any thread may send. One thread at a time receives."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._sending = threading.Lock()
        self._splitter = frames.FrameSplitter()

    def send(self, frame: frames.Frame) -> None:
        """Raises TooLarge before anything is sent, and OSError when the parent is gone."""
        data = frames.encode(frame)
        with self._sending:
            self._sock.sendall(data)

    def receive(self) -> list[frames.ToEngine]:
        """The next frames, all that have arrived; none: the parent has closed its end."""
        found: list[frames.ToEngine] = []
        while not found:
            data = self._sock.recv(max(RECEIVE_BYTES, self._splitter.missing))
            if not data:
                break
            for body in self._splitter.feed(data):
                try:
                    found.append(frames.to_engine(body))
                except BadMessage as error:  # only the frame fails, not the engine with all that it holds
                    self.send(failed(frames.number_of(body), error))
        return found
