"""All jobs, in memory as in the journal. A submit resolves names; the end of a job compacts its stream."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence

from msgspec.structs import replace

from coordinator.journal import FATAL, Journal
from coordinator.plans import labels
from coordinator.plans.events import (
    AnyEvent,
    AttemptEnded,
    AttemptFinished,
    AttemptLeased,
    JobFinished,
    JobSubmitted,
    MeasureAgain,
    RoundBroken,
    RoundPlanned,
    StoodStill,
    StrategyChosen,
)
from coordinator.plans.job import Attempt, Job
from coordinator.plans.labels import listed
from coordinator.plans.past import with_choices
from coordinator.plans.placement import NodeView
from coordinator.plans.strategies import strategy_for
from coordinator.plans.training import privacy
from coordinator.plans.training.scores import direction
from coordinator.registry import Registry
from potluck.blobs.store import BlobStore
from potluck.errors import CorruptBlob, InvalidRequest, NotFound, PotluckError
from potluck.logs import fields
from potluck.wire import codec
from potluck.wire.jobs import NODE_DATA, AnyJobSpec, Deploy, Evaluate, JobProgress, Predict, Train
from potluck.wire.questions import JobChanged, ModelInfo
from potluck.wire.values import BlobRef, DataFormat, Dataset, ImageOptions, ModelFormat
from potluck.wording import be, counted

log = logging.getLogger(__name__)

LOADED_KEPT = 16
"""Data sets of jobs in memory: equal ones are shared."""
JOBS_KEPT = 1000
"""How many ended jobs are remembered."""
JOBS_REPUBLISHED = 100
SOON = (
    AttemptLeased
    | AttemptFinished
    | AttemptEnded
    | StrategyChosen
    | RoundPlanned
    | MeasureAgain
    | RoundBroken
    | StoodStill
)
"""Events after which nothing is deleted: they are only written before a message tells of them."""


def meant(job_id: str, known: Collection[str]) -> str:
    """The full id: this one, or the only one that begins with it. Raises NotFound, and InvalidRequest where several do."""
    if job_id in known:
        return job_id
    found = [one for one in known if job_id and one.startswith(job_id)]
    if not found:
        raise NotFound(f"there is no job {job_id!r}: `potluck jobs` lists them")
    if len(found) > 1:
        raise InvalidRequest(
            f"{counted(len(found), 'job')} begin with {job_id!r}: {listed(found)}: write more of the id"
        )
    return found[0]


class JobStore:
    """Jobs by id, oldest first."""

    def __init__(
        self,
        journal: Journal,
        registry: Registry,
        store: BlobStore,
        urls: Callable[[], tuple[str, ...]],
        node_data: Callable[[str], Dataset],
        *,
        synchronous: bool = True,
    ) -> None:
        """`node_data` returns the data set of a name that lives on the nodes; it raises NotFound, InvalidRequest.

        `synchronous`: whether jobs may ask for synchronous training.
        """
        self._journal = journal
        self._registry = registry
        self._blobs = store
        self._loaded: dict[str, Dataset] = {}
        self._urls = urls
        self._node_data = node_data
        self._synchronous = synchronous
        self._requests: dict[str, str] = {}
        self._final: dict[str, JobProgress] = {}
        self._rounds: set[str] = set()
        """Blobs that are pinned because running training needs them."""
        self.jobs: dict[str, Job] = {}
        self.active: dict[str, None] = {}
        for stream in journal.streams("job/"):
            try:
                self._replay(stream)
            except FATAL:
                raise  # the journal is damaged: it would lose one job after the other
            except (PotluckError, ValueError) as error:
                log.error("job cannot be resumed %s", fields(stream=stream, reason=error))

    def resolve(self, spec: AnyJobSpec, request_id: str, job_id: str, now: float) -> JobSubmitted:
        """The job with its names looked up. Raises NotFound, InvalidRequest."""
        if isinstance(spec, Train) and spec.strategy == "sync" and not self._synchronous:
            raise InvalidRequest(
                "strategy 'sync' is refused in a closed cluster, because TensorFlow's own connections between the nodes are not protected: "
                "train with 'auto' or 'local'"
            )
        if isinstance(spec, Deploy):
            info = self._registry.model(spec.model)
            named = replace(spec, model=f"{info.name}:{info.version}")
            submitted = JobSubmitted(
                at=now, job_id=job_id, request_id=request_id, spec=named, model=info.model, model_format=info.format
            )
            return submitted if spec.quantize == "none" else self._quantized(submitted, named, info)
        model, image, model_format = self._model(spec.model)
        known = self._registry.model(spec.model).classes if isinstance(spec.model, str) else ()
        if isinstance(spec, Predict) and spec.dataset.startswith(NODE_DATA):
            raise InvalidRequest(
                f"{spec.dataset} stays on its nodes, so predictions for it would have to stay there too: evaluate it instead"
            )
        dataset = self._dataset(spec.dataset)
        if isinstance(spec, Predict | Evaluate) and isinstance(spec.model, str):
            _check_rate(self._registry.model(spec.model), dataset)
        if isinstance(spec, Evaluate) and isinstance(spec.model, str):
            dataset = labels.as_known(dataset, self._registry.model(spec.model))
        validation = None
        if isinstance(spec, Train):
            if model_format not in ("keras", "h5"):
                raise InvalidRequest(
                    f"model {spec.model} is a graph ({model_format}), which cannot be trained: train a Keras model"
                )
            self._check_training(spec, dataset)
        if isinstance(spec, Train) and spec.validation is not None:
            held_out = self._dataset(spec.validation)
            _check_alike(spec, dataset.format, held_out.format)
            validation = self._manifest(labels.as_trained_on(held_out, dataset))
        return JobSubmitted(
            at=now,
            job_id=job_id,
            request_id=request_id,
            spec=spec,
            model=model,
            image=_image(spec.image, image),
            dataset=self._manifest(dataset),
            validation=validation,
            model_format=model_format,
            classes=known,
        )

    def _quantized(self, submitted: JobSubmitted, spec: Deploy, info: ModelInfo) -> JobSubmitted:
        """A deployment of the model that is to be made from a model. Raises NotFound, InvalidRequest."""
        if info.format == "tflite":
            raise InvalidRequest(
                f"{spec.model} is a LiteRT model already: deploy it as it is, or quantize the model that it was made from"
            )
        if info.signature is not None and any(one.datatype == "BYTES" for one in info.signature.inputs):
            raise InvalidRequest(
                f"{spec.model} takes text, which a LiteRT model cannot: deploy it as it is, or make a model without text layers"
            )
        trained = self.jobs.get(info.job_id)
        learnt = trained.submitted.spec.dataset if trained and isinstance(trained.submitted.spec, Train) else None
        calibration = spec.calibration or learnt
        if calibration is None:
            raise InvalidRequest(
                f"the training data of {spec.model} are unknown: name a data set like its usual inputs (calibration, --calibration)"
            )
        if calibration.startswith(NODE_DATA):
            raise InvalidRequest(
                f"{calibration} stays on its nodes: name another data set to calibrate with (--calibration)"
            )
        data = self._learnt_from(trained) if trained and not spec.calibration else self._registry.dataset(calibration)
        measured = self._registry.dataset(spec.evaluation) if spec.evaluation else data
        for dataset in (data, measured):
            _check_rate(info, dataset)
        return replace(
            submitted,
            spec=replace(spec, calibration=calibration, evaluation=spec.evaluation or calibration),
            image=info.image,
            dataset=self._manifest(labels.as_known(measured, info)),
            validation=self._manifest(data),
        )

    def _learnt_from(self, trained: Job) -> Dataset:
        """The data set of a training job: by its name, or, while its blobs are there, as the job had it. Raises NotFound."""
        name = getattr(trained.submitted.spec, "dataset", "")
        try:
            return self._registry.dataset(name)
        except NotFound:
            found = self._load(trained.submitted.dataset)
            if found is not None and all(self._blobs.has(shard.blob.sha256) for shard in found.shards):
                return found
        raise NotFound(
            f"data set {name!r}, which the model was trained on, is gone (data packed for a job are removed with it): name a data set "
            "like the usual inputs (calibration, --calibration)"
        )

    def add(self, submitted: JobSubmitted) -> Job:
        """Journal a new job."""
        job = self._make(submitted)
        self._journal.append(f"job/{job.job_id}", submitted)
        self._insert(job)
        self.active[job.job_id] = None
        return job

    def by_request(self, request_id: str) -> Job | None:
        return self.jobs.get(self._requests.get(request_id, "")) if request_id else None

    def results(self) -> set[str]:
        """Blobs of models and keys in remembered results: clients may still ask for them."""
        ended = [job.ended for job in self.jobs.values() if job.ended is not None]
        return {ref.sha256 for one in ended for ref in (one.model, one.keys) if ref is not None}

    def kept(self) -> set[str]:
        """Blobs of training that a job needs, or may be resumed from. Jobs with the same beginning hold the same blobs."""
        found = self._rested_on()
        ended = [job.ended.checkpoint for job in self.jobs.values() if job.ended is not None]
        return found | {ref.sha256 for ref in ended if ref is not None}

    def pin_rounds(self) -> None:
        """Keep the blobs that running training needs, even if the store needs room."""
        wanted = self._rested_on()
        for sha256 in wanted - self._rounds:
            self._blobs.pin(sha256)
        for sha256 in self._rounds - wanted:
            self._blobs.unpin(sha256)
        self._rounds = wanted

    def record(self, job: Job, event: AnyEvent) -> None:
        """Journal an event, and then apply it.

        Outcomes of attempts, and choices, are written together with everything else of this turn of the loop, before a message tells of them.
        """
        append = self._journal.append_soon if isinstance(event, SOON) else self._journal.append
        append(f"job/{job.job_id}", event)
        job.apply(event)

    def flush(self) -> None:
        """Write the events that are not written yet. Raises Unavailable."""
        self._journal.flush()

    async def sync(self) -> None:
        """Return when a power cut can no longer undo the record. Raises Unavailable."""
        await self._journal.sync()

    def ended(self, job: Job, final: JobProgress) -> list[str]:
        """Shorten the stream of a job that has ended; returns ids of old jobs that are no longer remembered."""
        assert job.ended is not None
        self.active.pop(job.job_id, None)
        self._final[job.job_id] = final
        self._journal.snapshot(
            f"job/{job.job_id}", [job.submitted, JobFinished(at=job.ended.ended_at, result=job.ended)]
        )
        for sha256 in self._pinned(job):
            self._blobs.unpin(sha256)
        job.strategy = job.dataset = None  # everything that is still asked about it is in its result
        over = [one for one in self.jobs.values() if one.ended is not None]
        over.sort(key=lambda one: one.ended.ended_at if one.ended is not None else 0.0)
        old = [one.job_id for one in over[:-JOBS_KEPT]]
        for job_id in old:
            forgotten = self.jobs.pop(job_id)
            self._requests.pop(forgotten.submitted.request_id, None)
            self._final.pop(job_id, None)
            self._journal.snapshot(f"job/{job_id}", [])
        return old

    def recent(self) -> list[Job]:
        """The jobs whose state is worth publishing again."""
        ended = [job for job in self.jobs.values() if not job.active][-JOBS_REPUBLISHED:]
        return [*ended, *(self.jobs[job_id] for job_id in self.active)]

    def described(
        self,
        job: Job,
        running: dict[str, tuple[Attempt, int, dict[str, float]]],
        nodes: Sequence[NodeView] = (),
        *,
        waiting: str,
    ) -> JobChanged:
        """`nodes`: nodes that can compute now. `waiting`: what the job waits for; "" if it does not wait."""
        progress = self._final.get(job.job_id) or JobProgress()
        if job.active and job.strategy is not None:
            progress = replace(job.strategy.progress(running, nodes), image=job.image)
            if job.failings.refused:
                reasons = {node_id: error.message for node_id, error in job.failings.refused.items()}
                progress = replace(progress, quarantined=progress.quarantined | reasons)
        if job.active and waiting:
            progress = replace(progress, message=waiting)
        return job.changed(progress)

    def _rested_on(self) -> set[str]:
        """The blobs of training that is under way."""
        found = [self.jobs[job_id].training for job_id in self.active]
        return {sha256 for training in found if training is not None for sha256 in training.kept()}

    def _replay(self, stream: str) -> None:
        job: Job | None = None
        events: Iterator[AnyEvent] = self._journal.replay(stream, AnyEvent)  # type: ignore[arg-type]
        for event in with_choices(events):
            if isinstance(event, JobSubmitted):
                job = self._make(event)
            elif job is not None:
                job.apply(event)
        if job is None:
            return
        if job.active:
            self.active[job.job_id] = None
        else:
            job.strategy = job.dataset = None
        self._insert(job)

    def _make(self, submitted: JobSubmitted) -> Job:
        # Ended jobs need no strategy. Whether this job has ended is known only later, so its data sets may be gone.
        dataset = self._load(submitted.dataset)
        strategy = None
        if dataset is not None or submitted.dataset is None:
            strategy = strategy_for(submitted, dataset, self._load(submitted.validation))
        return Job(submitted=submitted, strategy=strategy, dataset=dataset)

    def _insert(self, job: Job) -> None:
        self.jobs[job.job_id] = job
        if job.submitted.request_id:
            self._requests[job.submitted.request_id] = job.job_id
        if job.active:
            for sha256 in self._pinned(job):
                self._blobs.pin(sha256)

    def _pinned(self, job: Job) -> list[str]:
        """Blobs that must stay while the job runs, even if the names of its data sets are given to others."""
        submitted = job.submitted
        begun = submitted.spec.weights if isinstance(submitted.spec, Train) else None
        refs = [ref for ref in (submitted.model, submitted.dataset, submitted.validation, begun) if ref is not None]
        datasets = [one for one in (job.dataset, self._load(submitted.validation)) if one is not None]
        return [ref.sha256 for ref in refs] + [shard.blob.sha256 for one in datasets for shard in one.shards]

    def _check_training(self, spec: Train, dataset: Dataset) -> None:
        if spec.initial_epoch >= spec.epochs:
            raise InvalidRequest(
                f"{counted(spec.initial_epoch, 'epoch')} {be(spec.initial_epoch)} trained already (initial_epoch), and epochs={spec.epochs} counts all epochs: ask for more"
            )
        if spec.patience is not None and not spec.monitor:
            raise InvalidRequest("patience needs a metric to monitor, such as val_loss")
        if spec.monitor and direction(spec) is None:
            raise InvalidRequest(
                f"a small or a large {spec.monitor!r} may be better, and its name does not tell: "
                "say monitor_mode 'min' or 'max'"
            )
        if spec.monitor.startswith("val_") and spec.validation is None:
            raise InvalidRequest(f"monitor {spec.monitor!r} needs validation data")
        _check_private(spec, dataset)
        if spec.deterministic and (spec.strategy == "sync" or spec.dataset.startswith(NODE_DATA)):
            what = "strategy 'sync'" if spec.strategy == "sync" else spec.dataset
            raise InvalidRequest(
                f"deterministic needs rounds over data that any node may use, but {what} is not that: leave one of them out"
            )
        classes = dataset.format.classes
        unknown = [label for label in spec.class_weight if classes and label not in classes]
        if unknown:
            raise InvalidRequest(f"class_weight names {listed(unknown)}, but the classes are {listed(classes)}")
        if spec.weights is not None and not self._blobs.has(spec.weights.sha256):
            raise NotFound(f"the checkpoint {spec.weights.sha256[:12]} is not in the coordinator's store any more")

    def _dataset(self, name: str) -> Dataset:
        if name.startswith(NODE_DATA):
            return self._node_data(name.removeprefix(NODE_DATA))
        return self._registry.dataset(name)

    def _model(self, model: str | BlobRef) -> tuple[BlobRef, ImageOptions | None, ModelFormat]:
        if isinstance(model, str):
            info = self._registry.model(model)
            return info.model, info.image, info.format
        if not self._blobs.has(model.sha256):
            raise NotFound(
                f"the model blob {model.sha256[:12]} is not in the coordinator's store: "
                f"PUT it to {(self._urls() or ('<coordinator>',))[0]}/blobs/{model.sha256} first"
            )
        if (size := self._blobs.size(model.sha256)) != model.size:
            raise InvalidRequest(f"the model blob {model.sha256[:12]} has {size} bytes, not {model.size}")
        return replace(model, holders=()), None, "keras"

    def _manifest(self, dataset: Dataset) -> BlobRef:
        """The part of a data set that a job needs: without the names of skipped items."""
        return self._blobs.put_bytes(codec.pack(replace(dataset, skipped=(), remarks=())))

    def _load(self, manifest: BlobRef | None) -> Dataset | None:
        if manifest is None or not self._blobs.has(manifest.sha256):
            return None
        if (found := self._loaded.pop(manifest.sha256, None)) is None:
            try:
                found = codec.unpack(self._blobs.read(manifest.sha256), Dataset)
            except (NotFound, CorruptBlob):  # gone just now
                return None
        self._loaded[manifest.sha256] = found  # the last one that was asked for
        while len(self._loaded) > LOADED_KEPT:
            del self._loaded[next(iter(self._loaded))]
        return found


def _image(asked: ImageOptions | None, registered: ImageOptions | None) -> ImageOptions | None:
    """How images become a model's input. Each field that is asked for goes before the one registered with the model."""
    if asked is None or registered is None or asked.scale is not None:
        return asked or registered
    return replace(asked, scale=registered.scale)


