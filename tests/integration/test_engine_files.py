"""Texts and recordings in an engine: the same numbers as Keras gets from the same folder."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from potluck.data.audio import fitted
from potluck.data.pack import pack
from potluck.errors import InvalidData, InvalidModel, InvalidRequest
from potluck.wire.tasks import ExportTask, SyncTask
from potluck.wire.tensors import to_numpy
from potluck.wire.values import DataFormat, Dataset
from support.engine_lab import Lab, engine_lab, evaluation, prediction, training
from support.models import Files, blobs, dense, stepwise, whole
from support.recordings import FLOAT, audio_model, text_model, tone, wav, write_files, write_texts, write_tones
from support.shards import new_store

pytestmark = [pytest.mark.tensorflow, pytest.mark.asyncio(loop_scope="module")]
TEXTS = DataFormat(kind="texts", classes=("bad", "good"))
AUDIO = DataFormat(kind="audio", classes=("high", "low"), rate=8000)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def lab(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lab]:
    async with engine_lab(tmp_path_factory.mktemp("engine")) as lab:
        yield lab


def packed(files: Files, folder: Path, tmp_path: Path) -> Dataset:
    """The data set of a folder in the order of its names, with its shards among `files`."""
    store = new_store(tmp_path)
    dataset = pack(folder, "d", store, shuffle=False)
    for shard in dataset.shards:
        files.put(store.read(shard.blob.sha256))
    return dataset


def by_keras(folder: Path, kind: str, **options: Any) -> tuple[Any, Any]:
    """(inputs, labels) of a folder as Keras reads it, in the order of its names."""
    import keras

    read = {"texts": keras.utils.text_dataset_from_directory, "audio": keras.utils.audio_dataset_from_directory}[kind]
    batches = list(read(folder, shuffle=False, batch_size=1000, verbose=False, **options))
    assert len(batches) == 1
    return batches[0]


async def _same_as_keras(lab: Lab, model: Any, dataset: Dataset, x: Any, y: Any, job: str) -> None:
    """Predictions, metrics, and the weights after five steps of SGD on batches of all the data."""
    blob, form, count = lab.files.model(model), dataset.format, dataset.count
    stepwise(model)
    predicted = await lab.run(prediction(blob, whole(dataset.shards), format=form, batch_size=7), job)
    np.testing.assert_allclose(to_numpy(predicted.outputs[0]), model.predict(x, verbose=0), atol=1e-6)
    scored = await lab.run(evaluation(blob, whole(dataset.shards), format=form, batch_size=7), job)
    expected = model.evaluate(x, y, verbose=0, return_dict=True)
    assert scored.count == np.sum(scored.confusion) == count
    assert {name: value / count for name, value in scored.sums.items()} == pytest.approx(expected, abs=1e-6)
    task = training(blob, dataset.shards, format=form, samples=count * 5, batch_size=count)
    trained = await lab.run(task, job)
    model.fit(x, y, batch_size=count, epochs=5, shuffle=False, verbose=0)
    for ours, theirs in zip(lab.weights(trained), model.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("shape", [(), (1,)])
async def test_texts_give_the_numbers_of_keras(lab: Lab, tmp_path: Path, shape: tuple[int, ...]) -> None:
    folder = write_files(write_texts(tmp_path / "films"), {"bad/umlaut.txt": "größer, größer".encode()})
    dataset = packed(lab.files, folder, tmp_path)
    x, y = by_keras(folder, "texts")
    assert dataset.format == TEXTS
    await _same_as_keras(lab, text_model(folder, shape, _sgd()), dataset, x, y, f"texts {shape}")


@pytest.mark.parametrize(("shape", "channels"), [((640,), 1), ((640, 1), 1), ((640, 2), 2)])
async def test_recordings_give_the_numbers_of_keras(
    lab: Lab, tmp_path: Path, shape: tuple[int, ...], channels: int
) -> None:
    """Recordings have 500 to 900 samples: shorter ones are padded with zeros, longer ones are cut."""
    folder = write_tones(tmp_path / "tones")
    if channels == 2:
        left, right = tone(300, 700), tone(900, 700)
        for path in folder.rglob("*.wav"):
            path.write_bytes(wav(np.stack([left, right * (path.parent.name == "high")], axis=1)))
    dataset = packed(lab.files, folder, tmp_path)
    x, y = by_keras(folder, "audio", output_sequence_length=640)
    assert dataset.format == AUDIO
    model = audio_model(shape, _sgd())
    await _same_as_keras(lab, model, dataset, reshaped(x, model), y, f"audio {shape}")


async def test_channels_are_averaged_or_repeated(lab: Lab) -> None:
    import keras

    left, right = np.array([0.5, -0.25, 0.125]), np.array([0.25, 0.25, -0.125])
    stereo = lab.files.images([(wav(np.stack([left, right], axis=1)), None)], "wav")
    for shape, expected in (
        ((4,), [0.375, 0.0, 0.0, 0.0]),
        ((2, 3), [0.5, 0.25, 0.25, -0.25, 0.25, 0.25]),
    ):
        model = keras.Sequential([keras.Input(shape), keras.layers.Flatten()])
        found = await lab.run(prediction(lab.files.model(model), whole([stereo]), format=AUDIO), "channels")
        np.testing.assert_allclose(to_numpy(found.outputs[0])[0], expected, atol=1e-4)
        at_a_client = fitted(lab.files.paths[stereo.blob.sha256].read_bytes()[512:], shape)
        np.testing.assert_allclose(to_numpy(found.outputs[0])[0], at_a_client.ravel(), atol=1e-7)


async def test_an_export_keeps_the_vocabulary(lab: Lab, tmp_path: Path) -> None:
    import keras

    folder = write_texts(tmp_path / "films")
    dataset, model = packed(lab.files, folder, tmp_path), text_model(folder, optimizer="sgd")
    blob = lab.files.model(model)
    trained = await lab.run(training(blob, dataset.shards, format=TEXTS), "export")
    exported = await lab.run(ExportTask(model=blob, weights=lab.after(trained)), "export")
    assert [spec.datatype for spec in exported.signature.inputs] == ["BYTES"]
    target = tmp_path / "exported.keras"
    target.write_bytes((lab.scratch / exported.model.sha256).read_bytes())
    again = keras.saving.load_model(target, compile=False)
    assert again.layers[1].get_vocabulary() == model.layers[1].get_vocabulary()
    assert len(again.layers[1].get_vocabulary()) == 15


@pytest.mark.parametrize("kind", ["texts", "audio"])
async def test_files_that_do_not_fit_into_memory_are_streamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """In this process, where the limit can be lowered."""
    from node.engine import training as engine_training
    from node.engine.shards import ShardPart

    monkeypatch.setattr(engine_training, "MEMORY_LIMIT_BYTES", 0)
    files = Files(tmp_path / "blobs")
    folder = (write_texts if kind == "texts" else write_tones)(tmp_path / "data", 64)
    dataset = packed(files, folder, tmp_path)
    model = text_model(folder, optimizer=_adam()) if kind == "texts" else audio_model(optimizer=_adam())
    session = engine_training.TrainingSession(model, seed=0)
    task = training(dataset.shards[0].blob, dataset.shards, format=dataset.format, batch_size=16)
    session.use_data(task, [ShardPart(files.paths[shard.blob.sha256], 0, shard.count) for shard in dataset.shards])
    outcomes = [session.train(640, 60, threading.Event(), lambda done, metrics: None) for _ in range(3)]
    assert [outcome.samples for outcome in outcomes] == [640] * 3
    assert outcomes[-1].metrics["accuracy"] > 0.9


@pytest.mark.parametrize("limit", [2**30, 0])
@pytest.mark.parametrize("kind", ["texts", "audio"])
async def test_a_group_of_one_takes_the_steps_of_keras(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, limit: int
) -> None:
    """In this process, where the limit can be lowered: below it, files are decoded for each step."""
    from node.engine import synchronous
    from node.engine import training as engine_training

    monkeypatch.setattr(engine_training, "MEMORY_LIMIT_BYTES", limit)
    files = Files(tmp_path / "blobs")
    folder = (write_texts if kind == "texts" else write_tones)(tmp_path / "data", 64)
    dataset = packed(files, folder, tmp_path)
    model = text_model(folder, optimizer=_sgd()) if kind == "texts" else audio_model(optimizer=_sgd())
    x, y = by_keras(folder, kind, **({} if kind == "texts" else {"output_sequence_length": 640}))
    task = SyncTask(
        model=files.model(model),
        data=dataset.shards,
        format=dataset.format,
        image=None,
        formation="f",
        members=("alone:1",),
        batches=(64,),
        rank=0,
        first_step=0,
        steps=5,
        begins=True,
    )
    member = synchronous.GroupMember(task, files.paths, tmp_path)
    member.train(task, threading.Event(), lambda done, metrics: None)
    stepwise(model).fit(reshaped(x, model), y, batch_size=64, epochs=5, shuffle=False, verbose=0)
    for ours, theirs in zip(member.model.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def reshaped(x: Any, model: Any) -> Any:
    """Inputs as Keras read them, in the shape that the model takes."""
    return x if x.dtype == "string" else x.numpy().reshape(-1, *model.input_shape[1:])


async def test_models_and_data_that_do_not_fit_are_named(lab: Lab, tmp_path: Path) -> None:
    import keras

    text = lab.files.images([(b"good", 1), (b"", 0)], "txt")
    sound = lab.files.images([(wav(tone(300)), 0), (wav(tone(1200)), 1)], "wav")
    for_text = lab.files.model(text_model(write_texts(tmp_path / "films")))
    free = keras.Sequential([keras.Input((None, 1)), keras.layers.GlobalAveragePooling1D()])
    with pytest.raises(
        InvalidModel, match=r"the data is texts, but the model takes .*\(8\): expected one of text, keras"
    ):
        await lab.run(prediction(lab.files.model(dense()), whole([text]), format=TEXTS))
    with pytest.raises(InvalidModel, match=r"the data is recordings, but the model takes .*\(\) of text: expected"):
        await lab.run(prediction(for_text, whole([sound]), format=AUDIO))
    with pytest.raises(
        InvalidModel, match=r"has shape \(.*, 1\): recordings are cut or padded to one length, so build the model"
    ):
        await lab.run(prediction(lab.files.model(free), whole([sound]), format=AUDIO))
    x, y = blobs(10)
    with pytest.raises(InvalidRequest, match=r"takes text, but the data has numbers: give a folder of \.txt files"):
        await lab.run(prediction(for_text, whole(lab.files.arrays(1, x=x[:, 0], y=y))))
    assert (await lab.run(prediction(for_text, whole([text]), format=TEXTS))).count == 2, "an empty text is a text"


async def test_a_file_that_no_decoder_reads_is_named(lab: Lab) -> None:
    for bad in (b"RIFF no wave", wav(tone(300), bits=32, code=FLOAT)):
        shard = lab.files.images([(wav(tone(300)), 0), (bad, 1)], "wav")
        blob = lab.files.model(audio_model())
        for task in (prediction(blob, whole([shard]), format=AUDIO), training(blob, (shard,), format=AUDIO)):
            with pytest.raises(
                InvalidData, match=r"a recording cannot be decoded .*TensorFlow reads WAV files of 16-bit"
            ):
                await lab.run(task, "bad")


def _sgd() -> Any:
    import keras

    return keras.optimizers.SGD(0.5, momentum=0.9)


def _adam() -> Any:
    import keras

    return keras.optimizers.Adam(0.05)
