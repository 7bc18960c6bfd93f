"""Discovery by real mDNS on loopback: who is there, who went, and where the bus is."""

from __future__ import annotations

import asyncio
import dataclasses
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
from zeroconf import IPVersion, ServiceStateChange
from zeroconf.asyncio import AsyncServiceInfo, AsyncZeroconf

from potluck.errors import Unavailable
from potluck.net import discovery as module
from potluck.net.discovery import SERVICE_TYPE, Discovery, Role, Service, broker_addresses
from potluck.net.side import Side, ca_hint
from potluck.settings import NetworkSettings
from support.eventually import eventually


@pytest.fixture
def cluster() -> str:
    """A unique name, so that other clusters on this machine are not seen."""
    return f"test-{uuid.uuid4().hex[:8]}"


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


def service(cluster: str, id: str, role: Role = "node", **facts: object) -> Service:
    return dataclasses.replace(
        Service(id=id, cluster=cluster, role=role, host="127.0.0.1", port=1234),
        **facts,  # type: ignore[arg-type]
    )


async def test_everything_said_is_heard(cluster: str, stack: AsyncExitStack) -> None:
    here = await stack.enter_async_context(Discovery(cluster))
    there = await stack.enter_async_context(Discovery(cluster))
    said = service(cluster, "n-1", cores=8, memory_bytes=32 * 2**30, gpus=2)
    await there.advertise(said)
    assert await here.wait_for(lambda one: one.id == "n-1", 5) == said
    assert here.services("node") == [said]
    assert here.services("coordinator") == []
    assert said in there.services() or await there.wait_for(lambda one: one == said, 5)


async def test_who_comes_later_sees_who_was_there_before(cluster: str, stack: AsyncExitStack) -> None:
    first = await stack.enter_async_context(Discovery(cluster))
    await first.advertise(service(cluster, "c", "coordinator", broker_port=1883))
    later = await stack.enter_async_context(Discovery(cluster))
    found = await later.wait_for(lambda one: one.role == "coordinator", 5)
    assert found is not None
    assert found.broker_port == 1883


async def test_a_withdrawal_is_seen_at_once(cluster: str, stack: AsyncExitStack) -> None:
    here = await stack.enter_async_context(Discovery(cluster))
    async with Discovery(cluster) as leaving:
        await leaving.advertise(service(cluster, "leaves"))
        assert await here.wait_for(lambda one: one.id == "leaves", 5)
        await leaving.withdraw()
        await eventually(lambda: not here.services())
        await leaving.withdraw()  # twice does no harm
        await leaving.advertise(service(cluster, "leaves"))
        assert await here.wait_for(lambda one: one.id == "leaves", 5)
    await eventually(lambda: not here.services())  # leaving the block withdraws


async def test_an_update_is_seen_once_and_whole(cluster: str, stack: AsyncExitStack) -> None:
    here = await stack.enter_async_context(Discovery(cluster))
    there = await stack.enter_async_context(Discovery(cluster))
    await there.advertise(service(cluster, "x", "candidate"))
    assert await here.wait_for(lambda one: one.role == "candidate", 5)
    await there.update(service(cluster, "x", "coordinator", broker_port=7))
    await eventually(lambda: [(one.role, one.broker_port) for one in here.services()] == [("coordinator", 7)])


async def test_other_clusters_are_not_seen_though_their_nodes_have_the_same_ids(
    cluster: str, stack: AsyncExitStack
) -> None:
    here = await stack.enter_async_context(Discovery(cluster))
    other = await stack.enter_async_context(Discovery(f"{cluster}-b"))
    ours = await stack.enter_async_context(Discovery(cluster))
    await other.advertise(service(f"{cluster}-b", "node-1", cores=1))
    await ours.advertise(service(cluster, "node-1", cores=2))
    assert await here.wait_for(lambda one: one.id == "node-1", 5)
    assert await other.wait_for(lambda one: one.id == "node-1", 5)
    assert [one.cores for one in here.services()] == [2]
    assert [one.cores for one in other.services()] == [1]


async def test_two_nodes_of_one_id_are_both_seen(cluster: str, stack: AsyncExitStack) -> None:
    here = await stack.enter_async_context(Discovery(cluster))
    for port in (1, 2):
        twin = await stack.enter_async_context(Discovery(cluster))
        await twin.advertise(service(cluster, "twin", port=port))
        assert await here.wait_for(lambda one, port=port: one.port == port, 5)  # type: ignore[misc]
    assert sorted(one.port for one in here.services()) == [1, 2]


async def test_the_longest_names_fit(cluster: str, stack: AsyncExitStack) -> None:
    here = await stack.enter_async_context(Discovery(cluster))
    there = await stack.enter_async_context(Discovery(cluster))
    said = service(cluster, "a" * 30 + "." + "b_c" * 11, memory_bytes=2**50, cores=4096)
    await there.advertise(said)
    assert await here.wait_for(lambda one: one == said, 5)
    assert there._info is not None
    assert len(there._info.text or b"") < 400


