"""Guesses of join tokens are few, and those of one address do not keep others out."""

from __future__ import annotations

import pytest

from coordinator.identities.tries import ALL, EACH, KEPT, MINUTE, Tries, neighbourhood


@pytest.mark.parametrize(
    ("host", "same"),
    [
        ("10.0.0.7", "10.0.0.7"),
        ("::ffff:10.0.0.7", "10.0.0.7"),
        ("2001:db8:1:2::9", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::1", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
    ],
)
def test_what_counts_as_one_address(host: str, same: str) -> None:
    assert neighbourhood(host) == same


def test_an_address_waits_after_ten_wrong_tries() -> None:
    tries = Tries()
    for number in range(EACH):
        assert tries.wait("a", float(number)) == 0
        assert tries.wrong("a", float(number)) == 0
    assert tries.wait("a", 9.0) == MINUTE - 9
    assert tries.wait("b", 9.0) == 0
    assert tries.wait("a", MINUTE - 0.5) == 0.5
    assert tries.wait("a", MINUTE) == 0
    assert tries.wrong("a", MINUTE) == 0
    assert tries.wait("a", MINUTE) == 1.0, "one more each time that one is a minute ago"


def test_all_together_have_a_limit_that_keeps_no_address_from_trying() -> None:
    tries = Tries()
    for number in range(ALL):
        assert tries.wrong(f"{number}", 0.0) == 0
    assert tries.wrong("one more", 1.0) == MINUTE - 1
    assert tries.wait("another", 1.0) == 0
    for number in range(2 * KEPT):
        tries.wrong(f"{number}", 2.0)
    assert tries.count == ALL + 1 + 2 * KEPT
    assert tries.wrong("a", 2.0 + MINUTE) == 0
