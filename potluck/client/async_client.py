"""The client for asyncio: everything that one can ask of a cluster."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, Unpack

import numpy as np
from msgspec.structs import replace

from potluck.bus.mqtt import Bus
from potluck.client import arguments, deploying, events, formats, listings, sources, training
from potluck.client.connection import Connection, client_settings
from potluck.client.deploying import DeployOptions
from potluck.client.inputs import KNOWN_SECONDS, LargeInputs
from potluck.client.job_parts import JobParts, Roles
from potluck.client.jobs import AsyncJob, Predictions, as_arrays, fetch_tensor
from potluck.client.membership import Membership, membership
from potluck.client.models import (
    image_argument,
    image_options,
    is_model,
    is_model_path,
)
from potluck.client.signatures import suggesting, with_options
from potluck.client.training import TrainOptions
from potluck.credentials import Credentials
from potluck.data.packing import Target
from potluck.errors import Conflict, InvalidData, InvalidRequest, NotFound
from potluck.wire import tensors
from potluck.wire.jobs import AnyJobSpec, Deploy, Epochs, Evaluate, Predict, Train
from potluck.wire.questions import (
    Alias,
    CancelJob,
    ClusterEvent,
    DatasetInfo,
    DatasetRemoved,
    DeleteModel,
    DeploymentInfo,
    DeploymentsListed,
    GetJob,
    GetModel,
    Infer,
    JobAccepted,
    JobChanged,
    JobEnded,
    ModelChanged,
    ModelInfo,
    ModelRegistered,
    ModelsDeleted,
    NodeInfo,
    Priority,
    Promote,
    RegisterModel,
    RemoveAlias,
    RemoveDataset,
    RollBack,
    SetAlias,
    SubmitJob,
    TagModel,
    Undeploy,
    Undeployed,
)
from potluck.wire.values import INLINE_LIMIT_BYTES, Count, ImageOptions, Message, Source

Model = object
"""A keras.Model, the path of a model's file, or the name of a registered one: `name`, `name:version` or `name:alias`."""
Data = object
"""A path, the name of a registered data set, `"node:name"`, an array, or arrays `(x, y)` or `(x, y, sample_weight)`."""
Image = ImageOptions | tuple[int, ...]
Inputs = Any
"""An array, nested lists, a map of them by input name, or paths of files."""

_INLINE_INPUT_BYTES = INLINE_LIMIT_BYTES * 3 // 4

_NAMED = "the `name`, `name:version` or `name:alias` of a model"

M = TypeVar("M", bound=Message)


