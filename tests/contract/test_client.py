"""The client against a coordinator that answers by script: on the fake bus, and once on a real mosquitto."""

from __future__ import annotations

import asyncio
import json
import time
import zipfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potluck.bus.mqtt import MqttBus
from potluck.client import AsyncClient, Client
from potluck.client import connection as connection_module
from potluck.credentials import Credentials
from potluck.errors import (
    Cancelled,
    Conflict,
    InvalidData,
    InvalidModel,
    InvalidRequest,
    NotFound,
    Overloaded,
    PotluckError,
    TimedOut,
    TooLarge,
    Unavailable,
)
from potluck.wire.jobs import EpochMetrics, Evaluation, RoundMetrics, Train
from potluck.wire.questions import (
    AddDataset,
    CancelInfer,
    DatasetInfo,
    DatasetsListed,
    GetHistory,
    GetJob,
    GetModel,
    HistoryListed,
    Infer,
    Inferred,
    JobChanged,
    JobsListed,
    ListDatasets,
    ListJobs,
    ListNodes,
    NodesListed,
    StopTraining,
    SubmitJob,
)
from potluck.wire.topics import Topics
from potluck.wire.values import BlobRef, ErrorInfo, ImageOptions, Message, Tensor
from support.brokers import TestBroker, some_kind
from support.eventually import eventually
from support.fake_bus import FakeBroker, FakeBus
from support.recordings import write_files
from support.scripted_coordinator import ScriptedCoordinator


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(connection_module, "_ASK_AGAIN_SECONDS", 0.1)
    monkeypatch.setattr(connection_module, "_FIND_SECONDS", 1.0)
    monkeypatch.setattr("potluck.client.jobs._POLL_SECONDS", 0.1)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))


@pytest.fixture
def broker() -> FakeBroker:
    return FakeBroker()


@pytest.fixture
async def coordinator(broker: FakeBroker, tmp_path: Path) -> AsyncIterator[ScriptedCoordinator]:
    async with ScriptedCoordinator(FakeBus(broker, client_id="coordinator"), tmp_path / "store") as running:
        yield running


@pytest.fixture
async def client(broker: FakeBroker, coordinator: ScriptedCoordinator) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(timeout=2, bus=FakeBus(broker, client_id="client")) as connected:
        yield connected


def keras_file(path: Path, *, compiled: bool = True) -> Path:
    """A file like Keras's, as far as a client reads it."""
    layers = [{"class_name": "InputLayer", "config": {"batch_shape": [None, 32, 32, 1]}}]
    config = {"class_name": "Functional", "config": {"name": "net", "layers": layers}}
    if compiled:
        config["compile_config"] = {"optimizer": "adam", "loss": "mse"}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", json.dumps(config))
    return path


def datasets(**kinds: str) -> DatasetsListed:
    """Registered data sets of these kinds."""
    return DatasetsListed(
        datasets=tuple(
            DatasetInfo(name=name, kind=kind, count=1, shards=1, size_bytes=1) for name, kind in kinds.items()
        )
    )


def jobs_of(coordinator: ScriptedCoordinator) -> list[Any]:
    return [asked.job for asked in coordinator.asked if isinstance(asked, SubmitJob)]


async def test_a_question_is_asked_again_until_it_is_answered(
    client: AsyncClient, coordinator: ScriptedCoordinator
) -> None:
    answers = iter([None, None, NodesListed(nodes=())])
    coordinator.answers[ListNodes] = lambda asked: next(answers)
    assert await client.nodes() == ()
    assert len({asked.id for asked in coordinator.asked}) == 1, "the same id, so that nothing is done twice"


async def test_silence_ends_in_a_timeout(client: AsyncClient, coordinator: ScriptedCoordinator) -> None:
    coordinator.answers[ListNodes] = lambda asked: None
    with pytest.raises(TimedOut, match="ListNodes"):
        await client.nodes()


async def test_without_a_coordinator_the_error_says_so(broker: FakeBroker) -> None:
    with pytest.raises(Unavailable, match="no coordinator of cluster 'default' is online"):
        await AsyncClient(timeout=1, bus=FakeBus(broker, client_id="client")).nodes()


async def test_a_coordinator_that_starts_anew_is_waited_for(
    client: AsyncClient, coordinator: ScriptedCoordinator
) -> None:
    coordinator.answers[ListNodes] = lambda asked: NodesListed(nodes=())
    await coordinator.online("offline")
    await eventually(lambda: not client._connection._online.is_set())
    asking = asyncio.create_task(client.nodes())
    await coordinator.online()
    assert await asking == ()


async def test_training_sends_the_file_and_the_job(
    client: AsyncClient, coordinator: ScriptedCoordinator, tmp_path: Path
) -> None:
    file = keras_file(tmp_path / "net.keras")
    coordinator.answers[ListDatasets] = lambda asked: datasets(images="images")
    job = await client.train(file, "images", validation="held-out", epochs=3, image=(32, 32), name="net")
    (spec,) = jobs_of(coordinator)
    assert isinstance(spec, Train)
    assert (spec.dataset, spec.validation, spec.epochs, spec.register) == ("images", "held-out", 3, "net")
    assert spec.image is not None
    assert spec.image.channels == 1, "as the model's input has it"
    assert coordinator.store.read(spec.model.sha256) == file.read_bytes()
    assert (job.id, job.asked) == ("job-1", spec)


