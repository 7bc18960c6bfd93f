"""Counts and latencies of inference requests, for Prometheus. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field

from coordinator.serving.windows import Window

BUCKETS_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


@dataclass
class _Histogram:
    counts: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS_SECONDS) + 1))
    sum_seconds: float = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(BUCKETS_SECONDS, seconds)] += 1
        self.sum_seconds += seconds


@dataclass
class ServingMetrics:
    """For each deployment: answers by error code ("": no error), their latencies, and how well it did lately."""

    answers: Counter[tuple[str, str]] = field(default_factory=Counter)
    latency: dict[str, _Histogram] = field(default_factory=dict)
    windows: dict[str, Window] = field(default_factory=dict)

    def answered(self, name: str, now: float, seconds: float, failure: str) -> None:
        self.answers[name, failure] += 1
        self.latency.setdefault(name, _Histogram()).observe(seconds)
        self.window(name).answered(now, seconds, failure)

    def window(self, name: str) -> Window:
        return self.windows.setdefault(name, Window())
