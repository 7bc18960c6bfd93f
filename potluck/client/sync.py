"""The client for programs without asyncio: the same client, on an event loop in its own thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, Unpack

from potluck.client.async_client import AsyncClient, Data, Image, Inputs, Model
from potluck.client.callbacks import Callbacks
from potluck.client.deploying import DeployOptions
from potluck.client.jobs import AsyncJob, Predictions, evaluation_of, history_of
from potluck.client.signatures import suggesting, told_by
from potluck.client.sources import Progress
from potluck.client.training import TrainOptions
from potluck.credentials import Credentials
from potluck.data.packing import Target
from potluck.errors import InvalidRequest
from potluck.wire.jobs import AnyJobSpec, EpochMetrics, Evaluation, JobProgress, RoundMetrics
from potluck.wire.questions import ClusterEvent, DatasetInfo, DeploymentInfo, JobChanged, JobEnded, ModelInfo, NodeInfo

T = TypeVar("T")

_LEAVE_SECONDS = 10.0
_LOOK_SECONDS = 0.2
"""How often a waiting thread checks for an interrupt: a signal that comes just as it begins to wait does not wake it."""


class Portal:
    """An event loop in a daemon thread. `call` runs a coroutine there; an interrupt of the caller cancels it."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="potluck client", daemon=True)
        self._thread.start()

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run the coroutine and return its result. KeyboardInterrupt is raised at once; the coroutine has then ended or is being cancelled."""
        if self._loop.is_closed() or threading.current_thread() is self._thread:
            coroutine.close()
            raise InvalidRequest("the client is closed, or was called from its own thread: make a new client")
        future: Future[T] = Future()
        tasks: list[asyncio.Task[T]] = []

        def begin() -> None:
            tasks.append(self._loop.create_task(coroutine))
            tasks[0].add_done_callback(lambda task: _copy(task, future))

        def give_up() -> None:
            if tasks:
                tasks[0].cancel()
            else:
                coroutine.close()

        try:
            # An interrupt can come at any line, also before we know what we have started.
            self._loop.call_soon_threadsafe(begin)
            while not future.done():
                if self._loop.is_closed():
                    raise InvalidRequest("the client was closed meanwhile: make a new client")
                with suppress(TimeoutError):
                    return future.result(_LOOK_SECONDS)
            return future.result()
        except BaseException:
            with suppress(RuntimeError):  # closed
                self._loop.call_soon_threadsafe(give_up)
            raise

    def each(self, source: AsyncGenerator[T, None]) -> Iterator[T]:
        """What an asynchronous generator yields there."""
        try:
            while (value := self.call(_next(source))) is not None:
                yield value
        finally:
            # Python may be collecting this generator, and prints errors raised then. So do not wait for anything that could be interrupted.
            if not self.closed:
                self.start(source.aclose())

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run the coroutine, without waiting for it."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    @property
    def closed(self) -> bool:
        return self._loop.is_closed()

    def close(self) -> None:
        """End the thread: cancels what still runs there, and waits a limited time for it."""
        if self._loop.is_closed():
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_LEAVE_SECONDS)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            left = asyncio.all_tasks(self._loop)
            for task in left:
                if not task.cancelling():  # already cancelled: a second cancel would stop its cleanup
                    task.cancel()
            if left:
                self._loop.run_until_complete(asyncio.wait(left, timeout=_LEAVE_SECONDS / 2))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()


def _copy(task: asyncio.Task[T], future: Future[T]) -> None:
    """Pass a task's result or error on to a future that another thread waits for."""
    if task.cancelled():
        future.cancel()
    elif (error := task.exception()) is not None:
        future.set_exception(error)
    else:
        future.set_result(task.result())


