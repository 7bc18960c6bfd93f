"""Replicas in an engine: requests run together and are answered separately, and requests that do not fit get an error."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from potluck.errors import Cancelled, InvalidModel, NotFound, TimedOut
from potluck.wire.reports import RequestOutcome
from potluck.wire.tensors import from_numpy, to_numpy
from potluck.wire.values import Tensor
from support.engine_lab import Lab, engine_lab, training
from support.models import blobs, dense

pytestmark = [pytest.mark.tensorflow, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def lab(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lab]:
    async with engine_lab(tmp_path_factory.mktemp("engine")) as lab:
        yield lab


async def load(lab: Lab, replica_id: str, model: Any) -> Any:
    signature, resident, warm_rows = await lab.engine.load_model(
        replica_id, lab.files.paths[lab.files.model(model).sha256]
    )
    assert resident >= 0
    assert 0 <= warm_rows <= 64
    return signature


def request(array: np.ndarray[Any, Any], name: str = "x") -> tuple[Tensor, ...]:
    return (from_numpy(name, array),)


def answer(outcome: RequestOutcome) -> np.ndarray[Any, Any]:
    assert outcome.error is None, outcome.error
    return to_numpy(outcome.outputs[0])


async def test_requests_run_together_and_are_answered_apart(lab: Lab) -> None:
    model = dense()
    signature = await load(lab, "many", model)
    assert [(spec.datatype, spec.shape) for spec in signature.inputs] == [("FP32", (-1, 8))]
    assert [(spec.name, spec.datatype, spec.shape) for spec in signature.outputs] == [("output_0", "FP32", (-1, 3))]
    random = np.random.default_rng(0)
    for sizes in ([1], [2, 1], [3, 5, 1], [64], [300, 1], [1] * 33):
        inputs = [random.normal(size=(size, 8)).astype(np.float32) for size in sizes]
        outcomes, seconds = await lab.engine.infer("many", [request(array) for array in inputs])
        assert seconds > 0
        for array, outcome in zip(inputs, outcomes, strict=True):
            np.testing.assert_allclose(answer(outcome), model(array).numpy(), atol=1e-5)
            assert outcome.outputs[0].name == "output_0"


async def test_a_bad_request_fails_alone(lab: Lab) -> None:
    await load(lab, "some", dense())
    good = np.zeros((1, 8), np.float32)
    text = Tensor(name="x", datatype="BYTES", shape=(1, 8), data=["a"] * 8)
    short = Tensor(name="x", datatype="FP32", shape=(1, 8), data=b"\0" * 31)
    batch = [
        request(good), request(np.zeros((1, 7), np.float32)), (), (text,), (short,), request(good[:0]), request(good)
    ]  # fmt: skip
    outcomes, _ = await lab.engine.infer("some", batch)
    assert answer(outcomes[0]).shape == answer(outcomes[-1]).shape == (1, 3)
    errors = [outcome.error for outcome in outcomes[1:-1]]
    assert all(error is not None and error.code == "invalid_request" for error in errors)
    messages = [error.message for error in errors if error is not None]
    assert "takes FP32 of shape (any, 8)" in messages[0]
    assert "(1, 7)" in messages[0]
    assert "1 input (" in messages[1]
    assert "BYTES, which cannot be cast" in messages[2]
    assert "data has 31" in messages[3]
    assert "at least one" in messages[4]


async def test_a_request_that_the_model_refuses_fails_alone(lab: Lab) -> None:
    import keras

    model = keras.Sequential([keras.Input((3,), dtype="int32"), keras.layers.Embedding(5, 2), keras.layers.Flatten()])
    await load(lab, "tokens", model)
    good, bad = np.array([[0, 1, 4]], np.int64), np.array([[0, 1, 99]], np.int64)
    outcomes, _ = await lab.engine.infer("tokens", [request(good), request(bad), request(good)])
    assert answer(outcomes[0]).shape == answer(outcomes[2]).shape == (1, 6)
    assert outcomes[1].error is not None
    assert outcomes[1].error.code == "model_failed"
    assert "failed on this input" in outcomes[1].error.message


async def test_lookups_without_a_place_for_unknown_values_run(lab: Lab) -> None:
    """Their vocabularies have neither zeros nor empty texts: a batch is filled up with one of its own rows."""
    import keras

    texts, numbers = keras.Input((1,), dtype="string", name="texts"), keras.Input((1,), dtype="int64", name="numbers")
    word = keras.layers.StringLookup(vocabulary=["red", "green"], num_oov_indices=0)(texts)
    number = keras.layers.IntegerLookup(vocabulary=[10, 20], num_oov_indices=0)(numbers)
    await load(lab, "lookups", keras.Model([texts, numbers], keras.layers.Concatenate()([word, number])))

    def asked(rows: int, text: str = "green") -> tuple[Tensor, ...]:
        return (
            from_numpy("texts", np.full((rows, 1), text, object)),
            from_numpy("numbers", np.full((rows, 1), 20, np.int64)),
        )

    said = []
    for text in ("blue", "green", "blue"):
        [outcome], _ = await lab.engine.infer("lookups", [asked(1, text)])
        said.append(outcome.error.message if outcome.error is not None else "")
    assert ["the model itself may be at fault" in message for message in said] == [True, False, False]
    assert "found OOV values" in said[2]
    for rows in (8, 9):  # 9 rows run as 10
        [outcome], _ = await lab.engine.infer("lookups", [asked(rows)])
        assert answer(outcome).tolist() == [[1, 1]] * rows


async def test_numbers_are_cast_where_nothing_is_lost(lab: Lab) -> None:
    import keras

    model = dense()
    await load(lab, "casts", model)
    values = np.arange(8).reshape(1, 8)
    expected = model(values.astype(np.float32)).numpy()
    listed = Tensor(name="x", datatype="FP32", shape=(1, 8), data=[[float(value) for value in range(8)]])
    requests = [(listed,), *(request(values.astype(kind)) for kind in (np.float64, np.int64, np.uint8, np.float16))]
    outcomes, _ = await lab.engine.infer("casts", requests)
    for outcome in outcomes:
        np.testing.assert_allclose(answer(outcome), expected, atol=1e-6)
    whole_numbers = keras.Sequential([keras.Input((1,), dtype="int32"), keras.layers.Embedding(5, 2)])
    await load(lab, "whole numbers", whole_numbers)
    batch = [request(np.array([[1.5]])), request(np.array([[2**40]])), request(np.array([[3]], np.uint8))]
    outcomes, _ = await lab.engine.infer("whole numbers", batch)
    assert [outcome.error is None for outcome in outcomes] == [False, False, True]


async def test_several_inputs_and_outputs_go_by_name(lab: Lab) -> None:
    import keras

    left, right = keras.Input((2,), name="left"), keras.Input((3,), name="right")
    total = keras.layers.Dense(1, name="total")(keras.layers.Concatenate()([left, right]))
    model = keras.Model(
        {"left": left, "right": right}, {"total": total, "left_again": keras.layers.Identity(name="left_again")(left)}
    )
    signature = await load(lab, "named", model)
    assert [spec.name for spec in signature.inputs] == ["left", "right"]
    assert [spec.name for spec in signature.outputs] == ["left_again", "total"]
    a, b = np.ones((2, 2), np.float32), np.full((2, 3), 2, np.float32)
    swapped = (from_numpy("right", b), from_numpy("left", a))
    wrong = (from_numpy("right", b), from_numpy("middle", a))
    uneven = (from_numpy("right", b), from_numpy("left", a[:1]))
    outcomes, _ = await lab.engine.infer("named", [swapped, wrong, uneven])
    outputs = {tensor.name: to_numpy(tensor) for tensor in outcomes[0].outputs}
    np.testing.assert_allclose(outputs["left_again"], a)
    np.testing.assert_allclose(outputs["total"], model({"left": a, "right": b})["total"].numpy(), atol=1e-6)
    assert outcomes[1].error is not None
    assert "left, right, the request's right, middle" in outcomes[1].error.message
    assert outcomes[2].error is not None
    assert "same number of rows" in outcomes[2].error.message


async def test_free_dimensions_run_by_shape(lab: Lab) -> None:
    import keras

    model = keras.Sequential([keras.Input((None, None, 1)), keras.layers.GlobalAveragePooling2D()])
    signature = await load(lab, "free", model)
    assert signature.inputs[0].shape == (-1, -1, -1, 1)
    shapes = [(1, 4, 4, 1), (1, 2, 6, 1), (2, 4, 4, 1)]
    outcomes, _ = await lab.engine.infer("free", [request(np.ones(shape, np.float32)) for shape in shapes])
    assert [answer(outcome).tolist() for outcome in outcomes] == [[[1.0]], [[1.0]], [[1.0], [1.0]]]


async def test_what_is_not_there(lab: Lab) -> None:
    with pytest.raises(NotFound, match="replica nowhere is not loaded"):
        await lab.engine.infer("nowhere", [request(np.zeros((1, 8), np.float32))])
    with pytest.raises(InvalidModel, match=r"not a \.keras file"):
        await lab.engine.load_model("bad", lab.files.paths[lab.files.put(b"nothing").sha256])
    await load(lab, "gone", dense())
    await load(lab, "gone", dense())  # asked again, as it is loaded already
    await lab.engine.unload_model("gone")
    await lab.engine.unload_model("gone")
    with pytest.raises(NotFound):
        await lab.engine.infer("gone", [request(np.zeros((1, 8), np.float32))])


async def test_a_batch_that_nobody_waits_for_is_left_out(lab: Lab) -> None:
    await load(lab, "wanted", dense())
    asked = [request(np.zeros((1, 8), np.float32))]
    assert lab.engine.pid is not None
    os.kill(lab.engine.pid, signal.SIGSTOP)
    try:
        batches = [
            asyncio.create_task(lab.engine.infer("wanted", asked, batch_id=batch_id)) for batch_id in ("a", "b", "c")
        ]
        await asyncio.sleep(0)  # they are sent
        lab.engine.cancel_inference("b")
        lab.engine.cancel_inference("never asked")
    finally:
        os.kill(lab.engine.pid, signal.SIGCONT)
    first, second, third = await asyncio.gather(*batches, return_exceptions=True)
    assert isinstance(second, Cancelled)
    assert not isinstance(first, BaseException)
    assert not isinstance(third, BaseException)


async def test_a_batch_whose_time_is_up_is_left_out(lab: Lab) -> None:
    await load(lab, "late", dense())
    asked = [request(np.zeros((1, 8), np.float32))]
    with pytest.raises(TimedOut):
        await lab.engine.infer("late", asked, expires=time.time() - 0.1)
    outcomes, _ = await lab.engine.infer("late", asked, expires=time.time() + 60)
    assert outcomes[0].error is None


async def test_inference_goes_on_while_a_task_runs(lab: Lab) -> None:
    x, y = blobs()
    await load(lab, "beside", dense())
    told = asyncio.Event()
    task = training(lab.files.model(dense()), lab.files.arrays(1, x=x, y=y), samples=10**9, seconds=60)
    running = asyncio.create_task(
        lab.engine.run_task("beside", task, lab.files.paths, lambda done, metrics: told.set()), name="training"
    )
    await asyncio.wait_for(told.wait(), 60)
    for _ in range(20):
        outcomes, _ = await asyncio.wait_for(lab.engine.infer("beside", [request(x[:2])]), 5)
        assert answer(outcomes[0]).shape == (2, 3)
    assert not running.done()
    await lab.engine.cancel_task()
    await asyncio.wait({running}, timeout=10)
    assert running.exception() is not None
