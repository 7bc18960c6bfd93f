"""The result that synchronous training must equal: the same batches, one after the other, in this process."""

from __future__ import annotations

from typing import Any

import numpy as np

from potluck.data.order import passes, shuffled


def plainly(model: Any, x: Any, y: Any, epochs: int, batch: int) -> Any:
    """Train a compiled model on the batches that a group would take, of data with class labels `y` packed with seed 0."""
    order = shuffled(y, len(y), 0)  # packing spreads the classes over the shards
    x, y, steps = x[order], y[order], 0
    for epoch in range(1, epochs + 1):
        while epoch * len(x) - steps * batch >= batch:
            index = np.fromiter(passes(len(x), 0, skip=steps * batch), np.int64, batch)
            model.train_on_batch(x[index], y[index])
            steps += 1
    return model


def relative(ours: Any, theirs: Any) -> float:
    """The largest difference between two models of any weight tensor, relative to its norm."""
    return max(
        float(np.linalg.norm(a - b) / max(1e-12, np.linalg.norm(b)))
        for a, b in zip(ours.get_weights(), theirs.get_weights(), strict=True)
    )
