"""Which texts are addresses of holders, and which could make this machine ask for something else."""

from __future__ import annotations

import pytest

from potluck.errors import InvalidRequest
from potluck.wire.addresses import address, check_holders, is_address, is_place, place


@pytest.mark.parametrize(
    "text",
    [
        "http://127.0.0.1:1",
        "https://node-1.lan:7814",
        "http://[fe80::1]:80/",
        "http://under_score:65535",
        "http://a.:80",
    ],
)
def test_addresses(text: str) -> None:
    assert is_address(text)
    check_holders((text,), "x")


@pytest.mark.parametrize(
    "text",
    [
        "", "//x", "x", "http://", "http://x", "http://:80", "http://x:", "http://x:65536", "http://x:-1",
        "http://x:80/admin", "http://x:80?q", "http://x:80#f", "http://u@x:80", "http://u:p@x:80", "http://x:80//",
        "ftp://x:80", "http://a b:80", "http://x:80\n", "http://[x]:80", "http://[::1:80", "http://1.2.3.4.5:80",
        "http://2130706433:80", "http://a..b:80", f"http://{'a' * 64}:80", "http://\u00e9:80", "http://x:\u0661",
        f"http://{'a.' * 200}b:80", "http://x\\@y:80", "HTTP://x:80",
    ],
)  # fmt: skip
def test_what_is_none(text: str) -> None:
    assert not is_address(text)
    with pytest.raises(InvalidRequest, match=r"input 'x' names the holder .* is not an http://host:port address"):
        check_holders(("http://x:80", text), "input 'x'")


def test_what_is_written_is_an_address() -> None:
    assert address("node-1.lan", 7814, "http") == "http://node-1.lan:7814"
    assert address("fe80::1", 80, "https") == "https://[fe80::1]:80"
    for host in ("node-1.lan", "fe80::1", "10.0.0.1"):
        assert is_place(place(host, 1))
        assert is_address(address(host, 1, "http"))
    for text in ("http://x:80", "x:80/", "x", "fe80::1", "x:65536"):
        assert not is_place(text)
