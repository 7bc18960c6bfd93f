"""The options of `deploy`, checked one by one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, TypedDict

from msgspec import Meta, structs

from potluck.client import arguments
from potluck.errors import InvalidRequest
from potluck.wire.jobs import Deploy, Factor
from potluck.wire.values import Objective, Quantization, Seconds

IDLE_SECONDS = 300.0
"""Default for `0..MAX`: all replicas are unloaded after this long without a request."""
_RANGE = re.compile(r"^(\d{1,6})\.\.(\d{1,6})\Z")
_REPLICAS = "a whole number from 1 to 999,999, 'all', or 'MIN..MAX'"
Replicas = Annotated[int, Meta(ge=1, le=999_999)]
"""As many digits as `MIN..MAX` allows."""
Share = Annotated[int, Meta(ge=1, le=100)]
_SECONDS = "a number of seconds of at least 0"
_KINDS: dict[str, tuple[Any, str]] = {
    "canary": (Share, "a whole number of percent, from 1 to 100"),
    "shadow": (bool, "True or False"),
    "keep": (bool, "True or False"),
    "rollback_factor": (Factor, "a number above 1, or 0 (never)"),
    "watch_seconds": (Seconds, _SECONDS),
    "queue_seconds": (Seconds, _SECONDS),
    "idle_seconds": (Seconds, _SECONDS),
    "objective": (Objective, "a number of seconds, at most 3600"),
    "quantize": (Quantization, "'int8' or 'none'"),
}
DATA = ("calibration", "evaluation")
"""Options that are data."""
DEFAULTS = {field.name: field.default for field in structs.fields(Deploy)} | {"canary": None, "objective": 0.0}
"""Defaults of the options."""


class DeployOptions(TypedDict, total=False):
    """Options of `deploy` that are seldom needed.

    - `canary`: let it answer this percentage of the requests to the plain name, until it is promoted or rolled back.
    - `shadow`: send it a copy of each request, and drop its answers. `keep`: keep the version that it replaces deployed.
    - `rollback_factor`: withdraw it when its failures or p99 are this many times those of the version before (0: never). The version
      before is kept for `watch_seconds` for that.
    - `queue_seconds`: with `replicas="1..4"`, more replicas are loaded while requests wait longer than this.
    - `idle_seconds`: unload all replicas after this long without a request, until the next request (0: never).
    - `objective`: how long an answer may take, in seconds. Batches are as large as that allows, training on the same nodes gives way, and
      a request that would take longer is refused with Overloaded (0: requests wait for as long as their timeouts allow).
    - `quantize="int8"`: deploy `<name>-int8` instead, a LiteRT model that the job makes, a quarter of the size. `calibration` is data
      like the usual inputs (None: the model's training data), `evaluation` is data to measure both models on (None: the
      calibration data): registered names, paths or arrays. `job.result()` has `evaluation`, and `before`, that of the original.
    """

    canary: int
    shadow: bool
    keep: bool
    rollback_factor: float
    watch_seconds: float
    queue_seconds: float
    idle_seconds: float
    objective: float
    quantize: Quantization
    calibration: object
    evaluation: object


def fields(replicas: object, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options as fields of `Deploy`, without those that are data. Raises InvalidRequest."""
    found: dict[str, Any] = {}
    for name, value in options.items():
        if name in DATA:
            if value is not None and options.get("quantize", "none") == "none":
                raise InvalidRequest(
                    f"{name} is only for a model that is quantized: add quantize='int8', or leave {name} out"
                )
            continue
        found[name] = arguments.checked(name, value, *_KINDS[name])
    if 0 < found.get("rollback_factor", 0) <= 1:
        raise InvalidRequest(f"rollback_factor must be above 1, or 0 (never), not {found['rollback_factor']}")
    if "objective" in found:
        found["objective_seconds"] = found.pop("objective")
    return _replicas(replicas, found) | found


def data(options: Mapping[str, Any]) -> dict[str, object]:
    """The given options that are data."""
    return {name: options[name] for name in DATA if options.get(name) is not None}


def _replicas(given: object, options: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(given, str) and (bounds := _RANGE.match(given)):
        least, most = map(int, bounds.groups())
        if not 0 < most >= least:
            raise InvalidRequest(f"replicas must be MIN..MAX with MAX at least MIN and 1, not {given!r}")
        if least and options.get("idle_seconds"):
            raise InvalidRequest(
                f"replicas={given!r} always keeps {least} loaded: to unload all when idle, write '0..{most}'"
            )
        idle = {} if least else {"idle_seconds": IDLE_SECONDS}
        return {"replicas": max(1, least), "min_replicas": least, "max_replicas": most, **idle}
    if given == "all":
        return {"replicas": 0}
    if isinstance(given, str) and given.isdecimal():
        given = int(given)
    return {"replicas": arguments.checked("replicas", given, Replicas, _REPLICAS)}
