"""Which runtime loads which format of models, and which runtimes there are; each is imported when it is needed."""

from __future__ import annotations

import importlib.metadata
from importlib.util import find_spec
from pathlib import Path

from node.engine.replicas import Model
from potluck import extras
from potluck.errors import Unavailable
from potluck.wire.messages import ModelFormat


def has_tensorflow() -> bool:
    return find_spec("tensorflow") is not None and find_spec("keras") is not None


def has_litert() -> bool:
    return find_spec("ai_edge_litert") is not None


def litert_version() -> str:
    """Without importing it: only who has such models needs it."""
    return importlib.metadata.version("ai-edge-litert")


def load(model_format: ModelFormat, path: Path, scratch: Path, threads: int) -> Model:
    """A model for inference. Raises InvalidModel, CodeNotAllowed, and Unavailable where its runtime is not installed."""
    if model_format == "tflite":
        if not has_litert():
            raise missing("LiteRT", "litert")
        from node.engine.litert import LiteModel

        return LiteModel(path, threads)
    if not has_tensorflow():
        raise missing("TensorFlow", "engine")
    from node.engine import graphs, savedmodel

    return savedmodel.load(path, scratch) if model_format == "savedmodel" else graphs.load_keras(path, scratch)


def missing(runtime: str, extra: str) -> Unavailable:
    """What is said where something needs a runtime that is not here."""
    return Unavailable(f"this node has no {runtime}: {extras.install(extra)} there, or leave it to other nodes")
