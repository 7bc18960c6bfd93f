"""How long training will take under each strategy: the cost model by which `auto` chooses. Pure.

Computing is divisible work (Bharadwaj et al., 1996): N nodes with v_i samples/s do sum(v_i) samples/s together. `sync` adds a ring
all-reduce to every step. It sends 2 (N - 1) / N times the gradients' bytes over each link (Patarasuk and Yuan, 2009). Each node
also needs all of the data. `local` adds the exchange of quantised updates to every round, over the coordinator's link.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from potluck.wire.tasks import TaskResult

MEASURABLE_BYTES = 1_000_000
"""A transfer of fewer bytes tells nothing of a link's bandwidth."""
ASSUMED_BANDWIDTH = 12.5e6
"""Bytes a second (100 Mbit/s), while no transfer was large enough to tell."""
LATENCY_SECONDS = 0.002
"""Of one message in the ring. The all-reduce of a step sends 2 (N - 1) messages, one after the other."""
PACKED = 1 / 8
"""The size of an update, as a share of the weights: 4 bits for each weight of 32."""
QUANTISE_SECONDS_PER_BYTE = 8.5e-9
"""Quantising, averaging and applying, for each byte of float32 weights: 0.44 s for 51.6 MB on a core of 2020 or so."""
WIRE = 1.1
"""Bytes that an all-reduce sends, for each byte of gradients: there are frames, headers and acknowledgements, too."""
REDUCE_SECONDS_PER_BYTE = 5e-9
"""Copying and packing of each byte of gradients in an all-reduce over gRPC, on a core that also computes. Measured: 2.5e-9 to 4.6e-9
on a processor of 2023, 9e-9 on one of 2020. So it may be wrong by half, and the time of a step by 15 %."""
CHECKPOINT = 3
"""The size of a checkpoint, as a multiple of the weights: it has the weights and the state of Adam."""
ROUND_SECONDS = 0.15
"""What each round costs, however large the model is: leases, results, files."""
COMPUTING_FACTOR = 9.0
PATIENT_FACTOR = 4.5
PATIENT_SECONDS = 10.0
"""A round computes for COMPUTING_FACTOR times what it costs besides computing: that is 90 % of its time. If this is longer than
PATIENT_SECONDS, it computes only for these, but for PATIENT_FACTOR times its cost at least (82 %): with rare rounds, training needs
more samples."""
FORMING_SECONDS = 8.0
"""To start engines anew and form a group of them."""
DATA_LIMIT_BYTES = 2 * 2**30
"""Members of a group hold all of the data in memory. Larger data sets are trained on with `local`."""
PREFERENCE = 1.1
"""`sync` is exact, so it is chosen even if it takes so many times as long as `local`."""


@dataclass(frozen=True)
class Costs:
    """What a prediction rests on. `rates`: samples/s of each node. `samples`: how many are left to train on.

    `weights_bytes`: the size of the trained weights as float32; others are not sent. `bandwidth`: bytes/s; None if it is unknown.
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
    """The prediction for both strategies. One node alone trains with `local`, which is then exact, too."""
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
    """Bytes a second with which a node fetched what it needed; None if that was too little to tell."""
    measurable = result.fetched_bytes >= MEASURABLE_BYTES and result.fetch_seconds > 0
    return result.fetched_bytes / result.fetch_seconds if measurable else None


def round_overhead(nodes: int, weights_bytes: float, bandwidth: float) -> float:
    """Seconds that a round of `local` costs besides computing: updates to the coordinator, and the step back to each node."""
    return ROUND_SECONDS + QUANTISE_SECONDS_PER_BYTE * weights_bytes + 2 * nodes * PACKED * weights_bytes / bandwidth


def with_overhead(overhead: float) -> float:
    """How many times as long work takes in rounds, if each of them costs `overhead` seconds besides computing."""
    length = computing_seconds(overhead)
    return (length + overhead) / length


def computing_seconds(overhead: float) -> float:
    """For how many seconds a round computes that costs `overhead` seconds besides."""
    return min(COMPUTING_FACTOR * overhead, max(PATIENT_FACTOR * overhead, PATIENT_SECONDS))


def step_exchange(nodes: int, weights_bytes: float, bandwidth: float) -> float:
    """Seconds of a ring all-reduce of the gradients."""
    wire = 2 * (nodes - 1) * (WIRE * weights_bytes / nodes / bandwidth + LATENCY_SECONDS)
    return wire + REDUCE_SECONDS_PER_BYTE * weights_bytes


def _rate(costs: Costs, seconds: float) -> str:
    return f"{costs.samples / seconds:.0f} samples/s" if seconds > 0 else "at once"