@suggesting
class Job:
    """One job of the cluster, by its id."""

    def __init__(self, portal: Portal, job: AsyncJob) -> None:
        self.id = job.id
        self._portal = portal
        self._job = job

    def __repr__(self) -> str:
        return f"<Job {self.id}>"

    @property
    def asked(self) -> AnyJobSpec | None:
        """What this client asked for, with the data sets that it packed; None for a job that it did not submit."""
        return self._job.asked

    def status(self) -> JobChanged:
        """Its state now. Raises NotFound."""
        return self._portal.call(self._job.status())

    def trouble(self) -> str:
        """Why there is no news of the job: the connection to the cluster is lost; "": there is a connection."""
        return self._job.trouble()

    def progress(self) -> Iterator[JobProgress]:
        """Each new progress until the job ends in any way; `wait` tells how it ended."""
        return self._portal.each(self._job.progress())

    def states(self) -> Iterator[JobChanged]:
        """Each new state, the final one last."""
        return self._portal.each(self._job.states())

    def epochs(self) -> Iterator[EpochMetrics]:
        """Each epoch of a training job once, in order from the first, as it ends; until the job ends in any way."""
        return self._portal.each(self._job.epochs())

    def epochs_so_far(self) -> tuple[EpochMetrics, ...]:
        """The epochs that have ended by now; empty for a job that does not train."""
        return self._portal.call(self._job.epochs_so_far())

    def follow(self, callbacks: object = ()) -> dict[str, list[float]]:
        """Wait for a training job like `wait`, and call Keras callbacks for each epoch as it ends; returns the history.

        Callbacks get the logs of epochs, counted from 0. Their `model` has only `stop_training`, which ends the job after the current
        epoch. An error raised by a callback ends the following, but the job goes on.
        """
        told = Callbacks(callbacks)
        told.begin(self.status().progress.epochs)
        for epoch in self.epochs():  # not in the client's thread: a callback may use the client itself
            if told.epoch(epoch):
                self.stop()
        told.end()
        return self.wait().history

    def wait(self, timeout: float | None = None) -> Job:
        """Wait until the job has succeeded. Raises the job's error when it failed or was cancelled; TimedOut after `timeout` seconds."""
        self._portal.call(self._job.wait(timeout))
        return self

    def result(self) -> JobEnded:
        """The result of a job that has ended, whether it succeeded or not."""
        return self._portal.call(self._job.result())

    def stop(self) -> JobChanged:
        """End training after the current epoch, as if it had been the last. Raises Conflict for another kind of job."""
        return self._portal.call(self._job.stop())

    def cancel(self) -> JobChanged:
        """End the job now. Does nothing to a job that has ended."""
        return self._portal.call(self._job.cancel())

    @property
    def history(self) -> dict[str, list[float]]:
        """Metrics of each epoch, as Keras' `History.history`. Waits for the job."""
        return history_of(self.result())

    @property
    def rounds(self) -> tuple[RoundMetrics, ...]:
        """The rounds of a training job, or of very many rounds, an even selection. Waits for the job."""
        return self.result().rounds

    @property
    def evaluation(self) -> Evaluation:
        """Merged metrics of an evaluation. Waits for the job. Raises the job's error, or Conflict for another kind of job."""
        self.wait()
        return evaluation_of(self.result())

    @property
    def predictions(self) -> Predictions:
        """The outputs of a predict job in input order: one array, or a map from output names to arrays. Waits for the job."""
        return self._portal.call(self._job.predictions())

    @property
    def keys(self) -> list[str]:
        """The name of each item of a predict job (a file's path, a row's number), in the order of the predictions."""
        return self._portal.call(self._job.keys())

    @property
    def registered(self) -> str:
        """The `name:version` under which the trained model was registered; empty where it was not. Waits for the job."""
        return self.result().registered

    def model(self, path: str | Path | None = None, *, safe_mode: bool = True) -> Any:
        """The trained model, loaded as a keras.Model (in `safe_mode`, as in Keras, no code in its file runs). With `path`, the file is saved
        there instead and the path returned; that does not need Keras. Waits for the job.
        """
        return self._portal.call(self._job.model(path, safe_mode=safe_mode))

    def plot(self, path: str | Path) -> Path:
        """Draw loss and metrics over the epochs into a .png, .svg or .pdf file, once the job has ended; returns the path. Needs matplotlib."""
        return self._portal.call(self._job.plot(path))

    def tensorboard(self, folder: str | Path) -> Path:
        """Write event files for TensorBoard, once the job has ended: the runs `train` and `validation` below `folder`, with Keras'
        names for scalars, and with scalars for rounds. Returns the folder. Needs tensorboardX.
        """
        return self._portal.call(self._job.tensorboard(folder))


