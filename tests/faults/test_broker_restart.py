"""The broker is killed and comes back while models are asked: nobody waits for what was lost with it."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potluck.client import AsyncClient
from potluck.local_cluster import LocalCluster
from potluck.settings import BusTimings
from support.brokers import TestBroker

pytestmark = [pytest.mark.tensorflow, pytest.mark.timeout(120)]

AWAY_SECONDS = 1.0
LONGEST_SECONDS = 20.0
"""Everybody has found the broker again by then (they try every five seconds at worst), on a busy machine, too."""
PATIENT = {"POTLUCK_INFERENCE_SECONDS": "120"}
"""A batch that is lost is noticed by itself after a third of that: what comes sooner was asked again for a reason."""


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[TestBroker]:
    broker = TestBroker("mosquitto", tmp_path)
    await broker.start()
    try:
        yield broker
    finally:
        await broker.stop()


async def test_what_was_asked_while_the_broker_went_is_asked_again(broker: TestBroker, tmp_path: Path) -> None:
    import keras

    model = keras.Sequential([keras.Input((8,), name="x"), keras.layers.Dense(3)])
    row = np.random.default_rng(0).random((1, 8), np.float32)
    expected = model(row).numpy()
    cluster = LocalCluster(
        tmp_path,
        cluster="broken",
        nodes=2,
        discovery=False,
        broker="external",
        broker_port=broker.port,
        environment=PATIENT,
    )
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 8], "data": row.ravel().tolist()}]}
    with cluster:
        url = f"{cluster.http_url}/v2/models/m/infer"

        def ask_http() -> Any:
            request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    return np.array(json.load(answer)["outputs"][0]["data"]).reshape(1, 3)
            except urllib.error.HTTPError as error:
                raise AssertionError(error.read().decode()) from None

        async with AsyncClient(f"127.0.0.1:{broker.port}", cluster="broken") as client:
            model.save(tmp_path / "m.keras")
            await client.register(tmp_path / "m.keras", "m")
            await client.deploy("m", replicas=2, wait=True)
            over, answered = False, 0
            longest = {True: 0.0, False: 0.0}
            enough = asyncio.Event()

            async def ask(http: bool) -> None:
                nonlocal answered
                while not over:
                    began = time.monotonic()
                    found = await (asyncio.to_thread(ask_http) if http else client.infer("m", row, timeout=60))
                    longest[http] = max(longest[http], time.monotonic() - began)
                    answered += 1
                    if answered % 100 == 0:
                        enough.set()
                    np.testing.assert_allclose(found, expected, atol=1e-5)

            async with asyncio.TaskGroup() as tasks:
                for number in range(6):
                    tasks.create_task(ask(number % 3 == 0))
                for _ in range(3):
                    enough.clear()
                    async with asyncio.timeout(30):
                        await enough.wait()
                    await broker.kill()
                    await asyncio.sleep(AWAY_SECONDS)
                    await broker.start()
                over = True
            assert max(longest.values()) < LONGEST_SECONDS, longest


async def test_a_question_waits_for_the_broker_as_long_as_it_may(broker: TestBroker, tmp_path: Path) -> None:
    cluster = LocalCluster(
        tmp_path, cluster="away", nodes=0, discovery=False, broker="external", broker_port=broker.port
    )
    with cluster:
        async with AsyncClient(f"127.0.0.1:{broker.port}", cluster="away") as client:
            await broker.kill()
            asked = asyncio.create_task(client.infer("m", np.zeros((1, 8), np.float32), timeout=30))
            await asyncio.sleep(BusTimings().connect_timeout_seconds + 0.5)
            assert not asked.done()
            await broker.start()
            with pytest.raises(Exception, match="no model"):
                await asked
