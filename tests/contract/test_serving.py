"""Serving on a bus in memory, with scripted nodes: deploy, ask, lose, replace."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.serving.inputs import size_bytes
from potluck.bus.exchange import Envelope
from potluck.errors import (
    BadMessage,
    Cancelled,
    InvalidModel,
    InvalidRequest,
    NotFound,
    TimedOut,
    TooLarge,
    Unavailable,
)
from potluck.wire import codec, tensors
from potluck.wire.jobs import Deploy
from potluck.wire.questions import Infer, ListNodes
from potluck.wire.reports import InferenceFinished, ModelLoaded, ModelLoadFailed, ModelUnloaded, RequestOutcome
from potluck.wire.values import BlobRef, ErrorInfo, Signature, Tensor, TensorSpec
from support.eventually import eventually
from support.serving_lab import SIGNATURE, TOPICS, Lab, ask, client, question


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as opened:
        yield opened


@pytest.fixture
async def lab(tmp_path: Path, stack: AsyncExitStack) -> Lab:
    made = Lab(tmp_path)
    await made.open(stack)
    return made


async def test_deploy_and_ask_in_both_encodings(lab: Lab, stack: AsyncExitStack) -> None:
    await lab.join(stack, "a")
    await lab.join(stack, "b")
    lab.add_model()
    assert await lab.deploy("m", 2) == "m:1"
    (info,) = lab.serving.deployments()
    assert [replica.state for replica in info.replicas] == ["ready", "ready"]
    assert lab.registry.model("m").signature == SIGNATURE
    async with client(lab) as bus:
        lab.registry.set_alias("m:1", "prod")
        for model in ("m", "m:1", "m:prod"):
            answer = await ask(bus, question(1, 2), model)
            assert answer.model == "m:1"
            np.testing.assert_array_equal(tensors.to_numpy(answer.outputs[0]), [[2, 4]])
        spoken = await ask(bus, question(1, 2), encoding="json")
        assert spoken.outputs[0].data == [2.0, 4.0]


async def test_many_questions_share_batches(lab: Lab, stack: AsyncExitStack) -> None:
    node = await lab.join(stack, "a")
    lab.add_model()
    await lab.deploy("m", 1)
    async with client(lab) as bus:
        answers = await asyncio.gather(*(ask(bus, question(n, n)) for n in range(40)))
    assert [float(tensors.to_numpy(answer.outputs[0])[0, 0]) for answer in answers] == [2.0 * n for n in range(40)]
    assert sum(node.batches) == 40
    assert len(node.batches) < 40


async def test_a_model_ended_by_another_is_back_at_once_and_one_that_ends_engines_is_given_up(
    lab: Lab, stack: AsyncExitStack
) -> None:
    node = await lab.join(stack, "a")
    lab.add_model()
    await lab.deploy("m", 1)
    died = ErrorInfo(code="engine_failed", message="another model's doing", retryable=True)
    began = time.monotonic()
    lab.serving.on_node_event("a", ModelUnloaded(replica_id=node.loaded[-1], error=died))
    await eventually(lambda: len(node.loaded) == 2)
    assert time.monotonic() - began < 1.0
    crashed = ErrorInfo(code="model_crashed", message="a batch took more than 60 s", retryable=True)
    for _ in range(3):
        lab.serving.on_node_event("a", ModelUnloaded(replica_id=node.loaded[-1], error=crashed))
        (info,) = lab.serving.deployments()
        if info.state == "failing":
            break
        lab.serving._deployments["m:1"].resting.clear()  # it would be left alone for some seconds
        loaded = len(node.loaded)
        await eventually(lambda loaded=loaded: len(node.loaded) > loaded)  # type: ignore[misc]
        await eventually(lambda: lab.serving._deployments["m:1"].ready)
    (info,) = lab.serving.deployments()
    assert info.state == "failing"
    assert "3 times within an hour" in info.reason
    assert "a batch took more than 60 s" in info.reason
    async with client(lab) as bus:
        with pytest.raises(Unavailable, match="m:1 has no replica: the model made its engine die 3 times"):
            await ask(bus, question(1, 2))
    node.loaded.clear()
    await lab.deploy("m", 1)  # begins anew
    assert node.loaded


async def test_a_lost_replica_is_replaced_and_its_questions_are_asked_again(lab: Lab, stack: AsyncExitStack) -> None:
    first = await lab.join(stack, "a")
    lab.add_model()
    await lab.deploy("m", 1)
    second = await lab.join(stack, "b")
    first.mute = True
    async with client(lab) as bus:
        asked = asyncio.create_task(ask(bus, question(3, 4)))
        await eventually(lambda: lab.inference.router("m:1").in_flight)
        lab.leave("a")
        np.testing.assert_array_equal(tensors.to_numpy((await asked).outputs[0]), [[6, 8]])
    assert second.loaded


async def test_a_model_that_cannot_be_loaded_says_why(lab: Lab, stack: AsyncExitStack) -> None:
    node = await lab.join(stack, "a")
    node.broken = True
    lab.add_model()
    with pytest.raises(InvalidModel, match="Lambda"):
        await lab.deploy("m", 1)
    assert lab.serving.deployments() == ()


@pytest.mark.parametrize("first", ["a", "b"])
async def test_more_replicas_than_nodes_that_can_load_it(lab: Lab, stack: AsyncExitStack, first: str) -> None:
    """Either node may come first: the one that can load it, or the one that cannot."""
    nodes = {name: await lab.join(stack, name) for name in "ab"}
    nodes["a"].broken = True
    nodes[first].slow_to_load = True
    lab.add_model()
    asked = asyncio.create_task(lab.deploy("m", 2))
    await eventually(
        lambda: (
            "m:1" in lab.serving._deployments
            and lab.serving._deployments["m:1"].refused.keys()
            | {replica.node_id for replica in lab.serving._deployments["m:1"].ready}
        )
    )
    nodes[first].slow_to_load = False
    with pytest.raises(InvalidModel, match=r"1 of 2 replicas of m:1 is ready, and 1 node cannot have it: .*Lambda"):
        await asked
    (info,) = lab.serving.deployments()
    assert [replica.node_id for replica in info.replicas if replica.state == "ready"] == ["b"]
    async with client(lab) as bus:
        await ask(bus, question(1, 2), "m:1")


async def test_a_node_says_nothing_of_the_replicas_of_another(lab: Lab, stack: AsyncExitStack) -> None:
    for name in ("a", "b"):
        await lab.join(stack, name)
    lab.add_model()
    await lab.deploy("m", 1)
    (replica,) = lab.serving._deployments["m:1"].ready
    liar = "b" if replica.node_id == "a" else "a"
    crashed = ErrorInfo(code="model_crashed", message="so they say", retryable=True)
    for _ in range(3):
        lab.serving.on_node_event(liar, ModelUnloaded(replica_id=replica.replica_id, error=crashed))
        lab.serving.on_node_event(liar, ModelLoadFailed(replica_id=replica.replica_id, error=crashed))
        lab.serving.on_node_event(
            liar, ModelLoaded(replica_id=replica.replica_id, signature=SIGNATURE, resident_bytes=2**50)
        )
    lab.nodes[replica.node_id].mute = True
    async with client(lab) as bus:
        asked = asyncio.create_task(ask(bus, question(1, 2)))
        await eventually(lambda: lab.nodes[replica.node_id].asked)
        batch = lab.nodes[replica.node_id].asked[0]
        forged = RequestOutcome(outputs=question(6, 6).inputs)
        lab.inference.on_answers(liar, InferenceFinished(id=batch.id, replica_id=batch.replica_id, outcomes=(forged,)))
        lab.nodes[replica.node_id].mute = False
        lab.nodes[replica.node_id].on_command(Envelope("", batch))
        np.testing.assert_array_equal(tensors.to_numpy((await asked).outputs[0]), [[2, 4]])
    (info,) = lab.serving.deployments()
    assert (info.state, info.resident_bytes) == ("ready", 0)
    lab.serving.on_node_event(
        replica.node_id, ModelLoaded(replica_id=replica.replica_id, signature=SIGNATURE, resident_bytes=2**50)
    )
    assert lab.serving.deployments()[0].resident_bytes == 0, "no machine has so much"


async def test_an_impossible_signature_is_a_failure_of_its_node(lab: Lab, stack: AsyncExitStack) -> None:
    odd = await lab.join(stack, "a")
    odd.signature = Signature(inputs=(TensorSpec(name="x", datatype="FP31", shape=(-1, 2)),), outputs=())
    lab.add_model()
    asked = asyncio.create_task(lab.deploy("m", 1))

    def told() -> bool:
        error = deployment.error if (deployment := lab.serving._deployments.get("m:1")) is not None else None
        return error is not None and error.message == "node a: the signature has the datatype 'FP31'"

    await eventually(told)
    await lab.serving.undeploy("m")
    with pytest.raises(Cancelled):
        await asked
    assert lab.registry.model("m").signature is None


async def test_a_model_that_could_not_be_warmed_up_is_deployed_and_says_so(lab: Lab, stack: AsyncExitStack) -> None:
    await lab.join(stack, "a")  # this node warms up nothing
    lab.add_model()
    await lab.deploy("m", 1)
    assert "its first request shows whether it runs" in lab.serving.deployments()[0].reason
    async with client(lab) as bus:
        await ask(bus, question(1, 1))
    assert lab.serving.deployments()[0].reason == ""


async def test_more_replicas_than_nodes(lab: Lab, stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.serving.serving.JOIN_SECONDS", 0.3)
    await lab.join(stack, "a")
    lab.add_model()
    with pytest.raises(InvalidRequest, match="2 replicas are asked for, but 1 node with"):
        await lab.deploy("m", 2)


async def test_who_is_ready_answers_while_a_slow_node_loads_and_the_job_says_so(
    lab: Lab, stack: AsyncExitStack
) -> None:
    await lab.join(stack, "quick")
    slow = await lab.join(stack, "slow")
    slow.slow_to_load = True
    lab.add_model()
    said: list[str] = []
    deploying = asyncio.create_task(lab.serving.deploy(Deploy(model="m", replicas=2), said.append))
    async with client(lab) as bus:
        await eventually(lambda: said and said[-1].startswith("m:1 on quick is ready and answers to m; "))
        assert said[-1].endswith(" on slow")
        assert (await ask(bus, question(1, 2))).model == "m:1"
    assert not deploying.done()  # two were asked for
    slow.slow_to_load = False
    assert await deploying == "m:1"
    assert len(lab.serving.deployments()[0].replicas) == 2


async def test_undeploy_answers_who_waits(lab: Lab, stack: AsyncExitStack) -> None:
    node = await lab.join(stack, "a")
    lab.add_model()
    await lab.deploy("m", 1)
    node.mute = True
    async with client(lab) as bus:
        asked = asyncio.create_task(ask(bus, question(1, 1)))
        await eventually(lambda: lab.inference.router("m:1").in_flight)
        assert await lab.serving.undeploy("m") == ("m:1",)
        with pytest.raises(Unavailable, match="undeployed"):
            await asked
        await eventually(lambda: not node.loaded)
        with pytest.raises(NotFound, match="potluck deploy m"):
            await ask(bus, question(1, 1))
    with pytest.raises(NotFound, match="not deployed"):
        await lab.serving.undeploy("m")


async def test_the_newest_deployed_version_answers_to_the_plain_name(lab: Lab, stack: AsyncExitStack) -> None:
    await lab.join(stack, "a")
    lab.add_model(1)
    lab.add_model(2)
    await lab.deploy("m:1", 1)
    async with client(lab) as bus:
        assert (await ask(bus, question(1, 1))).model == "m:1"
        await lab.deploy("m:2", 1)
        assert (await ask(bus, question(1, 1))).model == "m:2"
        assert (await ask(bus, question(1, 1), "m:1")).model == "m:1"


async def test_deployments_are_taken_up_again_after_a_restart(lab: Lab, stack: AsyncExitStack) -> None:
    await lab.join(stack, "a")
    lab.add_model()
    await lab.deploy("m", 1)
    await lab.close()
    await lab.open(stack, "coordinator-again")
    await eventually(lambda: lab.serving.deployments() and lab.serving.ready("m"))
    async with client(lab) as bus:
        assert (await ask(bus, question(1, 1))).model == "m:1"


async def test_an_upgrade_leaves_no_gap(lab: Lab, stack: AsyncExitStack) -> None:
    """The plain name goes on to mean the old version until the new one has been ready."""
    node = await lab.join(stack, "a")
    lab.add_model(1)
    lab.add_model(2)
    await lab.deploy("m:1", 1)
    node.slow_to_load = True
    async with client(lab) as bus:
        upgrading = asyncio.create_task(lab.deploy("m:2", 1))
        await eventually(lambda: len(lab.serving.deployments()) == 2)
        assert (await ask(bus, question(1, 1))).model == "m:1"
        node.slow_to_load = False
        assert await upgrading == "m:2"
        assert (await ask(bus, question(1, 1))).model == "m:2"
        await lab.serving.undeploy("m:2")
        assert (await ask(bus, question(1, 1))).model == "m:1"


async def test_a_failed_change_leaves_what_works(lab: Lab, stack: AsyncExitStack) -> None:
    await lab.join(stack, "a")
    lab.add_model()
    await lab.deploy("m", 1)
    second = await lab.join(stack, "b")
    second.broken = True
    with pytest.raises(InvalidModel, match=r"1 of 2 replicas of m:1 is ready, and 1 node cannot have it: .*Lambda"):
        await lab.deploy("m", 2)
    async with client(lab) as bus:
        assert (await ask(bus, question(1, 1))).model == "m:1"
    second.broken = False
    assert await lab.deploy("m", 1) == "m:1"


async def test_nodes_that_are_lost_while_it_loads(
    lab: Lab, stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.serving.serving.JOIN_SECONDS", 0.3)
    await lab.join(stack, "a")
    second = await lab.join(stack, "b")
    second.slow_to_load = True
    lab.add_model()
    deploying = asyncio.create_task(lab.deploy("m", 2))
    await eventually(lambda: lab.serving.deployments() and lab.serving.ready("m"))
    lab.leave("b")
    with pytest.raises(Unavailable, match=r"1 of 2 replicas of m:1 is ready, and only 1 node with"):
        await deploying
    assert lab.serving.ready("m")  # what there is stays, and another node completes it
    await lab.join(stack, "c")
    await eventually(lambda: len(lab.inference.router("m:1").lanes) == 2)


async def test_undeployed_while_it_loads(lab: Lab, stack: AsyncExitStack) -> None:
    node = await lab.join(stack, "a")
    node.slow_to_load = True
    lab.add_model()
    deploying = asyncio.create_task(lab.deploy("m", 1))
    await eventually(lab.serving.deployments)
    await lab.serving.undeploy("m")
    node.slow_to_load = False
    again = asyncio.create_task(lab.deploy("m", 1))
    with pytest.raises(Cancelled, match="undeployed"):
        await deploying
    assert await again == "m:1"


async def test_a_replica_that_its_node_does_not_know_is_replaced(lab: Lab, stack: AsyncExitStack) -> None:
    first = await lab.join(stack, "a")
    lab.add_model()
    await lab.deploy("m", 1)
    await lab.join(stack, "b")
    first.forgetful = True
    async with client(lab) as bus:
        answer = await ask(bus, question(1, 2))
    np.testing.assert_array_equal(tensors.to_numpy(answer.outputs[0]), [[2, 4]])
    assert [replica.node_id for replica in lab.serving.deployments()[0].replicas] == ["b"]


async def test_the_error_of_a_replica_is_told(lab: Lab, stack: AsyncExitStack) -> None:
    node = await lab.join(stack, "a")
    lab.add_model()
    await lab.deploy("m", 1)
    node.failing = ErrorInfo(code="unavailable", message="no holder has the blob", retryable=True)
    with pytest.raises(Unavailable, match="4 attempts on its replicas: no holder has the blob"):
        await lab.inference.infer("m", question(1, 2).inputs, 30)


async def test_replicas_on_a_node_are_adopted_after_a_restart_and_the_rest_goes(
    lab: Lab, stack: AsyncExitStack
) -> None:
    node = await lab.join(stack, "a")
    lab.add_model()
    await lab.deploy("m", 1)
    await lab.close()
    node.loaded = ["m:1/a/7", "gone:3/a/1"]
    lab.nodes.clear()
    await lab.open(stack, "coordinator-again")
    lab.nodes["a"] = node
    lab.report("a", ("m:1/a/7", "gone:3/a/1"))
    await eventually(lambda: lab.serving.deployments() and lab.serving.ready("m"))
    await eventually(lambda: node.loaded == ["m:1/a/7", "m:1/a/7"])  # it was asked to load it, and said that it has it
    lab.report("a", ("m:1/a/7", "m:1/a/3"))  # and one that is too many
    await eventually(lambda: "m:1/a/3" in node.unloaded)
    assert "m:1/a/7" not in node.unloaded


async def test_impossible_requests_are_refused_at_once(lab: Lab, stack: AsyncExitStack) -> None:
    node = await lab.join(stack, "a")
    lab.add_model()
    await lab.deploy("m", 1)

    def listed(datatype: str, shape: tuple[int, ...], data: list[Any]) -> Infer:
        return Infer(inputs=(Tensor(name="x", datatype=datatype, shape=shape, data=data),))

    async with client(lab) as bus:
        for message, error, said in (
            (Infer(inputs=()), InvalidRequest, "at least one"),
            (listed("FP31", (1,), [1]), InvalidRequest, "FP31"),
            (listed("INT32", (1, 2), [1.5, 2]), InvalidRequest, "does not fit INT32"),
            (listed("FP32", (2**53, 2**53, 0), []), InvalidRequest, "cannot have shape"),
            (listed("FP32", (1,) * 64, [1.0]), InvalidRequest, "the request has"),
            (listed("FP32", (1,) * 65, [1.0]), BadMessage, "length <= 64"),
            (listed("BYTES", (2,), ["a", 1]), InvalidRequest, "list of strings"),
            (listed("FP64", (1, 50_000), [0] * 50_000), TooLarge, "send fewer rows"),
            (listed("FP32", (1, 3), [1, 2, 3]), InvalidRequest, "the request has"),
            (listed("FP32", (0, 2), []), InvalidRequest, "at least one"),
        ):
            with pytest.raises(error, match=said):
                await ask(bus, message)
        assert node.batches == []
        # Short as JSON text, and long as numbers in msgpack: as bytes, both fit.
        asked = [ask(bus, listed("FP32", (15_000, 2), [[0.5, 0.5]] * 15_000), encoding="json") for _ in range(6)]
        answers = await asyncio.gather(*asked)
        assert {answer.outputs[0].shape for answer in answers} == {(15_000, 2)}
        with pytest.raises(InvalidRequest, match="ListNodes"):
            await bus.request(TOPICS.infer("m"), ListNodes(), timeout_seconds=10)


_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=50)


@given(
    name=_TEXT,
    datatype=_TEXT,
    shape=st.lists(st.integers(0, 2**53), max_size=40),
    data=st.binary(max_size=300)
    | st.lists(_TEXT, max_size=20)
    | st.builds(BlobRef, sha256=st.just("0" * 64), size=st.integers(0, 2**53), holders=st.tuples(_TEXT, _TEXT, _TEXT)),
)
def test_no_tensor_takes_more_than_it_is_counted_for(
    name: str, datatype: str, shape: list[int], data: bytes | list[str] | BlobRef
) -> None:
    """A batch that grew beyond a message would be lost, with the requests of others in it."""
    tensor = Tensor(name=name, datatype=datatype, shape=tuple(shape), data=data)
    assert len(codec.pack(tensor)) <= size_bytes(tensor)


async def test_the_deadline_also_ends_requests_that_a_node_has(lab: Lab, stack: AsyncExitStack) -> None:
    node = await lab.join(stack, "a")
    lab.add_model()
    await lab.deploy("m", 1)
    node.mute = True
    async with client(lab) as bus:
        started = time.monotonic()
        with pytest.raises(TimedOut, match="no answer in time"):
            await bus.request(
                TOPICS.infer("m"), Infer(inputs=question(1, 2).inputs, expires=time.time() + 0.3), timeout_seconds=10
            )
        assert time.monotonic() - started < 3


async def test_names_that_nobody_knows_do_not_fill_the_metrics(lab: Lab, stack: AsyncExitStack) -> None:
    async with client(lab) as bus:
        for number in range(20):
            with pytest.raises(NotFound):
                await ask(bus, question(1), f"nothing-{number}")
    assert list(lab.inference.metrics.answers) == [("", "not_found")]
