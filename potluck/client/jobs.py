"""A job as a client follows it: its states come from the bus; in between, the client asks the coordinator."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace

from potluck import errors
from potluck.bus.mqtt import Envelope
from potluck.client import arguments, event_files, plots
from potluck.client.callbacks import Callbacks
from potluck.client.connection import Connection
from potluck.client.listings import completed
from potluck.client.models import load_model
from potluck.client.signatures import suggesting
from potluck.errors import Conflict, NotFound, PotluckError, TimedOut
from potluck.wire import tensors
from potluck.wire.failures import as_error
from potluck.wire.jobs import AnyJobSpec, EpochMetrics, Evaluation, JobProgress, RoundMetrics
from potluck.wire.questions import CancelJob, GetHistory, GetJob, HistoryListed, JobChanged, JobEnded, StopTraining
from potluck.wire.values import BlobRef, Message, Tensor

ENDED = ("succeeded", "failed", "cancelled")
_POLL_SECONDS = 2.0
"""How long the bus may say nothing of a job before the coordinator is asked."""

Predictions = np.ndarray[Any, Any] | dict[str, np.ndarray[Any, Any]]


class JobFeed:
    """The newest state of one job. States that nobody looked at in time are not kept."""

    def __init__(self) -> None:
        self.state: JobChanged | None = None
        self.ended: JobEnded | None = None
        self.news = asyncio.Event()

    def on_message(self, envelope: Envelope) -> None:
        """Handler for the bus."""
        self.take(envelope.message)

    def take(self, message: Message) -> None:
        """Take the news in a message. A job that has ended stays ended."""
        if isinstance(message, JobEnded):
            self.ended = message
        elif isinstance(message, JobChanged):
            if self.state is not None and self.state.state in ENDED:
                return
            self.state = completed(message)
        else:
            return
        self.news.set()


@suggesting
class AsyncJob:
    """One job of the cluster, by its id."""

    def __init__(self, connection: Connection, job_id: str, asked: AnyJobSpec | None = None) -> None:
        self.id = job_id
        self.asked = asked
        """What this client asked for; None for a job that it did not submit."""
        self._connection = connection
        self._ended: JobEnded | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id}>"

    async def status(self) -> JobChanged:
        """Its state now. Raises NotFound."""
        answer = await self._get()
        if isinstance(answer, JobChanged):
            return completed(answer)
        async with self._feed() as feed:
            # The retained status has the last progress; a result has none.
            await _news(feed, 0.2)
            return feed.state or state_of(answer)

    def trouble(self) -> str:
        """Why there is no news of the job: the connection to the cluster is lost; "": there is a connection."""
        return self._connection.bus.trouble()

    async def progress(self) -> AsyncGenerator[JobProgress, None]:
        """Each new progress until the job ends in any way; `wait` tells how it ended."""
        seen: JobProgress | None = None
        async with aclosing(self.states()) as states:
            async for state in states:
                if state.progress != seen:
                    seen = state.progress
                    yield seen

    async def states(self) -> AsyncGenerator[JobChanged, None]:
        """Each new state, the final one last. Goes on over lost connections and restarted coordinators."""
        seen: JobChanged | None = None
        async with self._feed() as feed:
            heard_at = time.monotonic()
            # The bus may have lost the job's state, and the coordinator knows at once that a job is unknown.
            await self._poll(feed, heard_at)
            while True:
                if not await _news(feed, _POLL_SECONDS):
                    await self._poll(feed, heard_at)
                    if not feed.news.is_set():
                        continue
                feed.news.clear()
                heard_at = time.monotonic()
                if feed.state is not None and feed.state != seen:
                    seen = feed.state
                    yield seen
                if feed.ended is not None and (seen is None or seen.state not in ENDED):
                    seen = state_of(feed.ended, seen.progress if seen else JobProgress())
                    yield seen
                if seen is not None and seen.state in ENDED:
                    return

    async def epochs(self) -> AsyncGenerator[EpochMetrics, None]:
        """Each epoch of a training job once, in order from the first, as it ends; until the job ends in any way."""
        after, at = 0, 0
        async with aclosing(self.states()) as states:
            async for state in states:
                if state.progress.epoch != at or state.state in ENDED:
                    at = state.progress.epoch
                    async with aclosing(self._epochs_after(after)) as found:
                        async for epoch in found:
                            after = epoch.epoch
                            yield epoch

    async def epochs_so_far(self) -> tuple[EpochMetrics, ...]:
        """The epochs that have ended by now; empty for a job that does not train."""
        return tuple([epoch async for epoch in self._epochs_after(0)])

    async def _epochs_after(self, number: int) -> AsyncGenerator[EpochMetrics, None]:
        while True:
            answer = await self._connection.ask(GetHistory(job_id=self.id, after=number), HistoryListed)
            for epoch in answer.epochs:
                number = epoch.epoch
                yield epoch
            if not answer.epochs:
                return

    async def follow(self, callbacks: object = ()) -> dict[str, list[float]]:
        """Wait for a training job like `wait`, and call Keras callbacks for each epoch as it ends; returns the history.

        Callbacks get the logs of epochs, counted from 0. Their `model` has only `stop_training`, which ends the job after the current
        epoch. An error raised by a callback ends the following, but the job goes on.
        """
        told = Callbacks(callbacks)
        told.begin((await self.status()).progress.epochs)
        async with aclosing(self.epochs()) as epochs:
            async for epoch in epochs:
                if told.epoch(epoch):
                    await self.stop()
        told.end()
        await self.wait()
        return self.history

    async def wait(self, timeout: float | None = None) -> AsyncJob:
        """Wait until the job has succeeded. Raises the job's error when it failed or was cancelled; TimedOut after `timeout` seconds."""
        limit_seconds = arguments.timeout(timeout)
        try:
            async with asyncio.timeout(limit_seconds):
                ended = await self.result()
        except TimeoutError:
            raise TimedOut(f"job {self.id} has not ended within {limit_seconds:g} s; it goes on") from None
        if ended.state != "succeeded":
            raise job_error(ended)
        return self

    async def result(self) -> JobEnded:
        """The result of a job that has ended, whether it succeeded or not."""
        if self._ended is None:
            async for _ in self.states():
                pass
            answer = await self._get()
            if not isinstance(answer, JobEnded):
                raise Conflict(f"job {self.id} is {answer.state} again: try again")
            self._ended = answer
        return self._ended

    async def stop(self) -> JobChanged:
        """End training after the current epoch, as if it had been the last. Raises Conflict for another kind of job."""
        return await self._connection.ask(StopTraining(job_id=self.id), JobChanged)

    async def cancel(self) -> JobChanged:
        """End the job now. Does nothing to a job that has ended."""
        return await self._connection.ask(CancelJob(job_id=self.id), JobChanged)

    @property
    def history(self) -> dict[str, list[float]]:
        """Metrics of each epoch, as Keras' `History.history`. Raises Conflict before `wait`."""
        return history_of(self._known())

    @property
    def rounds(self) -> tuple[RoundMetrics, ...]:
        """The rounds of a training job, or of very many rounds, an even selection. Raises Conflict before `wait`."""
        return self._known().rounds

    @property
    def evaluation(self) -> Evaluation:
        """Merged metrics of an evaluation. Raises Conflict before `wait`, and for another kind of job."""
        return evaluation_of(self._known())

    @property
    def registered(self) -> str:
        """The `name:version` under which the model was registered; empty where it was not. Raises Conflict before `wait`."""
        return self._known().registered

    async def model(self, path: str | Path | None = None, *, safe_mode: bool = True) -> Any:
        """The trained model, loaded as a keras.Model (in `safe_mode`, as in Keras, no code in its file runs). With `path`, the file is saved
        there instead and the path returned; that does not need Keras.
        """
        if (target := arguments.path("path", path)) is not None:
            arguments.in_a_folder("the model", target)
        await self.wait()
        ref = model_of(self._known())
        file = await self._connection.fetch(ref)
        if target is not None:
            try:
                await asyncio.to_thread(shutil.copyfile, file, target)
            except OSError as error:
                raise errors.InvalidRequest(f"the model cannot be saved as {target}: {error.strerror}") from error
            return target
        return await asyncio.to_thread(load_model, file, safe_mode=safe_mode)

    async def plot(self, path: str | Path) -> Path:
        """Draw loss and metrics over the epochs into a .png, .svg or .pdf file, once the job has ended; returns the path. Needs matplotlib.

        Raises InvalidRequest, and Conflict for a job without epochs.
        """
        target = plots.check_path(arguments.given_path("path", path))
        ended = trained(await self.result())
        await asyncio.to_thread(plots.save, ended, target)
        return target

    async def tensorboard(self, folder: str | Path) -> Path:
        """Write event files for TensorBoard, once the job has ended: the runs `train` and `validation` below `folder`, with Keras'
        names for scalars, and with scalars for rounds. Returns the folder. Needs tensorboardX.

        Raises InvalidRequest, and Conflict for a job without epochs.
        """
        target = event_files.check_folder(arguments.given_path("folder", folder), self.id)
        ended = trained(await self.result())
        await asyncio.to_thread(event_files.save, ended, target)
        return target

    async def predictions(self) -> Predictions:
        """The outputs of a predict job in input order: one array, or a map from output names to arrays.

        Rows come back in the order of their numbers, files in the order of their paths. (A packed data set holds its items in any order;
        their keys tell which is which.)
        """
        await self.wait()
        known = self._known()
        if not known.outputs:
            raise Conflict(f"job {self.id} is a job of kind {known.kind!r}: it has no predictions")
        outputs = as_arrays([await fetch_tensor(self._connection, tensor) for tensor in known.outputs])
        order = input_order(await self._keys())
        if order is None:
            return outputs
        if isinstance(outputs, dict):
            return {name: array[order] for name, array in outputs.items()}
        return outputs[order]

    async def keys(self) -> list[str]:
        """The name of each item of a predict job, in the order of the predictions; empty where the data set has no names."""
        await self.wait()
        keys = await self._keys()
        order = input_order(keys)
        return keys if order is None else [keys[index] for index in order]

    # ------------------------------------------------------------------------------------------------------------------

    def _known(self) -> JobEnded:
        if self._ended is None:
            raise Conflict(f"job {self.id} may still run: call wait() first")
        return self._ended

    async def _keys(self) -> list[str]:
        ref = self._known().keys
        if ref is None:
            return []
        file = await self._connection.fetch(ref)
        return [str(key) for key in json.loads(await asyncio.to_thread(file.read_bytes))]

    async def _get(self) -> JobChanged | JobEnded:
        answer = await self._connection.ask(GetJob(job_id=self.id), Message)
        if isinstance(answer, JobChanged | JobEnded):
            return answer
        raise Conflict(f"the coordinator answered GetJob with {type(answer).__name__}")

    async def _poll(self, feed: JobFeed, heard_at: float) -> None:
        """Ask for the state. Tolerates a coordinator that is away for less than the timeout (at least 60 s).

        The answer shows the state when it was asked for. News from the bus that came meanwhile is newer.
        """
        before = feed.state
        try:
            answer = await self._get()
            if isinstance(answer, JobEnded) or feed.state is before:
                feed.take(answer)
        except NotFound:
            raise
        except PotluckError as error:
            if not error.retryable or time.monotonic() - heard_at > max(
                60.0, self._connection.settings.timeout_seconds
            ):
                raise

    @asynccontextmanager
    async def _feed(self) -> AsyncIterator[JobFeed]:
        """The bus's news of the job while the context lasts."""
        feed = JobFeed()
        leave = self._connection.follow(self.id, feed.on_message)
        try:
            yield feed
        finally:
            leave()