def _check_private(spec: Train, dataset: Dataset) -> None:
    """Checks options that are only for data that live on nodes, or not for them. Raises InvalidRequest."""
    stays, rules = spec.dataset.startswith(NODE_DATA), spec.privacy
    if stays and spec.strategy == "sync":
        raise InvalidRequest(
            f"{spec.dataset} stays on its nodes, but strategy 'sync' gives every node all data: use 'local' or 'auto'"
        )
    if rules is None:
        return
    if not stays:
        raise InvalidRequest(
            f"l2_norm_clip and noise_multiplier are for data that live on nodes, but {spec.dataset!r} does not: "
            "name it under [data] in the nodes' settings and train on node:NAME, or leave them out"
        )
    if not rules.noise_multiplier:
        return
    privacy.check()
    if (spec.validation or "").startswith(NODE_DATA):
        raise InvalidRequest(
            f"validation on {spec.validation} would reveal data that noise must hide: give a data set that is not secret"
        )
    if spec.monitor and not spec.monitor.startswith("val_"):
        raise InvalidRequest(
            f"monitor {spec.monitor!r}: with noise there are no training metrics: monitor a val_ metric"
        )
    if rules.unit == "example" and rules.delta * dataset.count >= 1:
        raise InvalidRequest(
            f"delta {rules.delta:g} protects nothing for {counted(dataset.count, 'item')}: it must be well below {1 / dataset.count:.1g}"
        )


