"""Requests that are given up, that are late, and that have an objective: on a bus in memory, with scripted nodes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from coordinator.callers import Callers
from coordinator.serving.bus_requests import BusRequests
from potluck.bus.exchange import Envelope
from potluck.errors import Cancelled, InvalidRequest, NotAllowed, NotAuthenticated, TimedOut, Unavailable
from potluck.wire import tensors
from potluck.wire.questions import CancelInfer, Infer, Inferred
from potluck.wire.topics import Topics
from potluck.wire.values import Signature, TensorSpec
from support.eventually import eventually
from support.fake_bus import FakeBus
from support.serving_lab import TOPICS, Lab, ask, client, question


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as opened:
        yield opened


@pytest.fixture
async def lab(tmp_path: Path, stack: AsyncExitStack) -> Lab:
    made = Lab(tmp_path)
    await made.open(stack)
    return made


async def test_a_client_that_gives_up_gets_no_outputs_and_the_node_is_told(lab: Lab, stack: AsyncExitStack) -> None:
    node = await lab.join(stack, "a")
    lab.add_model()
    await lab.deploy("m")
    node.mute = True
    async with client(lab) as bus:
        message = replace(question(1, 2), id="q-1")
        asked = asyncio.create_task(ask(bus, message))
        await eventually(lambda: node.asked)
        other = replace(CancelInfer(id="q-1"), reply_to="clients/somebody-else")
        await bus.publish(TOPICS.infer("m"), other, qos=0)
        await bus.publish(TOPICS.infer("m"), CancelInfer(id="q-2", reply_to=TOPICS.client_inbox("client")), qos=0)
        assert not node.cancelled
        await bus.publish(TOPICS.infer("m"), CancelInfer(id="q-1", reply_to=TOPICS.client_inbox("client")), qos=0)
        with pytest.raises(Cancelled, match="cancelled"):
            await asked
        await eventually(lambda: node.cancelled == [node.asked[0].id])
        assert lab.bus_requests._asked == {}


async def test_a_question_asked_twice_while_it_waits_is_computed_once(lab: Lab, stack: AsyncExitStack) -> None:
    """A client asks again what may be lost. If it was not lost, one answer is enough."""
    node = await lab.join(stack, "a")
    lab.add_model()
    await lab.deploy("m")
    node.mute = True
    async with client(lab) as bus:
        asked = replace(question(1, 2), id="q-1", reply_to=TOPICS.client_inbox("client"))
        for _ in range(3):
            await bus.publish(TOPICS.infer("m"), asked, qos=0)
        await bus.publish(TOPICS.infer("m"), replace(asked, reply_to="clients/somebody-else"), qos=0)
        await eventually(lambda: len(lab.bus_requests._asked) == 2)
    router = lab.inference.router("m:1")
    assert router.in_flight + len(router.queue) == 2


async def test_a_question_of_the_gateway_that_is_given_up(lab: Lab, stack: AsyncExitStack) -> None:
    node = await lab.join(stack, "a")
    lab.add_model()
    await lab.deploy("m")
    node.mute = True
    asking = [asyncio.create_task(lab.inference.infer("m", question(n, n).inputs, 30)) for n in range(5)]
    await eventually(lambda: len(node.asked) == 2)
    router = lab.inference.router("m:1")
    assert len(router.queue) == 3
    for one in asking:
        one.cancel()
    await asyncio.wait(asking)
    assert all(one.cancelled() for one in asking)
    assert len(router.queue) == 0
    await eventually(lambda: set(node.cancelled) == {batch.id for batch in node.asked})


async def test_a_batch_that_is_late_is_asked_elsewhere_too(lab: Lab, stack: AsyncExitStack) -> None:
    nodes = [await lab.join(stack, "a"), await lab.join(stack, "b")]
    lab.add_model()
    await lab.deploy("m", 2)
    async with client(lab) as bus:
        for number in range(80):
            await ask(bus, question(number, number))
        nodes[0].mute = True
        answers = await asyncio.wait_for(asyncio.gather(*(ask(bus, question(n, n)) for n in range(8))), 5)
    assert [float(tensors.to_numpy(answer.outputs[0])[0, 0]) for answer in answers] == [2.0 * n for n in range(8)]
    assert nodes[0].asked
    await eventually(lambda: set(nodes[0].cancelled) >= {batch.id for batch in nodes[0].asked})


async def test_an_objective_reaches_the_router_and_the_nodes_and_outlives_a_restart(
    lab: Lab, stack: AsyncExitStack
) -> None:
    node = await lab.join(stack, "a")
    lab.add_model()
    await lab.deploy("m", objective_seconds=0.05)
    assert lab.serving.deployments()[0].objective_seconds == 0.05
    await lab.close()
    await lab.open(stack, "coordinator-again")
    await eventually(lambda: lab.serving.deployments() and lab.serving.ready("m"))
    assert lab.inference.router("m").objective_seconds == 0.05
    await lab.deploy("m", objective_seconds=0.2)
    node.mute = True
    asking = asyncio.create_task(lab.inference.infer("m", question(1, 1).inputs, 30))
    await eventually(lambda: node.asked)
    assert node.asked[0].objective_seconds == 0.2
    asking.cancel()
    await asyncio.wait([asking])


@pytest.mark.parametrize(
    ("specs", "given", "sent"),
    [
        ({"x": ("FP32", (-1, 2))}, {"": np.zeros(2, np.float32)}, [(1, 2)]),
        ({"x": ("FP32", (-1, 2))}, {"x": np.zeros((3, 2), np.float32)}, [(3, 2)]),
        ({"x": ("BYTES", (-1,))}, {"x": np.array("a", object)}, [(1,)]),
        ({"x": ("BYTES", (-1, 1))}, {"x": np.array("a", object)}, [(1,)]),
        ({"x": ("BYTES", (-1, 1))}, {"x": np.array(["a", "b"], object)}, [(2,)]),
        ({"a": ("FP32", (-1,)), "b": ("FP32", (-1, 2))}, {"b": np.zeros(2, "f4"), "a": np.array(1.0, "f4")}, [(1, 2), (1,)]),
        ({"a": ("FP32", (-1,)), "b": ("FP32", (-1, 2))}, {"b": np.zeros((1, 2), "f4"), "a": np.array(1.0, "f4")}, None),
    ],
)  # fmt: skip
async def test_a_single_item_gets_the_batch_axis_that_it_lacks(
    lab: Lab, stack: AsyncExitStack, specs: Any, given: dict[str, Any], sent: list[tuple[int, ...]] | None
) -> None:
    """All of its tensors get one, or the request is refused as it came."""
    node = await lab.join(stack, "a")
    inputs = [TensorSpec(name=name, datatype=datatype, shape=shape) for name, (datatype, shape) in specs.items()]
    node.signature = Signature(inputs=tuple(inputs), outputs=())
    lab.add_model()
    await lab.deploy("m")
    node.mute = True
    async with client(lab) as bus:
        message = Infer(inputs=tuple([tensors.from_numpy(name, array) for name, array in given.items()]))
        if sent is None:
            with pytest.raises(InvalidRequest, match=r"takes FP32 of shape \(any\)"):
                await ask(bus, message)
            return
        asked = asyncio.create_task(ask(bus, message))
        await eventually(lambda: node.asked)
        assert [tensor.shape for tensor in node.asked[0].requests[0]] == sent
        asked.cancel()
        await asyncio.wait([asked])


@pytest.mark.parametrize("ahead_seconds", [3600.0, -3600.0])
async def test_a_wrong_clock_does_not_harm_clients_that_say_how_long_they_wait(
    tmp_path: Path, stack: AsyncExitStack, ahead_seconds: float
) -> None:
    lab = Lab(tmp_path)
    lab.clock_ahead_seconds = ahead_seconds
    await lab.open(stack)
    node = await lab.join(stack, "a")
    lab.add_model()
    await lab.deploy("m")
    async with client(lab) as bus:
        asked = replace(question(1, 2), expires=time.time() + 5, valid_seconds=5.0)
        assert (await ask(bus, asked)).model == "m:1"
        if ahead_seconds > 0:
            with pytest.raises(TimedOut, match=r"3[56]\d\d s after its time was up .* by the coordinator's clock"):
                await ask(bus, replace(asked, valid_seconds=0.0))
        node.mute = True
        with pytest.raises(TimedOut, match="no answer in time"):
            await ask(bus, replace(asked, valid_seconds=0.3))
        # The node, too, gets a duration and not a time of day.
        assert 0.0 < node.asked[0].valid_seconds <= 0.3


async def test_a_stop_answers_what_was_taken_and_takes_no_more(lab: Lab, stack: AsyncExitStack) -> None:
    node = await lab.join(stack, "a")
    lab.add_model()
    await lab.deploy("m")
    node.mute = True
    async with client(lab) as bus:
        asked = [asyncio.create_task(ask(bus, question(n, n))) for n in range(3)]
        await eventually(lambda: len(node.asked) == 2 and len(lab.inference.router("m:1").queue) == 1)
        stopping = asyncio.create_task(lab.inference.drained())
        await eventually(lambda: lab.inference.stopping)
        with pytest.raises(Unavailable, match="stopping"):
            await lab.inference.infer("m", question(1, 2).inputs, 30)
        # Our clients ask the next coordinator again: an error would end that.
        with pytest.raises(TimedOut):
            await bus.request(TOPICS.infer("m"), question(1, 2), timeout_seconds=0.1)
        assert not stopping.done()
        node.mute = False
        for batch in node.asked:
            node.on_command(Envelope(topic=TOPICS.node("a", "inbox"), message=batch))
        assert len(await asyncio.gather(*asked)) == 3
        await asyncio.wait_for(stopping, 5)


async def test_what_is_not_answered_by_the_end_of_a_stop_is_refused(lab: Lab, stack: AsyncExitStack) -> None:
    node = await lab.join(stack, "a")
    lab.add_model()
    await lab.deploy("m")
    node.mute = True
    over_http = [asyncio.create_task(lab.inference.infer("m", question(n, n).inputs, 30)) for n in range(3)]
    async with client(lab) as bus:
        over_the_bus = asyncio.create_task(ask(bus, question(1, 2)))
        await eventually(lambda: len(lab.bus_requests._asked) == 1)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(lab.inference.drained(), 0.05)
        lab.inference.give_up()
        for one in over_http:
            with pytest.raises(Unavailable, match="stopped before m:1 answered"):
                await one
        await lab.answers.drained()
        assert not over_the_bus.done(), "its client asks the next coordinator"
        over_the_bus.cancel()
        await asyncio.wait([over_the_bus])


async def test_in_a_closed_cluster_a_member_that_may_gets_its_own_answers(lab: Lab, stack: AsyncExitStack) -> None:
    node = await lab.join(stack, "a")
    lab.add_model()
    await lab.deploy("m")
    members = {"client:ann": "user", "client:vic": "viewer"}
    asked = BusRequests(
        lab.inference,
        topics=TOPICS,
        outbox=lab.answers,
        settings=lab.settings,
        callers=Callers(members.get),
    )
    lab.bus.subscribe_asked({TOPICS.infer("+"): asked.on_infer})
    buses = {}
    for name in ("ann", "vic", "eve"):
        topics = Topics(TOPICS.cluster, name)
        bus = buses[name] = FakeBus(lab.broker, topics, client_id=f"{name}-1")
        running = asyncio.create_task(bus.run())
        stack.callback(running.cancel)
        await bus.connected(5)

    async def infer(name: str) -> list[list[float]]:
        bus = buses[name]
        answer = await bus.request(bus.topics.infer("m"), replace(question(1, 2), id="q-1"), timeout_seconds=10)
        assert isinstance(answer, Inferred)
        found: list[list[float]] = tensors.to_numpy(answer.outputs[0]).tolist()
        return found

    assert await infer("ann") == [[2, 4]]
    with pytest.raises(NotAllowed, match="needs the role 'user'"):
        await infer("vic")
    with pytest.raises(NotAuthenticated, match="client:eve is no member"):
        await infer("eve")
    node.mute = True
    waiting = asyncio.create_task(infer("ann"))
    await eventually(lambda: len(asked._asked) == 1)
    members["client:eve"] = "operator"
    cancel = CancelInfer(id="q-1", reply_to=buses["ann"].topics.client_inbox("ann-1"))
    await buses["eve"].publish(buses["eve"].topics.infer("m"), cancel)
    await eventually(lambda: lab.bus.counters["refused_replies"] == 1)
    assert not waiting.done(), "nobody gives up what another asked"
    await buses["ann"].publish(buses["ann"].topics.infer("m"), cancel)
    with pytest.raises(Cancelled):
        await waiting
