"""The outer step: from the updates of a round's nodes to the weights of the next round, piece by piece.

The mean of the updates by samples (FedAvg, McMahan et al., 2017) is taken as a gradient of the outer optimizer, which is
SGD with Nesterov momentum (DiLoCo, Douillard et al., 2023): v <- m v + d, w <- w + lr (d + m v). What is added to the weights is
quantised first, and the same update goes to the nodes, so that all have the same bits. State that is not trained (moving
statistics) is averaged only. Memory is that of a few pieces, whatever the model's size and the number of nodes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from potluck.errors import Diverged, InvalidModel
from potluck.messages import Compression
from potluck.updates import UpdateReader, UpdateWriter, applied, choose, spans
from potluck.weights import Array, Reader, Spec, Writer

MOMENTUM_LIMIT = 0.9
COOLING = 0.3
"""The last part of a job, in which momentum falls to nothing."""


@dataclass(frozen=True)
class Outer:
    """The outer optimizer's settings for one round."""

    learning_rate: float
    momentum: float


def outer_for(
    round: int, done: float, nodes: int, learning_rate: float | None = None, momentum: float | None = None
) -> Outer:
    """The settings of `round` (from 0), after which the share `done` of the job is done, with updates of so many nodes.

    What the user has set; else full steps, and momentum that rises as in Nesterov's accelerated gradient (1983; k / (k + 3), as
    Beck and Teboulle write it, 2009) to MOMENTUM_LIMIT, and falls to nothing at the end: docs/training.md has the
    evidence. A node that is alone needs none: its own optimizer has gone all the way.
    """
    rising = min(round / (round + 3), MOMENTUM_LIMIT)
    ruled = rising * min(1.0, max(0.0, 1 - done) / COOLING) if nodes > 1 else 0.0
    return Outer(1.0 if learning_rate is None else learning_rate, ruled if momentum is None else momentum)


def combine(
    weights: Path,
    updates: Sequence[tuple[Path, int]],
    velocity: Path | None,
    outer: Outer,
    compression: Compression,
    *,
    step: Path,
    after: Path,
    velocity_after: Path,
) -> None:
    """Take the outer step of a round from `weights`, with `updates` as (file, samples) and the `velocity` of the round before.

    Writes `step` (what is added, as it goes to the nodes), `after` (the weights with it) and `velocity_after`. Raises
    InvalidModel where files do not fit the weights, Diverged where values are not finite.
    """
    if not updates or sum(samples for _, samples in updates) <= 0:
        raise InvalidModel("no samples were trained on in this round, so there is nothing to average")
    with ExitStack() as stack:
        base = stack.enter_context(Reader(weights))
        before = stack.enter_context(Reader(velocity)) if velocity is not None else None
        parts = [(stack.enter_context(UpdateReader(path, base)), samples) for path, samples in updates]

        def pushed(spec: Spec, start: int, stop: int) -> tuple[Array, Array]:
            """(What is to be added, the velocity): of a piece."""
            mean = _mean(parts, spec, start, stop)
            if not _is_trained(spec):
                return mean, np.zeros_like(mean)
            old = before.read(spec.name, start, stop) if before is not None else np.zeros_like(mean)
            fast = mean.dtype.type(outer.momentum) * old + mean
            return mean.dtype.type(outer.learning_rate) * (mean + mean.dtype.type(outer.momentum) * fast), fast

        specs = list(base.specs.values())
        plan = [
            (spec, choose(spec, compression, lambda start, stop, spec=spec: pushed(spec, start, stop)[0]))  # type: ignore[misc]
            for spec in specs
        ]
        writer = stack.enter_context(UpdateWriter(step, plan))
        target = stack.enter_context(Writer(after, specs))
        moving = stack.enter_context(Writer(velocity_after, specs))
        for spec, kind in plan:
            # In step with the quantised pieces that come back: what is made for one is not made again for the other.
            made: list[Array] = []

            def pieces(spec: Spec = spec, made: list[Array] = made) -> Iterator[Array]:
                for start, stop in spans(spec):
                    wanted, fast = pushed(spec, start, stop)
                    moving.write(fast)
                    made.append(base.read(spec.name, start, stop))
                    yield wanted

            for piece in writer.write(kind, pieces()):
                new = applied(made.pop(), piece)
                if new.dtype.kind == "f" and not np.isfinite(new).all():
                    raise Diverged(
                        f"training diverged: weight {spec.name} is not finite any more; lower the learning rate"
                    )
                target.write(new)


def _mean(parts: Sequence[tuple[UpdateReader, int]], spec: Spec, start: int, stop: int) -> Array:
    """Of a piece, by samples; of what is no floating-point number, that of the largest part."""
    if spec.dtype.kind != "f":
        return max(parts, key=lambda part: part[1])[0].read(spec.name, start, stop)
    total = sum(samples for _, samples in parts)
    sums = np.zeros(stop - start, np.float64)
    for part, samples in parts:
        sums += part.read(spec.name, start, stop) * (samples / total)
    return sums.astype(spec.dtype)


def _is_trained(spec: Spec) -> bool:
    """Weights are named w00000, ..., state that is not trained s00001, ..."""
    return spec.dtype.kind == "f" and spec.name.startswith("w")
