"""Metrics in Prometheus's text format (exposition format 0.0.4)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from itertools import accumulate

from coordinator.membership import Membership
from coordinator.serving.inference import Inference
from coordinator.serving.metrics import BUCKETS_SECONDS
from coordinator.serving.serving import Serving
from potluck.lifecycle import software

_LABEL = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def exposition(serving: Serving, inference: Inference, membership: Membership) -> str:
    """The page for `/metrics`."""
    lines: list[str] = []

    def family(name: str, kind: str, text: str) -> None:
        lines.extend((f"# HELP {name} {text}", f"# TYPE {name} {kind}"))

    family("potluck_nodes", "gauge", "Nodes by state.")
    states = Counter(member.state for member in membership.members.values() if member.session)
    for state in ("online", "suspect", "offline"):
        lines.append(f'potluck_nodes{{state="{state}"}} {states[state]}')

    # As in Prometheus's own exporters: the value is always 1, and the labels hold the information.
    family("potluck_build_info", "gauge", "Versions of the coordinator.")
    lines.append(f"potluck_build_info{{{_labels(software())}}} 1")
    family("potluck_node_info", "gauge", "Versions of the nodes that are not offline, and of their engines' runtimes.")
    for member in sorted(membership.members.values(), key=lambda member: member.node_id):
        if member.session and member.state != "offline":
            lines.append(f"potluck_node_info{{{_labels({'node': member.node_id, **member.software})}}} 1")

    family("potluck_replicas", "gauge", "Replicas by deployment and state.")
    deployments = serving.deployments()
    for deployment in deployments:
        found = Counter(replica.state for replica in deployment.replicas)
        for replica_state in ("loading", "ready", "failed"):
            labels = f'model="{_escaped(deployment.name)}",state="{replica_state}"'
            lines.append(f"potluck_replicas{{{labels}}} {found[replica_state]}")

    family("potluck_traffic_percent", "gauge", "Share of the questions to its plain name that a deployment answers.")
    for deployment in deployments:
        labels = f'model="{_escaped(deployment.name)}",role="{deployment.role or "none"}"'
        lines.append(f"potluck_traffic_percent{{{labels}}} {deployment.weight}")

    family("potluck_replica_bytes", "gauge", "Memory that a replica took when it was loaded.")
    for deployment in deployments:
        lines.append(f'potluck_replica_bytes{{model="{_escaped(deployment.name)}"}} {deployment.resident_bytes}')

    family("potluck_queue_length", "gauge", "Requests that wait for a replica.")
    for deployment in deployments:
        lines.append(f'potluck_queue_length{{model="{_escaped(deployment.name)}"}} {deployment.queued}')

    family("potluck_requests_total", "counter", "Inference requests answered, by error code (none: ok).")
    for (name, failure), count in sorted(inference.metrics.answers.items()):
        lines.append(f'potluck_requests_total{{model="{_escaped(name)}",code="{failure or "ok"}"}} {count}')

    family("potluck_request_seconds", "histogram", "Time from a request's arrival to its answer.")
    for name, histogram in sorted(inference.metrics.latency.items()):
        label = f'model="{_escaped(name)}"'
        for bound, total in zip((*BUCKETS_SECONDS, "+Inf"), accumulate(histogram.counts), strict=True):
            lines.append(f'potluck_request_seconds_bucket{{{label},le="{bound}"}} {total}')
        lines.append(f"potluck_request_seconds_sum{{{label}}} {histogram.sum_seconds}")
        lines.append(f"potluck_request_seconds_count{{{label}}} {sum(histogram.counts)}")
    return "\n".join(lines) + "\n"


def _labels(values: Mapping[str, str]) -> str:
    """The labels as text. Names that cannot be labels are left out: they came from another machine."""
    return ",".join(f'{name}="{_escaped(value)}"' for name, value in values.items() if _LABEL.fullmatch(name))


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
