"""The tasks of shards: train a round, evaluate and predict slices, export a model."""

from __future__ import annotations

import gc
import hashlib
import math
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace

from node.engine import keras_models, pixels, privacy, saving, state
from node.engine.converting import convert
from node.engine.evaluating import evaluate
from node.engine.gate import Gate
from node.engine.graded import Graded, grade
from node.engine.inputs import source_for
from node.engine.loaded import Loaded
from node.engine.memory import shortage
from node.engine.replicas import Load
from node.engine.shards import ShardPart
from node.engine.synchronous import GroupMember
from node.engine.training import TrainingSession
from potluck.errors import Cancelled, Diverged, PeerLost
from potluck.weights import updates
from potluck.wire.tasks import (
    AnyTask,
    AnyTaskResult,
    ConvertResult,
    ConvertTask,
    EvaluateResult,
    EvaluateTask,
    ExportResult,
    ExportTask,
    PredictResult,
    PredictTask,
    SyncResult,
    SyncTask,
    TrainResult,
    TrainTask,
    WarmUpResult,
    WarmUpTask,
)
from potluck.wire.tensors import from_numpy
from potluck.wire.values import BlobRef, DataSlice, ModelFormat, Step

Progress = Callable[[int, dict[str, float]], None]
Paths = dict[str, Path]
PROGRESS_SECONDS = 1.0
MODELS_KEPT = 2
CONVERT_BATCH = 32
SESSIONS_KEPT = 3
"""Training jobs whose optimizer and data stay in memory. The job that has been unused for longest is dropped."""