async def _news(feed: JobFeed, timeout_seconds: float) -> bool:
    try:
        async with asyncio.timeout(timeout_seconds):
            await feed.news.wait()
    except TimeoutError:
        return False
    return True


def state_of(ended: JobEnded, progress: JobProgress = JobProgress()) -> JobChanged:  # noqa: B008 - frozen
    """The final state that belongs to a result."""
    return completed(
        JobChanged(
            job_id=ended.job_id,
            kind=ended.kind,
            state=ended.state,
            created_at=ended.created_at,
            started_at=ended.started_at,
            ended_at=ended.ended_at,
            progress=progress,
            error=ended.error,
            subject=ended.subject,
        )
    )


def job_error(ended: JobEnded) -> PotluckError:
    """The error of a job that did not succeed."""
    if ended.error is None:
        return errors.from_code(
            "cancelled" if ended.state == "cancelled" else "internal", f"job {ended.job_id}: {ended.state}"
        )
    return as_error(ended.error)


def history_of(ended: JobEnded) -> dict[str, list[float]]:
    """Metrics by name, as Keras' `History.history`; NaN where an epoch lacks a metric."""
    names = dict.fromkeys(name for epoch in ended.history for name in epoch.metrics)
    return {name: [epoch.metrics.get(name, float("nan")) for epoch in ended.history] for name in names}


