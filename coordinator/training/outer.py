"""The outer step: from the updates of a round's nodes to the weights of the next round, piece by piece.

The mean of the updates by samples (FedAvg, McMahan et al., 2017) is taken as a gradient of the outer optimizer, which is
SGD with Nesterov momentum (DiLoCo, Douillard et al., 2023): v <- m v + d, w <- w + lr (d + m v). What is added to the weights is
quantised first, and the same update goes to the nodes, so that all have the same bits. State that is not trained (moving
statistics) is averaged only. Memory is that of a few pieces, whatever the model's size and the number of nodes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from potluck.errors import Diverged, InvalidModel
from potluck.messages import Compression
from potluck.updates import UpdateReader, UpdateWriter, applied, choose, spans
from potluck.weights import Array, Reader, Spec, Writer

MOMENTUM_LIMIT = 0.5

Rule = Callable[[float], tuple[float, float]]
"""From the cosine between a round's mean update and the velocity before it to (learning rate, momentum)."""


@dataclass(frozen=True)
class Taken:
    """What was done in a round: the outer learning rate and momentum, and the cosine they were chosen by."""

    learning_rate: float
    momentum: float
    cosine: float


def rule(learning_rate: float | None, momentum: float | None, nodes: int) -> Rule:
    """Values that the user has set; else full steps, with as much momentum as successive rounds agree (docs/training.md).

    A node that is alone in a round needs none: its own optimizer has gone all the way.
    """

    def chosen(cosine: float) -> tuple[float, float]:
        agreed = min(MOMENTUM_LIMIT, max(0.0, cosine)) if nodes > 1 else 0.0
        return 1.0 if learning_rate is None else learning_rate, agreed if momentum is None else momentum

    return chosen


def combine(
    weights: Path,
    updates: Sequence[tuple[Path, int]],
    velocity: Path | None,
    decide: Rule,
    compression: Compression,
    *,
    mean: Path,
    step: Path,
    after: Path,
    velocity_after: Path,
) -> Taken:
    """Take the outer step of a round from `weights`, with `updates` as (file, samples) and the `velocity` of the round before.

    Writes `mean` (of the updates), `step` (what is added, as it goes to the nodes), `after` (the weights with it) and
    `velocity_after`. Raises InvalidModel where files do not fit the weights, Diverged where values are not finite.
    """
    if not updates or sum(samples for _, samples in updates) <= 0:
        raise InvalidModel("no samples were trained on in this round, so there is nothing to average")
    with ExitStack() as stack:
        base = stack.enter_context(Reader(weights))
        before = stack.enter_context(Reader(velocity)) if velocity is not None else None
        parts = [(stack.enter_context(UpdateReader(path, base)), samples) for path, samples in updates]
        cosine = _average(base, parts, before, mean)
        learning_rate, momentum = decide(cosine)
        average = stack.enter_context(Reader(mean))

        def pushed(spec: Spec, start: int, stop: int) -> tuple[Array, Array]:
            """(What is to be added, the velocity): of a piece."""
            value = average.read(spec.name, start, stop)
            if not _is_trained(spec):
                return value, np.zeros_like(value)
            old = before.read(spec.name, start, stop) if before is not None else np.zeros_like(value)
            fast = value.dtype.type(momentum) * old + value
            return value.dtype.type(learning_rate) * (value + value.dtype.type(momentum) * fast), fast

        plan = [
            (spec, choose(spec, compression, lambda start, stop, spec=spec: pushed(spec, start, stop)[0]))  # type: ignore[misc]
            for spec in base.specs.values()
        ]
        specs = list(base.specs.values())
        writer = stack.enter_context(UpdateWriter(step, plan))
        target = stack.enter_context(Writer(after, specs))
        moving = stack.enter_context(Writer(velocity_after, specs))
        for spec, kind in plan:
            places = list(spans(spec))
            pieces = writer.write(kind, (pushed(spec, *place)[0] for place in places))
            for place, piece in zip(places, pieces, strict=True):
                new = applied(base.read(spec.name, *place), piece)
                if new.dtype.kind == "f" and not np.isfinite(new).all():
                    raise Diverged(
                        f"training diverged: weight {spec.name} is not finite any more; lower the learning rate"
                    )
                target.write(new)
            for place in places:
                moving.write(pushed(spec, *place)[1])
        return Taken(learning_rate, momentum, cosine)


def _average(base: Reader, parts: Sequence[tuple[UpdateReader, int]], before: Reader | None, target: Path) -> float:
    """Write the mean of the updates; returns the cosine between it and the velocity before (0 without one)."""
    total = sum(samples for _, samples in parts)
    largest = max(parts, key=lambda part: part[1])[0]
    along = ours = theirs = 0.0
    with Writer(target, list(base.specs.values())) as writer:
        for name, spec in base.specs.items():
            for start, stop in spans(spec):
                if spec.dtype.kind != "f":
                    writer.write(largest.read(name, start, stop))
                    continue
                sums = np.zeros(stop - start, np.float64)
                for part, samples in parts:
                    sums += part.read(name, start, stop) * (samples / total)
                value = sums.astype(spec.dtype)
                writer.write(value)
                if before is not None and _is_trained(spec):
                    old = before.read(name, start, stop)
                    along += float(np.dot(value, old))
                    ours += float(np.dot(value, value))
                    theirs += float(np.dot(old, old))
    cosine = along / math.sqrt(ours * theirs) if ours > 0 and theirs > 0 else 0.0
    return cosine if math.isfinite(cosine) else 0.0


def _is_trained(spec: Spec) -> bool:
    """Weights are named w00000, ..., state that is not trained s00001, ..."""
    return spec.dtype.kind == "f" and spec.name.startswith("w")
