"""Averaging of weights by samples, one tensor at a time, so that memory does not grow with the number of nodes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from potluck.errors import InvalidModel


def average(files: Sequence[tuple[Path, int]], target: Path) -> None:
    """Write to `target` the mean of the weights in `files`, each weighted by its samples (safetensors, equal names and shapes).

    Sums are kept in float64. Tensors that are not floating point (counters) are taken from the file with most samples.
    Raises InvalidModel when the files do not hold the same weights, or hold values that are not finite.
    """
    total = sum(samples for _, samples in files)
    if total <= 0:
        raise InvalidModel("no samples were trained on in this round, so there is nothing to average")
    averaged: dict[str, np.ndarray[Any, Any]] = {}
    largest = max(range(len(files)), key=lambda number: files[number][1])
    try:
        opened: list[Any] = [safe_open(path, framework="numpy") for path, _ in files]
        names = list(opened[0].keys())
        for path, file in zip((path for path, _ in files), opened, strict=True):
            if list(file.keys()) != names:
                raise InvalidModel(f"the weights in {path.name[:12]} have other names than the rest of the round")
        for name in names:
            like = opened[largest].get_tensor(name)
            if like.dtype.kind != "f":
                averaged[name] = like
                continue
            mean = np.zeros(like.shape, np.float64)
            for file, (_, samples) in zip(opened, files, strict=True):
                part = file.get_tensor(name)
                if part.shape != like.shape:
                    raise InvalidModel(f"weight {name} has shape {part.shape} on one node and {like.shape} on another")
                mean += part.astype(np.float64) * (samples / total)
            if not np.isfinite(mean).all():
                raise InvalidModel(f"training diverged: weight {name} is not finite any more; lower the learning rate")
            averaged[name] = mean.astype(like.dtype)
    except SafetensorError as error:
        raise InvalidModel(f"weights of this round cannot be read: {error}") from error
    save_file(averaged, target)