class Tasks:
    """Runs one task at a time. Models and training sessions of the last tasks are kept, so that the next task starts at once."""

    def __init__(self, scratch: Path, load: Load) -> None:
        """`load` loads a model of any runtime, for grading."""
        self._scratch = scratch
        self.gate = Gate()
        self._load = load
        self._sessions: OrderedDict[str, TrainingSession] = OrderedDict()
        self._models: OrderedDict[tuple[str, bool], Loaded] = OrderedDict()
        self._graded_models: OrderedDict[str, Graded] = OrderedDict()
        self._ahead: TrainingSession | None = None
        self._member: GroupMember | None = None
        self._formation = ""
        self._checkpoint: tuple[BlobRef, Path] | None = None
        """The group's last checkpoint, and its file."""

    def run(
        self, job_id: str, task: AnyTask, files: Mapping[str, str], cancelled: threading.Event, progress: Progress
    ) -> AnyTaskResult:
        """Raises InvalidModel, InvalidData, InvalidRequest, OutOfMemory, and Cancelled soon after `cancelled` is set."""
        if cancelled.is_set():
            raise Cancelled("the attempt was withdrawn")
        try:
            return self._run(job_id, task, files, cancelled, progress)
        except Exception as error:
            short = shortage(error)
            if short is None:
                raise
            self._make_room()
            raise short from error

    def _run(
        self, job_id: str, task: AnyTask, files: Mapping[str, str], cancelled: threading.Event, progress: Progress
    ) -> AnyTaskResult:
        paths = {sha256: Path(path) for sha256, path in files.items()}
        match task:
            case TrainTask():
                return self._train(job_id, task, paths, cancelled, progress)
            case EvaluateTask():
                return self._evaluate(task, paths, _Reporter(cancelled, progress, self.gate))
            case PredictTask():
                return self._predict(task, paths, _Reporter(cancelled, progress, self.gate))
            case ExportTask():
                return self._export(task, paths)
            case ConvertTask():
                return self._convert(task, paths, _Reporter(cancelled, progress, self.gate))
            case SyncTask():
                return self._sync(job_id, task, paths, cancelled, progress)
            case WarmUpTask():
                return self._warm_up(job_id, task.task, paths, cancelled)

    def train_ahead(self, until: Callable[[], bool]) -> None:
        """After a round, while its result is on its way, go on with the next round until there is other work."""
        session, self._ahead = self._ahead, None
        if session is not None:
            session.train_ahead(lambda: until() or self.gate.shut)

    def forget(self, job_id: str) -> None:
        """Drop what is kept for a job."""
        self._close(job_id)
        if self._formation.startswith(f"{job_id} "):
            self._member = None
        self._models.clear()
        self._graded_models.clear()
        gc.collect()  # Keras models are full of cycles

    def _make_room(self) -> None:
        """Drop what is kept of all jobs, so that a task that did not fit may fit at the next try."""
        for job_id in list(self._sessions):
            self._close(job_id)
        self._ahead = self._member = None
        self._models.clear()
        self._graded_models.clear()
        gc.collect()

    def _close(self, job_id: str) -> None:
        session = self._sessions.pop(job_id, None)
        if session is not None:
            session.close()

    def _train(
        self, job_id: str, task: TrainTask, paths: Paths, cancelled: threading.Event, progress: Progress
    ) -> TrainResult:
        # Without weights, training begins at those of the model's file, not at those of an earlier attempt.
        if task.weights is None and job_id in self._sessions and self._sessions[job_id].begun:
            self._close(job_id)
        session = self._session(job_id, task, paths)
        if task.weights is not None:
            base = task.weights
            session.begin(paths[base.sha256])
        else:
            base = self._weights_now(session, paths)
        parts = self._use_data(session, task, paths)
        session.follow(task.seen)
        seconds = math.inf if task.parts else task.seconds
        outcome = session.train(task.samples, seconds, cancelled, progress, overlap=task.overlap, gate=self.gate)
        target = self._scratch / "update.new"
        after = privacy.protected(paths[base.sha256], outcome.weights, task.privacy, session.roles)
        updates.write_update(target, paths[base.sha256], after, task.compression, session.roles)
        self._ahead = session if task.overlap else None
        return TrainResult(
            base=base,
            update=self._blob(target),
            samples=outcome.samples,
            steps=outcome.steps,
            metrics=outcome.metrics,
            items=sum(part.count for part in parts),
            seconds=outcome.seconds,
            seconds_ahead=outcome.seconds_ahead,
            image=session.image,
            trained_bytes=state.trained_bytes(session.model),
            momentum=state.momentum(session.model),
        )

    def _warm_up(self, job_id: str, task: TrainTask, paths: Paths, cancelled: threading.Event) -> WarmUpResult:
        started = time.perf_counter()
        session = self._session(job_id, task, paths)
        base = paths[self._weights_now(session, paths).sha256]
        self._use_data(session, task, paths)

        def beside() -> None:
            """Do what a round does besides its steps."""
            after = keras_models.weights_of(session.model)
            with suppress(Diverged):  # training will fail in the same way, and report more
                updates.write_update(self._scratch / "update.new", base, after, task.compression)
            after.clear()  # or they would be in memory twice
            keras_models.set_weights(session.model, base)

        try:
            rate, beside_seconds = session.rehearse(cancelled, beside)
        finally:
            for path in (self._scratch / "update.new", base):
                path.unlink(missing_ok=True)
        seconds = time.perf_counter() - started
        return WarmUpResult(rate=rate, beside_seconds=beside_seconds, seconds=seconds, image=session.image)

    def _session(self, job_id: str, task: TrainTask, paths: Paths) -> TrainingSession:
        """The session of the job. It is made if there is none."""
        session = self._sessions.get(job_id)
        if session is None:
            model = keras_models.load_model(paths[task.model.sha256], self._scratch, compiled=True)
            keras_models.need_trainable(model)
            session = self._sessions[job_id] = TrainingSession(model, seed=task.seed)
            while len(self._sessions) > SESSIONS_KEPT:
                self._close(next(iter(self._sessions)))
        self._sessions.move_to_end(job_id)
        return session

    def _weights_now(self, session: TrainingSession, paths: Paths) -> BlobRef:
        """Write the model's present weights to a file, and add its path to `paths`."""
        target = self._scratch / "weights.new"
        keras_models.save_weights(session.model, target)
        found = self._blob(target)
        paths[found.sha256] = self._scratch / found.sha256
        return found

    def _use_data(self, session: TrainingSession, task: TrainTask, paths: Paths) -> list[ShardPart]:
        parts = [ShardPart(paths[shard.blob.sha256], 0, shard.count) for shard in task.data]
        session.use_data(task, parts)
        if task.parts:
            session.begin_anew(task.seed, task.round, task.part)
        elif task.node_data is not None:
            # Moments remember the direction of this node's data. With the outer momentum, it would count twice.
            session.forget_moments()
        return parts

    def _sync(
        self, job_id: str, task: SyncTask, paths: Paths, cancelled: threading.Event, progress: Progress
    ) -> SyncResult:
        formation = f"{job_id} {task.formation}"
        if task.begins:
            self._close(job_id)  # another session will train: both would be in memory
            self._member = GroupMember(task, paths, self._scratch)
            self._formation = formation
            self._checkpoint = None
            if task.weights is not None and task.rank == 0:
                self._keep_checkpoint(task.weights, paths[task.weights.sha256])
        if self._member is None or self._formation != formation:
            raise PeerLost("this engine was started anew, and is no member of the group any more")
        member = self._member
        seconds, metrics = member.train(task, cancelled, progress, self.gate)
        saved: list[BlobRef] = []
        step: Step | None = None
        if task.rank == 0:
            files = self._scratch / "weights.new", self._scratch / "optimizer.new"
            member.save(*files)
            step = self._step(member)
            saved = [self._blob(path) for path in files]
            self._keep_checkpoint(saved[0], self._scratch / saved[0].sha256)
        return SyncResult(
            samples=task.steps * task.batches[task.rank],
            steps=task.steps,
            metrics=metrics,
            rate=member.rate,
            weights=saved[0] if saved else None,
            optimizer=saved[1] if saved else None,
            reduced_bytes=member.reduced_bytes,
            step=step,
            seconds=seconds,
            image=member.image,
        )

    def _keep_checkpoint(self, ref: BlobRef, path: Path) -> None:
        """Keep the file under another name: the parent takes the file away."""
        kept = self._scratch / "weights.kept"
        kept.unlink(missing_ok=True)
        try:
            kept.hardlink_to(path)
        except OSError:  # another disk, or one without hard links
            shutil.copyfile(path, kept)
        self._checkpoint = ref, kept

    def _step(self, member: GroupMember) -> Step | None:
        """The update from the last checkpoint to the member's weights, if it is less than half of their size."""
        if self._checkpoint is None:
            return None
        base, path = self._checkpoint
        if state.trained_bytes(member.model) >= base.size / 2:
            return None
        target, values = self._scratch / "update.new", keras_models.weights_of(member.model)
        updates.write_update(target, path, values, "none", ["value"] * len(values))
        return Step(base=base, update=self._blob(target))

    def apply_step(self, before: Path, update: Path) -> BlobRef:
        """Apply an update to weights. Returns the file of the result. Raises InvalidModel."""
        target = self._scratch / "weights.new"
        updates.apply_update(before, update, target)
        return self._blob(target)

    def _evaluate(self, task: EvaluateTask, paths: Paths, reporter: _Reporter) -> EvaluateResult:
        if task.by_outputs or _is_graph(task.model_format):
            return self._grade(task, paths, reporter)
        loaded = self._loaded(paths[task.model.sha256], compiled=True)
        if not keras_models.has_loss(loaded.model):
            return self._grade(task, paths, reporter)
        wanted = task.weights.sha256 if task.weights is not None else ""
        if loaded.weights and not wanted:  # its own weights were replaced, and are only in its file
            del self._models[task.model.sha256, True]
            loaded = self._loaded(paths[task.model.sha256], compiled=True)
        if loaded.weights != wanted:
            keras_models.set_weights(loaded.model, paths[wanted])
            loaded.weights = wanted
        source = source_for(loaded.model, task.format, task.image)
        started = time.perf_counter()
        result = evaluate(loaded, source, _parts(task.slices, paths), task.batch_size, reporter.step)
        if task.states:
            result = EvaluateResult(count=0, values=loaded.values_of(task.states))
        elif task.node_data is not None:
            # Only means leave a node: counts by threshold would tell about single items.
            result = replace(result, states={}, values={})
        return replace(result, seconds=time.perf_counter() - started, image=source.image)

    def _grade(self, task: EvaluateTask, paths: Paths, reporter: _Reporter) -> EvaluateResult:
        """Score a model by its outputs alone."""
        model = self._graded(paths[task.model.sha256], task.model_format)
        source = source_for(model, task.format, task.image)
        started = time.perf_counter()
        result = grade(model, source, _parts(task.slices, paths), task.batch_size, reporter.step)
        return replace(result, seconds=time.perf_counter() - started, image=source.image)

    def _predict(self, task: PredictTask, paths: Paths, reporter: _Reporter) -> PredictResult:
        path = paths[task.model.sha256]
        loaded: Loaded | Graded
        if _is_graph(task.model_format):
            loaded = self._graded(path, task.model_format)
            model: Any = loaded
        else:
            loaded = self._loaded(path, compiled=False)
            model = loaded.model
        source = source_for(model, task.format, task.image)
        specs = keras_models.signature(model).outputs
        started, count = time.perf_counter(), 0
        found: list[list[Any]] = [[] for _ in specs]
        for batch in source.batches(_parts(task.slices, paths), task.batch_size):
            for kept, output in zip(found, loaded.predict(batch), strict=True):
                kept.append(output)
            count += len(batch[0])
            reporter.step(count)
        outputs = tuple(
            from_numpy(spec.name, np.concatenate(kept)) for spec, kept in zip(specs, found, strict=True) if kept
        )
        seconds = time.perf_counter() - started
        return PredictResult(count=count, outputs=outputs, seconds=seconds, image=source.image)

    def _export(self, task: ExportTask, paths: Paths) -> ExportResult:
        started = time.perf_counter()
        model = keras_models.load_model(paths[task.model.sha256], self._scratch, compiled=True)
        keras_models.set_weights(model, paths[task.weights.sha256])
        if model.optimizer is not None:
            # Loading gave the optimizer a state of zeros, twice the model's size for Adam. The file needs only its settings.
            model.optimizer = type(model.optimizer).from_config(model.optimizer.get_config())
        target = self._scratch / "export.keras"
        saving.save(model, target)
        return ExportResult(
            model=self._blob(target), signature=pixels.described(model), seconds=time.perf_counter() - started
        )

    def _convert(self, task: ConvertTask, paths: Paths, reporter: _Reporter) -> ConvertResult:
        started = time.perf_counter()
        path = paths[task.model.sha256]
        model = self._graded(path, task.model_format)
        source = source_for(model, task.format, task.image)
        names = [spec.name for spec in model.signature.inputs]
        reporter.step(0)
        batches = source.batches(_parts(task.slices, paths), CONVERT_BATCH)
        target = self._scratch / "model.tflite"
        convert(path, task.model_format, self._scratch, names, batches, target, lambda: reporter.step(0))
        return ConvertResult(model=self._blob(target), seconds=time.perf_counter() - started, image=source.image)

    def _graded(self, path: Path, model_format: ModelFormat) -> Graded:
        found = self._graded_models.get(path.name)
        if found is None:
            found = Graded(self._load(model_format, path))
            self._graded_models[path.name] = found
            while len(self._graded_models) > MODELS_KEPT:
                self._graded_models.popitem(last=False)
        self._graded_models.move_to_end(path.name)
        return found

    def _loaded(self, path: Path, *, compiled: bool) -> Loaded:
        key = (path.name, compiled)
        found = self._models.get(key)
        if found is None:
            found = self._models[key] = Loaded(keras_models.load_model(path, self._scratch, compiled=compiled))
            while len(self._models) > MODELS_KEPT:
                self._models.popitem(last=False)
        self._models.move_to_end(key)
        return found

    def _blob(self, path: Path) -> BlobRef:
        """Rename a file in the scratch folder to its hash: the parent takes it from there."""
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        size = path.stat().st_size
        path.replace(self._scratch / sha256)
        return BlobRef(sha256=sha256, size=size)


class _Reporter:
    """Reports progress at the first step and then about once a second. Waits at the gate, and ends a cancelled task."""

    def __init__(self, cancelled: threading.Event, progress: Progress, gate: Gate) -> None:
        self._cancelled = cancelled
        self._progress = progress
        self._gate = gate
        self._told_at = float("-inf")

    def step(self, done: int) -> None:
        self._gate.wait(self._cancelled.is_set)
        if self._cancelled.is_set():
            raise Cancelled("the attempt was withdrawn")
        now = time.perf_counter()
        if now - self._told_at >= PROGRESS_SECONDS:
            self._told_at = now
            self._progress(done, {})


def _is_graph(model_format: ModelFormat) -> bool:
    return model_format in ("savedmodel", "tflite")


def _parts(slices: Sequence[DataSlice], paths: Paths) -> list[ShardPart]:
    return [ShardPart(paths[piece.blob.sha256], piece.start, piece.stop) for piece in slices]
