"""The options of `deploy`, checked one by one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, TypedDict

from msgspec import Meta, structs

from potluck.client import arguments
from potluck.errors import InvalidRequest
from potluck.wire.messages import Deploy, Factor, Objective, Quantization, Seconds

IDLE_SECONDS = 300.0
"""After so long without a request `0..MAX` holds none, where nothing else is said."""
_RANGE = re.compile(r"^(\d{1,6})\.\.(\d{1,6})\Z")
_REPLICAS = "a whole number from 1 to 999,999, 'all', or 'MIN..MAX'"
Replicas = Annotated[int, Meta(ge=1, le=999_999)]
"""As many digits as `MIN..MAX` takes."""
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
"""What an option is that is not given."""


class DeployOptions(TypedDict, total=False):
    """Options of `deploy` that are seldom needed.

    - `canary`: let it answer so many percent of the plain name's questions, until it is promoted or rolled back.
    - `shadow`: let it have a copy of each, and throw its answers away. `keep`: leave the version deployed that it replaces.
    - `rollback_factor`: withdraw it when failures or p99 are so many times those of the version before (0: never), which is kept
      for `watch_seconds` for that.
    - `queue_seconds`: with `replicas="1..4"`, more are loaded while requests wait for longer.
    - `idle_seconds`: hold none after so long without a request, until the next one (0: always hold them).
    - `objective`: how long an answer may take, in seconds: batches are as large as that allows, training on the same nodes gives way, and
      what would take longer is refused with Overloaded (0: requests wait for as long as their timeouts allow).
    - `quantize="int8"`: deploy `<name>-int8` instead, a LiteRT model of a quarter of the size that the job makes. `calibration` is data
      that show what is usual (None: those that it was trained on), `evaluation` those on which both models are measured (None: on
      those again): registered names, paths or arrays. `job.result()` has `evaluation`, and `before`, that of the original.
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
    """The options as fields of `Deploy`, but for those that are data. Raises InvalidRequest."""
    found: dict[str, Any] = {}
    for name, value in options.items():
        if name in DATA:
            if value is not None and options.get("quantize", "none") == "none":
                raise InvalidRequest(f"{name} is for a model that is quantized: add quantize='int8', or leave it out")
            continue
        found[name] = arguments.checked(name, value, *_KINDS[name])
    if 0 < found.get("rollback_factor", 0) <= 1:
        raise InvalidRequest(f"rollback_factor must be above 1, or 0 (never), not {found['rollback_factor']}")
    if "objective" in found:
        found["objective_seconds"] = found.pop("objective")
    return _replicas(replicas, found) | found


def data(options: Mapping[str, Any]) -> dict[str, object]:
    """The options that are data, where they are given."""
    return {name: options[name] for name in DATA if options.get(name) is not None}


def _replicas(given: object, options: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(given, str) and (bounds := _RANGE.match(given)):
        least, most = map(int, bounds.groups())
        if not 0 < most >= least:
            raise InvalidRequest(f"replicas must be MIN..MAX with MAX at least MIN and 1, not {given!r}")
        if least and options.get("idle_seconds"):
            raise InvalidRequest(f"with replicas={given!r} never fewer than {least} are held: write '0..{most}'")
        idle = {} if least else {"idle_seconds": IDLE_SECONDS}
        return {"replicas": max(1, least), "min_replicas": least, "max_replicas": most, **idle}
    if given == "all":
        return {"replicas": 0}
    if isinstance(given, str) and given.isdecimal():
        given = int(given)
    return {"replicas": arguments.checked("replicas", given, Replicas, _REPLICAS)}
