"""Questions of clients on the bus: each message type to the part that answers it."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

from msgspec import Struct
from msgspec.structs import replace

from coordinator.copies.locations import Holders
from coordinator.dispatch.deletion import Deletion
from coordinator.dispatch.dispatcher import Dispatcher
from coordinator.dispatch.packed import Packed
from coordinator.membership import Membership
from coordinator.plans import node_data as federated
from coordinator.registry import Registry, dataset_blobs
from coordinator.serving.serving import Serving
from potluck.blobs.store import BlobStore
from potluck.bus.mqtt import Envelope
from potluck.bus.outbox import Outbox
from potluck.data.packing import check_class_names
from potluck.errors import (
    BadMessage,
    Conflict,
    InvalidData,
    InvalidRequest,
    NotFound,
    Overloaded,
    PotluckError,
    TimedOut,
)
from potluck.surviving import as_defect
from potluck.wire import codec
from potluck.wire.addresses import check_holders
from potluck.wire.deadlines import deadline, too_late
from potluck.wire.messages import (
    NODE_DATA,
    SHARDS_LIMIT,
    AddDataset,
    AnyJobSpec,
    BlobRef,
    CancelJob,
    Dataset,
    DatasetAdded,
    DatasetRemoved,
    DatasetsListed,
    DeleteModel,
    Deploy,
    DeploymentsListed,
    FindReplicas,
    GetHistory,
    GetJob,
    GetModel,
    HistoryListed,
    JobAccepted,
    JobsListed,
    ListDatasets,
    ListDeployments,
    ListJobs,
    ListModels,
    ListNodes,
    Message,
    ModelChanged,
    ModelRegistered,
    ModelsDeleted,
    ModelsListed,
    NodesListed,
    Promote,
    RegisterModel,
    RemoveAlias,
    RemoveDataset,
    ReplicaPlace,
    ReplicasFound,
    RollBack,
    SetAlias,
    StopTraining,
    SubmitJob,
    TagModel,
    Undeploy,
    Undeployed,
)
from potluck.wire.refs import locate
from potluck.wording import be, counted

log = logging.getLogger(__name__)

P = TypeVar("P", bound=Struct)

ONCE = RemoveAlias | DeleteModel | RemoveDataset | Promote | RollBack
MANIFEST_LIMIT_BYTES = 2 * 2**20
LISTED_BYTES = 96 * 1024
"""Models or jobs in one answer, as msgpack: in JSON they may be twice as long."""
PLACES_TOLD = 16
"""Nodes with replicas that a client is told: it sends inputs to each in turn, and asks again soon."""
ANSWERS_KEPT = 256
"""Answers to questions that can be carried out once: asked again, they would find nothing to do."""


class Requests:
    """Answers what comes on `coordinator/inbox` and `jobs/submit`. `run` must be under way."""

    def __init__(
        self,
        *,
        outbox: Outbox,
        dispatcher: Dispatcher,
        registry: Registry,
        serving: Serving,
        membership: Membership,
        deletion: Deletion,
        packed: Packed,
        holders: Holders,
        store: BlobStore,
        urls: Callable[[], tuple[str, ...]],
        sync: Callable[[], Awaitable[None]],
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`sync` returns when what was journaled is on the disk for good; it raises Unavailable."""
        self._outbox = outbox
        self._dispatcher = dispatcher
        self._registry = registry
        self._serving = serving
        self._membership = membership
        self._deletion = deletion
        self._packed = packed
        self._holders = holders
        self._store = store
        self._urls = urls
        self._clock = clock
        self._sync = sync
        self._undeploys: asyncio.Queue[Envelope] = asyncio.Queue(100)
        self._accepted: asyncio.Queue[tuple[Envelope, Message]] = asyncio.Queue()
        """Answers that promise something which a power cut is not to undo."""
        self._answered: dict[tuple[str, str], Message] = {}

    def on_request(self, envelope: Envelope) -> None:
        """Handler for the bus."""
        message = envelope.message
        now = self._clock()
        if deadline(message, now) < now:
            self._outbox.refuse(envelope, TimedOut(too_late(message, now, "the coordinator's")))
            return
        try:
            if isinstance(message, Undeploy):
                if self._undeploys.full():
                    raise Overloaded("too many questions wait to undeploy: try again later", retry_after_seconds=1.0)
                self._undeploys.put_nowait(envelope)  # takes time
                return
            answer = self._once(envelope, message)
            if isinstance(answer, JobAccepted):
                self._accepted.put_nowait((envelope, answer))
            else:
                self._outbox.reply(envelope, answer)
        except Exception as error:  # noqa: BLE001 - whoever asked hears of it, and nobody else
            self._outbox.refuse(envelope, as_defect(error, type(message).__name__))

    async def run(self) -> None:
        """Answer the questions that take time, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._undeploy(), name="questions to undeploy")
            tasks.create_task(self._accept(), name="jobs accepted")

    async def _accept(self) -> None:
        """Whoever asks for a job hears that we have it once it is on the disk; all that came meanwhile hear it together."""
        while True:
            answers = [await self._accepted.get()]
            while not self._accepted.empty():
                answers.append(self._accepted.get_nowait())
            try:
                await self._sync()
            except PotluckError as error:
                for envelope, _ in answers:
                    self._outbox.refuse(envelope, error)
            else:
                for envelope, answer in answers:
                    self._outbox.reply(envelope, answer)

    async def _undeploy(self) -> None:
        while True:
            envelope = await self._undeploys.get()
            assert isinstance(envelope.message, Undeploy)
            try:
                gone = await self._serving.undeploy(self._registry.version_of(envelope.message.model))
                self._outbox.reply(envelope, Undeployed(deployments=gone))
            except Exception as error:  # noqa: BLE001 - the same
                self._outbox.refuse(envelope, as_defect(error, "Undeploy"))

    def _once(self, envelope: Envelope, message: Message) -> Message:
        """The answer; a question that can be carried out once, asked again with the same id, has the answer that it had."""
        if not isinstance(message, ONCE) or not (envelope.reply_to and message.id):
            return self._answer(envelope, message)
        asked = (envelope.reply_to, message.id)
        if asked not in self._answered:
            self._answered[asked] = self._answer(envelope, message)
            if len(self._answered) > ANSWERS_KEPT:
                del self._answered[next(iter(self._answered))]
        return self._answered[asked]

    def _answer(self, envelope: Envelope, message: Message) -> Message:
        match message:
            case SubmitJob():
                # The same question asked twice (QoS 1, or a client that tries again) is one job.
                request_id = f"{envelope.reply_to} {message.id}" if envelope.reply_to and message.id else ""
                job = self._dispatcher.submit(message.job, request_id)
                if not _is_same(job.submitted.spec, message.job):
                    raise Conflict(
                        f"the id {message.id[:80]!r} was used for job {job.job_id}, which is another one: "
                        "submit each job with an id of its own"
                    )
                return JobAccepted(job_id=job.job_id)
            case CancelJob():
                return self._dispatcher.described(self._dispatcher.cancel(message.job_id))
            case StopTraining():
                return self._dispatcher.described(self._dispatcher.stop(message.job_id))
            case GetHistory():
                job = self._dispatcher.job(message.job_id)
                return HistoryListed(job_id=job.job_id, epochs=job.epochs_after(message.after))
            case GetJob():
                job = self._dispatcher.job(message.job_id)
                return self._dispatcher.ended(job) or self._dispatcher.described(job)
            case ListJobs():
                listed, more = _page(self._dispatcher.all_described(message.after))
                return JobsListed(jobs=listed, more=more)
            case ListNodes():
                nodes, more = _page(self._membership.infos(message.after))
                return NodesListed(nodes=nodes, sent_at=self._clock(), more=more)
            case ListModels():
                return self._list_models(message.after)
            case GetModel():
                return ModelRegistered(model=locate(self._registry.model(message.model), self._holders.of))
            case RegisterModel():
                return self._register(message)
            case SetAlias():
                return ModelChanged(model=self._registry.set_alias(message.model, message.alias))
            case RemoveAlias():
                return ModelChanged(model=self._registry.remove_alias(message.model))
            case TagModel():
                return ModelChanged(model=self._registry.tag(message.model, message.tags, message.remove))
            case DeleteModel():
                return ModelsDeleted(models=self._deletion.delete_models(message.model, every=message.every_version))
            case ListDatasets():
                return self._list_datasets(message.after)
            case AddDataset():
                return self._add_dataset(message)
            case RemoveDataset():
                self._deletion.remove_dataset(message.name)
                return DatasetRemoved(name=message.name)
            case ListDeployments():
                found = (one for one in self._serving.deployments() if one.name > message.after)
                deployments, more = _page(found)
                return DeploymentsListed(deployments=deployments, more=more)
            case FindReplicas():
                return self._find_replicas(message.model)
            case Promote():
                return DeploymentsListed(deployments=self._serving.promote(message.model))
            case RollBack():
                return DeploymentsListed(deployments=self._serving.roll_back(message.model))
            case _:
                raise InvalidRequest(
                    f"{type(message).__name__} is not a question to the coordinator: see docs/protocol.md"
                )

    def _find_replicas(self, model: str) -> ReplicasFound:
        members = [self._membership.get(node_id) for node_id in self._serving.nodes_of(model)]
        there = [member for member in members if member is not None and member.http]
        told = random.sample(there, min(len(there), PLACES_TOLD))
        return ReplicasFound(replicas=tuple([ReplicaPlace(node_id=one.node_id, http=one.http) for one in told]))

    def _list_models(self, after: str) -> Message:
        listed, more = _page(self._registry.models(after))
        return ModelsListed(models=listed, more=more)

    def _list_datasets(self, after: str) -> Message:
        living = federated.described(self._membership.data())
        found = ((one.name.startswith(NODE_DATA), one.name, one) for one in (*self._registry.datasets(), *living))
        last = (after.startswith(NODE_DATA), after)
        listed, more = _page(one for lives, name, one in found if (lives, name) > last)
        return DatasetsListed(datasets=listed, more=more)

    def _register(self, message: RegisterModel) -> Message:
        self._need(message.model, "model")
        info = self._registry.add_model(
            message.name,
            replace(message.model, holders=()),  # it is here
            format=message.format,
            image=message.image,
            classes=message.classes,
            tags=message.tags,
            source=message.source,
            now=self._clock(),
        )
        return ModelRegistered(model=info)

    def _add_dataset(self, message: AddDataset) -> Message:
        self._need(message.manifest, "manifest")
        if message.manifest.size > MANIFEST_LIMIT_BYTES:
            raise InvalidData(
                f"the manifest of data set {message.name!r} has {message.manifest.size} bytes: {MANIFEST_LIMIT_BYTES} are allowed"
            )
        try:
            dataset = codec.unpack(self._store.read(message.manifest.sha256), Dataset)
        except BadMessage as error:
            raise InvalidData(f"the manifest of data set {message.name!r} is not one: {error.message}") from error
        if len(dataset.shards) > SHARDS_LIMIT:
            raise InvalidData(
                f"data set {message.name!r} has {len(dataset.shards)} shards, {SHARDS_LIMIT} are allowed: make larger ones"
            )
        check_class_names(dataset.format.classes, f"data set {message.name!r}")
        _, *parts = dataset_blobs(message.manifest, dataset)
        for ref in parts:
            check_holders(ref.holders, f"the manifest of data set {message.name!r}")
        missing = [ref.sha256 for ref in parts if not self._store.has(ref.sha256)]
        if missing:
            raise InvalidData(
                f"{len(missing)} of {counted(len(parts), 'blob')} of data set {message.name!r} {be(len(missing))} not in the "
                f"coordinator's store (first: {missing[0][:12]}): PUT them to {self._where()}/blobs/<sha256> first"
            )
        for ref in parts:
            if (size := self._store.size(ref.sha256)) != ref.size:
                raise InvalidData(
                    f"the manifest of data set {message.name!r} says that blob {ref.sha256[:12]} has {ref.size} bytes: "
                    f"it has {size}"
                )
        if sum(shard.count for shard in dataset.shards) != dataset.count or not dataset.count:
            raise InvalidData(
                f"the manifest of data set {message.name!r} counts {counted(dataset.count, 'item')}, its shards do not"
            )
        added = self._registry.add_dataset(
            message.name, replace(message.manifest, holders=()), dataset, packed=message.packed
        )
        if message.packed:
            self._packed.added(message.name)
        return DatasetAdded(dataset=added)

    def _need(self, ref: BlobRef, what: str) -> None:
        """Raises NotFound when the blob is not here, InvalidRequest when it has another size than its reference says."""
        if not self._store.has(ref.sha256):
            raise NotFound(
                f"the {what} blob {ref.sha256[:12]} is not in the coordinator's store: "
                f"PUT it to {self._where()}/blobs/{ref.sha256} first"
            )
        size = self._store.size(ref.sha256)
        if size != ref.size:
            raise InvalidRequest(f"the {what} blob {ref.sha256[:12]} has {size} bytes, not {ref.size}")

    def _where(self) -> str:
        return (self._urls() or ("<coordinator>",))[0]


def _page(found: Iterable[P]) -> tuple[tuple[P, ...], bool]:
    """As many of the first as go into an answer, and whether there are more."""
    listed: list[P] = []
    size = 0
    for one in found:
        size += len(codec.pack(one))
        if listed and size > LISTED_BYTES:
            return tuple(listed), True
        listed.append(one)
    return tuple(listed), False


def _is_same(kept: AnyJobSpec, asked: AnyJobSpec) -> bool:
    """Whether a job that is kept is the one asked for: a deployment is kept with the version that its name or alias stood for, and
    with the data that it is quantized by."""
    if isinstance(kept, Deploy) and isinstance(asked, Deploy):
        name, _, version = asked.model.partition(":")
        named = kept.model if version.isdigit() else kept.model.partition(":")[0]
        meant = replace(
            asked,
            model=asked.model if version.isdigit() else name,
            calibration=asked.calibration or kept.calibration,
            evaluation=asked.evaluation or kept.evaluation,
        )
        return replace(kept, model=named) == meant
    return kept == asked
