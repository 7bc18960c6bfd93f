"""A coordinator that answers clients by script, with a real blob store over HTTP, on any bus."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from aiohttp import web

from potluck.blobs import server
from potluck.blobs.rights import OPEN
from potluck.blobs.store import BlobStore
from potluck.bus.exchange import request_failed
from potluck.bus.mqtt import Bus, Envelope
from potluck.errors import NotFound, PotluckError
from potluck.wire.births import CoordinatorStatus
from potluck.wire.jobs import JobProgress
from potluck.wire.questions import (
    AddDataset,
    DatasetAdded,
    DatasetInfo,
    DatasetsListed,
    FindReplicas,
    GetJob,
    GetModel,
    Infer,
    Inferred,
    JobAccepted,
    JobChanged,
    JobEnded,
    ListDatasets,
    ModelInfo,
    ModelRegistered,
    RegisterModel,
    ReplicasFound,
    SubmitJob,
)
from potluck.wire.values import BlobRef, Message

Answer = Callable[[Any], Message | None]


class ScriptedCoordinator:
    """`answers[Kind]` makes the answer to a question of that kind: it raises for an error, and returns None for silence.

    Submitted jobs get the ids job-1, job-2, ...; `state` and `end` publish their news on the bus.
    """

    def __init__(self, bus: Bus, folder: Path) -> None:
        self.bus = bus
        self.store = BlobStore(folder, 1 << 30)
        self.asked: list[Message] = []
        self.jobs: dict[str, JobChanged | JobEnded] = {}
        self.submitted: dict[str, str] = {}
        self.models: dict[str, ModelInfo] = {}
        self.urls: tuple[str, ...] = ()
        self.answers: dict[type[Message], Answer] = {
            SubmitJob: self._submit,
            GetJob: self._job,
            RegisterModel: self._register,
            GetModel: self._model,
            AddDataset: lambda asked: DatasetAdded(
                dataset=DatasetInfo(name=asked.name, kind="arrays", count=1, shards=1, size_bytes=asked.manifest.size)
            ),
            ListDatasets: lambda asked: DatasetsListed(datasets=()),
            FindReplicas: lambda asked: ReplicasFound(),
            Infer: lambda asked: Inferred(model="m:1", outputs=asked.inputs),
        }
        self._stack = AsyncExitStack()
        self._replies: asyncio.Queue[tuple[Envelope, Message]] = asyncio.Queue(1000)
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.add_routes(server.routes(self.store, writable=True, max_bytes=1 << 28, rights=OPEN))
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        self._stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.urls = (f"http://127.0.0.1:{runner.addresses[0][1]}",)
        topics = self.bus.topics
        for topic in (topics.coordinator_inbox, topics.jobs_submit, topics.infer("+")):
            self.bus.subscribe(topic, self._on_question)
        self._tasks = [
            asyncio.create_task(self.bus.run(), name="scripted bus"),
            asyncio.create_task(self._reply(), name="scripted replies"),
        ]
        await self.bus.connected(5)
        await self.online()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)
        await self._stack.aclose()

    async def online(self, state: Any = "online") -> None:
        status = CoordinatorStatus(session="s", epoch=1, state=state, http=self.urls)
        await self.bus.publish(self.bus.topics.coordinator_status, status, retain=True)

    async def state(self, job_id: str, state: Any, **progress: Any) -> None:
        """Publish that a job changed."""
        changed = JobChanged(
            job_id=job_id, kind="train", state=state, created_at=1.0, started_at=2.0, progress=JobProgress(**progress)
        )
        self.jobs[job_id] = changed
        await self.bus.publish(self.bus.topics.job(job_id, "status"), changed, retain=True)

    async def end(self, job_id: str, state: Any = "succeeded", *, say: bool = True, **parts: Any) -> None:
        """End a job. `say` False: do not publish it; clients must ask."""
        ended = JobEnded(
            job_id=job_id, kind="train", state=state, created_at=1.0, started_at=2.0, ended_at=time.time(), **parts
        )
        self.jobs[job_id] = ended
        if say:
            await self.bus.publish(self.bus.topics.job(job_id, "result"), ended, retain=True)

    def _model(self, asked: GetModel) -> ModelRegistered:
        """The registered model; else one with only a name."""
        name = asked.model.partition(":")[0]
        unknown = ModelInfo(name=name, version=1, model=BlobRef(sha256="0" * 64, size=1), created_at=1.0)
        return ModelRegistered(model=self.models.get(name, unknown))

    def _register(self, asked: RegisterModel) -> Message:
        info = ModelInfo(
            name=asked.name, version=1, model=asked.model, created_at=1.0, classes=asked.classes, format=asked.format,
            tags=asked.tags, source=asked.source,
        )  # fmt: skip
        self.models[asked.name] = info
        return ModelRegistered(model=info)

    def _submit(self, asked: SubmitJob) -> Message:
        job_id = self.submitted.setdefault(asked.id, f"job-{len(self.submitted) + 1}")
        if job_id not in self.jobs:
            self.jobs[job_id] = JobChanged(job_id=job_id, kind="train", state="queued", created_at=1.0)
        return JobAccepted(job_id=job_id)

    def _job(self, asked: GetJob) -> Message:
        if asked.job_id not in self.jobs:
            raise NotFound(f"there is no job {asked.job_id!r}")
        return self.jobs[asked.job_id]

    def _on_question(self, envelope: Envelope) -> None:
        self.asked.append(envelope.message)
        try:
            answer = self.answers[type(envelope.message)](envelope.message)
        except PotluckError as error:
            answer = request_failed(error)
        if answer is not None:
            self._replies.put_nowait((envelope, answer))

    async def _reply(self) -> None:
        while True:
            await self.bus.reply(*await self._replies.get())
