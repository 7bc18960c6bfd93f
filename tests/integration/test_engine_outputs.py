"""Several outputs, weights of items, and Keras's losses and shapes of targets give the same numbers as Keras."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from msgspec.structs import replace

from coordinator.plans.batch import merge
from coordinator.plans.training.scores import evaluation_metrics
from potluck.errors import InvalidRequest
from potluck.weights.files import load
from potluck.wire.tasks import SyncTask
from potluck.wire.tensors import to_numpy
from potluck.wire.values import DataFormat
from support.engine_lab import Lab, engine_lab, evaluation, prediction, training
from support.models import stepwise, whole

pytestmark = [pytest.mark.tensorflow, pytest.mark.asyncio(loop_scope="module")]

Array = np.ndarray[Any, Any]
ROWS, STEPS = 48, 4
TWO = DataFormat(kind="arrays", inputs=("x",), targets=("kind", "size"))
ONE = DataFormat(kind="arrays", inputs=("x",), target="y")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def lab(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lab]:
    async with engine_lab(tmp_path_factory.mktemp("engine")) as lab:
        yield lab


def numbers(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=(ROWS, *shape)).astype(np.float32)


def whole_numbers(high: int, *shape: int) -> Array:
    return np.random.default_rng(2).integers(0, high, (ROWS, *shape))


WEIGHTS = np.random.default_rng(3).uniform(0, 3, ROWS).astype(np.float32)
X, KIND, SIZE = numbers(6), whole_numbers(3), numbers(2, seed=1)


def two_outputs(as_map: bool = False, optimizer: Any = None, **compiled: Any) -> Any:
    import keras

    keras.utils.set_random_seed(5)
    given = keras.Input((6,))
    hidden = keras.layers.Dense(8, activation="tanh", kernel_regularizer="l2")(given)
    kind = keras.layers.Dense(3, activation="softmax", name="kind_layer" if as_map else "kind")(hidden)
    size = keras.layers.Dense(2, name="a_size_layer" if as_map else "size")(hidden)
    model = keras.Model(given, {"kind": kind, "size": size} if as_map else [kind, size])
    model.compile(optimizer or keras.optimizers.SGD(0.05, momentum=0.9), **compiled)
    return model


COMPILED: dict[str, dict[str, Any]] = {
    "maps": {
        "loss": {"kind": "sparse_categorical_crossentropy", "size": "mse"},
        "loss_weights": {"kind": 1.0, "size": 0.3},
        "metrics": {"kind": ["accuracy"], "size": ["mae", "mse"]},
    },
    "lists": {
        "loss": ["sparse_categorical_crossentropy", "huber"],
        "loss_weights": [0.5, 2.0],
        "metrics": [["accuracy"], ["mae"]],
        "weighted_metrics": [["accuracy"], ["mae"]],
    },
}


async def assert_trains_as_keras(
    lab: Lab, model: Any, arrays: dict[str, Array], y: Any, form: DataFormat, tolerance: float = 2e-5
) -> None:
    """Train in steps over all data at once, and then evaluate in slices, with batches of other sizes."""
    blob, data = lab.files.model(model), lab.files.arrays(2, **arrays)
    weight = arrays.get("sample_weight")
    if weight is not None and weight.ndim == 1 and len(model.outputs[0].shape) == 3:
        weight = weight[:, None]  # Keras wants it so for sequences
    task = training(blob, data, samples=ROWS * STEPS, batch_size=ROWS, format=form)
    result = await lab.run(task, str(id(model)))
    x = arrays["x"]
    stepwise(model)
    logs = [model.train_on_batch(x, y, sample_weight=weight, return_dict=True) for _ in range(STEPS)]
    for ours, theirs in zip(lab.weights(result), model.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=tolerance)
    means = {name: np.mean([log[name] for log in logs]) for name in logs[0]}
    assert result.metrics == pytest.approx(means, rel=tolerance * 10)
    after = lab.after(result)
    expected = model.evaluate(x, y, sample_weight=weight, batch_size=ROWS, return_dict=True, verbose=0)
    first, second = whole(data)
    cuts = [replace(first, stop=7), replace(first, start=7), second]
    parts = [
        await lab.run(evaluation(blob, (cut,), weights=after, batch_size=size, format=form))
        for cut, size in zip(cuts, (16, 3, 5), strict=True)
    ]
    merged = merge(parts)
    assert merged.count == ROWS
    found = evaluation_metrics(merged)
    assert {name: found.get(name) for name in expected} == pytest.approx(expected, abs=tolerance, rel=tolerance)
    predicted = await lab.run(prediction(blob, whole(data), format=form))
    assert [tensor.name for tensor in predicted.outputs] == [spec.name for spec in _outputs(model)]
    await lab.engine.forget_job(str(id(model)))


def _outputs(model: Any) -> Sequence[Any]:
    from node.engine import keras_models

    return keras_models.signature(model).outputs


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", COMPILED)
async def test_two_outputs_give_the_numbers_of_keras(lab: Lab, kind: str, weighted: bool) -> None:
    arrays = {"x": X, "size": SIZE, "kind": KIND} | ({"sample_weight": WEIGHTS} if weighted else {})
    form = replace(TWO, weight="sample_weight" if weighted else "")
    await assert_trains_as_keras(lab, two_outputs(**COMPILED[kind]), arrays, [KIND, SIZE], form)


async def test_a_model_that_answers_a_map_takes_targets_by_its_keys(lab: Lab) -> None:
    arrays = {"x": X, "size": SIZE, "kind": KIND}
    y = {"kind": KIND, "size": SIZE}
    await assert_trains_as_keras(lab, two_outputs(as_map=True, **COMPILED["maps"]), arrays, y, TWO)


async def test_targets_in_order_and_their_losses_by_sum(lab: Lab) -> None:
    import keras

    losses = [keras.losses.SparseCategoricalCrossentropy(reduction="sum"), "mse"]
    model = two_outputs(loss=losses, loss_weights=[0.25, 1.0])
    blob = lab.files.model(model)
    expected = stepwise(model).evaluate(X, [KIND, SIZE], batch_size=1, return_dict=True, verbose=0)
    data = lab.files.arrays(1, x=X, y_0=KIND, y_1=SIZE)
    form = replace(TWO, targets=("y_0", "y_1"))
    for size in (ROWS, 7):
        result = await lab.run(evaluation(blob, whole(data), batch_size=size, format=form))
        assert evaluation_metrics(result) == pytest.approx(expected, abs=1e-5)


async def test_predictions_of_two_outputs_have_their_names(lab: Lab) -> None:
    model = two_outputs(as_map=True, **COMPILED["maps"])
    data = lab.files.arrays(1, x=X)
    result = await lab.run(prediction(lab.files.model(model), whole(data), format=TWO))
    expected = model.predict(X, verbose=0)
    assert {tensor.name for tensor in result.outputs} == {"kind", "size"}
    for tensor in result.outputs:
        np.testing.assert_allclose(to_numpy(tensor), expected[tensor.name], atol=1e-6)


@pytest.mark.parametrize("kind", ["train", "sync", "evaluate", "predict"])
async def test_tasks_stand_still_while_they_give_way(lab: Lab, kind: str) -> None:
    model = lab.files.model(two_outputs(**COMPILED["maps"]))
    data = lab.files.arrays(1, x=X, kind=KIND, size=SIZE)
    tasks = {
        "train": training(model, data, format=TWO, samples=64, seconds=60),
        "evaluate": evaluation(model, whole(data), format=TWO),
        "predict": prediction(model, whole(data), format=TWO),
        "sync": SyncTask(
            model=model, data=data, image=None, formation="f", rank=0, format=TWO, members=("127.0.0.1:1",),
            batches=(16,), first_step=0, steps=3, begins=True,
        ),
    }  # fmt: skip
    job_id = f"gives way: {kind}"
    await lab.run(tasks[kind], job_id)  # now all is loaded, and a run takes only milliseconds
    lab.engine.pause()
    running = asyncio.create_task(lab.run(tasks[kind], job_id))
    ended, _ = await asyncio.wait([running], timeout=1.5)
    assert not ended
    assert lab.progress == []
    lab.engine.resume()
    assert await running


@pytest.mark.parametrize("weighted", [False, True])
async def test_synchronous_steps_of_two_outputs(lab: Lab, weighted: bool) -> None:
    """A group of one member. The test takes the same batches in the same order."""
    import keras

    from potluck.data.order import passes

    model = two_outputs(optimizer=keras.optimizers.SGD(0.05), **COMPILED["maps"])
    arrays = {"x": X, "size": SIZE, "kind": KIND} | ({"sample_weight": WEIGHTS} if weighted else {})
    result = await lab.run(
        SyncTask(
            model=lab.files.model(model), data=lab.files.arrays(2, **arrays), image=None, formation="f", rank=0,
            format=replace(TWO, weight="sample_weight" if weighted else ""), members=("127.0.0.1:1",), batches=(16,),
            first_step=0, steps=6, begins=True,
        ),
        f"sync {weighted}",
    )  # fmt: skip
    order = np.fromiter(passes(ROWS, 0), np.int64, 6 * 16).reshape(6, 16)
    stepwise(model)
    for index in order:
        weight = WEIGHTS[index] if weighted else None
        log = model.train_on_batch(X[index], [KIND[index], SIZE[index]], sample_weight=weight, return_dict=True)
    stored = dict(load(lab.scratch / result.weights.sha256))
    for name, theirs in zip(sorted(stored, key=lambda name: name[1:]), model.get_weights(), strict=True):
        np.testing.assert_allclose(stored[name], theirs, atol=1e-5)
    assert set(result.metrics) == set(log) >= {"kind_loss", "size_loss", "kind_accuracy", "size_mae"}


def one_output(*layers: Any, loss: Any, inputs: Any = None, optimizer: Any = None, metrics: Any = ()) -> Any:
    import keras

    model = keras.Sequential([keras.Input((6,)) if inputs is None else inputs, *layers])
    optimizer = optimizer or keras.optimizers.SGD(0.05)
    model.compile(optimizer, loss, metrics=list(metrics), weighted_metrics=list(metrics))
    return model


def multi_label() -> tuple[Any, Array, Array]:
    import keras

    layers = [keras.layers.Dense(3, activation="sigmoid")]
    return one_output(*layers, loss="binary_crossentropy", metrics=["binary_accuracy"]), X, whole_numbers(2, 3)


def recurrent() -> tuple[Any, Array, Array]:
    import keras

    layers = [keras.layers.LSTM(5, return_sequences=True), keras.layers.Dense(4, activation="softmax")]
    model = one_output(
        *layers, loss="sparse_categorical_crossentropy", inputs=keras.Input((7, 6)), metrics=["accuracy"]
    )
    return model, numbers(7, 6), whole_numbers(4, 7)


def recurrent_values() -> tuple[Any, Array, Array]:
    import keras

    layers = [keras.layers.Embedding(9, 5), keras.layers.GRU(5, return_sequences=True), keras.layers.Dense(1)]
    model = one_output(*layers, loss="mae", inputs=keras.Input((7,), dtype="int32"), metrics=["mse"])
    return model, whole_numbers(9, 7).astype(np.int32), numbers(7)


def several_values(**clipped: float) -> tuple[Any, Array, Array]:
    import keras

    optimizer = keras.optimizers.SGD(0.5, **clipped)
    return one_output(keras.layers.Dense(2), loss="huber", optimizer=optimizer, metrics=["mae"]), X, SIZE * 20


def normalised() -> tuple[Any, Array, Array]:
    import keras

    layers = [keras.layers.Dense(8), keras.layers.BatchNormalization(), keras.layers.Dense(3)]
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return one_output(*layers, loss=loss, metrics=["accuracy"]), X, KIND


def mixed_precision() -> tuple[Any, Array, Array]:
    import keras

    layers = [keras.layers.Dense(8, dtype="mixed_bfloat16"), keras.layers.Dense(2, dtype="float32")]
    return one_output(*layers, loss="mse", metrics=["mae"]), X, SIZE


LOSSES = {
    "poisson": (1, np.abs(SIZE[:, :1])), "log_cosh": (2, SIZE), "squared_hinge": (1, whole_numbers(2) * 2 - 1),
    "binary_focal_crossentropy": (1, whole_numbers(2)), "categorical_focal_crossentropy": (3, KIND),
    "crossentropy": (3, np.eye(3, dtype=np.float32)[KIND]), "kl_divergence": (3, np.eye(3, dtype=np.float32)[KIND]),
    "cosine_similarity": (2, SIZE), "mape": (2, SIZE + 9),
}  # fmt: skip
KINDS: dict[str, Callable[[], tuple[Any, Array, Array]]] = {
    "multi-label": multi_label,
    "LSTM with a target a step": recurrent,
    "values of a sequence": recurrent_values,
    "several values": several_values,
    "global_clipnorm": lambda: several_values(global_clipnorm=0.1),
    "clipvalue": lambda: several_values(clipvalue=0.02),
    "BatchNormalization": normalised,
    "mixed precision": mixed_precision,
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", KINDS)
async def test_kinds_of_targets_and_optimizers_give_the_numbers_of_keras(lab: Lab, kind: str, weighted: bool) -> None:
    model, x, y = KINDS[kind]()
    arrays = {"x": x, "y": y} | ({"sample_weight": WEIGHTS} if weighted else {})
    form = replace(ONE, weight="sample_weight" if weighted else "", classes=("a", "b", "c") if "label" in kind else ())
    tolerance = 1e-2 if kind == "mixed precision" else 2e-5  # bfloat16 has 8 bits, and the items come in another order
    await assert_trains_as_keras(lab, model, arrays, y, form, tolerance)


async def test_steps_of_time_have_weights_of_their_own(lab: Lab) -> None:
    model, x, y = recurrent()
    weights = np.random.default_rng(4).integers(0, 2, y.shape).astype(np.float32)
    arrays = {"x": x, "y": y, "sample_weight": weights}
    await assert_trains_as_keras(lab, model, arrays, y, replace(ONE, weight="sample_weight"))


@pytest.mark.parametrize("loss", LOSSES)
async def test_losses_give_the_numbers_of_keras(lab: Lab, loss: str) -> None:
    import keras

    units, y = LOSSES[loss]
    activation = {"poisson": "softplus", "log_cosh": "linear", "cosine_similarity": "linear", "mape": "linear"}
    last = activation.get(loss, "softmax" if units == 3 else "sigmoid")
    model = one_output(keras.layers.Dense(units, activation=last), loss=loss)
    shown = np.eye(3, dtype=np.float32)[y] if loss == "categorical_focal_crossentropy" else y.reshape(ROWS, -1)
    await assert_trains_as_keras(lab, model, {"x": X, "y": y}, shown, ONE)


async def test_targets_that_do_not_fit_the_outputs_are_named(lab: Lab) -> None:
    model = lab.files.model(two_outputs(**COMPILED["maps"]))
    data = lab.files.arrays(1, x=X, kind=KIND, weight=SIZE)
    with pytest.raises(InvalidRequest, match=r"2 outputs \(kind, size\), and the data 2 targets \(kind, weight\)"):
        await lab.run(training(model, data, format=replace(TWO, targets=("kind", "weight"))), "names")
    data = lab.files.arrays(1, x=X, kind=KIND, size=SIZE)
    with pytest.raises(InvalidRequest, match="class_weight is for models with one output"):
        await lab.run(training(model, data, format=TWO, class_weight={"0": 2.0}), "class weight")
    single, _, _ = normalised()
    data = lab.files.arrays(1, x=X, y=KIND, w=WEIGHTS)
    with pytest.raises(InvalidRequest, match="cannot be used together"):
        await lab.run(
            training(lab.files.model(single), data, format=replace(ONE, weight="w"), class_weight={"0": 2.0}), "both"
        )


async def test_columns_are_one_target_of_several_values(lab: Lab) -> None:
    model, x, y = several_values()
    arrays = {"x": x, "left": y[:, 0], "right": y[:, 1]}
    await assert_trains_as_keras(lab, model, arrays, y, replace(ONE, target="", targets=("left", "right")))


async def test_new_weights_of_items_are_taken_in_the_same_job(lab: Lab) -> None:
    model, x, y = several_values()
    data = lab.files.arrays(1, x=x, y=y, none=np.zeros(ROWS, np.float32))
    task = training(lab.files.model(model), data, samples=ROWS, batch_size=ROWS, format=ONE)
    first = await lab.run(task, "same data")
    assert lab.norm(first) > 0
    again = replace(task, weights=lab.after(first), round=1, format=replace(ONE, weight="none"))
    assert lab.norm(await lab.run(again, "same data")) == 0
