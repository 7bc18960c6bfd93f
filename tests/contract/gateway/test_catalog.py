"""What the protocols of the gateway ask `Control`, with all pages, and what they make of the answers."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import aiohttp
import pytest

from coordinator.control import Control
from coordinator.gateway.catalog import Catalog
from potluck.errors import NotFound
from potluck.wire.questions import DeploymentsListed, ListDeployments
from support.eventually import eventually
from support.serving_lab import Lab

Http = tuple[str, aiohttp.ClientSession]


async def two_versions(lab: Lab, stack: AsyncExitStack) -> asyncio.Task[str]:
    """`m:2` is being deployed beside `m:1`."""
    node = await lab.join(stack, "b")
    node.slow_to_load = True
    lab.add_model(2)
    loading = asyncio.create_task(lab.deploy("m", 1), name="deploy m:2")
    await eventually(lambda: len(lab.serving.deployments()) == 2)
    return loading


async def test_all_pages_are_asked_for(
    lab: Lab, stack: AsyncExitStack, http: Http, control: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.control.LISTED_BYTES", 1)
    loading = await two_versions(lab, stack)
    catalog = Catalog(control)
    assert [f"{one.name}:{one.version}" for one in catalog.models()] == ["m:1", "m:2"]
    assert [one.name for one in catalog.deployments()] == ["m:1", "m:2"]
    loading.cancel()
    await asyncio.wait([loading])


async def test_deployments_of_one_model(lab: Lab, stack: AsyncExitStack, http: Http, control: Control) -> None:
    loading = await two_versions(lab, stack)
    lab.registry.set_alias("m:2", "next")

    def listed(model: str) -> list[str]:
        answer = control.answer(ListDeployments(model=model))
        assert isinstance(answer, DeploymentsListed)
        return [one.name for one in answer.deployments]

    assert listed("m") == ["m:1", "m:2"]
    assert (listed("m:1"), listed("m:next")) == (["m:1"], ["m:2"])
    assert listed("m:prod") == listed("unheard-of") == []
    loading.cancel()
    await asyncio.wait([loading])


async def test_the_plain_name_is_as_ready_as_the_version_that_answers_to_it(
    lab: Lab, stack: AsyncExitStack, http: Http, control: Control
) -> None:
    loading = await two_versions(lab, stack)
    catalog = Catalog(control)
    assert (catalog.ready("m"), catalog.ready("m:1"), catalog.ready("m:2")) == (True, True, False)
    with pytest.raises(NotFound, match="there is no model 'n'"):
        catalog.ready("n")
    loading.cancel()
    await asyncio.wait([loading])


async def test_a_deployment_that_only_finishes_its_requests_is_not_listed(lab: Lab, http: Http) -> None:
    base, session = http
    lab.serving._deployments["m:1"].retired = True
    lab.inference.retired.add("m:1")
    async with session.get(f"{base}/v2/health/ready") as response:
        assert (response.status, (await response.json())["error"]) == (503, "no model is deployed")
    async with session.get(f"{base}/v1/models/m") as response:
        assert response.status == 404