async def test_bad_models_and_options_are_refused_before_anything_is_sent(
    client: AsyncClient, coordinator: ScriptedCoordinator, tmp_path: Path
) -> None:
    with pytest.raises(InvalidModel, match="not compiled"):
        await client.train(keras_file(tmp_path / "raw.keras", compiled=False), "images")
    with pytest.raises(InvalidModel, match="no model file"):
        await client.train("nowhere.keras", "images")
    (tmp_path / "text.keras").write_text("hello")
    with pytest.raises(InvalidModel, match=r"not a \.keras file"):
        await client.predict(tmp_path / "text.keras", "images")
    with pytest.raises(InvalidModel, match=r"model must be a keras\.Model.*not 3"):
        await client.train(3, "images")
    with pytest.raises(InvalidRequest, match="epochs"):
        await client.train("net", "images", epochs=0)
    with pytest.raises(InvalidRequest, match="name must be made of letters"):
        await client.train("net", "images", name="a b")
    with pytest.raises(InvalidData, match="nowhere"):
        await client.train("net", tmp_path / "nowhere")
    with pytest.raises(InvalidData, match="it cannot be the name of a data set"):
        await client.train("net", "my pictures")
    assert coordinator.asked == []


async def test_data_that_cannot_fit_are_refused_before_they_are_packed(
    client: AsyncClient, coordinator: ScriptedCoordinator, tmp_path: Path
) -> None:
    def missing(asked: GetModel) -> Message:
        raise NotFound(f"there is no model {asked.model!r}: did you mean 'net'?")

    coordinator.answers[ListDatasets] = lambda asked: datasets(images="images")
    file, y = keras_file(tmp_path / "net.keras"), np.zeros(3)
    shapes = r"the model's input has shape \(32, 32, 1\), but the data has \(28, 28\) per item"
    with pytest.raises(InvalidRequest, match=f"data: {shapes}"):
        await client.train(file, (np.zeros((3, 28, 28)), y))
    with pytest.raises(InvalidRequest, match=f"validation: {shapes}"):
        await client.train(file, "images", validation=(np.zeros((3, 28, 28)), y))
    with pytest.raises(InvalidRequest, match="takes images of 32x32, not of 128x128: leave out image"):
        await client.predict(file, tmp_path, image=(128, 128))
    with pytest.raises(NotFound, match=r"no data set 'imags': did you mean 'images'\?"):
        await client.train(file, "imags", validation=(np.zeros((3, 32, 32, 1)), y))
    coordinator.answers[GetModel] = missing
    for ask in (client.train, client.evaluate, client.predict):
        with pytest.raises(NotFound, match="no model 'nett': did you mean 'net'"):
            await ask("nett", (np.zeros((3, 32, 32, 1)), y))
    with pytest.raises(NotFound, match="no model 'nett'"):
        await client.deploy("nett", quantize="int8", calibration=np.zeros((3, 32, 32, 1)))
    (tmp_path / "saved").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        with pytest.raises(
            NotFound, match=r"there is a file or folder of that name here: if that is the model, write \./saved"
        ):
            await client.evaluate("saved", "images")
    assert not [asked for asked in coordinator.asked if isinstance(asked, AddDataset | SubmitJob)]


def table_model(path: Path, loss: str = "sparse_categorical_crossentropy") -> Path:
    """One of four numbers and three classes."""
    layers = [
        {"class_name": "InputLayer", "config": {"batch_shape": [None, 4]}},
        {"class_name": "Dense", "config": {"name": "scores", "units": 3}},
    ]
    config = {"class_name": "Sequential", "config": {"layers": layers}, "compile_config": {"loss": loss}}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", json.dumps(config))
    return path


async def test_a_missing_target_is_told_with_the_names_of_columns_before_data_are_sent(
    client: AsyncClient, coordinator: ScriptedCoordinator, tmp_path: Path
) -> None:
    model, table = table_model(tmp_path / "net.keras"), tmp_path / "iris.csv"
    table.write_text("a,b,c,d,species\n" + "1,2,3,4,0\n" * 6)
    untold = r"no target .*: none of its columns \(a, b, c, d, species\) is called y, target, label or class: .*--target NAME"
    for ask in (client.train, client.evaluate):
        with pytest.raises(InvalidData, match=f"^data has {untold}"):
            await ask(model, table)
    np.savez(tmp_path / "iris.npz", rows=np.zeros((6, 4)), species=np.arange(6) % 3)
    with pytest.raises(InvalidData, match=r"none of its arrays \(rows, species\) is called y, .*target=NAME"):
        await client.train(model, tmp_path / "iris.npz")
    with pytest.raises(InvalidData, match=r"it holds only 'x', so give both, as arrays \(x, y\)"):
        await client.train(model, np.zeros((6, 4)))
    table.write_text("id,a,b,c,d,class\n" + "1,1,2,3,4,0\n" * 6)
    fits = r"has shape \(4\), but the data has \(5\) per item; its columns are id, a, b, c, d without the target 'class': make .* \(5,\)"
    with pytest.raises(InvalidRequest, match=fits):
        await client.train(model, table)
    table.write_text(",id,a,b,c,d,buys\n" + "0,1,1,2,3,4,0\n" * 6)
    fits = r"its columns are \(no name\), id, a, b, c, d without the target 'buys': make the model's input \(5,\)"
    with pytest.raises(InvalidRequest, match=fits):
        await client.train(model, table, target="buys")
    with pytest.raises(
        InvalidRequest, match=r"\(no name\), id, a, b, c, d, buys, none of them is the target: name the target"
    ):
        await client.predict(model, table)
    with pytest.raises(InvalidModel, match="data has 4 classes, but the model takes 3: give its last layer 4 units"):
        await client.train(model, {"x": np.zeros((8, 4)), "y": np.array(list("abcdabcd"))})
    assert not [asked for asked in coordinator.asked if isinstance(asked, AddDataset | SubmitJob)]
    with pytest.raises(InvalidData, match=r"^validation has no target .* holds only 'x'"):
        await client.train(model, (np.zeros((6, 4)), np.zeros(6)), validation=np.zeros((6, 4)))
    assert jobs_of(coordinator) == []


