"""Versions replace each other on a bus in memory: swaps under load, canaries, shadows, and what is withdrawn."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from potluck.errors import Conflict, InvalidRequest, NotFound, PotluckError
from potluck.wire.questions import DeploymentInfo
from potluck.wire.values import ErrorInfo
from support.eventually import eventually
from support.fake_bus import FakeBus
from support.serving_lab import Lab, Node, ask, client, question

FAILS = ErrorInfo(code="model_failed", message="the model failed on this input")


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as opened:
        yield opened


@pytest.fixture
async def lab(tmp_path: Path, stack: AsyncExitStack) -> Lab:
    """With three versions of m, of which the first is deployed on node a."""
    made = Lab(tmp_path)
    await made.open(stack)
    await made.join(stack, "a")
    for number in (1, 2, 3):
        made.add_model(number)
    await made.deploy("m:1")
    return made


@pytest.fixture
def node(lab: Lab) -> Node:
    return lab.nodes["a"]


def found(lab: Lab) -> dict[str, DeploymentInfo]:
    return {info.name: info for info in lab.serving.deployments()}


def roles(lab: Lab) -> dict[str, str]:
    return {info.name: info.role or info.state for info in lab.serving.deployments()}


def only(lab: Lab, name: str) -> bool:
    """Whether this is all there is, and stable. Raises AssertionError that says what there is."""
    assert roles(lab) == {name: "stable"}, [
        (info.name, info.role, info.state, info.reason) for info in found(lab).values()
    ]
    return True


async def answers(bus: FakeBus, count: int, model: str = "m") -> Counter[str]:
    """Ask `count` questions. Counts the answers by version, or by error."""

    async def one() -> str:
        try:
            return (await ask(bus, question(1, 2), model)).model
        except PotluckError as error:
            return error.code

    return Counter([await one() for _ in range(count)])


@asynccontextmanager
async def load(lab: Lab, bus: FakeBus) -> AsyncIterator[Counter[str]]:
    """Questions by four clients without a pause; the counter says who answered."""
    seen: Counter[str] = Counter()
    stop = asyncio.Event()

    async def go_on() -> None:
        while not stop.is_set():
            seen.update(await answers(bus, 1))

    asking = [asyncio.create_task(go_on()) for _ in range(4)]
    try:
        yield seen
    finally:
        stop.set()
        await asyncio.wait(asking)


async def test_a_new_version_replaces_the_old_one_without_a_failed_request(lab: Lab, node: Node) -> None:
    async with client(lab) as bus:
        async with load(lab, bus) as seen:
            await eventually(lambda: seen["m:1"] > 20)
            node.slow_to_load = True
            # A request that is slow because this machine is busy must not cause a rollback here: other tests are about that.
            deploying = asyncio.create_task(lab.deploy("m:2", watch_seconds=0.2, rollback_factor=1000))
            await eventually(lambda: len(lab.serving.deployments()) == 2)
            node.slow_to_load = False
            assert await deploying == "m:2"
            before = seen["m:1"]
            await eventually(lambda: only(lab, "m:2"))
            await eventually(lambda: seen["m:2"] > 20)
        assert set(seen) == {"m:1", "m:2"}
        assert seen["m:1"] <= before + 4  # who was on the way
        assert [one.split("/")[0] for one in node.loaded] == ["m:2"]
        with pytest.raises(NotFound, match="deploy m:1"):
            await ask(bus, question(1, 2), "m:1")


async def test_the_old_version_answers_its_requests_before_it_goes(lab: Lab, node: Node) -> None:
    async with client(lab) as bus:
        node.mute = True
        asked = asyncio.create_task(ask(bus, question(1, 2)))
        await eventually(lambda: lab.inference.router("m:1").in_flight)
        await lab.deploy("m:2", watch_seconds=0)
        await eventually(lambda: roles(lab) == {"m:1": "retired", "m:2": "stable"})
        with pytest.raises(NotFound):
            await ask(bus, question(1, 2), "m:1")
        node.mute = False
        replica_id = found(lab)["m:1"].replicas[0].replica_id
        lab.inference.remove_replica(replica_id)
        lab.inference.add_replica("m:1", lab.endpoint(replica_id, "a"))  # it is asked again
        assert (await asked).model == "m:1"
        await eventually(lambda: roles(lab) == {"m:2": "stable"})


async def test_keep_leaves_the_old_version_to_be_asked_by_its_name(lab: Lab) -> None:
    await lab.deploy("m:2", keep=True, watch_seconds=0)
    assert roles(lab) == {"m:1": "ready", "m:2": "stable"}
    async with client(lab) as bus:
        assert await answers(bus, 3) == {"m:2": 3}
        assert await answers(bus, 3, "m:1") == {"m:1": 3}
    await lab.deploy("m:1")  # and back
    assert roles(lab) == {"m:1": "stable", "m:2": "previous"}


async def test_a_canary_gets_its_share_until_it_is_promoted(lab: Lab, stack: AsyncExitStack) -> None:
    await lab.deploy("m:2", canary=10)
    assert {name: info.weight for name, info in found(lab).items()} == {"m:1": 90, "m:2": 10}
    async with client(lab) as bus:
        assert abs((await answers(bus, 100))["m:2"] - 10) <= 2
        assert await answers(bus, 5, "m:2") == {"m:2": 5}
        await lab.deploy("m:2", canary=40)
        assert abs((await answers(bus, 100))["m:2"] - 40) <= 2
        await lab.close()  # a restart keeps it
        await lab.open(stack, "coordinator-again")
        await eventually(lambda: lab.serving.ready("m:1") and lab.serving.ready("m:2"))
        assert abs((await answers(bus, 100))["m:2"] - 40) <= 2
        lab.serving.promote("m")
        assert roles(lab) == {"m:1": "previous", "m:2": "stable"}
        assert await answers(bus, 10) == {"m:2": 10}
        lab.serving.roll_back("m")
        assert roles(lab) == {"m:1": "stable", "m:2": "withdrawn"}
        assert await answers(bus, 10) == {"m:1": 10}
    with pytest.raises(Conflict, match="no canary"):
        lab.serving.promote("m")
    with pytest.raises(Conflict, match="no version before"):
        lab.serving.roll_back("m")


async def test_a_canary_that_fails_is_withdrawn_and_says_why(lab: Lab, node: Node) -> None:
    await lab.deploy("m:2", canary=50)
    node.failing, node.fails = FAILS, "m:2"
    async with client(lab) as bus:
        assert (await answers(bus, 60))["m:1"] >= 25
        await eventually(lambda: found(lab)["m:2"].state == "withdrawn")
        assert await answers(bus, 20) == {"m:1": 20}
        assert "100.0% of its answers failed" in found(lab)["m:2"].reason
        await eventually(lambda: not found(lab)["m:2"].replicas)
        node.failing = None
        assert await answers(bus, 1, "m:2") == {"m:2": 1}  # by its own name it is loaded again
        assert found(lab)["m:2"].p50_seconds > 0
    await lab.deploy("m:2", canary=20)
    assert found(lab)["m:2"].role == "canary"
    # Requests from before do not count.
    assert (found(lab)["m:2"].p50_seconds, found(lab)["m:2"].failure_rate) == (0.0, 0.0)


async def test_a_version_that_does_worse_than_the_one_before_gives_way_to_it(lab: Lab, node: Node) -> None:
    async with client(lab) as bus:
        await answers(bus, 30)
        await lab.deploy("m:2")
        assert roles(lab) == {"m:1": "previous", "m:2": "stable"}
        node.failing, node.fails = FAILS, "m:2"
        assert await answers(bus, 30)
        await eventually(lambda: roles(lab) == {"m:1": "stable", "m:2": "withdrawn"})
        assert await answers(bus, 10) == {"m:1": 10}
        await lab.deploy("m:3", rollback_factor=0)  # nobody watches
        node.fails = "m:3"
        await eventually(lambda: roles(lab) == {"m:2": "withdrawn", "m:3": "stable"})


async def test_requests_that_contradict_the_signature_are_refused_and_count_against_no_version(
    lab: Lab, node: Node
) -> None:
    async with client(lab) as bus:
        await answers(bus, 30)
        await lab.deploy("m:2")
        batches = len(node.batches)
        for _ in range(60):
            with pytest.raises(InvalidRequest, match=r"shape \(any, 2\) .*the request has \(1, 7\)"):
                await ask(bus, question(*range(7)))
        with pytest.raises(InvalidRequest, match="the request has"):
            await lab.inference.infer("m", question(1, 2, 3).inputs, 5)
        assert len(node.batches) == batches
        node.failing, node.fails = replace(FAILS, code="invalid_request"), "m:2"  # the replica refuses a value in them
        assert await answers(bus, 30) == {"invalid_request": 30}
        node.failing = None
        lab.serving._rollout.tick(time.time())
        assert roles(lab) == {"m:1": "previous", "m:2": "stable"}
        assert (found(lab)["m:2"].failure_rate, found(lab)["m:2"].p50_seconds) == (0.0, 0.0)


async def test_a_version_that_refuses_requests_which_the_one_before_took_gives_way_to_it(lab: Lab, node: Node) -> None:
    (spec,) = node.signature.inputs
    node.signature = replace(node.signature, inputs=(replace(spec, shape=(-1, 3)),))
    async with client(lab) as bus:
        await answers(bus, 30)
        await lab.deploy("m:2")
        with pytest.raises(InvalidRequest, match="m:1 takes this request"):
            await ask(bus, question(1, 2))
        assert (await answers(bus, 30))["model_failed"] > 15
        await eventually(lambda: roles(lab) == {"m:1": "stable", "m:2": "withdrawn"})
        assert await answers(bus, 10) == {"m:1": 10}


async def test_a_shadow_gets_a_copy_of_each_question_and_its_failures_harm_nobody(lab: Lab, node: Node) -> None:
    await lab.deploy("m:2", shadow=True)
    async with client(lab) as bus:
        assert await answers(bus, 20) == {"m:1": 20}
        await eventually(lambda: found(lab)["m:2"].served == 20)
        assert found(lab)["m:2"].p50_seconds > 0
        node.failing, node.fails = FAILS, "m:2"
        assert await answers(bus, 20) == {"m:1": 20}
        await eventually(lambda: found(lab)["m:2"].failure_rate == 0.5)
        assert lab.inference.metrics.answers["m:2", "model_failed"] == 20
    lab.serving.roll_back("m")
    assert roles(lab) == {"m:1": "stable", "m:2": "withdrawn"}


async def test_impossible_traffic_is_refused(lab: Lab) -> None:
    lab.registry.add_model("alone", lab.registry.model("m").model, now=1.0)
    for model, options, said in (
        ("m:1", {"canary": 10}, "no other version of m is deployed"),
        ("alone", {"shadow": True}, "without --shadow"),
        ("m:2", {"canary": 10, "shadow": True}, "a canary or a shadow"),
    ):
        with pytest.raises(InvalidRequest, match=said):
            await lab.deploy(model, **options)
    assert roles(lab) == {"m:1": "stable"}


async def test_a_canary_that_cannot_be_loaded_leaves_everything_as_it_was(lab: Lab, node: Node) -> None:
    node.broken = True
    with pytest.raises(PotluckError, match="Lambda"):
        await lab.deploy("m:2", canary=10)
    assert roles(lab) == {"m:1": "stable"}


@pytest.mark.parametrize("seed", [1, 2])
async def test_whatever_is_done_to_versions_and_nodes_no_request_fails(
    lab: Lab, stack: AsyncExitStack, seed: int
) -> None:
    """Forty things at random: deployments, canaries, shadows, promotions, rollbacks, nodes that go and come back."""
    rng = random.Random(seed)
    for node_id in "bc":
        await lab.join(stack, node_id)
    gone: list[str] = []
    done: Counter[str] = Counter()

    async def deploy(**options: Any) -> None:
        version, replicas = rng.randint(1, 3), rng.choice((1, 1, 2))
        watch, idle = rng.choice((0.0, 0.3, 5.0)), rng.choice((0.0, 0.0, 0.6))
        options |= {"watch_seconds": watch, "idle_seconds": idle, "keep": rng.random() < 0.2}
        await lab.deploy(f"m:{version}", replicas, **options)

    def leave() -> None:
        if not gone:
            gone.append(rng.choice("abc"))
            lab.nodes[gone[0]].mute = lab.nodes[gone[0]].slow_to_load = True
            lab.leave(gone[0])

    def come_back() -> None:
        if gone:
            node = lab.nodes[gone.pop()]
            node.mute = node.slow_to_load = False
            node.loaded.clear()
            lab.report(node.node_id, ())

    async with client(lab) as bus, load(lab, bus) as seen:
        for _ in range(40):
            what = rng.choice(("deploy", "deploy", "canary", "shadow", "promote", "rollback", "leave", "come back"))
            with suppress(Conflict, InvalidRequest):  # there is nothing to promote, or nothing to be a canary beside
                match what:
                    case "deploy":
                        await deploy()
                    case "canary":
                        await deploy(canary=rng.choice((1, 30, 100)))
                    case "shadow":
                        await deploy(shadow=True)
                    case "promote":
                        lab.serving.promote("m")
                    case "rollback":
                        lab.serving.roll_back("m")
                    case "leave":
                        leave()
                    case _:
                        come_back()
                done[what] += 1
            before = seen.total()
            await eventually(lambda before=before: seen.total() > before + 10)
    assert len(done) == 7
    assert set(seen) <= {"m:1", "m:2", "m:3"}
