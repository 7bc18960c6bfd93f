"""Births, wills, silence: who is in the cluster."""

import pytest
from msgspec.structs import replace

from coordinator import membership
from coordinator.membership import (
    LISTED_LIMIT_BYTES,
    QUARANTINE_SECONDS,
    REBIRTH_SECONDS,
    Membership,
    NodeJoined,
    NodeLost,
    NodeRefused,
    NodeUnknown,
    Rebirths,
)
from potluck.wire import codec
from potluck.wire.births import NodeCapacity, NodeStatus, NodeTelemetry
from potluck.wire.values import Capacity, DataFormat, Gpu, NodeData


def birth(session: str, state: str = "online") -> NodeStatus:
    return NodeStatus(node_id="n", session=session, state=state)  # type: ignore[arg-type]


def telemetry(session: str) -> NodeTelemetry:
    return NodeTelemetry(node_id="n", session=session, cpu_percent=1.0, memory_used_bytes=1, memory_available_bytes=1)


def test_a_birth_joins_and_its_will_loses() -> None:
    members = Membership(timeout_seconds=10)
    assert members.on_status(birth("1"), 0) == [NodeJoined("n")]
    assert members.on_status(birth("1"), 1) == []
    assert [type(change) for change in members.on_status(birth("1", "offline"), 2)] == [NodeLost]
    assert members.on_status(birth("1", "offline"), 2) == []
    assert members.online() == []


def test_a_stale_will_does_not_kill_a_live_node() -> None:
    members = Membership(timeout_seconds=10)
    members.on_status(birth("old"), 0)
    assert [type(change) for change in members.on_status(birth("new"), 1)] == [NodeLost, NodeJoined]
    assert members.on_status(birth("old", "offline"), 2) == []
    assert [member.session for member in members.online()] == ["new"]


def test_silence_makes_a_suspect_and_then_a_loss_and_telemetry_brings_it_back() -> None:
    members = Membership(timeout_seconds=10)
    members.on_status(birth("1"), 0)
    assert members.tick(6) == []
    assert members.online() == []  # suspect: no new work
    members.heard("n", 7)
    assert len(members.online()) == 1
    assert [type(change) for change in members.tick(20)] == [NodeLost]
    assert members.tick(30) == []
    assert members.on_telemetry(telemetry("other"), 31) == [NodeUnknown("n")]
    assert members.on_telemetry(telemetry("1"), 31) == [NodeJoined("n")]


def test_capacity_may_arrive_before_the_birth() -> None:
    members = Membership(timeout_seconds=10)
    members.on_capacity(
        NodeCapacity(node_id="n", capacity=Capacity(hostname="h", system="s", cores=4, memory_bytes=1)), 0.0
    )
    assert list(members.infos()) == []
    members.on_status(birth("1"), 0)
    (info,) = members.infos()
    assert info.capacity.cores == 4


def test_what_a_node_runs_and_which_data_it_lacks_are_listed() -> None:
    members = Membership(timeout_seconds=10)
    capacity = NodeCapacity(
        node_id="n",
        capacity=Capacity(hostname="h", system="s", cores=2, memory_bytes=1),
        data_missing={"photos": "gone"},
    )
    members.on_capacity(capacity, 0.0)  # retained: it may come first
    members.on_status(NodeStatus(node_id="n", session="1", state="online", software={"potluck": "1"}), 0)
    (info,) = members.infos()
    assert (info.software, info.data_missing, info.capacity.cores) == ({"potluck": "1"}, {"photos": "gone"}, 2)
    members.on_status(NodeStatus(node_id="n", session="1", state="online", software={"potluck": "2"}), 1)
    assert next(members.infos()).software == {"potluck": "2"}
    members.on_status(NodeStatus(node_id="n", session="1", state="offline"), 2)
    assert next(members.infos()).software == {"potluck": "2"}, "what was there when it left"


def test_whoever_left_did_not_get_lost_and_what_it_did_is_not_told_any_more() -> None:
    members = Membership(timeout_seconds=10)
    members.on_status(birth("1"), 0)
    members.on_telemetry(replace(telemetry("1"), attempts=("a",), sent_at=107.5), 100)
    (info,) = members.infos()
    assert (info.leases, info.cpu_percent, info.clock_ahead_seconds) == (1, 1.0, 7.5)
    members.on_status(replace(birth("1", "offline"), left=True), 101)
    (info,) = members.infos()
    assert (info.state, info.left, info.leases, info.cpu_percent) == ("offline", True, 0, 0.0)
    members.on_status(birth("2"), 102)
    members.tick(120)
    (info,) = members.infos()
    assert (info.state, info.left) == ("offline", False)


