"""Replicas go to nodes that have what the model's format runs on."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from coordinator.serving import serving
from potluck.errors import InvalidRequest
from support.serving_lab import Lab


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture
async def lab(tmp_path: Path, stack: AsyncExitStack) -> Lab:
    lab = Lab(tmp_path)
    await lab.open(stack)
    return lab


async def test_each_format_goes_where_its_runtime_is(lab: Lab, stack: AsyncExitStack) -> None:
    small = await lab.join(stack, "small", "litert")
    large = await lab.join(stack, "large", "tensorflow", "keras")
    both = await lab.join(stack, "xboth", "tensorflow", "litert")
    bare = await lab.join(stack, "bare", "keras")
    for number, model_format in enumerate(("tflite", "savedmodel", "h5", "keras"), start=1):
        lab.add_model(number, format=model_format)
        name = f"m:{number}"
        assert await lab.deploy(name, 0) == name
        [info] = [one for one in lab.serving.deployments() if one.name == name]
        places = {"small", "xboth"} if model_format == "tflite" else {"large", "xboth"}
        assert {replica.node_id for replica in info.replicas if replica.state == "ready"} == places
    assert small.formats == ["tflite"]
    assert large.formats == ["savedmodel", "h5", "keras"]
    assert both.formats == ["tflite", "savedmodel", "h5", "keras"]
    assert bare.formats == []


async def test_without_a_node_that_has_the_runtime_it_says_which_is_missing(
    lab: Lab, stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "JOIN_SECONDS", 0.2)
    await lab.join(stack, "large", "tensorflow")
    lab.add_model(1, format="tflite")
    with pytest.raises(InvalidRequest, match="1 replica is asked for, but 0 nodes with LiteRT are online"):
        await lab.deploy("m", 1)
    lab.add_model(2, format="savedmodel")
    with pytest.raises(InvalidRequest, match="2 replicas are asked for, but 1 node with TensorFlow is online"):
        await lab.deploy("m", 2)
