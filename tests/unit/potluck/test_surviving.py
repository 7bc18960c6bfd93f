"""A defect leaves a log line now and then, and everything else goes on."""

from __future__ import annotations

import pytest

from potluck import logs
from potluck.errors import NotFound, Unavailable
from potluck.logs import Seldom
from potluck.surviving import as_defect, outlived, surviving


def test_a_block_that_fails_is_left_and_told(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        with surviving("test_a_block"):
            raise AssertionError("odd")
    (record,) = [one for one in caplog.records if "test_a_block" in one.getMessage()]
    assert record.exc_info is not None


def test_what_is_fatal_is_raised() -> None:
    with pytest.raises(Unavailable, match="full"), surviving("journal", fatal=(Unavailable,)):
        raise Unavailable("the disk is full")


async def test_work_that_nobody_waits_for() -> None:
    async def work() -> None:
        raise NotFound("gone")

    await outlived(work(), "work")


def test_our_errors_stay_as_they_are_and_others_are_defects() -> None:
    ours = NotFound("no such model")
    assert as_defect(ours, "test") is ours
    assert (found := as_defect(KeyError("x" * 9000), "test")).code == "internal"
    assert found.message.startswith("a defect of potluck: KeyError('xxx")
    assert len(found.message) < 600


def test_each_subject_has_its_time_and_many_share_one() -> None:
    now = 0.0
    seldom = Seldom(5.0, limit=2, clock=lambda: now)
    assert [seldom.due("a") for _ in range(3)] == [0, None, None]
    assert seldom.due("b") == 0
    assert [seldom.due(f"other {number}") for number in range(100)] == [0, *[None] * 99]
    now = 5.0
    assert seldom.due("a") == 2
    assert seldom.due("") == 99
    now = 50.0
    assert seldom.due("c") == 0  # the earlier subjects are forgotten


def test_what_others_name_obeys_nobody_in_a_log() -> None:
    assert logs.fields(node="n", odd="a\nERROR forged line", colour="\x1b[31m", plain="ünïcode") == (
        "node=n odd='a\\nERROR forged line' colour='\\x1b[31m' plain=ünïcode"
    )