def trained(ended: JobEnded) -> JobEnded:
    """`ended` itself. Raises Conflict for a job without epochs."""
    if not any(epoch.metrics for epoch in ended.history):
        raise Conflict(f"job {ended.job_id} ({ended.kind}, {ended.state}) has no epochs to show")
    return ended


def evaluation_of(ended: JobEnded) -> Evaluation:
    """The evaluation. Raises Conflict for another kind of job."""
    if ended.evaluation is None:
        raise Conflict(f"job {ended.job_id} ({ended.kind}, {ended.state}) has no evaluation")
    return ended.evaluation


def model_of(ended: JobEnded) -> BlobRef:
    """The model's blob. Raises Conflict for another kind of job."""
    if ended.model is None:
        raise Conflict(f"job {ended.job_id} ({ended.kind}, {ended.state}) has no model")
    return ended.model


async def fetch_tensor(connection: Connection, tensor: Tensor) -> Tensor:
    """The tensor with its data inline."""
    if not isinstance(tensor.data, BlobRef):
        return tensor
    file = await connection.fetch(tensor.data)
    return replace(tensor, data=await asyncio.to_thread(file.read_bytes))


def as_arrays(outputs: list[Tensor]) -> Predictions:
    """The only output as an array; several outputs as a map by name."""
    arrays = {tensor.name: tensors.to_numpy(tensor) for tensor in outputs}
    if len(arrays) == 1:
        return next(iter(arrays.values()))
    return arrays


def input_order(keys: list[str]) -> list[int] | None:
    """The position of each item in the order of its keys, by number where all are numbers; None where they are in order already."""
    if all(key.isdecimal() for key in keys):
        order = sorted(range(len(keys)), key=lambda index: int(keys[index]))
    else:
        order = sorted(range(len(keys)), key=keys.__getitem__)
    return None if order == list(range(len(keys))) else order