def _check_rate(model: ModelInfo, dataset: Dataset) -> None:
    """Recordings at another rate are different sounds to a model. Raises InvalidRequest."""
    if model.rate and dataset.format.rate not in (0, model.rate):
        raise InvalidRequest(
            f"model {model.name}:{model.version} was trained on {model.rate} samples a second, but data set "
            f"{dataset.name!r} has {dataset.format.rate}: resample the recordings"
        )


def _check_alike(spec: Train, data: DataFormat, held_out: DataFormat) -> None:
    """Checks that training and validation data fit together, before a whole epoch is trained. Raises InvalidRequest."""
    if held_out.kind != data.kind:
        raise InvalidRequest(
            f"data set {spec.dataset!r} holds {data.kind}, but {spec.validation!r} holds {held_out.kind}: a model takes only one of them"
        )
    if held_out.rate != data.rate:
        raise InvalidRequest(
            f"data set {spec.dataset!r} has {data.rate} samples a second, but {spec.validation!r} has {held_out.rate}: resample one of them"
        )
    alone = len(held_out.inputs) == len(data.inputs) == 1  # the name of a single input does not matter: X or x
    if sorted(held_out.inputs) != sorted(data.inputs) and not alone:
        raise InvalidRequest(
            f"data set {spec.dataset!r} has the inputs {', '.join(data.inputs)}, but {spec.validation!r} has "
            f"{', '.join(held_out.inputs)}: validation data need the same"
        )
    if sorted(held_out.targets) != sorted(data.targets):
        raise InvalidRequest(
            f"data set {spec.dataset!r} has the targets {', '.join(data.targets) or data.target or 'none'}, but "
            f"{spec.validation!r} has {', '.join(held_out.targets) or held_out.target or 'none'}: validation data need the same"
        )
    if data.target and not held_out.target:
        raise InvalidRequest(f"data set {spec.validation!r} has no target to compare with: name it with --target")