@suggesting
class AsyncClient:
    """A client of one cluster.

    `seed` is a broker's address (`host` or `host:port`), or several. Without `seed`, the address comes from `POTLUCK_SEEDS`, the settings
    file or mDNS. `timeout` limits each question, in seconds; jobs have no limit.
    `credentials` is the folder with the credentials of a closed cluster; without it, they are looked for where `potluck join` puts them,
    and on the coordinator's machine beside its state. `"none"`: the cluster is open. Raises InvalidSettings for those that cannot be used.
    Use the client as an async context manager, or call `aclose`. It connects when entered or first used. All methods raise
    subclasses of `potluck.errors.PotluckError`, also Unavailable and TimedOut.
    """

    def __init__(
        self,
        seed: str | Sequence[str] | None = None,
        *,
        cluster: str | None = None,
        timeout: float | None = None,
        bus: Bus | None = None,
        credentials: str | Path | None = None,
    ) -> None:
        settings = client_settings(seed, cluster, timeout, credentials)
        # a bus that is given needs no credentials
        self._member = membership(settings) if bus is None else Membership(settings, Credentials.of_client())
        self._settings = self._member.settings
        self.credentials = self._member.credentials
        """Who this client is, and what it shows and checks when it connects."""
        self._bus = bus
        self._connection: Connection | None = None
        self._opening = asyncio.Lock()
        self._parts = JobParts(self._connected)
        self._large_inputs = LargeInputs()
        self._answered: dict[str, tuple[float, ModelInfo]] = {}
        """For each name: until when, and which model, answers to it without asking again."""

    async def __aenter__(self) -> AsyncClient:
        await self._connected()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Disconnect, and remove temporary files. Can be called twice."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.__aexit__(None, None, None)

    @property
    def cluster(self) -> str:
        """The cluster's name."""
        return self._settings.cluster

    # --- the cluster ----------------------------------------------------------------------------------------------------

    async def gateway(self) -> tuple[str, ...]:
        """The addresses of the cluster's HTTP gateway, with their ports. Raises Unavailable."""
        return (await (await self._connected()).coordinator()).http

    async def nodes(self) -> tuple[NodeInfo, ...]:
        """Every node that the coordinator knows, offline nodes too."""
        return (await listings.nodes(await self._connected()))[0]

    async def events(
        self, after: int | None = None, *, last: int | None = None, follow: bool = False
    ) -> AsyncGenerator[ClusterEvent, None]:
        """What has happened to jobs, nodes, models, data sets and deployments; with `follow`, also what happens from now on.

        `after`: only events after the one of this number. `last`: of these, at most this many, the newest. Without both: all events that are
        kept, or with `follow`, only new ones. Iterate over the result with `async for`. With `follow` this never ends: it goes on when
        connections are lost and when the coordinator restarts. If you come back with the `number` of your last event, you get each
        event once. An event `missed` tells you that some events in between are not kept any more.
        """
        number = arguments.checked("after", after, Count | None, "the number of an event, or None")
        newest = None if last is None else arguments.at_least_one("last", last)
        follow = arguments.flag("follow", follow)
        return events.events(await self._connected(), number, newest, follow)

    async def jobs(self) -> tuple[JobChanged, ...]:
        """Every job that the coordinator remembers, oldest first."""
        return await listings.jobs(await self._connected())

    async def job(self, job_id: str) -> AsyncJob:
        """A job by its id, or by the beginning of its id. Raises NotFound, and InvalidRequest if several ids begin so."""
        job_id = arguments.text("job_id", job_id, "a job's id")
        found = await self._ask(GetJob(job_id=job_id), Message)
        return AsyncJob(await self._connected(), found.job_id if isinstance(found, JobChanged | JobEnded) else job_id)

    async def cancel(self, job_id: str) -> JobChanged:
        """End a job now. Raises NotFound."""
        return await self._ask(CancelJob(job_id=arguments.text("job_id", job_id, "a job's id")), JobChanged)

    # --- jobs -----------------------------------------------------------------------------------------------------------

    @with_options(TrainOptions, training.DEFAULTS)
    async def train(
        self,
        model: Model,
        data: Data,
        *,
        validation: Data | None = None,
        epochs: int = 1,
        batch_size: int = 32,
        image: Image | None = None,
        name: str | None = None,
        target: Target = None,
        sample_weight: str | None = None,
        **options: Unpack[TrainOptions],
    ) -> AsyncJob:
        """Train a compiled keras.Model, a `.keras` file or a registered model on all nodes.

        `data` and `validation` are registered names, paths, `"node:name"` for data that live on the nodes, or arrays `(x, y)` or
        `(x, y, sample_weight)`. For a model with several outputs, `y` is a map by output name, or a list. In files, `target` names the
        column or array to learn (or several), and `sample_weight` the one with the weight of each item in the loss. `image` says
        how images become tensors; None: as the model's input needs them. With `name`, the result is registered under that name.
        Raises NotFound, InvalidModel, InvalidData and InvalidRequest before a job is made, as far as the arguments, the model's file and
        the data show what is wrong: data of the wrong kind or shape, no target, images without a size, more classes than units in
        the last layer of the file. An error that only nodes can see ends the job, and `job.wait()` raises it.
        """
        epochs = arguments.checked("epochs", epochs, Epochs, "a whole number from 1 to 1,000,000")
        batch_size = arguments.at_least_one("batch_size", batch_size)
        register = arguments.name("name", name)
        roles = Roles.of(target, sample_weight, data, validation)
        fields = training.fields(options, validated=validation is not None)
        given = roles.given("data", data)
        given_too = None if validation is None else roles.given("validation", validation)
        if options.get("resume") is not None:
            fields |= await self._resumed(options["resume"])
        asked = await self._parts.model(model, image, compiled=True)
        if isinstance(given, str) != isinstance(given_too, str) and given_too is not None:
            await self._parts.check_known(given if isinstance(given, str) else str(given_too))
        dataset = await self._parts.data("data", given, asked)
        held_out = None if given_too is None else await self._parts.data("validation", given_too, asked)
        return await self._submit(
            Train(
                **asked.fields,
                dataset=dataset,
                validation=held_out,
                epochs=epochs,
                batch_size=batch_size,
                register=register,
                **fields,
            )
        )

    async def evaluate(
        self,
        model: Model,
        data: Data,
        *,
        batch_size: int = 32,
        image: Image | None = None,
        target: Target = None,
        sample_weight: str | None = None,
    ) -> AsyncJob:
        """Measure a model on labelled data: `job.evaluation` after `job.wait()`. Raises the errors of `train`."""
        batch_size, roles = arguments.at_least_one("batch_size", batch_size), Roles.of(target, sample_weight, data)
        given = roles.given("data", data)
        asked = await self._parts.model(model, image, compiled=False)
        dataset = await self._parts.data("data", given, asked)
        return await self._submit(Evaluate(**asked.fields, dataset=dataset, batch_size=batch_size))

    async def predict(
        self,
        model: Model,
        data: Data,
        *,
        batch_size: int = 32,
        image: Image | None = None,
        target: Target = None,
    ) -> AsyncJob:
        """A model's outputs for a whole data set or array: `job.predictions()`. `target` names columns to leave out.

        Raises the errors of `train`.
        """
        batch_size, roles = arguments.at_least_one("batch_size", batch_size), Roles.of(target, None, data)
        given = roles.given("data", data)
        asked = await self._parts.model(model, image, compiled=False)
        dataset = await self._parts.data("data", given, asked, for_prediction=True)
        return await self._submit(Predict(**asked.fields, dataset=dataset, batch_size=batch_size))

    # --- models and deployments -----------------------------------------------------------------------------------------

    @with_options(DeployOptions, deploying.DEFAULTS)
    async def deploy(
        self,
        model: Model,
        replicas: int | str = 1,
        *,
        name: str | None = None,
        wait: bool = False,
        **options: Unpack[DeployOptions],
    ) -> AsyncJob:
        """Keep a model loaded on `replicas` nodes (0 or `"all"`: on all nodes; `"1..4"`: by load, between these).

        The job succeeds when the replicas are ready and the model answers to its plain name; `wait` waits for that. A keras.Model, or a
        model's file or folder, is registered first, as `name` or under its own name.

        Raises NotFound, InvalidModel and InvalidRequest for errors in the arguments and the file. An error that the coordinator finds
        ends the job, and `job.wait()` raises it: more replicas than nodes (after waiting a while for more nodes), too little memory.
        """
        fields, wait = deploying.fields(replicas, options), arguments.flag("wait", wait)
        if isinstance(model, str) and not is_model_path(model):
            if name is not None:
                raise InvalidRequest(
                    f"name is only for a keras.Model or a file, and {model!r} already has a name: leave name out"
                )
            registered = model
        else:
            info = await self.register(model, name)
            registered = f"{info.name}:{info.version}"
        given = {name: Roles.of(None, None, data).given(name, data) for name, data in deploying.data(options).items()}
        if any(isinstance(data, sources.GivenData) for data in given.values()):
            await self.get_model(registered)
        for option, data in given.items():
            fields[option] = await self._parts.data(option, data, None)
        job = await self._submit(Deploy(model=registered, **fields))
        return await job.wait() if wait else job

    async def promote(self, model: str) -> tuple[DeploymentInfo, ...]:
        """Make the canary (or shadow) of `model` the version that answers; returns the model's deployments. Raises NotFound, Conflict."""
        return (await self._ask(Promote(model=arguments.text("model", model, _NAMED)), DeploymentsListed)).deployments

    async def roll_back(self, model: str) -> tuple[DeploymentInfo, ...]:
        """Withdraw the canary or shadow of `model`, or without one go back to the version before. Raises NotFound, Conflict."""
        return (await self._ask(RollBack(model=arguments.text("model", model, _NAMED)), DeploymentsListed)).deployments

    async def undeploy(self, model: str) -> tuple[str, ...]:
        """Unload `name` (every version) or `name:version` from all nodes; returns the names unloaded. Raises NotFound."""
        return (await self._ask(Undeploy(model=arguments.text("model", model, _NAMED)), Undeployed)).deployments

    async def deployments(self) -> tuple[DeploymentInfo, ...]:
        """The deployments, with the nodes that they are on."""
        return await listings.deployments(await self._connected())

    async def models(self) -> tuple[ModelInfo, ...]:
        """Every version of every registered model."""
        return await listings.models(await self._connected())

    async def get_model(self, model: str) -> ModelInfo:
        """The registered `name` (its newest version), `name:version` or `name:alias`. Raises NotFound."""
        return (await self._ask(GetModel(model=arguments.text("model", model, _NAMED)), ModelRegistered)).model

    async def register(
        self,
        model: Model,
        name: str | None = None,
        *,
        image: Image | None = None,
        classes: Sequence[str] = (),
        tags: Mapping[str, str] | None = None,
        source: str | None = None,
    ) -> ModelInfo:
        """Register a model as the next version of `name` (default: its own name): a keras.Model, or the path of a `.keras`, `.h5` or
        `.tflite` file or of a SavedModel's folder. The same bytes again keep their version.

        `classes` are the labels of its scores, in order. `source` tells people where the model came from (default: the file's name).
        Raises InvalidModel for any other file, saying what is wrong with it.
        """
        given, image = arguments.name("name", name), image_argument(image)
        labels = arguments.checked("classes", classes, tuple[str, ...], "a list of the classes' names")
        said = arguments.checked("source", source, Source | None, "a text of at most 256 characters")
        tags = arguments.tags(tags)
        file, ref = await self._parts.push(model)
        question = RegisterModel(
            name=given or sources.plain_name(file.name),
            model=ref,
            format=file.format,
            image=image_options(image, file.input_shape),
            classes=labels,
            tags=tags,
            source=file.source if said is None else said,
        )
        return (await self._ask(question, ModelRegistered)).model

    async def export(self, model: str, path: str | Path) -> Path:
        """Write a registered model to `path`, as the file or folder that it was registered from; returns where it was written.

        If `path` is an existing folder, a file gets the model's own name in it. A SavedModel becomes a folder, which must be new or empty.
        Raises NotFound, and InvalidRequest where it cannot be written.
        """
        target = arguments.given_path("path", path)
        info = await self.get_model(model)
        target = formats.export_path(info, target)
        blob = await (await self._connected()).fetch(info.model)
        await asyncio.to_thread(formats.write, blob, info, target)
        return target

    async def set_alias(self, model: str, alias: str) -> ModelInfo:
        """Let `name:alias` mean the version that `model` is now: `set_alias("digits:3", "prod")` makes `digits:prod`.

        Raises NotFound, and InvalidRequest for an alias that looks like a version.
        """
        takes = "made of letters, digits, '.', '_' and '-', at most 64, beginning with a letter; not latest or v3, which look like a version"
        question = SetAlias(
            model=arguments.text("model", model, _NAMED), alias=arguments.checked("alias", alias, Alias, takes)
        )
        return (await self._ask(question, ModelChanged)).model

    async def remove_alias(self, model: str) -> ModelInfo:
        """Remove an alias, `name:alias`; returns the version that it named. Raises NotFound, InvalidRequest."""
        return (await self._ask(RemoveAlias(model=arguments.text("model", model, _NAMED)), ModelChanged)).model

    async def tag_model(
        self, model: str, tags: Mapping[str, str] | None = None, *, remove: Iterable[str] = ()
    ) -> ModelInfo:
        """Set tags of a version, and remove the tags named in `remove`. Raises NotFound, InvalidRequest."""
        question = TagModel(
            model=arguments.text("model", model, _NAMED),
            tags=arguments.tags(tags),
            remove=arguments.checked("remove", remove, tuple[str, ...], "a list of keys of tags"),
        )
        return (await self._ask(question, ModelChanged)).model

    async def delete_model(self, model: str, *, every_version: bool = False) -> tuple[str, ...]:
        """Delete a version, or with `every_version` all of a name; returns the deleted versions. Their numbers are never used again.

        Raises NotFound, and Conflict while a deployment, an alias or a job uses one of them.
        """
        question = DeleteModel(
            model=arguments.text("model", model, _NAMED), every_version=arguments.flag("every_version", every_version)
        )
        return (await self._ask(question, ModelsDeleted)).models

    async def deployed_model(self, model: str) -> ModelInfo:
        """The registered version that answers to `model`. For a plain name that is the stable version, which may not be the newest.

        Raises NotFound.
        """
        name = arguments.text("model", model, _NAMED)
        if ":" not in name:
            stable = [one.name for one in await self.deployments() if one.role == "stable"]
            name = next((one for one in stable if one.rpartition(":")[0] == name), name)
        return await self.get_model(name)

    async def infer(
        self,
        model: str,
        inputs: Inputs,
        *,
        image: Image | None = None,
        timeout: float | None = None,
        priority: int = 0,
    ) -> Predictions:
        """The outputs of a deployed model for a batch of inputs: one array, or one for each output by its name.

        `inputs` is one array (its first axis is the batch; a single item may lack it), a map of arrays by input name, or files: a
        path, a list of paths, or a folder, whose files are taken in the order of their names. Files become arrays as in
        training and over HTTP; `image` says how where the model does not. For a model that takes text, a `str` is a text, and only a
        `Path` names a file. Lists of numbers become float32; uint8 images for a model of floats are scaled like image files.

        `timeout` goes with the request (with each request, where there are very many files): what cannot be answered by then is refused
        at once. Where requests wait, those with a higher `priority` (-10 to 10) go first. Large arrays are sent straight from memory: do not
        change them before the answer is there. Cancelling this cancels the request in the cluster too. Raises NotFound,
        InvalidRequest (a shape that does not fit), InvalidData (a file that cannot be read), Overloaded (with `retry_after_seconds`),
        TimedOut.
        """
        size = image_argument(image)
        if arguments.may_name_files(inputs):
            from potluck.client import files  # imported here: it reads images, which most clients do not need
            from potluck.data.items import input_shape

            info = await self._answering(model)
            if found := await asyncio.to_thread(files.paths, inputs, info):
                options = image_options(size, input_shape(info))
                answers = [
                    await self._infer(
                        model, await asyncio.to_thread(files.read, some, info, options), timeout, priority
                    )
                    for some in files.chunks(found)
                ]
                return _joined(answers)
        if size is not None:
            raise InvalidRequest("image is only for image files, and the inputs are not files: leave image out")
        return await self._infer(model, inputs, timeout, priority)

    async def _answering(self, model: str) -> ModelInfo:
        """Like `deployed_model`, but remembers the answer for a while."""
        now = asyncio.get_running_loop().time()
        known = self._answered.get(model)
        if known is None or known[0] < now:
            known = self._answered[model] = now + KNOWN_SECONDS, await self.deployed_model(model)
        return known[1]

    async def _infer(self, model: str, inputs: Inputs, timeout: float | None, priority: int) -> Predictions:
        topic_name, limit_seconds = _topic_name(arguments.text("model", model, _NAMED)), arguments.timeout(timeout)
        priority = arguments.checked("priority", priority, Priority, "a whole number from -10 to 10")
        named = inputs if isinstance(inputs, Mapping) else {"": inputs}
        arrays = {str(name): _as_array(value) for name, value in named.items()}
        sent = [
            tensors.from_numpy(name, array, copy=array.nbytes <= _INLINE_INPUT_BYTES) for name, array in arrays.items()
        ]
        connection = await self._connected()
        question = Infer(inputs=tuple(sent), priority=priority)
        if (
            sum(len(tensor.data) for tensor in sent if isinstance(tensor.data, bytes | memoryview))
            > _INLINE_INPUT_BYTES
        ):
            answer = await self._large_inputs.infer(connection, topic_name, question, limit_seconds)
        else:
            answer = await connection.infer(topic_name, question, limit_seconds)
        return as_arrays([await fetch_tensor(connection, tensor) for tensor in answer.outputs])

    # --- data -----------------------------------------------------------------------------------------------------------

    async def datasets(self) -> tuple[DatasetInfo, ...]:
        """The registered data sets, and those that live on nodes."""
        return await listings.datasets(await self._connected())

    async def add_data(
        self,
        data: Data,
        name: str | None = None,
        *,
        target: Target = None,
        sample_weight: str | None = None,
        progress: sources.Progress | None = None,
    ) -> DatasetInfo:
        """Register a folder of class folders, an `.npz`, `.csv`, Parquet or TFRecord file, or arrays `(x, y)`; see docs/data.md.

        Without `name`, it gets the file's or folder's own name. Shards that the coordinator already has are not sent again.
        """
        if name is None and isinstance(data, str | Path):
            name = sources.path_name(data)
        name, roles = arguments.name("name", name), Roles.of(target, sample_weight, data)
        if is_model(data):
            raise InvalidData(
                f"{arguments.shown(data)} is a model: `potluck models add` (client.register) registers it"
            )
        if isinstance(data, str):
            data = Path(data)  # data to be added are never the name of a data set
        given = sources.given(data, roles.target, roles.sample_weight)
        assert isinstance(given, sources.GivenData)
        return await sources.add(await self._connected(), given, name=name, progress=progress)

    async def remove_data(self, name: str) -> None:
        """Remove a registered data set. Raises NotFound, and Conflict while a job uses it."""
        asked = arguments.name("name", arguments.text("name", name, "the name of a registered data set"))
        await self._ask(RemoveDataset(name=asked or ""), DatasetRemoved)

    # ------------------------------------------------------------------------------------------------------------------

    async def _connected(self) -> Connection:
        if self._connection is None:
            async with self._opening:
                if self._connection is None:
                    connection = Connection(self._settings, self.credentials, bus=self._bus, member=self._member)
                    await connection.__aenter__()
                    self._connection = connection
        return self._connection

    async def _ask(self, question: Message, answer: type[M]) -> M:
        return await (await self._connected()).ask(question, answer)

    async def _submit(self, spec: AnyJobSpec) -> AsyncJob:
        connection = await self._connected()
        accepted = await connection.ask(SubmitJob(job=spec), JobAccepted, topic=connection.topics.jobs_submit)
        return AsyncJob(connection, accepted.job_id, spec)

    async def _resumed(self, job: object) -> dict[str, Any]:
        """Where an ended training job stopped, as fields of `Train`. Raises NotFound, Conflict."""
        found = await self.job(getattr(job, "id", None) or arguments.text("resume", job, "a job or its id"))
        answer = await self._ask(GetJob(job_id=found.id), Message)
        if not isinstance(answer, JobEnded):
            raise Conflict(f"job {found.id} has not ended: cancel it or wait for it before you resume it")
        if answer.checkpoint is None:
            raise Conflict(f"job {found.id} ({answer.kind}) has no checkpoint to continue from")
        done = answer.history[-1].epoch if answer.history else 0
        return {"weights": replace(answer.checkpoint, holders=()), "initial_epoch": done}


