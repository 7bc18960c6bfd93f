"""Reading a request's body: where that happens, and the error for a body that is no JSON or not the right one."""

from __future__ import annotations

import threading

import msgspec
import pytest

from coordinator.gateway import bodies
from potluck.errors import InvalidRequest


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
