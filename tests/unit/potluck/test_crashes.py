"""Three times within an hour is too often; older crashes do not count."""

from __future__ import annotations

from potluck.crashes import Crashes


def test_three_within_an_hour_are_too_many() -> None:
    crashes = Crashes()
    for now in (0.0, 100.0, 200.0):
        assert not crashes.too_many(now)
        crashes.add(now, f"at {now:g}")
    assert crashes.too_many(200.0)
    assert "the last time: at 200" in crashes.summary
    assert not crashes.too_many(3600.0)
    assert crashes.count(3600.0) == 2
