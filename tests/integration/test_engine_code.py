"""Code of users: refused with words that help, and run where the node's configuration allows it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from msgspec.structs import replace

from coordinator.plans.training.scores import evaluation_metrics
from node.engine.process import Engine
from node.engine.watch import Limits
from potluck.errors import CodeNotAllowed, EngineFailed, InvalidModel
from potluck.wire.tasks import ExportTask, SyncTask
from potluck.wire.tensors import to_numpy
from potluck.wire.values import DataFormat
from support.allowing import ROWS, X, Y, compiled, dense, own_code
from support.engine_lab import Lab, engine_lab, evaluation, prediction, training
from support.models import stepwise, whole

pytestmark = [pytest.mark.tensorflow, pytest.mark.asyncio(loop_scope="module")]


@pytest.fixture(scope="module")
def own() -> Iterator[Any]:
    with own_code() as module:
        yield module


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def allowing(own: Any, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lab]:
    async with engine_lab(tmp_path_factory.mktemp("allowing"), ["own_code", "lambda"]) as lab:
        yield lab


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def strict(own: Any, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lab]:
    async with engine_lab(tmp_path_factory.mktemp("strict")) as lab:
        yield lab


MODELS = {
    "layer": lambda own: dense(own.Scale()),
    "loss": lambda own: dense(loss=own.cubed_error),
    "metric": lambda own: dense(metrics=["mae", own.Largest()]),
    "subclassed model": lambda own: compiled(own.Network(5)),
    "step of its own": lambda own: compiled(own.Stepping(5)),
}


@pytest.mark.parametrize("kind", MODELS)
async def test_code_that_is_allowed_gives_the_numbers_of_keras(own: Any, allowing: Lab, kind: str) -> None:
    model = MODELS[kind](own)
    blob, data = allowing.files.model(model), allowing.files.arrays(2, x=X, y=Y)
    task = training(blob, data, samples=ROWS * 3, batch_size=ROWS)
    result = await allowing.run(task, kind)
    stepwise(model)
    for _ in range(3):
        model.train_on_batch(X, Y[:, None])
    for ours, theirs in zip(allowing.weights(result), model.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert ("largest" in result.metrics) == (kind == "metric")
    after = allowing.after(result)
    scored = await allowing.run(evaluation(blob, whole(data), weights=after))
    expected = model.evaluate(X, Y[:, None], return_dict=True, verbose=0)
    assert scored.sums["loss"] / ROWS == pytest.approx(expected["loss"], abs=1e-5)
    assert scored.sums["mae"] / ROWS == pytest.approx(expected["mae"], abs=1e-5)
    exported = await allowing.run(ExportTask(model=blob, weights=after), kind)
    assert exported.signature.inputs[0].shape == (-1, 6)
    predicted = await allowing.run(prediction(blob, whole(data)))
    assert to_numpy(predicted.outputs[0]).shape == (ROWS, 1)


@pytest.mark.parametrize("names", [("input_0", "input_1"), ("left", "right")])
async def test_a_subclassed_model_of_two_inputs_and_outputs(own: Any, allowing: Lab, names: tuple[str, str]) -> None:
    import keras

    keras.utils.set_random_seed(5)
    given: Any = {name: X[:, place::2] for place, name in enumerate(names)}
    shown = list(given.values()) if names[0] == "input_0" else given
    model = own.Pair()
    model(shown)
    model.compile(keras.optimizers.SGD(0.05), {"sum": "mse", "difference": "mae"}, metrics={"sum": ["mae"]})
    data = allowing.files.arrays(2, **given, sum=Y, difference=-Y)
    form = DataFormat(kind="arrays", inputs=names, targets=("sum", "difference"))
    blob = allowing.files.model(model)
    result = await allowing.run(training(blob, data, samples=ROWS * 2, batch_size=ROWS, format=form), "pair")
    y = {"sum": Y[:, None], "difference": -Y[:, None]}
    stepwise(model)
    for _ in range(2):
        model.train_on_batch(shown, y)
    for ours, theirs in zip(allowing.weights(result), model.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    task = evaluation(blob, whole(data), weights=allowing.after(result), format=form)
    expected = model.evaluate(shown, y, batch_size=ROWS, return_dict=True, verbose=0)
    assert evaluation_metrics(await allowing.run(task)) == pytest.approx(expected, abs=1e-5)
    await allowing.engine.forget_job("pair")


@pytest.mark.parametrize(
    ("kind", "name"),
    [("layer", "class of its own, 'Scale'"), ("loss", "function of its own, 'own>cubed_error'"),
     ("metric", "class of its own, 'Largest'"), ("subclassed model", "class of its own, 'Network'")],
)  # fmt: skip
async def test_code_that_is_not_allowed_is_refused_and_says_what_to_do(
    own: Any, strict: Lab, kind: str, name: str
) -> None:
    blob, data = strict.files.model(MODELS[kind](own)), strict.files.arrays(1, x=X, y=Y)
    with pytest.raises(
        CodeNotAllowed, match=rf"{name}.*allow_code is empty.*register_keras_serializable\(\).*allow_code"
    ):
        await strict.run(training(blob, data), "refused")
    if kind in ("layer", "subclassed model"):
        with pytest.raises(CodeNotAllowed, match=name):
            await strict.engine.load_model("replica", strict.files.paths[blob.sha256])


async def test_lambda_layers_run_only_where_they_are_allowed(allowing: Lab, strict: Lab) -> None:
    import keras

    model = keras.Sequential([keras.Input((6,)), keras.layers.Lambda(lambda x: x * 2)])
    for lab in (strict, allowing):
        task = prediction(lab.files.model(model), whole(lab.files.arrays(1, x=X, y=Y)))
        if lab is strict:
            with pytest.raises(CodeNotAllowed, match=r'Lambda layer, which is code.*"lambda" in allow_code'):
                await lab.run(task)
        else:
            np.testing.assert_allclose(to_numpy((await lab.run(task)).outputs[0]), X * 2)


async def test_a_model_with_its_own_step_cannot_train_synchronously(own: Any, allowing: Lab) -> None:
    task = SyncTask(
        model=allowing.files.model(compiled(own.Stepping(5))), data=allowing.files.arrays(1, x=X, y=Y), image=None,
        format=training(None, ()).format, formation="f", members=("127.0.0.1:1",), batches=(16,), rank=0, first_step=0,
        steps=1, begins=True,
    )  # fmt: skip
    with pytest.raises(InvalidModel, match="Stepping has a train_step of its own: train with strategy 'local'"):
        await allowing.run(task, "sync")
    plain = replace(task, model=allowing.files.model(compiled(own.Network(5))))
    assert (await allowing.run(plain, "sync")).steps == 1


async def test_a_missing_module_is_named(tmp_path: Path) -> None:
    engine = Engine(tmp_path / "scratch", threads=1, limits=Limits(60, 20), allow_code=["no_such_module"])
    with pytest.raises(EngineFailed, match="allow_code names the module 'no_such_module', which cannot be imported"):
        await engine.start()
