"""Code of users: refused with words that help, and run where the node's configuration allows it."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from msgspec.structs import replace

from node.engine.process import Engine
from potluck.client import Client
from potluck.errors import CodeNotAllowed, EngineFailed, InvalidModel
from potluck.local_cluster import LocalCluster
from potluck.messages import ExportTask, SyncTask
from potluck.tensors import to_numpy
from support.engine_lab import Lab, engine_lab, evaluation, prediction, training
from support.models import whole

pytestmark = [pytest.mark.tensorflow, pytest.mark.asyncio(loop_scope="module")]

SUPPORT = Path(__file__).parents[1] / "support"
ROWS = 32
X = np.random.default_rng(0).normal(size=(ROWS, 6)).astype(np.float32)
Y = X.mean(axis=1)


@pytest.fixture(scope="module")
def own() -> Iterator[Any]:
    """The module `own_code`, imported by that name here as in engines."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{SUPPORT}:{Path(__file__).parents[2]}")
        patch.syspath_prepend(str(SUPPORT))
        import own_code

        yield own_code
        sys.modules.pop("own_code", None)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def allowing(own: Any, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lab]:
    async with engine_lab(tmp_path_factory.mktemp("allowing"), ["own_code", "lambda"]) as lab:
        yield lab


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def strict(own: Any, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lab]:
    async with engine_lab(tmp_path_factory.mktemp("strict")) as lab:
        yield lab


def compiled(model: Any, loss: Any = "mse", metrics: Any = ("mae",)) -> Any:
    import keras

    model(X[:1])
    model.compile(keras.optimizers.SGD(0.05), loss, metrics=list(metrics))
    return model


def layered(own: Any, loss: Any = "mse", metrics: Any = ("mae",)) -> Any:
    import keras

    keras.utils.set_random_seed(5)
    return compiled(keras.Sequential([keras.Input((6,)), own.Scale(), keras.layers.Dense(1)]), loss, metrics)


MODELS = {
    "layer": layered,
    "loss": lambda own: layered(own, loss=own.cubed_error),
    "metric": lambda own: layered(own, metrics=["mae", own.Largest()]),
    "subclassed model": lambda own: compiled(own.Network(5)),
    "step of its own": lambda own: compiled(own.Stepping(5)),
}


@pytest.mark.parametrize("kind", MODELS)
async def test_code_that_is_allowed_gives_the_numbers_of_keras(own: Any, allowing: Lab, kind: str) -> None:
    model = MODELS[kind](own)
    blob, data = allowing.files.model(model), allowing.files.arrays(2, x=X, y=Y)
    task = training(blob, data, samples=ROWS * 3, batch_size=ROWS)
    result = await allowing.run(task, kind)
    for _ in range(3):
        model.train_on_batch(X, Y[:, None])
    for ours, theirs in zip(allowing.weights(result), model.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert ("largest" in result.metrics) == (kind == "metric")
    assert ("steps_of_mine" in result.metrics) == (kind == "step of its own")
    after = allowing.after(result)
    scored = await allowing.run(evaluation(blob, whole(data), weights=after))
    expected = model.evaluate(X, Y[:, None], return_dict=True, verbose=0)
    assert scored.sums["loss"] / ROWS == pytest.approx(expected["loss"], abs=1e-5)
    assert scored.sums["mae"] / ROWS == pytest.approx(expected["mae"], abs=1e-5)
    exported = await allowing.run(ExportTask(model=blob, weights=after), kind)
    assert exported.signature.inputs[0].shape == (-1, 6)
    predicted = await allowing.run(prediction(blob, whole(data)))
    assert to_numpy(predicted.outputs[0]).shape == (ROWS, 1)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("layer", "class of its own, 'Scale'"), ("loss", "function of its own, 'cubed_error'"),
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


async def test_a_step_of_its_own_is_no_part_of_a_synchronous_one(own: Any, allowing: Lab) -> None:
    task = SyncTask(
        model=allowing.files.model(compiled(own.Stepping(5))), data=allowing.files.arrays(1, x=X, y=Y), image=None,
        format=training(None, ()).format, formation="f", members=("127.0.0.1:1",), batches=(16,), rank=0, first_step=0,
        steps=1, begins=True,
    )  # fmt: skip
    with pytest.raises(InvalidModel, match="Stepping has a train_step of its own: train with strategy 'local'"):
        await allowing.run(task, "sync")
    plain = replace(task, model=allowing.files.model(compiled(own.Network(5))))
    assert (await allowing.run(plain, "sync")).steps == 1


async def test_a_module_that_is_not_there_is_named(tmp_path: Path) -> None:
    engine = Engine(
        tmp_path / "scratch", threads=1, start_seconds=60, silence_seconds=20, allow_code=["no_such_module"]
    )
    with pytest.raises(EngineFailed, match="allow_code names the module 'no_such_module', which cannot be imported"):
        await engine.start()


@pytest.mark.timeout(300)
def test_a_node_that_does_not_allow_it_is_left_out_of_the_job(own: Any, tmp_path: Path) -> None:
    import keras

    allowing = tmp_path / "allowing.toml"
    allowing.write_text('allow_code = ["own_code"]\n')
    with LocalCluster(tmp_path / "cluster", cluster="code", nodes=1, discovery=False) as cluster:
        with Client(f"{cluster.broker_host}:{cluster.broker_port}", cluster="code") as client:
            with pytest.raises(CodeNotAllowed, match=r"no node runs this model.*'Scale'"):
                client.train(layered(own), (X, Y), epochs=2).wait(timeout=120)
            with pytest.raises(CodeNotAllowed, match="'Scale'"):
                client.deploy(layered(own), name="scaled").wait(timeout=120)

            @keras.saving.register_keras_serializable(package="elsewhere")
            class Known(keras.layers.Layer):  # type: ignore[misc]
                pass

            class Unknown(keras.layers.Layer):  # type: ignore[misc]
                pass

            with pytest.raises(InvalidModel, match="'Unknown', that is not registered"):
                client.train(compiled(keras.Sequential([keras.Input((6,)), Known(), Unknown()])), (X, X))
            cluster.add_node("--config", str(allowing))
            trained = client.train(layered(own), (X, Y), epochs=2, batch_size=8).wait(timeout=120)
            assert len(trained.history["loss"]) == 2
            assert isinstance(trained.model().layers[0], own.Scale)
            assert client.deploy(layered(own), name="scaled", replicas=0).wait(timeout=120)
            (deployment,) = client.deployments()
            assert [replica.node_id for replica in deployment.replicas] == ["node-2"]