async def test_services_that_we_cannot_read_are_ignored(cluster: str, stack: AsyncExitStack) -> None:
    """A service of another program or of a later version, with our type, does no harm, and the good one is still seen."""
    here = await stack.enter_async_context(Discovery(cluster))
    strange = AsyncZeroconf(interfaces=["127.0.0.1"], ip_version=IPVersion.V4Only)
    stack.push_async_callback(strange.async_close)
    strange_facts: tuple[dict[str, str | None], ...] = (
        {"port": "x"},
        {"port": "65536"},
        {"role": "emperor"},
        {"role": None},
        {"cores": "many"},
        {"memory": "-1"},
        {"id": None},
        {"ca": "no digits"},
        {"ca": "0123456789ABCDEF"},
        {"ca": "0123456789abcdef0"},
        {"ca": "0123456789abcdef", "clients": "65536"},
    )
    facts: dict[str, str | None] = {"id": "odd", "cluster": cluster, "role": "node", "port": "1"}
    for number, change in enumerate(strange_facts):
        info = AsyncServiceInfo(
            SERVICE_TYPE,
            f"odd-{number}-{cluster}.{SERVICE_TYPE}",
            addresses=[bytes((127, 0, 0, 1))],
            port=9,
            properties=facts | change,
            server=f"odd-{number}-{cluster}.local.",
        )
        await strange.async_register_service(info, cooperating_responders=True)
    there = await stack.enter_async_context(Discovery(cluster))
    await there.advertise(service(cluster, "good"))
    assert await here.wait_for(lambda one: one.id == "good", 5)
    assert [one.id for one in here.services()] == ["good"]


