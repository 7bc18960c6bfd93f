"""How long training will take under each strategy: the cost model by which `auto` chooses. Pure.

Computing is divisible work (Bharadwaj et al., 1996): N nodes of v_i samples/s do sum(v_i) a second. `sync` adds a ring all-reduce
to every step, 2 (N - 1) / N times the gradients' bytes over each link (Patarasuk and Yuan, 2009), and each node must have
all of the data; `local` adds the exchange of a quantised update to every round, over the coordinator's link.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from potluck.wire.tasks import TaskResult

MEASURABLE_BYTES = 1_000_000
"""A transfer of so many bytes says something of a link's bandwidth."""
ASSUMED_BANDWIDTH = 12.5e6
"""Bytes a second (100 Mbit/s), where no transfer was long enough to tell."""
LATENCY_SECONDS = 0.002
"""Of one message in the ring; a step's all-reduce passes 2 (N - 1) one after the other."""
PACKED = 1 / 8
"""An update of 4 bits a weight, against its 32."""
QUANTISE_SECONDS_PER_BYTE = 8.5e-9
"""Quantising, averaging and applying, for each byte of float32 weights: 0.44 s for 51.6 MB on a core of 2020 or so."""
WIRE = 1.1
"""What an all-reduce sends, against the gradients in it: frames, headers, acknowledgements."""
REDUCE_SECONDS_PER_BYTE = 5e-9
"""Copying and packing of each byte of gradients in an all-reduce over gRPC, on a core that computes as well: measured as 2.5e-9 to
4.6e-9 on a processor of 2023 and 9e-9 on one of 2020, so it may be wrong by half, and a step's time by 15 %."""
CHECKPOINT = 3
"""Weights and the state of Adam, against the weights."""
ROUND_SECONDS = 0.15
"""Of a round, whatever the model's size: leases, results, files."""
COMPUTING_FACTOR = 9.0
"""A round computes for so many times what it costs beside (90 % of the time) ..."""
PATIENT_FACTOR = 4.5
PATIENT_SECONDS = 10.0
"""... but where that makes it longer than so many seconds, for this factor (82 %): rare rounds cost samples."""
FORMING_SECONDS = 8.0
"""To start engines anew and form a group of them."""
DATA_LIMIT_BYTES = 2 * 2**30
"""Members of a group hold all of the data in memory, so larger sets are for rounds."""
PREFERENCE = 1.1
"""Exact training may take so many times as long as rounds."""


@dataclass(frozen=True)
class Costs:
    """`rates`: samples/s of each node; `samples` are left to train on; `bandwidth` in bytes/s, None where unknown.

    `weights_bytes` are those of the weights that are trained, as float32: others are not sent.
    """

    rates: tuple[float, ...]
    weights_bytes: int
    data_bytes: int
    samples: int
    batch_size: int
    bandwidth: float | None
    together: bool = True
    """Whether all of the nodes may take part in synchronous training."""


@dataclass(frozen=True)
class Prediction:
    """Seconds for the rest of the job under each strategy."""

    costs: Costs
    local_seconds: float
    sync_seconds: float
    choice: Literal["local", "sync"]

    def words(self, chosen: str) -> str:
        """One line: the choice and its figures."""
        costs = self.costs
        rates = " + ".join(f"{rate:.0f}" for rate in costs.rates)
        link = f"{costs.bandwidth / 1e6:.0f} MB/s" if costs.bandwidth else "an assumed 12 MB/s"
        return (
            f"{chosen}: {rates} samples/s, {costs.weights_bytes / 1e6:.1f} MB of weights, {link}: "
            f"local {_rate(costs, self.local_seconds)}, sync {_rate(costs, self.sync_seconds)}"
        )


def predict(costs: Costs) -> Prediction:
    """Of both strategies; a node alone trains locally, where it is exact as well."""
    together = sum(costs.rates) or 1.0
    nodes = len(costs.rates)
    bandwidth = costs.bandwidth or ASSUMED_BANDWIDTH
    computing = costs.samples / together
    if nodes < 2:
        return Prediction(costs, computing, computing, "local")
    overhead = round_overhead(nodes, costs.weights_bytes, bandwidth)
    local = computing * with_overhead(overhead)
    steps = math.ceil(costs.samples / costs.batch_size)
    data = (1 - 1 / nodes) * costs.data_bytes / bandwidth
    together_seconds = computing + steps * step_exchange(nodes, costs.weights_bytes, bandwidth)
    checkpoint = ROUND_SECONDS + CHECKPOINT * costs.weights_bytes / bandwidth
    sync = FORMING_SECONDS + data + together_seconds * with_overhead(checkpoint)
    possible = costs.together and costs.data_bytes <= DATA_LIMIT_BYTES
    return Prediction(costs, local, sync, "sync" if possible and sync <= PREFERENCE * local else "local")


def bandwidth_of(result: TaskResult) -> float | None:
    """Bytes a second with which a node has fetched what it needed; None where that was too little to tell."""
    measurable = result.fetched_bytes >= MEASURABLE_BYTES and result.fetch_seconds > 0
    return result.fetched_bytes / result.fetch_seconds if measurable else None


def round_overhead(nodes: int, weights_bytes: float, bandwidth: float) -> float:
    """Seconds that a round of `local` costs beside computing: updates to the coordinator, and the step back to each node."""
    return ROUND_SECONDS + QUANTISE_SECONDS_PER_BYTE * weights_bytes + 2 * nodes * PACKED * weights_bytes / bandwidth


def with_overhead(overhead: float) -> float:
    """How much longer work takes in rounds that each cost `overhead` seconds beside, for the length that they are given."""
    length = computing_seconds(overhead)
    return (length + overhead) / length


def computing_seconds(overhead: float) -> float:
    """For how long a round computes that costs `overhead` seconds beside."""
    return min(COMPUTING_FACTOR * overhead, max(PATIENT_FACTOR * overhead, PATIENT_SECONDS))


def step_exchange(nodes: int, weights_bytes: float, bandwidth: float) -> float:
    """Seconds of a ring all-reduce of the gradients."""
    wire = 2 * (nodes - 1) * (WIRE * weights_bytes / nodes / bandwidth + LATENCY_SECONDS)
    return wire + REDUCE_SECONDS_PER_BYTE * weights_bytes


def _rate(costs: Costs, seconds: float) -> str:
    return f"{costs.samples / seconds:.0f} samples/s" if seconds > 0 else "at once"
