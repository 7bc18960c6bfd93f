"""Another coordinator on the same bus: whoever comes second does not start, and what a broker keeps of a dead one keeps nobody out."""

from __future__ import annotations

import asyncio

import pytest
from msgspec.structs import replace

from coordinator.rival import Rival
from potluck.bus.mqtt import Envelope
from potluck.errors import Conflict
from potluck.wire.births import CoordinatorStatus

THEIRS = CoordinatorStatus(session="theirs", epoch=3, state="online", http=("http://192.0.2.1:7814",))


def said(status: CoordinatorStatus, *, retained: bool = False) -> Envelope:
    return Envelope("t", status, retained=retained)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RETAINED_SECONDS", "RIVAL_SECONDS"):
        monkeypatch.setattr(f"coordinator.rival.{name}", 0.05)


@pytest.fixture
def rival() -> Rival:
    return Rival("c", "ours", asyncio.Event())


async def test_one_that_speaks_keeps_us_out_until_it_is_offline(rival: Rival) -> None:
    rival.on_status(said(replace(THEIRS, session="ours")))
    await rival.check_none(shared=True)
    rival.on_status(said(THEIRS))
    with pytest.raises(Conflict, match=r"'c' has a coordinator on this bus already \(http://192\.0\.2\.1:7814\)"):
        await rival.check_none(shared=True)
    rival.on_status(said(replace(THEIRS, session="older", state="offline")))
    assert rival.here
    rival.on_status(said(replace(THEIRS, state="offline")))
    assert not rival.here
    rival.refuse()
    await rival.check_none(shared=True)


async def test_what_is_retained_counts_only_if_it_is_said_again(rival: Rival, monkeypatch: pytest.MonkeyPatch) -> None:
    rival.on_status(said(THEIRS, retained=True))
    await rival.check_none(shared=True)
    assert not rival.here
    monkeypatch.setattr("coordinator.rival.RIVAL_SECONDS", 20.0)
    rival.on_status(said(THEIRS, retained=True))
    checking = asyncio.create_task(rival.check_none(shared=True))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not checking.done()
    rival.on_status(said(THEIRS))
    with pytest.raises(Conflict):
        await checking


async def test_once_we_are_there_one_is_named_and_forgotten_when_it_is_silent(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    announced = asyncio.Event()
    announced.set()
    rival = Rival("c", "ours", announced)
    for _ in range(3):
        rival.on_status(said(THEIRS))
    assert [record.message.split(" cluster=")[0] for record in caplog.records] == [
        "another coordinator is on this bus: stop one"
    ]
    with pytest.raises(Conflict):
        await rival.check_none(shared=True)
    monkeypatch.setattr("coordinator.rival.STATUS_SECONDS", -1.0)
    await rival.check_none(shared=True)
    assert not rival.here