def test_a_quarantine_ends() -> None:
    """A sender of forged results in a node's name cannot stop the node for ever."""
    members = Membership(timeout_seconds=10)
    members.on_status(birth("1"), 0)
    for reason in "abc":
        members.violated("n", reason)
    now = 0.0
    while members.quarantined():
        now += 5
        members.heard("n", now)
        members.tick(now)
    assert QUARANTINE_SECONDS < now < QUARANTINE_SECONDS + 10
    assert not members.violated("n", "again")


def test_who_was_never_more_than_a_birth_is_forgotten() -> None:
    members = Membership(timeout_seconds=10)
    members.on_status(birth("1"), 0)
    members.on_telemetry(telemetry("1"), 1)
    for number in range(50):
        members.on_status(
            NodeStatus(node_id=f"f{number}", session="s", state="online", http=("http://127.0.0.1:1",)), 1
        )
    members.on_status(birth("1"), 2)  # connected again, and lost before it said more
    members.on_status(replace(birth("2")), 3)
    for now in (14, 30, 60, 90):
        members.tick(now)
    assert [node.node_id for node in members.infos()] == ["n"]
    assert members.node_at("http://127.0.0.1:1") == ""
    assert list(members.infos("n")) == []


def test_a_capacity_without_a_birth_is_forgotten() -> None:
    """It may come before the birth, but not a minute before."""
    members = Membership(timeout_seconds=10)
    members.on_capacity(
        NodeCapacity(node_id="n", capacity=Capacity(hostname="h", system="s", cores=4, memory_bytes=1)), 100.0
    )
    members.on_unreadable_capacity("u", "rubbish", 100.0)
    members.tick(169.0)
    assert sorted(members.members) == ["n", "u"]
    members.on_status(birth("1"), 169.5)
    members.tick(171.0)
    assert sorted(members.members) == ["n"]
    assert next(members.infos()).capacity.cores == 4


def test_a_thousand_nodes_are_asked_for_their_births_and_each_seldom() -> None:
    rebirths = Rebirths()
    asked: list[str] = []
    for second in range(int(3 * REBIRTH_SECONDS)):
        for number in range(1000):
            name = f"n{number}"
            if name not in asked and rebirths.due(name, 100.0 + second):
                asked.append(name)
                assert not rebirths.due(name, 100.0 + second)
    assert len(asked) == 1000
    assert rebirths.due("n999", 50.0), "the clock was set back"


def test_made_up_capacities_push_out_no_node_that_was_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "MEMBERS_LIMIT", 10)
    members = Membership(timeout_seconds=10)
    members.on_status(birth("1"), 0)
    members.on_telemetry(telemetry("1"), 1)
    members.on_status(birth("1", "offline"), 2)
    for number in range(100):
        members.on_capacity(NodeCapacity(node_id=f"g{number}", capacity=Capacity("h", "s", 1, 1)), 3.0)
        members.on_status(NodeStatus(node_id=f"f{number}", session="s", state="online"), 4.0)
        members.on_status(NodeStatus(node_id=f"f{number}", session="s", state="offline"), 5.0)
    assert "n" in members.members


def test_of_whom_nothing_but_telemetry_is_heard_a_birth_is_asked_for() -> None:
    members = Membership(timeout_seconds=10)
    assert members.on_telemetry(telemetry("1"), 0) == [NodeUnknown("n")]
    members.on_status(birth("1"), 1)
    assert members.on_telemetry(telemetry("1"), 2) == []
    members.on_status(birth("forged"), 3)
    assert members.on_telemetry(telemetry("1"), 4) == [NodeUnknown("n")]