async def test_who_announces_any_number_fills_no_memory(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the limit, only changes of services that are known are looked at."""
    looked: list[str] = []

    async def resolve(zeroconf: object, name: str) -> None:
        looked.append(name)

    here = Discovery(cluster)
    monkeypatch.setattr(module, "SERVICES_LIMIT", 3)
    monkeypatch.setattr(here, "_resolve", resolve)
    here._found = {name: service(cluster, name) for name in "abc"}
    for name in ("new", "a", "other"):
        here._on_change(None, SERVICE_TYPE, name, ServiceStateChange.Added)  # type: ignore[arg-type]
    await eventually(lambda: looked == ["a"] and not here._resolving)
    here._on_change(None, SERVICE_TYPE, "b", ServiceStateChange.Removed)  # type: ignore[arg-type]
    here._on_change(None, SERVICE_TYPE, "new", ServiceStateChange.Added)  # type: ignore[arg-type]
    await eventually(lambda: looked == ["a", "new"])


async def test_waiting_in_vain_ends(cluster: str, stack: AsyncExitStack) -> None:
    here = await stack.enter_async_context(Discovery(cluster))
    assert await here.wait_for(lambda one: True, 0.1) is None


async def test_a_network_that_changed_is_used(
    cluster: str, stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Discovery is started before there is a network. Later it advertises and finds services there."""
    monkeypatch.setattr(module, "lan_addresses", lambda: ["127.0.0.2"])
    early = await stack.enter_async_context(Discovery(cluster, listen_host="0.0.0.0"))
    await early.advertise(service(cluster, "early"))
    assert not await early.refresh()
    monkeypatch.setattr(module, "lan_addresses", lambda: ["127.0.0.1"])
    here = await stack.enter_async_context(Discovery(cluster))
    await here.advertise(service(cluster, "here"))
    assert await early.refresh()
    assert await here.wait_for(lambda one: one.id == "early", 5)
    assert await early.wait_for(lambda one: one.id == "here", 5)
    assert not await early.refresh()


async def test_a_service_that_was_not_heard_is_found_by_asking_again(cluster: str, stack: AsyncExitStack) -> None:
    here = await stack.enter_async_context(Discovery(cluster))
    await here.advertise(service(cluster, "here"))
    deaf = await stack.enter_async_context(Discovery(cluster))
    assert await deaf.wait_for(lambda one: one.id == "here", 5)
    assert deaf._zeroconf is not None
    cache = deaf._zeroconf.zeroconf.cache  # as if a switch between the two had been off all the time
    cache.async_remove_records([record for name in cache.names() for record in cache.entries_with_name(name)])
    deaf._found.clear()
    deaf._browsing_since = 0.0
    await deaf.look_again()
    assert await deaf.wait_for(lambda one: one.id == "here", 5)


# --- where the bus is ----------------------------------------------------------------------------------------------------


async def test_seeds_come_in_turn() -> None:
    addresses = broker_addresses(NetworkSettings(seeds=("a", "b:7", "[::1]:9")), None)
    assert [await addresses() for _ in range(4)] == [("a", 1883), ("b", 7), ("::1", 9), ("a", 1883)]


async def test_without_seeds_and_discovery_it_says_what_to_do() -> None:
    with pytest.raises(Unavailable, match="--seed"):
        await broker_addresses(NetworkSettings(), None)()


async def test_a_coordinator_that_appears_is_followed(cluster: str, stack: AsyncExitStack) -> None:
    here = await stack.enter_async_context(Discovery(cluster))
    addresses = broker_addresses(NetworkSettings(cluster=cluster), here)
    waiting = asyncio.create_task(addresses(), name="waiting")
    node = await stack.enter_async_context(Discovery(cluster))
    await node.advertise(service(cluster, "a-node"))  # has no broker
    there = await stack.enter_async_context(Discovery(cluster))
    await there.advertise(service(cluster, "c", "coordinator", broker_port=5001))
    assert await asyncio.wait_for(waiting, 5) == ("127.0.0.1", 5001)


async def test_a_missing_coordinator_is_told_after_a_while(
    cluster: str, stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FIND_SECONDS", 0.2)
    here = await stack.enter_async_context(Discovery(cluster))
    with pytest.raises(Unavailable, match=f"no coordinator of cluster '{cluster}' is found"):
        await broker_addresses(NetworkSettings(cluster=cluster), here)()


async def test_seeds_come_first_and_a_new_coordinator_before_old_addresses(cluster: str, stack: AsyncExitStack) -> None:
    here = await stack.enter_async_context(Discovery(cluster))
    addresses = broker_addresses(NetworkSettings(cluster=cluster, seeds=("s:1",)), here)
    old = await stack.enter_async_context(Discovery(cluster))
    await old.advertise(service(cluster, "b-old", "coordinator", broker_port=2))
    assert await here.wait_for(lambda one: one.broker_port == 2, 5)
    assert [await addresses() for _ in range(4)] == [("s", 1), ("127.0.0.1", 2), ("s", 1), ("127.0.0.1", 2)]
    # The old one was killed without a goodbye: its record stays, but is not asked first.
    new = await stack.enter_async_context(Discovery(cluster))
    await new.advertise(service(cluster, "a-new", "coordinator", broker_port=3))
    assert await here.wait_for(lambda one: one.broker_port == 3, 5)
    assert [await addresses() for _ in range(2)] == [("127.0.0.1", 3), ("s", 1)]


async def test_a_broker_elsewhere_is_named(cluster: str, stack: AsyncExitStack) -> None:
    here = await stack.enter_async_context(Discovery(cluster))
    there = await stack.enter_async_context(Discovery(cluster))
    await there.advertise(service(cluster, "c", "coordinator", broker_port=1883, broker_host="10.1.2.3"))
    assert await broker_addresses(NetworkSettings(cluster=cluster), here)() == ("10.1.2.3", 1883)


async def test_members_try_only_their_own_cluster_and_open_daemons_no_closed_one(
    cluster: str, stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mDNS that names another broker, also a plain one, changes nothing for a member; and nobody joins a closed cluster without a token."""
    monkeypatch.setattr(module, "FIND_SECONDS", 0.2)
    ours, theirs = ca_hint(bytes(32)), ca_hint(bytes([1] * 32))
    here = await stack.enter_async_context(Discovery(cluster))
    for name, facts in (
        ("closed", {"broker_port": 8001, "client_port": 8002, "ca": ours}),
        ("other", {"broker_port": 8003, "client_port": 8004, "ca": theirs}),
    ):
        there = await stack.enter_async_context(Discovery(cluster))
        said = service(cluster, name, "coordinator", **facts)
        await there.advertise(said)
        assert await here.wait_for(lambda one, said=said: one == said, 5)  # type: ignore[misc]
    network = NetworkSettings(cluster=cluster)
    with pytest.raises(Unavailable, match=f"closed. To let this machine .*potluck token create --cluster {cluster}`"):
        await broker_addresses(network, here)()
    plain = await stack.enter_async_context(Discovery(cluster))
    await plain.advertise(service(cluster, "plain", "coordinator", broker_port=1883))
    assert await here.wait_for(lambda one: one.broker_port == 1883, 5)
    for side, port in ((Side(), 1883), (Side(ours), 8001), (Side(ours, client=True), 8002), (Side(theirs), 8003)):
        addresses = broker_addresses(network, here, side)
        assert [await addresses() for _ in range(2)] == [("127.0.0.1", port)] * 2


async def test_the_ports_of_a_closed_cluster_need_not_be_typed() -> None:
    network = NetworkSettings(seeds=("a", "b:7"))
    for side, port in ((Side("00" * 8), 8883), (Side("00" * 8, client=True), 8884)):
        addresses = broker_addresses(network, None, side)
        assert [await addresses() for _ in range(2)] == [("a", port), ("b", 7)]
