"""Checks `.keras` files before Keras loads them: their unpacked size, and how many weights their layers imply.

A file of a few KB can ask for any amount of memory. If this check misses it, the engine's memory limit stops it.
"""

from __future__ import annotations

import json
import lzma
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from potluck.errors import InvalidModel, OutOfMemory

CONFIG_LIMIT_BYTES = 16 * 2**20
"""Limit of a `config.json`. The largest models of Keras have 1 MB. Read, it takes twenty times as much memory."""
INFLATION = 50
INFLATION_FROM_BYTES = 256 * 2**20
"""Keras does not compress, and weights compress little. A file that unpacks to far more than its size, and to at least
this, was made to fill memory."""
LEAST_WEIGHT_BYTES = 0.5
"""Size of a weight of 4 bits, the smallest that Keras knows."""
SLACK_BYTES = 2**20


_DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error),
    *(KeyError, ValueError, RecursionError, NotImplementedError, RuntimeError, EOFError, OSError),
)
"""Errors of zipfile and json for damaged files."""
_COUNT_LIMIT = 2**63
"""Numbers from here on are not told apart: no file has so many weights."""


def check(path: Path, memory_bytes: int) -> None:
    """Raises InvalidModel for a malformed file, OutOfMemory for one that cannot fit (0: any memory).

    The sizes that members of a zip announce can be trusted: no more than that is unpacked.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = {info.filename: info.file_size for info in archive.infolist()}
            total = sum(info.file_size for info in archive.infolist())
            if memory_bytes and total > memory_bytes:
                raise OutOfMemory(
                    f"the model file unpacks to {total / 2**30:.1f} GiB, and this node lets an engine have {memory_bytes / 2**30:.1f} GiB"
                )
            packed = path.stat().st_size
            if total > max(INFLATION_FROM_BYTES, INFLATION * packed):
                raise InvalidModel(
                    f"the model file has {packed / 1e6:.1f} MB and unpacks to {total / 1e6:,.0f} MB, which weights do not: save it again"
                )
            if sizes.get("config.json", 0) > CONFIG_LIMIT_BYTES:
                raise InvalidModel(f"the model's config.json has more than {CONFIG_LIMIT_BYTES / 2**20:.0f} MiB")
            config = json.loads(archive.read("config.json"))
    except _DAMAGE:
        return  # Keras says what is wrong with it
    implied = parameters(config)
    stored = sum(size for name, size in sizes.items() if name not in ("config.json", "metadata.json"))
    if implied * LEAST_WEIGHT_BYTES > stored + SLACK_BYTES:
        raise InvalidModel(
            f"the model's layers have at least {implied:,} weights, and its file only {stored:,} bytes for them: save it again"
        )


def parameters(config: Any) -> int:
    """The least number of weights in a model's configuration. Counts only layers whose configuration states their size."""
    return min(sum(_weights_of(layer) for layer in _layers(config)), _COUNT_LIMIT)


def _layers(config: Any) -> Iterator[dict[str, Any]]:
    waiting = [config]
    while waiting:
        found = waiting.pop()
        if isinstance(found, dict):
            if found.get("module") == "keras.layers" and isinstance(found.get("config"), dict):
                yield found
            waiting += found.values()
        elif isinstance(found, list):
            waiting += found


def _weights_of(layer: dict[str, Any]) -> int:
    options, kind = layer["config"], layer.get("class_name")
    if kind == "Embedding":
        return _product(options.get("input_dim"), options.get("output_dim"))
    built = layer.get("build_config")
    shape = built.get("input_shape") if isinstance(built, dict) else None
    last = shape[-1] if isinstance(shape, list) and shape else 1
    if kind == "Dense":
        return _product(last, options.get("units"))
    if kind in ("LSTM", "GRU", "SimpleRNN"):
        return _product(options.get("units"), options.get("units"))
    if kind in ("Conv1D", "Conv2D", "Conv3D") and options.get("data_format") != "channels_first":
        kernel, groups = options.get("kernel_size"), options.get("groups")
        found = _product(last, options.get("filters"), *(kernel if isinstance(kernel, list) else [kernel]))
        return found // groups if type(groups) is int and groups > 0 else found
    return 0


def _product(*factors: Any) -> int:
    """The product of whole numbers, at most _COUNT_LIMIT; 0 if a factor is not a whole number."""
    found = 1
    for factor in factors:
        if type(factor) is not int or factor <= 0:
            return 0
        found = min(found * factor, _COUNT_LIMIT) if factor < _COUNT_LIMIT else _COUNT_LIMIT
    return found