def _topic_name(model: str) -> str:
    if not model or any(sign in model for sign in "/+#\0"):
        raise NotFound(f"there is no deployed model {model!r}: `potluck deployments` lists them")
    return model


def _joined(answers: list[Predictions]) -> Predictions:
    """Joins the answers to the parts of a batch."""
    first = answers[0]
    if len(answers) == 1:
        return first
    if isinstance(first, dict):
        return {name: np.concatenate([answer[name] for answer in answers]) for name in first}
    return np.concatenate(answers)  # type: ignore[arg-type]


def _as_array(value: Any) -> np.ndarray[Any, Any]:
    """Lists of Python floats as float32, the type that models use; an array stays as it is."""
    try:
        array = np.asarray(value)
    except (ValueError, TypeError) as error:
        raise InvalidRequest(
            f"the input is not an array: {error} (a model of several inputs takes a map of arrays by input name)"
        ) from error
    if array.size == 0 and isinstance(value, list | tuple):  # the type of its rows is unknown
        raise InvalidRequest("the input has no rows: give at least one")
    if array.dtype == object and not all(isinstance(item, str | bytes) for item in array.flat):
        raise InvalidRequest(
            "inputs must be an array, nested lists of numbers or text, or a map of them by input name, "
            f"not {arguments.shown(value)}"
        )
    if array.dtype == np.float64 and isinstance(value, list | tuple | float):
        return array.astype(np.float32)
    return array
