"""Answers what clients ask the coordinator. It serves all transports, and knows none of them."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from msgspec import Struct
from msgspec.structs import replace

from coordinator.copies.locations import Holders
from coordinator.dispatch.deletion import Deletion
from coordinator.dispatch.dispatcher import Dispatcher
from coordinator.dispatch.packed import Packed
from coordinator.events.stream import Events
from coordinator.membership import Membership
from coordinator.plans import node_data as federated
from coordinator.registry import Registry, dataset_blobs
from coordinator.serving.serving import Serving
from potluck.blobs.store import BlobStore
from potluck.data.packing import check_class_names
from potluck.errors import (
    BadMessage,
    Conflict,
    InvalidData,
    InvalidRequest,
    NotAllowed,
    NotFound,
    TimedOut,
)
from potluck.logs import fields
from potluck.wire import codec, roles
from potluck.wire.addresses import check_holders
from potluck.wire.deadlines import deadline, too_late
from potluck.wire.jobs import NODE_DATA, AnyJobSpec, Deploy
from potluck.wire.members import CreateBearer, CreateToken, ListMembers, ListTokens, RemoveMember, RemoveToken
from potluck.wire.questions import (
    AddDataset,
    CancelJob,
    DatasetAdded,
    DatasetRemoved,
    DatasetsListed,
    DeleteModel,
    DeploymentInfo,
    DeploymentsListed,
    FindReplicas,
    FollowEvents,
    GetHistory,
    GetJob,
    GetModel,
    HistoryListed,
    JobAccepted,
    JobsListed,
    ListDatasets,
    ListDeployments,
    ListEvents,
    ListJobs,
    ListModels,
    ListNodes,
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
from potluck.wire.roles import ANYBODY, Caller
from potluck.wire.values import SHARDS_LIMIT, BlobRef, Dataset, Message
from potluck.wording import be, counted

log = logging.getLogger(__name__)

P = TypeVar("P", bound=Struct)

OF_MEMBERS = CreateToken | ListTokens | RemoveToken | ListMembers | RemoveMember | CreateBearer
"""Questions that only a closed cluster answers."""
TAKES_TIME = SubmitJob | Undeploy | ListEvents | FollowEvents | OF_MEMBERS
"""Questions whose answer is `Later`, or a `Stream`."""
ONCE = RemoveAlias | DeleteModel | RemoveDataset | Promote | RollBack
MANIFEST_LIMIT_BYTES = 2 * 2**20
LISTED_BYTES = 96 * 1024
"""Size of the models or jobs in one answer, as msgpack: in JSON they may be twice as long."""
PLACES_TOLD = 16
"""How many nodes with replicas a client is told. It sends inputs to each in turn, and soon asks again."""
ANSWERS_KEPT = 256
"""How many answers are kept to questions that can be carried out only once."""


@dataclass(frozen=True)
class Later:
    """An answer that takes time. Its work has begun, or begins when `answer` is awaited."""

    answer: Callable[[], Awaitable[Message]]


Stream = AsyncGenerator[Message, None]
"""Many answers, one after another. The code that reads them closes the stream."""


class OfMembers(Protocol):
    """Answers the questions about who belongs to a closed cluster."""

    async def answer(self, message: Message, caller: Caller) -> Message:
        """The answer to one of OF_MEMBERS, from a caller that may ask it. Raises a PotluckError if that is the answer."""
        ...


class Control:
    """Gives each question, from any transport, to the part that answers its message type."""

    def __init__(
        self,
        *,
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
        events: Events,
        members: OfMembers | None = None,
        may_get: Callable[[str, str], bool] = lambda identity, sha256: True,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`sync` returns when all journaled events are safe on the disk; it raises Unavailable. `members`: of a closed cluster.

        `may_get`: whether an identity may get a blob. Whoever gave a name to another's blob could get it from then on.
        """
        self._dispatcher = dispatcher
        self._registry = registry
        self._serving = serving
        self._membership = membership
        self._deletion = deletion
        self._packed = packed
        self._holders = holders
        self._store = store
        self._urls = urls
        self._sync = sync
        self._events = events
        self._members = members
        self._may_get = may_get
        self._clock = clock
        self._answered: dict[tuple[str, str], Message] = {}
        self._begun: dict[tuple[str, str], asyncio.Future[Message]] = {}
        """Answers of `members`: a second try would make another token, or find its name taken."""

    def answer(self, message: Message, caller: Caller = ANYBODY) -> Message | Later | Stream:
        """The answer to a question of `caller`. If it has a key or an identity and asks again with the same id, it gets the same answer.
        Lists come in pages: as much as fits into one message, and whether there is more.

        Raises a PotluckError if that is the answer: NotAllowed if the caller may not ask this, InvalidRequest if it is not a question,
        TimedOut if it came too late.
        """
        roles.check(caller, type(message))
        if caller.known and roles.changes(type(message)):
            log.info("asked %s", fields(caller=caller.identity, role=caller.role, type=type(message).__name__))
        now = self._clock()
        if deadline(message, now) < now:
            raise TimedOut(too_late(message, now, "the coordinator's"))
        if isinstance(message, FollowEvents):
            if not caller.key or not message.id:
                raise InvalidRequest("FollowEvents needs an id, and whoever asks a name: it is asked again")
            # A member may follow from several processes, and all of them count as one follower's.
            follower = (caller.identity, f"{caller.key} {message.id}") if caller.known else (caller.key, message.id)
            return self._events.follow(message.after, message.seconds, follower)
        asked = (caller.asks_as, message.id)
        if isinstance(message, OF_MEMBERS):
            return self._of_members(message, caller, asked)
        if not isinstance(message, ONCE) or not all(asked):
            return self._answer(message, caller, " ".join(asked) if all(asked) else "")
        # These can be carried out only once: a second try would find nothing to do.
        if asked not in self._answered:
            self._answered[asked] = self._answer_once(message, caller)
            if len(self._answered) > ANSWERS_KEPT:
                del self._answered[next(iter(self._answered))]
        return self._answered[asked]

    def _of_members(self, message: Message, caller: Caller, asked: tuple[str, str]) -> Later:
        if self._members is None:
            raise InvalidRequest(f"{type(message).__name__}: this cluster is open, and has no members and no tokens")
        begun = self._begun.get(asked) if all(asked) else None
        if begun is None:
            begun = asyncio.ensure_future(self._members.answer(message, caller))
            begun.add_done_callback(lambda done: self._settled(asked, done))
            if all(asked):
                self._begun[asked] = begun
                if len(self._begun) > ANSWERS_KEPT:
                    del self._begun[next(iter(self._begun))]
        kept = begun
        return Later(lambda: asyncio.shield(kept))

    def _settled(self, asked: tuple[str, str], answer: asyncio.Future[Message]) -> None:
        """An answer is there. One that is an error is not kept: trying again may help."""
        failed = answer.cancelled() or answer.exception() is not None
        if failed and self._begun.get(asked) is answer:
            del self._begun[asked]

    def _answer_once(self, message: Message, caller: Caller) -> Message:
        answer = self._answer(message, caller, "")
        assert isinstance(answer, Message)
        return answer

    def _answer(self, message: Message, caller: Caller, request_id: str) -> Message | Later:
        match message:
            case SubmitJob():
                # The same question asked twice (QoS 1, or a client that tries again) is one job.
                job = self._dispatcher.submit(message.job, request_id, caller.identity)
                if not _is_same(job.submitted.spec, message.job):
                    raise Conflict(
                        f"the id {message.id[:80]!r} was used for job {job.job_id}, which is another one: "
                        "submit each job with an id of its own"
                    )
                return Later(lambda: self._accepted(job.job_id))
            case Undeploy():
                return Later(lambda: self._undeploy(message.model))
            case CancelJob():
                return self._dispatcher.described(self._dispatcher.cancel(self._own(message.job_id, caller)))
            case StopTraining():
                return self._dispatcher.described(self._dispatcher.stop(self._own(message.job_id, caller)))
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
                return self._register(message, caller)
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
                return self._add_dataset(message, caller)
            case RemoveDataset():
                self._deletion.remove_dataset(message.name)
                return DatasetRemoved(name=message.name)
            case ListDeployments():
                return self._list_deployments(message.model, message.after)
            case FindReplicas():
                return self._find_replicas(message.model)
            case Promote():
                return DeploymentsListed(deployments=self._serving.promote(message.model))
            case ListEvents():
                return Later(lambda: self._events.listed(message.after, message.last))
            case RollBack():
                return DeploymentsListed(deployments=self._serving.roll_back(message.model))
            case _:
                raise InvalidRequest(
                    f"{type(message).__name__} is not a question to the coordinator: see docs/protocol.md"
                )

    def _own(self, job_id: str, caller: Caller) -> str:
        """The whole id of a job that the caller may end. Raises NotFound, InvalidRequest, and NotAllowed if it is another's."""
        job = self._dispatcher.job(job_id)
        if not caller.owns(job.submitted.owner):
            raise NotAllowed(
                f"job {job.job_id} is that of {job.submitted.owner or 'nobody who is known'}: it and operators may end it, "
                f"and {caller.identity} is a {caller.role}"
            )
        return job.job_id

    async def _accepted(self, job_id: str) -> Message:
        """The answer to a submitted job, given once a power cut cannot undo it."""
        await self._sync()
        return JobAccepted(job_id=job_id)

    async def _undeploy(self, model: str) -> Message:
        return Undeployed(deployments=await self._serving.undeploy(self._registry.version_of(model)))

    def _find_replicas(self, model: str) -> ReplicasFound:
        members = [self._membership.get(node_id) for node_id in self._serving.nodes_of(model)]
        there = [member for member in members if member is not None and member.http]
        told = random.sample(there, min(len(there), PLACES_TOLD))
        return ReplicasFound(replicas=tuple([ReplicaPlace(node_id=one.node_id, http=one.http) for one in told]))

    def _list_models(self, after: str) -> Message:
        listed, more = _page(self._registry.models(after))
        return ModelsListed(models=listed, more=more)

    def _list_deployments(self, model: str, after: str) -> DeploymentsListed:
        name, colon, _ = model.partition(":")
        found: Iterable[DeploymentInfo] = self._serving.deployments(name) if name else self._serving.deployments()
        if colon:
            meant = self._registry.version_of(model)
            found = (one for one in found if one.name == meant)
        deployments, more = _page(one for one in found if one.name > after)
        return DeploymentsListed(deployments=deployments, more=more)

    def _list_datasets(self, after: str) -> Message:
        living = federated.described(self._membership.data())
        found = ((one.name.startswith(NODE_DATA), one.name, one) for one in (*self._registry.datasets(), *living))
        last = (after.startswith(NODE_DATA), after)
        listed, more = _page(one for lives, name, one in found if (lives, name) > last)
        return DatasetsListed(datasets=listed, more=more)

    def _register(self, message: RegisterModel, caller: Caller) -> Message:
        self._need(message.model, "model", caller)
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

    def _add_dataset(self, message: AddDataset, caller: Caller) -> Message:
        self._need(message.manifest, "manifest", caller)
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
        missing = [ref.sha256 for ref in parts if not self._is_here(ref.sha256, caller)]
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

    def _is_here(self, sha256: str, caller: Caller) -> bool:
        """Whether the blob is here, as far as the caller may know."""
        return self._store.has(sha256) and (not caller.known or self._may_get(caller.identity, sha256))

    def _need(self, ref: BlobRef, what: str, caller: Caller) -> None:
        """Raises NotFound if the blob is not here, InvalidRequest if its size differs from the size in its reference."""
        if not self._is_here(ref.sha256, caller):
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
    """The first items, as many as fit into an answer, and whether there are more."""
    listed: list[P] = []
    size = 0
    for one in found:
        size += len(codec.pack(one))
        if listed and size > LISTED_BYTES:
            return tuple(listed), True
        listed.append(one)
    return tuple(listed), False


def _is_same(kept: AnyJobSpec, asked: AnyJobSpec) -> bool:
    """Whether a kept job is the one asked for. A kept job has the version in place of a name or alias, and the data for
    quantization."""
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
