"""Deployments come and go with memory and load, on a bus in memory: what fits where, who makes room, zero and back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from coordinator.serving import memory, scaling
from potluck.errors import InvalidRequest, TimedOut, Unavailable
from potluck.wire.questions import DeploymentInfo
from potluck.wire.values import BlobRef
from support.eventually import eventually
from support.serving_lab import Lab, Node, ask, client, question

MIB = 2**20


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as opened:
        yield opened


@pytest.fixture
async def lab(tmp_path: Path, stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch) -> Lab:
    """A lab with models x, y and z of 10 MiB. Engines take no memory, and a deployment is idle after a moment without requests."""
    monkeypatch.setattr(memory, "ENGINE_BYTES", 0)
    monkeypatch.setattr(memory, "RECENT_SECONDS", 0.5)
    monkeypatch.setattr("coordinator.serving.serving.JOIN_SECONDS", 0.5)
    made = Lab(tmp_path)
    await made.open(stack)
    for number, name in enumerate("xyz"):
        made.registry.add_model(name, BlobRef(sha256=f"{number:064x}", size=10 * MIB), now=1.0)
    return made


async def joined(lab: Lab, stack: AsyncExitStack, node_id: str, available_mib: int, resident_mib: int) -> Node:
    """A node with `available_mib` of free memory, on which a replica takes `resident_mib`."""
    node = await lab.join(stack, node_id)
    node.resident_bytes = resident_mib * MIB
    tell(lab, node, available_mib)
    return node


def tell(lab: Lab, node: Node, available_mib: int) -> None:
    """Telemetry of the node."""
    lab.report(node.node_id, tuple(node.loaded), available_mib * MIB)


def found(lab: Lab) -> dict[str, DeploymentInfo]:
    return {info.name: info for info in lab.serving.deployments()}


def places(lab: Lab) -> dict[str, list[str]]:
    return {name: sorted(replica.node_id for replica in info.replicas) for name, info in found(lab).items()}


async def test_replicas_go_where_memory_fits_by_measured_size(lab: Lab, stack: AsyncExitStack) -> None:
    large = await joined(lab, stack, "large", 500, resident_mib=90)
    await joined(lab, stack, "small", 60, resident_mib=90)
    await lab.deploy("x")
    assert places(lab) == {"x:1": ["large"]}  # 30 MiB by the file: it would fit on both
    assert found(lab)["x:1"].resident_bytes == 90 * MIB
    await lab.serving.undeploy("x")
    tell(lab, large, 500)
    await lab.deploy("x", 0)  # every node on which it fits, as it was measured now
    assert places(lab) == {"x:1": ["large"]}
    await lab.serving.undeploy("x")
    with pytest.raises(
        Unavailable, match=r"1 of 2 .*a replica needs 90\.0 MiB, and no node has as much free: small 60"
    ):
        await lab.deploy("x", 2)


async def test_the_measured_size_is_kept_over_a_restart(lab: Lab, stack: AsyncExitStack) -> None:
    await joined(lab, stack, "a", 500, resident_mib=90)
    await lab.deploy("x")
    await lab.serving.undeploy("x")
    await lab.close()
    await lab.open(stack, "coordinator-again")
    tell(lab, lab.nodes["a"], 80)
    with pytest.raises(Unavailable, match=r"needs 90\.0 MiB"):
        await lab.deploy("x")
    assert found(lab) == {}


async def test_the_deployment_unused_for_longest_makes_room_and_comes_back_on_demand(
    lab: Lab, stack: AsyncExitStack
) -> None:
    node = await joined(lab, stack, "a", 250, resident_mib=100)
    await lab.deploy("x")
    await lab.deploy("y")
    tell(lab, node, 20)
    async with client(lab) as bus:
        await ask(bus, question(1, 2), "x")
        await asyncio.sleep(memory.RECENT_SECONDS)  # time must pass: nobody asks
        await lab.deploy("z")
        assert found(lab)["y:1"].state == "evicted"
        assert "evicted for z:1, whose replica needs 30.0 MiB: not asked for" in found(lab)["y:1"].reason
        tell(lab, node, 20)
        await asyncio.sleep(memory.RECENT_SECONDS)
        assert (await ask(bus, question(1, 2), "y")).model == "y:1"
        assert {name: info.state for name, info in found(lab).items()} == {
            "x:1": "evicted",
            "y:1": "ready",
            "z:1": "ready",
        }


async def test_a_deployment_in_use_or_with_a_least_number_is_never_evicted(lab: Lab, stack: AsyncExitStack) -> None:
    node = await joined(lab, stack, "a", 120, resident_mib=100)
    await lab.deploy("x", min_replicas=1, max_replicas=1)
    tell(lab, node, 20)
    await asyncio.sleep(memory.RECENT_SECONDS)
    with pytest.raises(Unavailable, match=r"no node has as much free: a 20\.0 MiB"):
        await lab.deploy("y")
    assert places(lab) == {"x:1": ["a"]}


async def test_a_request_that_waits_in_vain_is_told_why(lab: Lab, stack: AsyncExitStack) -> None:
    node = await joined(lab, stack, "a", 500, resident_mib=100)
    await lab.deploy("x", 1, idle_seconds=0.3)
    await eventually(lambda: found(lab)["x:1"].state == "idle")
    await eventually(lambda: not node.loaded)  # otherwise it may answer with the replica that it has
    tell(lab, node, 40)
    with pytest.raises(TimedOut, match=r"no replica is ready \(a replica needs 100\.0 MiB, .* a 40\.0 MiB\)"):
        await lab.inference.infer("x", question(1, 2).inputs, 1.0)


async def test_to_zero_when_nobody_asks_and_back_on_demand(lab: Lab, stack: AsyncExitStack) -> None:
    node = await joined(lab, stack, "a", 500, resident_mib=10)
    await lab.deploy("x", 1, idle_seconds=0.5)
    await eventually(lambda: found(lab)["x:1"].state == "idle")
    await eventually(lambda: not node.loaded)
    assert "no request for" in found(lab)["x:1"].reason
    async with client(lab) as bus:
        answers = await asyncio.gather(*(ask(bus, question(1, n), "x") for n in range(20)))
        assert {answer.model for answer in answers} == {"x:1"}
        await eventually(lambda: found(lab)["x:1"].state == "idle")
        await lab.close()  # at zero it stays at zero over a restart
        await lab.open(stack, "coordinator-again")
        assert found(lab)["x:1"].state == "idle"
        assert (await ask(bus, question(1, 2), "x")).model == "x:1"


async def test_too_many_requests_for_a_loading_model_are_told_when_to_come_back(
    lab: Lab, stack: AsyncExitStack
) -> None:
    node = await joined(lab, stack, "a", 500, resident_mib=10)
    await lab.deploy("x", 1, idle_seconds=0.3)
    await eventually(lambda: found(lab)["x:1"].state == "idle")
    node.slow_to_load = True
    async with client(lab) as bus:
        waiting = [asyncio.create_task(ask(bus, question(1, n), "x")) for n in range(lab.settings.queue_limit)]
        await eventually(lambda: found(lab)["x:1"].queued == lab.settings.queue_limit)
        with pytest.raises(Unavailable, match="x:1 in the queue already, which is being loaded") as refused:
            await ask(bus, question(1, 2), "x")
        assert refused.value.retry_after_seconds
        node.slow_to_load = False
        assert {answer.model for answer in await asyncio.gather(*waiting)} == {"x:1"}


async def test_more_replicas_while_requests_wait_and_fewer_when_they_do_not(
    lab: Lab, stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling, "UP_SECONDS", 0.3)
    monkeypatch.setattr(scaling, "DOWN_SECONDS", 0.6)
    monkeypatch.setattr(scaling, "BUSY_SMOOTHING_SECONDS", 0.1)
    for node_id in "abc":
        await joined(lab, stack, node_id, 500, resident_mib=10)
    await lab.deploy("x", 1, min_replicas=1, max_replicas=8, queue_seconds=0.05)
    router = lab.inference.router_of("x:1")
    assert len(found(lab)["x:1"].replicas) == 1
    monkeypatch.setattr(type(router), "queue_seconds", 1.0)
    monkeypatch.setattr(type(router), "busy", 1.0)
    await eventually(lambda: len(router.lanes) == 3)  # there are no more nodes
    assert found(lab)["x:1"].state == "ready"
    assert found(lab)["x:1"].max_replicas == 8
    await lab.close()
    await lab.open(stack, "coordinator-again")
    await eventually(lambda: len(lab.inference.router_of("x:1").lanes) == 3)
    monkeypatch.setattr(type(router), "queue_seconds", 0.0)
    monkeypatch.setattr(type(router), "busy", 0.1)
    await eventually(lambda: len(lab.inference.router_of("x:1").lanes) == 1)


async def test_contradicting_options_are_refused(lab: Lab, stack: AsyncExitStack) -> None:
    await joined(lab, stack, "a", 500, resident_mib=10)
    for options, said in (
        ({"min_replicas": 2}, "needs max_replicas"),
        ({"min_replicas": 3, "max_replicas": 2}, "is more than max_replicas"),
        ({"min_replicas": 1, "max_replicas": 2, "idle_seconds": 5.0}, "leave one out"),
        ({"rollback_factor": 0.5}, "above 1"),
    ):
        with pytest.raises(InvalidRequest, match=said):
            await lab.deploy("x", **options)
