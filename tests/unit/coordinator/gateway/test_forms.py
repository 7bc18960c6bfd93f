"""Files in forms: as browsers and curl send them, and forms that are made to be hard to read."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.gateway.forms import HEAD_LIMIT_BYTES, PARTS_LIMIT, first_file
from potluck.errors import InvalidRequest

KIND = 'multipart/form-data; boundary="x y"'


def form(*parts: tuple[str, bytes], boundary: str = "x y") -> bytes:
    found = b"".join(f"--{boundary}\r\n{head}\r\n\r\n".encode() + data + b"\r\n" for head, data in parts)
    return found + f"--{boundary}--\r\n".encode()


FIELD = ('Content-Disposition: form-data; name="top"', b"3")
FILE = 'Content-Disposition: form-data; name="file"; filename="a.png"\r\nContent-Type: image/png'


@given(st.binary(max_size=200))
def test_the_first_file_is_found_behind_fields(data: bytes) -> None:
    if b"\r\n--x y" not in b"\r\n" + data:
        assert first_file(KIND, form(FIELD, (FILE, data), (FILE, b"another"))) == ("image/png", data)
        assert first_file(KIND, b"a preamble\r\n" + form((FILE, data))) == ("image/png", data)


def test_a_file_without_a_type_is_text_as_the_standard_says() -> None:
    assert first_file(KIND, form(('Content-Disposition: form-data; filename="a"', b"d")))[0] == "text/plain"


@pytest.mark.parametrize(
    ("kind", "body", "said"),
    [
        (KIND, form(FIELD), "has no file"),
        (KIND, b"", "has no file"),
        (KIND, form((FILE, b"d"))[:-12], "cut off"),
        (KIND, b"--x y\r\nContent-Disposition: form-data", "no head"),
        (KIND, form((FILE + "; " + "a" * HEAD_LIMIT_BYTES, b"d")), "no head"),
        (KIND, form(*[FIELD] * PARTS_LIMIT, (FILE, b"d")), "has no file"),
        (KIND, form(*[(FIELD[0] + "; xfilename=b" + "; a=b" * 400, b"3")] * 9, (FILE, b"d")), "heads of its parts"),
        (KIND, form((FILE + "\r\nContent-Transfer-Encoding: base64", b"ZA==")), "base64"),
        ("multipart/form-data", form((FILE, b"d")), "no boundary"),
        ("multipart/form-data; boundary=" + "b" * 71, form((FILE, b"d")), "no boundary"),
        ('multipart/form-data; boundary="', b"--", "no boundary"),
    ],
)
def test_what_cannot_be_read_says_why(kind: str, body: bytes, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        first_file(kind, body)


@pytest.mark.parametrize(
    "body",
    [
        b"\n" * 2**25,
        b"\r\n--x " * 2**22,
        b"--x y\r\n" * 2**22,
        form(("Content-Disposition: form-data; " + "; ".join(f"a*{n}=b" for n in range(700)), b"d")),
        form((FILE, form((FILE, b"d")) * 10_000), boundary="y"),
    ],
    ids=["lines", "nearly parts", "parts", "parameters", "nested"],
)
def test_what_is_made_to_be_hard_to_read_takes_no_time(body: bytes) -> None:
    began = time.perf_counter()
    with pytest.raises(InvalidRequest):
        first_file(KIND if not body.startswith(b"--y") else "multipart/form-data; boundary=z", body)
    assert time.perf_counter() - began < 1.0