def test_what_a_node_says_of_itself_goes_into_a_listing() -> None:
    members = Membership(timeout_seconds=10)
    long = "é" * 100_000
    members.on_status(replace(birth("1"), software={long: long} | {str(number): "1" for number in range(10_000)}), 0)
    gpus = (Gpu(name=long, memory_bytes=1),) * 1000
    capacity = Capacity(hostname=long, system=long, cores=1, memory_bytes=1, gpus=gpus, runtimes={"tensorflow": long})
    format = DataFormat(kind="images", classes=tuple(f"class number {number}" for number in range(20_000)))
    data = (
        NodeData(name="small", format=DataFormat(kind="images", classes=("a",)), count=1),
        NodeData(name="large", format=format, count=1),
    )
    members.on_capacity(NodeCapacity(node_id="n", capacity=capacity, data=data, data_missing={"gone": long}), 0.0)
    (info,) = members.infos()
    assert len(codec.pack(info)) < 100_000
    assert [one.name for one in info.data] == ["small"]
    assert "class names" in info.data_missing["large"]
    refused = [NodeRefused("n", "its session must have 1 to 256 characters")]
    assert members.on_status(replace(birth("2"), session=long), 1) == refused
    assert members.on_status(birth(""), 1) == refused, "it would get work, and be in no listing"
    loud = replace(telemetry("1"), shortage=long, replicas=tuple(f"{number:0300}" for number in range(500)))
    members.on_telemetry(loud, 2)
    members.on_status(replace(birth("1"), software={str(number): "\U0001f600" * 250 for number in range(64)}), 2)
    (info,) = members.infos()
    assert len(codec.pack(info)) <= LISTED_LIMIT_BYTES


def test_who_speaks_another_protocol_is_left_out_and_named() -> None:
    members = Membership(timeout_seconds=10)
    members.on_status(replace(birth("1"), version=2), 0)
    assert members.online() == []
    assert "speaks version 2 of the protocol, but the coordinator speaks 1" in next(members.infos()).left_out
    members.on_status(replace(birth("1"), version=2, newest_version=3), 0)
    assert "speaks version 2 to 3 of the protocol, but the coordinator speaks 1" in next(members.infos()).left_out
    members.on_status(replace(birth("1"), version=1, newest_version=2), 0)
    assert len(members.online()) == 1, "a newer node that still speaks our version"
    members.on_status(replace(birth("1"), version=0, newest_version=0), 0)
    assert members.online() == []
    members.on_status(birth("1"), 1)  # the same session, which no real node does
    assert len(members.online()) == 1
    assert next(members.infos()).left_out == ""


def test_the_third_violation_ends_in_quarantine_until_the_node_is_started_again() -> None:
    members = Membership(timeout_seconds=10)
    assert not members.violated("n", "unknown")
    members.on_status(birth("1"), 0)
    assert [members.violated("n", reason) for reason in ("a", "b", "c", "d")] == [False, False, True, False]
    assert members.quarantined() == {"n": next(members.infos()).left_out}
    assert "3 of its results were not what was asked for (last: c)" in next(members.infos()).left_out
    members.on_status(birth("1", "offline"), 1)
    members.on_status(birth("1"), 2)
    assert members.quarantined()  # the same session
    members.on_status(birth("2"), 3)
    assert members.quarantined() == {}


def test_a_capacity_that_cannot_be_read_is_named_where_none_is_known() -> None:
    members = Membership(timeout_seconds=10)
    members.on_unreadable_capacity("n", "gflops", 0.0)
    members.on_status(birth("1"), 0)
    assert next(members.infos()).left_out == "its capacity cannot be read: gflops"
    members.on_capacity(
        NodeCapacity(node_id="n", capacity=Capacity(hostname="h", system="s", cores=4, memory_bytes=1)), 0.0
    )
    members.on_unreadable_capacity("n", "gflops", 0.0)  # from another sender
    assert next(members.infos()).left_out == ""


def test_made_up_ids_fill_no_memory_and_push_out_nobody_who_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 100
    monkeypatch.setattr(membership, "MEMBERS_LIMIT", limit)
    members = Membership(timeout_seconds=10)
    members.on_status(birth("1"), 0)
    for number in range(2 * limit):
        forged = NodeStatus(node_id=f"f{number}", session="s", state="online", http=(f"http://127.0.0.1:{number + 1}",))
        members.on_capacity(NodeCapacity(node_id=f"g{number}", capacity=Capacity("h", "s", 1, 1)), 0.0)
        members.on_unreadable_capacity(f"u{number}", "rubbish", 0.0)
        answer = members.on_status(forged, 1)
    reason = "100 nodes are online: there are too many, or somebody makes up names"
    assert answer == [NodeRefused(forged.node_id, reason)]
    assert len(members.members) == limit
    assert len(members._at) <= limit
    assert members.members["n"].state == "online"
    members.heard("n", 15)
    members.tick(20)
    real = NodeStatus(node_id="late", session="s", state="online")
    assert members.on_status(real, 20) == [NodeJoined("late")], "the forged ones are silent"
    assert members.members["n"].state == "online"