async def _next(source: AsyncGenerator[T, None]) -> T | None:
    return await anext(source, None)


@suggesting
class Client:
    """A client of one cluster; `AsyncClient` has the same methods for asyncio, and describes them in more detail.

    `seed` is a broker's address (`host` or `host:port`), or several. Without `seed`, the address comes from `POTLUCK_SEEDS`, the settings
    file or mDNS. `timeout` limits each question, in seconds; jobs have no limit.
    Use the client as a context manager, or call `close`. All methods raise subclasses of `potluck.errors.PotluckError`, also
    Unavailable and TimedOut. Threads can share a client.
    """

    def __init__(
        self,
        seed: str | Sequence[str] | None = None,
        *,
        cluster: str | None = None,
        timeout: float | None = None,
        credentials: str | Path | None = None,
        make: Callable[..., AsyncClient] = AsyncClient,
    ) -> None:
        shown = {} if credentials is None else {"credentials": credentials}
        self._client = make(seed, cluster=cluster, timeout=timeout, **shown)
        self._portal = Portal()

    def __enter__(self) -> Client:
        try:
            self._portal.call(self._client.__aenter__())
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect, and remove temporary files. Can be called twice."""
        if self._portal.closed:
            return
        try:
            self._portal.call(self._client.aclose())
        finally:
            self._portal.close()

    @property
    def cluster(self) -> str:
        """The cluster's name."""
        return self._client.cluster

    @property
    def credentials(self) -> Credentials:
        """Who this client is, and what it shows and checks when it connects."""
        return self._client.credentials

    def gateway(self) -> tuple[str, ...]:
        """The addresses of the cluster's HTTP gateway, with their ports. Raises Unavailable."""
        return self._portal.call(self._client.gateway())

    def nodes(self) -> tuple[NodeInfo, ...]:
        """Every node that the coordinator knows, offline nodes too."""
        return self._portal.call(self._client.nodes())

    @told_by(AsyncClient.events)
    def events(
        self, after: int | None = None, *, last: int | None = None, follow: bool = False
    ) -> Iterator[ClusterEvent]:
        return self._portal.each(self._portal.call(self._client.events(after, last=last, follow=follow)))

    def jobs(self) -> tuple[JobChanged, ...]:
        """Every job that the coordinator remembers, oldest first."""
        return self._portal.call(self._client.jobs())

    def job(self, job_id: str) -> Job:
        """A job by its id, or by the beginning of its id. Raises NotFound, InvalidRequest."""
        return self._job(self._client.job(job_id))

    def cancel(self, job_id: str) -> JobChanged:
        """End a job now. Raises NotFound."""
        return self._portal.call(self._client.cancel(job_id))

    @told_by(AsyncClient.train)
    def train(
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
    ) -> Job:
        return self._job(
            self._client.train(
                model,
                data,
                validation=validation,
                epochs=epochs,
                batch_size=batch_size,
                image=image,
                name=name,
                target=target,
                sample_weight=sample_weight,
                **options,
            )
        )

    def evaluate(
        self,
        model: Model,
        data: Data,
        *,
        batch_size: int = 32,
        image: Image | None = None,
        target: Target = None,
        sample_weight: str | None = None,
    ) -> Job:
        """Measure a model on labelled data: `job.evaluation`. Raises the errors of `train`."""
        return self._job(
            self._client.evaluate(
                model, data, batch_size=batch_size, image=image, target=target, sample_weight=sample_weight
            )
        )

    def predict(
        self,
        model: Model,
        data: Data,
        *,
        batch_size: int = 32,
        image: Image | None = None,
        target: Target = None,
    ) -> Job:
        """A model's outputs for a whole data set or array: `job.predictions`. Raises the errors of `train`."""
        return self._job(self._client.predict(model, data, batch_size=batch_size, image=image, target=target))

    @told_by(AsyncClient.deploy)
    def deploy(
        self,
        model: Model,
        replicas: int | str = 1,
        *,
        name: str | None = None,
        wait: bool = False,
        **options: Unpack[DeployOptions],
    ) -> Job:
        return self._job(self._client.deploy(model, replicas, name=name, wait=wait, **options))

    def promote(self, model: str) -> tuple[DeploymentInfo, ...]:
        """Make the canary (or shadow) of `model` the version that answers. Raises NotFound, Conflict."""
        return self._portal.call(self._client.promote(model))

    def roll_back(self, model: str) -> tuple[DeploymentInfo, ...]:
        """Withdraw the canary or shadow of `model`, or without one go back to the version before. Raises NotFound, Conflict."""
        return self._portal.call(self._client.roll_back(model))

    def undeploy(self, model: str) -> tuple[str, ...]:
        """Unload `name` (every version) or `name:version` from all nodes; returns the names unloaded. Raises NotFound."""
        return self._portal.call(self._client.undeploy(model))

    def deployments(self) -> tuple[DeploymentInfo, ...]:
        """The deployments, with the nodes that they are on."""
        return self._portal.call(self._client.deployments())

    def models(self) -> tuple[ModelInfo, ...]:
        """Every version of every registered model."""
        return self._portal.call(self._client.models())

    def get_model(self, model: str) -> ModelInfo:
        """The registered `name` (its newest version), `name:version` or `name:alias`. Raises NotFound."""
        return self._portal.call(self._client.get_model(model))

    @told_by(AsyncClient.register)
    def register(
        self,
        model: Model,
        name: str | None = None,
        *,
        image: Image | None = None,
        classes: Sequence[str] = (),
        tags: Mapping[str, str] | None = None,
        source: str | None = None,
    ) -> ModelInfo:
        return self._portal.call(
            self._client.register(model, name, image=image, classes=classes, tags=tags, source=source)
        )

    @told_by(AsyncClient.export)
    def export(self, model: str, path: str | Path) -> Path:
        return self._portal.call(self._client.export(model, path))

    @told_by(AsyncClient.set_alias)
    def set_alias(self, model: str, alias: str) -> ModelInfo:
        return self._portal.call(self._client.set_alias(model, alias))

    def remove_alias(self, model: str) -> ModelInfo:
        """Remove an alias, `name:alias`; returns the version that it named. Raises NotFound, InvalidRequest."""
        return self._portal.call(self._client.remove_alias(model))

    def tag_model(self, model: str, tags: Mapping[str, str] | None = None, *, remove: Iterable[str] = ()) -> ModelInfo:
        """Set tags of a version, and remove the tags named in `remove`. Raises NotFound, InvalidRequest."""
        return self._portal.call(self._client.tag_model(model, tags, remove=remove))

    @told_by(AsyncClient.delete_model)
    def delete_model(self, model: str, *, every_version: bool = False) -> tuple[str, ...]:
        return self._portal.call(self._client.delete_model(model, every_version=every_version))

    @told_by(AsyncClient.deployed_model)
    def deployed_model(self, model: str) -> ModelInfo:
        return self._portal.call(self._client.deployed_model(model))

    @told_by(AsyncClient.infer)
    def infer(
        self,
        model: str,
        inputs: Inputs,
        *,
        image: Image | None = None,
        timeout: float | None = None,
        priority: int = 0,
    ) -> Predictions:
        return self._portal.call(self._client.infer(model, inputs, image=image, timeout=timeout, priority=priority))

    def datasets(self) -> tuple[DatasetInfo, ...]:
        """The registered data sets, and those that live on nodes."""
        return self._portal.call(self._client.datasets())

    @told_by(AsyncClient.add_data)
    def add_data(
        self,
        data: Data,
        name: str | None = None,
        *,
        target: Target = None,
        sample_weight: str | None = None,
        progress: Progress | None = None,
    ) -> DatasetInfo:
        return self._portal.call(
            self._client.add_data(data, name, target=target, sample_weight=sample_weight, progress=progress)
        )

    def remove_data(self, name: str) -> None:
        """Remove a registered data set. Raises NotFound, and Conflict while a job uses it."""
        self._portal.call(self._client.remove_data(name))

    def _job(self, asked: Coroutine[Any, Any, AsyncJob]) -> Job:
        return Job(self._portal, self._portal.call(asked))
