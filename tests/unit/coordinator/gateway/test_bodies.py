"""Reading a request's body: where that happens, and the error for a body that is no JSON or not the right one."""

from __future__ import annotations

import threading
from typing import Any

import msgspec
import pytest

from coordinator.gateway import bodies
from coordinator.gateway.bodies import HELD_EACH, Bodies
from coordinator.gateway.gate import CALLER
from potluck.errors import InvalidRequest, Overloaded
from potluck.wire.roles import Caller


class Asked(msgspec.Struct):
    rows: list[float]
    name: str = ""


_decode = msgspec.json.Decoder(Asked).decode


def read(body: bytes) -> Asked:
    return bodies.decoded(body, _decode, Asked, "a question")


async def test_much_is_read_in_a_thread_and_little_is_not() -> None:
    here = threading.get_ident()
    assert await bodies.beside(100, threading.get_ident) == here
    assert await bodies.beside(bodies.IN_THREAD_BYTES, threading.get_ident) != here


def test_what_is_not_json_says_where() -> None:
    assert str(read(b'\xef\xbb\xbf{"rows": [NaN, 1]}').rows) == "[nan, 1.0]"
    for body, said in ((b'{"rows": [1,]}', "line 1 column 13"), (b'{"name": "\xff"}', "byte 0xff"), (b"", "line 1")):
        with pytest.raises(InvalidRequest, match=f"the body is not a question: .*{said}"):
            read(body)


def test_json_of_another_form_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def again(body: bytes) -> None:
        raise AssertionError(body)

    monkeypatch.setattr(bodies, "_read_again", again)
    with pytest.raises(InvalidRequest, match=r"missing required field `rows`"):
        read(b"{}")


class Request(dict[str, Any]):
    """What is looked at to tell whose a body is."""

    def __init__(self, remote: str, identity: str = "") -> None:
        super().__init__({CALLER: Caller(identity, "user")} if identity else {})
        self.remote = remote


@pytest.mark.parametrize(
    ("mine", "other"),
    [
        (("10.0.0.1", ""), ("10.0.0.2", "")),
        (("10.0.0.1", "client:ann"), ("10.0.0.1", "client:bob")),
    ],
)
def test_nobody_holds_all_the_room(mine: tuple[str, str], other: tuple[str, str]) -> None:
    held = Bodies(100)
    requests: list[Any] = [Request(*mine) for _ in range(HELD_EACH)]
    for request in requests:
        held._hold(request, 100)
    again: Any = Request(*mine)
    with pytest.raises(Overloaded, match="of your requests"):
        held._hold(again, 1)
    another: Any = Request(*other)
    held._hold(another, 100)
    for request in (*requests, another):
        held.release(request)
    assert not held._of


def test_a_member_is_one_wherever_it_is() -> None:
    held = Bodies(100)
    requests: list[Any] = [Request(f"10.0.0.{number}", "client:ann") for number in range(HELD_EACH + 1)]
    for request in requests[:-1]:
        held._hold(request, 100)
    with pytest.raises(Overloaded):
        held._hold(requests[-1], 1)