async def test_files_of_another_kind_than_the_model_takes_are_refused_before_a_job(
    client: AsyncClient, coordinator: ScriptedCoordinator, tmp_path: Path
) -> None:
    coordinator.answers[ListDatasets] = lambda asked: datasets(pictures="images", tones="audio", rows="arrays")
    model, free = table_model(tmp_path / "net.keras"), tmp_path / "free.keras"
    layers = [{"class_name": "InputLayer", "config": {"batch_shape": [None, None, None, 3]}}]
    config = {"class_name": "Functional", "config": {"layers": layers}, "compile_config": {"loss": "mse"}}
    with zipfile.ZipFile(free, "w") as archive:
        archive.writestr("config.json", json.dumps(config))
    table = tmp_path / "shop.csv"
    table.write_text("age,price,label\n" + "1,2,0\n" * 6)
    said = r"data holds images, each \(height, width, channels\), but the model's input has shape \(4\)"
    for ask in (client.train, client.evaluate, client.predict):
        with pytest.raises(InvalidRequest, match=said):
            await ask(model, "pictures")
        with pytest.raises(InvalidRequest, match=r"shape \(any, any, 3\): give the size of the images, .*--image HxW"):
            await ask(free, "pictures")
        with pytest.raises(InvalidRequest, match="data holds recordings, each"):
            await ask(free, "tones")
        with pytest.raises(InvalidRequest, match="the model takes images, but a table holds none: give a folder"):
            await ask(free, table)
    assert jobs_of(coordinator) == []
    await client.train(free, "pictures", image=(8, 8))
    await client.train(model, "rows")


async def test_model_and_data_in_each_others_place_are_told_apart(
    client: AsyncClient, coordinator: ScriptedCoordinator, tmp_path: Path
) -> None:
    def missing(asked: GetModel) -> Message:
        raise NotFound(f"there is no model {asked.model!r}")

    coordinator.answers |= {ListDatasets: lambda asked: datasets(iris="arrays"), GetModel: missing}
    model, first = table_model(tmp_path / "net.keras"), "the model comes first and then the data"
    with pytest.raises(InvalidData, match=f"data is a model, .*net.keras.*: {first}"):
        await client.train("iris.csv", str(model))
    for data in ("iris", "iris.csv"):
        with pytest.raises(NotFound, match=rf"no model '{data}' \({data} is data: {first}"):
            await client.train(data, "net")
    with pytest.raises(InvalidModel, match=f"not array.*: {first}"):
        await client.train(np.zeros((6, 4)), "iris")
    with pytest.raises(InvalidData, match="is a model: `potluck models add`"):
        await client.add_data(model)
    assert jobs_of(coordinator) == []


