"""The engine's end of its socket: what came together is read together, and what cannot be read is answered."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from node.engine import frames
from node.engine.channel import Channel

ASKED = [frames.CancelBatch(number=1), frames.Pause(), frames.RunBatch(number=2, replica_id="r", requests=())]


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, Channel]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(10)
        theirs.settimeout(10)
        yield ours, Channel(theirs)


def test_what_came_together_is_read_together(ends: tuple[socket.socket, Channel]) -> None:
    parent, channel = ends
    parent.sendall(b"".join(map(frames.encode, ASKED)))
    assert channel.receive() == ASKED
    data = frames.encode(ASKED[2])
    parent.sendall(frames.encode(ASKED[0]) + data[:7])
    assert channel.receive() == [ASKED[0]]
    parent.sendall(data[7:])
    assert channel.receive() == [ASKED[2]]
    parent.close()
    assert channel.receive() == channel.receive() == []


def test_what_cannot_be_read_fails_alone(ends: tuple[socket.socket, Channel]) -> None:
    parent, channel = ends
    bad = frames.encode(frames.Frame(number=7))  # of no kind
    parent.sendall(bad + frames.encode(ASKED[0]))
    assert channel.receive() == [ASKED[0]]
    [body] = frames.FrameSplitter().feed(parent.recv(4096))
    failure = frames.from_engine(body)
    assert isinstance(failure, frames.Failed)
    assert (failure.number, failure.error.code) == (7, "bad_message")
