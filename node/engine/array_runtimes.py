"""The runtimes whose models are functions of batches of arrays: TensorFlow and LiteRT."""

from __future__ import annotations

import importlib.metadata
import mmap
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from msgspec.structs import replace

from node.engine import frames
from node.engine.answering import answer
from node.engine.replicas import LoadedReplicas, Model
from node.engine.runtimes import RuntimeInfo, Send, Work
from node.engine.turns import Turns
from potluck.errors import TimedOut
from potluck.wire.values import BlobRef, ModelFormat, Signature, Tensor

BATCHES_LIMIT = 256
"""Batches that may wait for a runtime. A node lets this many wait on all its engines together, so more is a fault."""


class ArrayRuntime(ABC):
    """A `Runtime` that computes one batch after the other, in order of arrival: models need not be thread-safe."""

    name: str
    title: str
    extra: str
    formats: tuple[ModelFormat, ...]

    def __init__(self) -> None:
        self._replicas = LoadedReplicas(self.model)
        self._turns = Turns(BATCHES_LIMIT)

    @abstractmethod
    def installed(self) -> bool:
        """See `Runtime`."""

    @abstractmethod
    def start(self) -> RuntimeInfo:
        """See `Runtime`."""

    @abstractmethod
    def model(self, model_format: ModelFormat, path: Path) -> Model:
        """Load a model, for a replica or for a task. Raises InvalidModel, CodeNotAllowed."""

    def load(self, asked: frames.LoadReplica) -> tuple[Signature, int, int]:
        return self._replicas.load(
            asked.replica_id, asked.format, Path(asked.path), asked.warm_rows, asked.warm_seconds, asked.pixel_scale
        )

    def unload(self, replica_id: str) -> None:
        self._replicas.unload(replica_id)

    def take(self, batch: frames.RunBatch, send: Send) -> Work | None:
        return self._turns.add(batch.number, lambda: answer(send, batch.number, lambda: self._run(batch)))

    def cancel(self, number: int) -> bool:
        return self._turns.withdraw(number)

    def _run(self, batch: frames.RunBatch) -> frames.BatchRun:
        if batch.expires and time.time() > batch.expires:
            raise TimedOut("the batch's time was up before its turn came")
        started = time.perf_counter()
        requests = batch.requests
        if batch.files:
            requests = tuple([tuple([_mapped(tensor, batch.files) for tensor in request]) for request in requests])
        outcomes = self._replicas.infer(batch.replica_id, requests)
        return frames.BatchRun(number=batch.number, outcomes=outcomes, seconds=time.perf_counter() - started)


class TensorFlow(ArrayRuntime):
    """Keras models and SavedModels. `allowed`: modules of users whose code models may run."""

    name = "tensorflow"
    title = "TensorFlow"
    extra = "engine"
    formats: tuple[ModelFormat, ...] = ("keras", "h5", "savedmodel")

    def __init__(self, scratch: Path, threads: int, allowed: Sequence[str] = ()) -> None:
        super().__init__()
        self._scratch = scratch
        self._threads = threads
        self._allowed = allowed

    def installed(self) -> bool:
        return find_spec("tensorflow") is not None and find_spec("keras") is not None

    def start(self) -> RuntimeInfo:
        """Takes seconds. Limits threads, and lets TensorFlow's memory on GPUs grow as needed."""
        with left_out("matplotlib", "pandas", "sklearn"):
            import keras
            import tensorflow as tf

            from node.engine import code

        tf.config.threading.set_intra_op_parallelism_threads(self._threads)
        tf.config.threading.set_inter_op_parallelism_threads(max(2, self._threads))
        gpus = tf.config.list_physical_devices("GPU")
        for gpu in gpus:
            tf.config.experimental.set_memory_growth(gpu, True)
        names = tuple(tf.config.experimental.get_device_details(gpu).get("device_name", gpu.name) for gpu in gpus)
        code.allow(self._allowed)
        return RuntimeInfo({"tensorflow": tf.__version__, "keras": keras.__version__}, names)

    def model(self, model_format: ModelFormat, path: Path) -> Model:
        from node.engine import graphs, savedmodel

        load = savedmodel.load if model_format == "savedmodel" else graphs.load_keras
        return load(path, self._scratch)


class LiteRT(ArrayRuntime):
    """LiteRT models."""

    name = "litert"
    title = "LiteRT"
    extra = "litert"
    formats: tuple[ModelFormat, ...] = ("tflite",)

    def __init__(self, threads: int) -> None:
        super().__init__()
        self._threads = threads

    def installed(self) -> bool:
        return find_spec("ai_edge_litert") is not None

    def start(self) -> RuntimeInfo:
        """Does not import LiteRT: only nodes with such models need it."""
        return RuntimeInfo({"litert": importlib.metadata.version("ai-edge-litert")})

    def model(self, model_format: ModelFormat, path: Path) -> Model:
        from node.engine.litert import LiteModel

        return LiteModel(path, self._threads)


@contextmanager
def left_out(*packages: str) -> Iterator[None]:
    """Let imports of these packages fail within the block.

    Keras imports them at its start, for features that an engine never uses. If they are installed, they take more than a third
    of the time (1.6 of 4.2 s).
    """
    hidden = [package for package in packages if package not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None makes imports fail
    try:
        yield
    finally:
        for package in hidden:
            del sys.modules[package]


def _mapped(tensor: Tensor, files: Mapping[str, str]) -> Tensor:
    """The tensor, with its blob's file mapped as memory: it is not copied on its way to the model."""
    ref = tensor.data
    if not isinstance(ref, BlobRef) or ref.sha256 not in files:
        return tensor
    with Path(files[ref.sha256]).open("rb") as file:
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)) if ref.size else b""
    return replace(tensor, data=data)