async def test_a_folder_named_like_a_data_set_is_used_with_a_warning(
    client: AsyncClient, coordinator: ScriptedCoordinator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    coordinator.answers[ListDatasets] = lambda asked: datasets(films="texts")
    write_files(tmp_path / "films", {"good/1.txt": b"fine", "bad/2.txt": b"dull"})
    monkeypatch.chdir(tmp_path)
    await client.train("net", "./films")
    assert caplog.text == ""
    await client.train("net", "films")
    assert {record.name for record in caplog.records} == {"potluck.client.sources"}, "what the command line shows"
    assert (
        "data: there is a file or folder 'films' here, and it is used instead of the cluster's data set 'films'"
        in caplog.text
    )


async def test_data_are_packed_for_their_job_and_models_have_names(
    client: AsyncClient, coordinator: ScriptedCoordinator, tmp_path: Path
) -> None:
    x, y = np.zeros((3, 32, 32, 1), np.float32), np.zeros(3)
    await client.train(keras_file(tmp_path / "net.keras"), (x, y))
    await client.add_data((x, y), "named")
    (spec,) = jobs_of(coordinator)
    assert spec.model_name == "net.keras"
    added = [(asked.name, asked.packed) for asked in coordinator.asked if isinstance(asked, AddDataset)]
    assert added == [(spec.dataset, True), ("named", False)]


async def test_more_jobs_than_go_into_a_message_are_all_listed(
    client: AsyncClient, coordinator: ScriptedCoordinator
) -> None:
    jobs = [JobChanged(job_id=f"job-{n}", kind="train", state="running", created_at=n) for n in range(5)]

    def page(asked: ListJobs) -> JobsListed:
        start = int(asked.after.partition("-")[2] or -1) + 1
        return JobsListed(jobs=tuple(jobs[start : start + 2]), more=start + 2 < len(jobs))

    coordinator.answers[ListJobs] = page
    assert await client.jobs() == tuple(jobs)


X = np.zeros((2, 2), np.float32)
WRONG: dict[str, tuple[type[PotluckError], Callable[[AsyncClient], Awaitable[object]]]] = {
    "model must be": (InvalidModel, lambda client: client.train(5, "d")),
    "model must be a keras": (InvalidModel, lambda client: client.deploy(object())),
    "model must be the `name`": (InvalidRequest, lambda client: client.infer(5, X)),
    "model must be the `name`,": (InvalidRequest, lambda client: client.undeploy(None)),
    "epochs must be a whole number": (InvalidRequest, lambda client: client.train("m", "d", epochs="x")),
    "epochs must be .*not 0": (InvalidRequest, lambda client: client.train("m", "d", epochs=0)),
    "epochs must be .*not 1.5": (InvalidRequest, lambda client: client.train("m", "d", epochs=1.5)),
    "batch_size must be .*not -1": (InvalidRequest, lambda client: client.train("m", "d", batch_size=-1)),
    "batch_size must be .*not None": (InvalidRequest, lambda client: client.evaluate("m", "d", batch_size=None)),
    "round_seconds must be .*86,400": (InvalidRequest, lambda client: client.train("m", "d", round_seconds=1e9)),
    "round_seconds must be": (InvalidRequest, lambda client: client.train("m", "d", round_seconds="fast")),
    "seed must be": (InvalidRequest, lambda client: client.train("m", "d", seed=2**70)),
    "private_unit alone hides nothing": (
        InvalidRequest,
        lambda client: client.train("m", "d", private_unit="node"),
    ),
    "name must be .*not 5": (InvalidRequest, lambda client: client.train("m", "d", name=5)),
    "target must be": (InvalidRequest, lambda client: client.predict("m", "d", target=b"y")),
    "target 'y' names": (InvalidRequest, lambda client: client.train("m", "d", validation=(X, X), target="y")),
    "target 'y' names a": (InvalidRequest, lambda client: client.predict("m", X, target="y")),
    "image must be .*not 'big'": (InvalidRequest, lambda client: client.predict("m", "d", image="big")),
    "image must be .*not 28": (InvalidRequest, lambda client: client.predict("m", "d", image=28)),
    "image must be .*2, 2, 2": (InvalidRequest, lambda client: client.predict("m", "d", image=(2, 2, 2))),
    "image must be .*height=0": (
        InvalidRequest,
        lambda client: client.predict("m", "d", image=ImageOptions(height=0, width=1)),
    ),
    "data must be .*not None": (InvalidData, lambda client: client.evaluate("m", data=None)),
    "data must be .*not 3": (InvalidData, lambda client: client.train("m", 3)),
    "data cannot be made into arrays": (InvalidData, lambda client: client.train("m", ([[1], [1, 2]], [0, 1]))),
    "the file or folder .* cannot be read: File name too long": (
        InvalidData,
        lambda client: client.train("m", "d" * 300),
    ),
    "validation must be .*not 3": (InvalidData, lambda client: client.train("m", "d", validation=3)),
    "replicas must be .*not 'two'": (InvalidRequest, lambda client: client.deploy("m", replicas="two")),
    "replicas must be .*not -1": (InvalidRequest, lambda client: client.deploy("m", replicas=-1)),
    "name is only for": (InvalidRequest, lambda client: client.deploy("m", name="other")),
    "inputs must be .*object": (InvalidRequest, lambda client: client.infer("m", object())),
    "inputs must be .*None": (InvalidRequest, lambda client: client.infer("m", {"a": None})),
    "timeout must be": (InvalidRequest, lambda client: client.infer("m", X, timeout="soon")),
    "priority must be": (InvalidRequest, lambda client: client.infer("m", X, priority=11)),
    "classes must be": (InvalidRequest, lambda client: client.register("m.keras", classes="cat")),
    "tags must be": (InvalidRequest, lambda client: client.register("m.keras", tags={"a": 1})),
    "tags must be a map": (InvalidRequest, lambda client: client.tag_model("m", ["a"])),
    "alias must be .*not 'v3'": (InvalidRequest, lambda client: client.set_alias("m", "v3")),
    "alias must be .*not '3'": (InvalidRequest, lambda client: client.set_alias("m", "3")),
    "alias must be .*not 'latest'": (InvalidRequest, lambda client: client.set_alias("m", "latest")),
    "path must be the path": (InvalidRequest, lambda client: client.export("m", None)),
    "wait must be True or False, not 5": (InvalidRequest, lambda client: client.deploy("m", wait=5)),
    "every_version must be": (InvalidRequest, lambda client: client.delete_model("m", every_version=2)),
    "name must be the name of a": (InvalidRequest, lambda client: client.remove_data(None)),
    "job_id must be": (InvalidRequest, lambda client: client.cancel(7)),
    "job_id must be a job": (InvalidRequest, lambda client: client.job(object())),
    "name must be .*not \\['d'\\]": (InvalidRequest, lambda client: client.add_data((X, X), ["d"])),
}


@pytest.mark.parametrize("said", WRONG)
async def test_wrong_arguments_are_named_before_a_job_is_made(
    client: AsyncClient, coordinator: ScriptedCoordinator, said: str
) -> None:
    kind, call = WRONG[said]
    with pytest.raises(kind, match=said):
        await call(client)
    assert coordinator.asked == []


async def test_the_clients_and_jobs_own_arguments_are_named_too(
    client: AsyncClient, coordinator: ScriptedCoordinator
) -> None:
    with pytest.raises(InvalidRequest, match=r"seed must be .*not 5"):
        AsyncClient(5)
    with pytest.raises(InvalidRequest, match=r"timeout must be .*not 'soon'"):
        AsyncClient("h", timeout="soon")
    with pytest.raises(InvalidRequest, match=r"cluster must be .*not 3"):
        AsyncClient("h", cluster=3)
    job = await client.train("net", "images", epochs=np.int64(2), batch_size=np.int32(8))
    assert (jobs_of(coordinator)[0].epochs, jobs_of(coordinator)[0].batch_size) == (2, 8), "numpy's numbers are numbers"
    with pytest.raises(InvalidRequest, match="timeout must be"):
        await job.wait("soon")
    with pytest.raises(InvalidRequest, match="path must be"):
        await job.model(5)


async def test_image_options_for_arrays_are_refused(
    client: AsyncClient, coordinator: ScriptedCoordinator, tmp_path: Path
) -> None:
    coordinator.answers[ListDatasets] = lambda asked: datasets(table="arrays", pictures="images")
    (tmp_path / "table.csv").write_text("a,b\n1,2\n3,4\n")
    for data in ((X, X), tmp_path / "table.csv", "table"):
        with pytest.raises(InvalidRequest, match="data holds no images"):
            await client.predict("net", data, image=ImageOptions(height=8, width=8))
    with pytest.raises(InvalidRequest, match="validation holds no images"):
        await client.train("net", "pictures", validation="table", image=ImageOptions(height=8, width=8))
    assert not [asked for asked in coordinator.asked if not isinstance(asked, ListDatasets | GetModel)], (
        "nothing was sent"
    )
    await client.predict("net", "pictures", image=ImageOptions(height=8, width=8))


async def test_arrays_become_a_data_set_named_by_its_content(
    client: AsyncClient, coordinator: ScriptedCoordinator
) -> None:
    x, y = np.arange(20, dtype=np.float32).reshape(10, 2), np.arange(10) % 2
    for _ in range(2):
        await client.train("net", (x, y))
    await client.train("net", (x + 1, y))
    names = [spec.dataset for spec in jobs_of(coordinator)]
    assert names[0] == names[1] != names[2]
    assert names[0].startswith("arrays-")


async def test_the_same_data_may_be_sent_twice_at_once(client: AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a search over learning rates: one call has sent its data and removes it, while the other still sends it."""
    x, y = np.arange(20, dtype=np.float32).reshape(10, 2), np.arange(10) % 2
    packed, other_sent = asyncio.Event(), asyncio.Event()
    push_blobs = connection_module.Connection.push_blobs

    async def late(*arguments: Any) -> None:
        if not packed.is_set():
            packed.set()
            await other_sent.wait()
        await push_blobs(*arguments)

    monkeypatch.setattr(connection_module.Connection, "push_blobs", late)
    waiting = asyncio.create_task(client.add_data((x, y), "one"))
    await asyncio.wait_for(packed.wait(), 10)
    await client.add_data((x, y), "two")
    other_sent.set()
    assert (await waiting).name == "one"


async def test_a_folder_too_far_up_is_refused_and_left_out_files_are_named(
    client: AsyncClient, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    films = tmp_path / "films"
    for part in ("train", "test"):
        write_files(films / part, {"good/1.txt": b"fine", "bad/2.txt": b"dull"})
    await client.train("net", films / "train", validation=films / "test")
    assert caplog.text == ""
    for data in ({"data": films}, {"data": films / "train", "validation": films}):
        with pytest.raises(InvalidData, match=r"To train: potluck train MODEL \S+/train --validation \S+/test "):
            await client.train("net", **data)
    write_files(films, {"train/good/notes.md": b"fine"})
    (films / "test" / "odd").mkdir()
    await client.train("net", films / "train", validation=films / "test")
    assert "data: 1 file of other kinds left out (1 .md): good/notes.md" in caplog.text
    assert "validation: 1 class folder empty, but still a class (remove a folder that is no class): odd" in caplog.text


async def test_progress_ends_with_the_job_and_the_result_is_read(
    client: AsyncClient, coordinator: ScriptedCoordinator, tmp_path: Path
) -> None:
    job = await client.train("net", "images")
    seen: list[int] = []

    async def follow() -> None:
        async for progress in job.progress():
            seen.append(progress.done)

    following = asyncio.create_task(follow())
    for done in (1, 2):
        await coordinator.state(job.id, "running", done=done, total=2)
        await eventually(lambda done=done: done in seen)
    model = coordinator.store.put_bytes(b"a model")
    history = tuple(EpochMetrics(epoch=n, metrics={"loss": 1 / n, "val_loss": 2 / n}) for n in (1, 2))
    await coordinator.end(job.id, history=history, model=BlobRef(sha256=model.sha256, size=model.size))
    await asyncio.wait_for(following, 5)
    with pytest.raises(Conflict, match="wait"):
        _ = job.history
    await job.wait(5)
    assert job.history == {"loss": [1.0, 0.5], "val_loss": [2.0, 1.0]}
    saved = await job.model(tmp_path / "saved.keras")
    assert saved.read_bytes() == b"a model"
    with pytest.raises(Conflict, match="evaluation"):
        _ = job.evaluation


class Recorder:
    """A callback as Keras has them; ends training after `epochs` of them."""

    def __init__(self, epochs: int) -> None:
        self.told: list[Any] = []
        self._epochs = epochs

    def set_params(self, params: dict[str, Any]) -> None:
        self.told.append(params["epochs"])

    def set_model(self, model: Any) -> None:
        self.model = model
        assert not hasattr(model, "optimizer")

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        self.told.append((epoch, logs))
        self.model.stop_training = epoch + 1 >= self._epochs

    def on_train_end(self, logs: dict[str, float]) -> None:
        self.told.append(logs)


async def test_callbacks_hear_of_each_epoch_once_and_may_end_training(
    client: AsyncClient, coordinator: ScriptedCoordinator
) -> None:
    epochs = tuple(EpochMetrics(epoch=number, metrics={"loss": 1 / number}) for number in (1, 2, 3))
    ended: list[EpochMetrics] = []

    def history(asked: GetHistory) -> HistoryListed:
        left = [epoch for epoch in ended if epoch.epoch > asked.after]
        return HistoryListed(job_id=asked.job_id, epochs=tuple(left[:1]))

    coordinator.answers[GetHistory] = history
    coordinator.answers[StopTraining] = lambda asked: coordinator.jobs[asked.job_id]
    job = await client.train("net", "images", epochs=9)
    await coordinator.state(job.id, "running", epoch=1, epochs=9)
    recorder = Recorder(epochs=2)
    following = asyncio.create_task(job.follow([recorder]))
    await eventually(lambda: recorder.told == [9])
    assert await job.epochs_so_far() == ()
    ended += epochs[:2]
    assert await job.epochs_so_far() == epochs[:2]
    await coordinator.state(job.id, "running", epoch=3, epochs=9)
    await eventually(lambda: any(isinstance(asked, StopTraining) for asked in coordinator.asked))
    ended += epochs[2:]
    await coordinator.end(job.id, history=epochs)
    assert await asyncio.wait_for(following, 5) == {"loss": [1.0, 0.5, 1 / 3]}
    assert recorder.told == [9, *((epoch.epoch - 1, epoch.metrics) for epoch in epochs), epochs[-1].metrics]
    assert sum(isinstance(asked, StopTraining) for asked in coordinator.asked) == 1
    with pytest.raises(InvalidRequest, match="on_epoch_end"):
        await job.follow([3])
    with pytest.raises(InvalidRequest, match="on_epoch_end"):
        await job.follow(Recorder)


async def test_a_job_is_drawn_when_it_has_ended(
    client: AsyncClient, coordinator: ScriptedCoordinator, tmp_path: Path
) -> None:
    job = await client.train("net", "images")
    with pytest.raises(InvalidRequest, match=r"must end in \.png"):
        await job.plot(tmp_path / "loss.txt")
    with pytest.raises(InvalidRequest, match="folder must be"):
        await job.tensorboard(None)
    drawing = asyncio.create_task(job.plot(tmp_path / "loss.svg"))
    rounds = (RoundMetrics(round=0, samples=8, metrics={"loss": 1.0}, outer_learning_rate=1.0, outer_momentum=0.5),)
    await coordinator.end(job.id, "failed", history=(EpochMetrics(epoch=1, metrics={"loss": 1.0}),), rounds=rounds)
    assert (await drawing).read_text().startswith("<?xml"), "also of a job that failed"
    assert job.rounds == rounds
    assert list((await job.tensorboard(tmp_path / "logs")).glob("train/*tfevents*"))
    empty = await client.train("net", "images")
    await coordinator.end(empty.id)
    with pytest.raises(Conflict, match="no epochs"):
        await empty.plot(str(tmp_path / "empty.png"))


async def test_the_last_progress_of_a_job_that_succeeded_shows_all_work_done(
    client: AsyncClient, coordinator: ScriptedCoordinator
) -> None:
    job = await client.train("net", "images")
    await coordinator.state(job.id, "running", done=98, total=100, message="writing the model")
    await coordinator.state(job.id, "succeeded", done=99, total=100, message="writing the model")
    coordinator.answers[ListJobs] = lambda asked: JobsListed(jobs=(coordinator.jobs[job.id],))
    last = [progress async for progress in job.progress()][-1]
    for progress in (last, (await job.status()).progress, (await client.jobs())[0].progress):
        assert (progress.done, progress.total, progress.message) == (100, 100, "")


async def test_a_job_is_followed_by_its_whole_id_if_only_the_beginning_was_given(
    client: AsyncClient, coordinator: ScriptedCoordinator
) -> None:
    job = await client.train("net", "images")
    coordinator.answers[GetJob] = lambda asked: coordinator.jobs[job.id]
    assert (await client.job(job.id[:2])).id == job.id


async def test_an_answer_that_is_older_than_news_from_the_bus_changes_nothing(
    client: AsyncClient, coordinator: ScriptedCoordinator
) -> None:
    job = await client.train("net", "images")
    old = coordinator.jobs[job.id]
    await coordinator.state(job.id, "running", done=1, total=4)
    coordinator.answers[GetJob] = lambda asked: old
    seen: list[tuple[str, int]] = []

    async def follow() -> None:
        async for state in job.states():
            seen.append((state.state, state.progress.done))

    following = asyncio.create_task(follow())
    await eventually(lambda: any(isinstance(asked, GetJob) for asked in coordinator.asked) and seen)
    await coordinator.state(job.id, "running", done=2, total=4)
    await coordinator.end(job.id, "failed")
    await asyncio.wait_for(following, 5)
    assert seen[0] == ("running", 1)
    assert seen[-1] == ("failed", 2)
    assert "queued" not in dict(seen)


async def test_a_lost_result_is_asked_for(client: AsyncClient, coordinator: ScriptedCoordinator) -> None:
    job = await client.evaluate("net", "images")
    waiting = asyncio.create_task(job.wait(5))
    await coordinator.end(job.id, say=False, evaluation=Evaluation(count=3, metrics={"accuracy": 1.0}))
    assert (await waiting).evaluation.count == 3


async def test_following_goes_on_after_a_lost_connection(
    broker: FakeBroker, client: AsyncClient, coordinator: ScriptedCoordinator
) -> None:
    job = await client.train("net", "images")
    waiting = asyncio.create_task(job.wait(5))
    await eventually(lambda: len(coordinator.asked) > 1)
    client._connection.bus.kill()
    await coordinator.end(job.id)
    assert (await waiting).id == job.id


@pytest.mark.parametrize(
    ("state", "error", "kind"),
    [
        ("failed", ErrorInfo(code="invalid_model", message="does not fit"), InvalidModel),
        ("cancelled", ErrorInfo(code="cancelled", message="was cancelled"), Cancelled),
        ("cancelled", None, Cancelled),
    ],
)
async def test_waiting_raises_the_jobs_error(
    client: AsyncClient, coordinator: ScriptedCoordinator, state: str, error: ErrorInfo | None, kind: type[Exception]
) -> None:
    job = await client.train("net", "images")
    await coordinator.end(job.id, state, error=error)
    with pytest.raises(kind):
        await job.wait(5)
    async for _ in job.progress():
        pass  # the iterator ends all the same


async def test_waiting_is_bounded_and_unknown_jobs_are_not_found(
    client: AsyncClient, coordinator: ScriptedCoordinator
) -> None:
    job = await client.train("net", "images")
    with pytest.raises(TimedOut, match="it goes on"):
        await job.wait(0.2)
    with pytest.raises(NotFound):
        await client.job("job-9")


async def test_predictions_come_back_in_input_order(client: AsyncClient, coordinator: ScriptedCoordinator) -> None:
    job = await client.predict("net", "images")
    rows = np.array([[2.0], [0.0], [10.0], [1.0]], dtype="<f4")
    keys = coordinator.store.put_bytes(json.dumps(["2", "0", "10", "1"]).encode())
    data = coordinator.store.put_bytes(rows.tobytes())
    await coordinator.end(
        job.id, outputs=(Tensor(name="y", datatype="FP32", shape=(4, 1), data=data),), keys=keys, classes=("a",)
    )
    assert (await job.predictions()).ravel().tolist() == [0.0, 1.0, 2.0, 10.0]
    assert await job.keys() == ["0", "1", "2", "10"]


async def test_inference_inline_and_by_blob(client: AsyncClient, coordinator: ScriptedCoordinator) -> None:
    small = await client.infer("m", [[1.0, 2.0]])
    assert small.dtype == np.float32
    assert small.tolist() == [[1.0, 2.0]]
    large = np.random.default_rng(0).random((300, 300), dtype=np.float32)
    assert np.array_equal(await client.infer("m:1", large), large)
    assert isinstance(coordinator.asked[-1].inputs[0].data, BlobRef)
    two = await client.infer("m", {"a": np.zeros(2, np.int32), "b": np.ones(2, np.uint8)})
    assert {name: array.dtype for name, array in two.items()} == {"a": np.dtype("i4"), "b": np.dtype("u1")}


async def test_inference_is_asked_once_and_its_errors_are_raised(
    client: AsyncClient, coordinator: ScriptedCoordinator
) -> None:
    def refuse(asked: Infer) -> Inferred:
        raise Overloaded("too much", retry_after_seconds=0.5)

    coordinator.answers[Infer] = refuse
    with pytest.raises(Overloaded) as caught:
        await client.infer("m", [1.0])
    assert caught.value.retry_after_seconds == 0.5
    coordinator.answers[Infer] = lambda asked: None
    coordinator.asked.clear()
    with pytest.raises(TimedOut):
        await client.infer("m", [1.0], timeout=0.3)
    assert len(coordinator.asked) == 1
    with pytest.raises(NotFound):
        await client.infer("a/b", [1.0])
    with pytest.raises(InvalidRequest, match="not an array"):
        await client.infer("m", [[1.0], [2.0, 3.0]])
    with pytest.raises(InvalidRequest, match="takes a map of arrays by input name"):
        await client.infer("m", [np.zeros((1, 2)), np.zeros((1, 3))])
    with pytest.raises(InvalidRequest, match="has no rows"):
        await client.infer("m", [])
    with pytest.raises(TooLarge, match=r"73600000 bytes is over the limit of 67108864: ask for fewer rows"):
        await client.infer("m", np.zeros((2_300_000, 8), np.float32))


async def test_the_first_connect_asks_nothing_again(client: AsyncClient, coordinator: ScriptedCoordinator) -> None:
    """The coordinator says every few seconds that it is online. Nothing was lost before there was a connection."""
    coordinator.answers[Infer] = lambda asked: None
    asking = asyncio.create_task(client.infer("m", [1.0], timeout=60))
    await eventually(lambda: len(coordinator.asked) == 1)
    await coordinator.online()
    await coordinator.online()
    coordinator.answers[Infer] = lambda asked: Inferred(model="m:1", outputs=asked.inputs)
    assert await client.infer("m", [2.0]) == [2.0]
    assert len(coordinator.asked) == 2
    asking.cancel()
    await asyncio.wait([asking])


async def test_an_inference_that_may_be_lost_is_asked_again(
    client: AsyncClient, coordinator: ScriptedCoordinator
) -> None:
    coordinator.answers[Infer] = lambda asked: None
    asking = asyncio.create_task(client.infer("m", [1.0], timeout=60))
    await eventually(lambda: len(coordinator.asked) == 1)
    await coordinator.online()  # as it says every few seconds: nothing was lost
    bus = client._connection.bus
    assert isinstance(bus, FakeBus)
    bus.kill()
    await eventually(lambda: len(coordinator.asked) == 2)  # the connection was made anew
    await coordinator.online()
    await eventually(lambda: len(coordinator.asked) == 3)  # only now it is sure that the coordinator was there
    await coordinator.online("offline")
    await eventually(lambda: not client._connection._online.is_set())
    coordinator.answers[Infer] = lambda asked: Inferred(model="m:1", outputs=asked.inputs)
    await coordinator.online()
    assert await asking == [1.0]
    assert len(coordinator.asked) == 4
    assert len({asked.id for asked in coordinator.asked}) == 1


async def test_an_inference_carries_its_deadline_and_priority_and_can_be_cancelled(
    client: AsyncClient, coordinator: ScriptedCoordinator
) -> None:
    coordinator.answers[Infer] = coordinator.answers[CancelInfer] = lambda asked: None
    asking = asyncio.create_task(client.infer("m", [1.0], timeout=60, priority=-3))
    await eventually(lambda: coordinator.asked)
    (asked,) = coordinator.asked
    assert 50 < asked.expires - time.time() <= 60
    assert 50 < asked.valid_seconds <= 60
    assert asked.priority == -3
    asking.cancel()
    await asyncio.wait([asking])
    assert asking.cancelled()
    await eventually(lambda: len(coordinator.asked) == 2)
    given_up = coordinator.asked[1]
    assert isinstance(given_up, CancelInfer)
    assert (given_up.id, given_up.reply_to) == (asked.id, asked.reply_to)


async def test_models_are_registered_from_files(
    client: AsyncClient, coordinator: ScriptedCoordinator, tmp_path: Path
) -> None:
    info = await client.register(keras_file(tmp_path / "my net.keras", compiled=False), classes=["a", "b"])
    assert (info.name, info.classes) == ("my-net", ("a", "b"))
    await client.deploy(tmp_path / "my net.keras", replicas=2)
    assert jobs_of(coordinator)[-1].model == "my-net:1"


async def test_models_come_back_as_they_were_given(
    client: AsyncClient, coordinator: ScriptedCoordinator, tmp_path: Path
) -> None:
    folder = tmp_path / "net"
    (folder / "variables").mkdir(parents=True)
    (folder / "saved_model.pb").write_bytes(b"graph")
    (folder / "variables" / "variables.index").write_bytes(b"index")
    info = await client.register(folder, "digits", tags={"team": "garden"}, classes=("a", "b"))
    assert (info.format, info.tags, info.source) == ("savedmodel", {"team": "garden"}, "imported from net")
    assert await client.export("digits:1", tmp_path / "back") == tmp_path / "back"
    assert (tmp_path / "back" / "variables" / "variables.index").read_bytes() == b"index"
    given = keras_file(tmp_path / "m.keras")
    assert (await client.register(given, source="made by hand")).source == "made by hand"
    assert await client.export("m", tmp_path / "back") == tmp_path / "back" / "m-1.keras"
    assert (tmp_path / "back" / "m-1.keras").read_bytes() == given.read_bytes()
    with pytest.raises(InvalidRequest, match=r"name the file x\.keras"):
        await client.export("m", tmp_path / "x.pb")
    with pytest.raises(InvalidRequest, match=r"a SavedModel, which is a folder: name it x$"):
        await client.export("digits:1", tmp_path / "x.pb")


async def test_the_synchronous_client_on_a_real_broker(tmp_path: Path) -> None:
    mosquitto = TestBroker(some_kind(), tmp_path)
    await mosquitto.start()
    bus = MqttBus(mosquitto.address, Topics("home"), Credentials(), client_id="coordinator")

    def use() -> None:
        with Client(f"127.0.0.1:{mosquitto.port}", cluster="home", timeout=5) as client:
            assert client.cluster == "home"
            job = client.train("net", "images")
            loop.call_soon_threadsafe(started.set)
            assert [progress.done for progress in job.progress()][-1] == 4
            assert job.wait().history == {}
            assert job.rounds == ()
            for draw in (job.plot, job.tensorboard):
                with pytest.raises(Conflict, match="no epochs"):
                    draw(tmp_path / "out.png")
            assert client.infer("m", np.ones((1, 2), np.float32)).tolist() == [[1.0, 1.0]]
        client.close()  # twice is fine
        with pytest.raises(InvalidRequest, match="closed"):
            client.nodes()

    loop, started = asyncio.get_running_loop(), asyncio.Event()
    try:
        async with ScriptedCoordinator(bus, tmp_path / "store") as coordinator:
            using = asyncio.create_task(asyncio.to_thread(use))
            await asyncio.wait_for(started.wait(), 10)
            await coordinator.state("job-1", "running", done=4, total=4)
            await asyncio.sleep(0)
            await eventually(lambda: len(coordinator.asked) > 1)
            await coordinator.end("job-1")
            await asyncio.wait_for(using, 60)
    finally:
        await mosquitto.stop()


async def test_brokers_that_refuse_are_named_at_once(unused_tcp_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "_FIND_SECONDS", 30.0)
    started = time.monotonic()
    with pytest.raises(Unavailable) as caught:
        await AsyncClient([f"127.0.0.1:{unused_tcp_port}", f"localhost:{unused_tcp_port}"]).nodes()
    assert time.monotonic() - started < 3
    for place in ("127.0.0.1", "localhost"):
        assert f"{place}:{unused_tcp_port} (Connection refused)" in caught.value.message
    assert "potluck up" in caught.value.message


async def test_of_several_brokers_the_one_that_answers_is_taken(tmp_path: Path, unused_tcp_port: int) -> None:
    mosquitto = TestBroker(some_kind(), tmp_path)
    await mosquitto.start()
    try:
        bus = MqttBus(mosquitto.address, Topics("default"), Credentials(), client_id="coordinator")
        async with ScriptedCoordinator(bus, tmp_path / "store") as coordinator:
            coordinator.answers[ListNodes] = lambda asked: NodesListed(nodes=())
            seeds = [f"127.0.0.1:{unused_tcp_port}", f"127.0.0.1:{mosquitto.port}"]
            async with AsyncClient(seeds, timeout=5) as client:
                assert await client.nodes() == ()
    finally:
        await mosquitto.stop()


async def test_where_no_cluster_is_found_the_error_says_where_it_looked() -> None:
    started = time.monotonic()
    with pytest.raises(Unavailable) as caught:
        await AsyncClient(cluster="nobody-is-there").nodes()
    assert time.monotonic() - started < 4
    for part in (
        "no cluster 'nobody-is-there' was found",
        "mDNS on 127.0.0.1",
        "`potluck up --cluster nobody-is-there`",
        "--seed HOST",
    ):
        assert part in caught.value.message, part


async def test_without_discovery_and_seed_the_error_comes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POTLUCK_DISCOVERY__ENABLED", "false")
    with pytest.raises(Unavailable, match="no broker is known"):
        await AsyncClient().nodes()
