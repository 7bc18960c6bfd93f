"""The options of `train` that are seldom needed, checked one by one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypedDict

import msgspec
from msgspec import Meta

from potluck.client import arguments
from potluck.errors import InvalidRequest
from potluck.wire.jobs import Epochs, Seed, Strategy, Train
from potluck.wire.values import Compression, Privacy

_SECONDS = "a number of seconds above 0, at most 86,400 (0: chosen from measured speed and bandwidth)"
AUTO, AUTO_METRIC = "auto", "val_loss"
_KINDS: dict[str, tuple[Any, str]] = {
    "strategy": (Strategy, "'auto', 'local' or 'sync'"),
    "round_seconds": (Annotated[float, Meta(ge=0, le=86_400)], _SECONDS),
    "seed": (Seed, "a whole number from 0 to 4,294,967,295"),
    "compression": (Compression, "'auto', 'none', 'int8' or 'int4'"),
    "overlap": (bool, "True or False"),
    "outer_learning_rate": (Annotated[float, Meta(gt=0, le=10)] | None, "a number above 0, at most 10, or None"),
    "outer_momentum": (Annotated[float, Meta(ge=0, lt=1)] | None, "a number from 0 to below 1, or None"),
    "class_weight": (dict[str, Annotated[float, Meta(ge=0)]] | None, "a map from classes to numbers of at least 0"),
    "monitor": (str | None, "the name of a metric, such as 'val_loss', 'auto', or None"),
    "monitor_mode": (Literal["auto", "min", "max"], "'auto', 'min' or 'max'"),
    "patience": (Epochs | None, "a whole number of epochs, or None"),
    "min_delta": (Annotated[float, Meta(ge=0)], "a number of at least 0"),
    "deterministic": (bool, "True or False"),
    "l2_norm_clip": (Annotated[float, Meta(gt=0)] | None, "a number above 0, or None"),
    "noise_multiplier": (Annotated[float, Meta(ge=0)], "a number of at least 0"),
    "private_unit": (Literal["example", "node"], "'example' or 'node'"),
    "delta": (Annotated[float, Meta(gt=0, lt=1)], "a number between 0 and 1"),
}
_PRIVACY = {
    "l2_norm_clip": "l2_norm_clip",
    "noise_multiplier": "noise_multiplier",
    "private_unit": "unit",
    "delta": "delta",
}
"""Options that are fields of `Privacy`."""
DEFAULTS = (
    {field.name: field.default for field in msgspec.structs.fields(Train)}
    | {
        name: field.default
        for field in msgspec.structs.fields(Privacy)
        for name, of in _PRIVACY.items()
        if of == field.name
    }
    | dict.fromkeys(("class_weight", "l2_norm_clip"))
    | {"monitor": AUTO}
)
"""Defaults of the options."""


class TrainOptions(TypedDict, total=False):
    """Options of `train` that are seldom needed.

    - `strategy`: `"local"` trains in rounds; `"sync"` takes every step on all nodes together, with `batch_size` items over all
      of them, exactly as one machine would; `"auto"` measures, and uses `"sync"` where the network is fast enough for it.
    - `seed`: for shuffling and initial state.
    - `monitor`: a metric of epochs; the result is the model after the best epoch. `"auto"`: `val_loss` where validation data are
      given; None: the model of the last epoch. `patience`: end after this many epochs in a row without an improvement above `min_delta`.
      `monitor_mode`: whether a small (`"min"`) or large (`"max"`) value is better; `"auto"` decides by the name, as Keras does, and
      refuses a name that does not tell.
    - `class_weight`: a map from class labels (numbers, where classes have no label) to weights in the loss; 1 for the others.
    - `resume`: an ended training job (or its id); continue from its last round, to `epochs` in all.
    - `round_seconds`: how long nodes compute between two exchanges; 0: chosen from measured speed and bandwidth.
    - `compression`: of updates on the network, `"auto"`, `"none"`, `"int8"` or `"int4"`. `overlap`: nodes compute while updates travel.
    - `outer_learning_rate`, `outer_momentum`: of the step that applies a round's mean update; None: by rule.
    - `deterministic`: a fixed number of steps per round, and a fixed order: the same nodes give exactly the same result again, also when
      some of them were killed on the way. Rounds then last as long as the slowest node takes.
    - `l2_norm_clip`, `noise_multiplier`: for data that live on nodes: hide each example (`private_unit="example"`, DP-SGD) or each
      node (`"node"`) with noise; epochs then have `epsilon`, for `delta`, instead of training metrics. See docs/federated.md.
    """

    strategy: Strategy
    seed: int
    monitor: str | None
    monitor_mode: Literal["auto", "min", "max"]
    patience: int | None
    min_delta: float
    class_weight: Mapping[Any, float] | None
    resume: Any
    round_seconds: float
    compression: Compression
    overlap: bool
    outer_learning_rate: float | None
    outer_momentum: float | None
    deterministic: bool
    l2_norm_clip: float | None
    noise_multiplier: float
    private_unit: Literal["example", "node"]
    delta: float


def fields(options: Mapping[str, Any], *, validated: bool) -> dict[str, Any]:
    """The options as fields of `Train`, without `resume`. `validated`: whether there are validation data. Raises InvalidRequest."""
    found: dict[str, Any] = {}
    if options.get("monitor", AUTO) == AUTO:
        options = {name: value for name, value in options.items() if name != "monitor"}
        if validated and options.get("monitor_mode") == "max":
            raise InvalidRequest(
                f"monitor_mode 'max' needs a metric: {AUTO_METRIC} is better when it is small; name the metric to monitor"
            )
        if validated:
            found["monitor"] = AUTO_METRIC
    for name, value in options.items():
        if name == "resume":
            continue
        if name == "class_weight" and isinstance(value, Mapping):
            value = {str(key): weight for key, weight in value.items()}  # a class without a label is a number
        kind, takes = _KINDS[name]
        checked = arguments.checked(name, value, kind, takes)
        if checked is not None:
            found[name] = checked
    hiding = {field: found.pop(name) for name, field in _PRIVACY.items() if name in found}
    if hiding and "l2_norm_clip" not in hiding:
        if "noise_multiplier" in hiding:
            raise InvalidRequest("noise_multiplier is a multiple of l2_norm_clip: give l2_norm_clip too")
        given = " and ".join(name for name, field in _PRIVACY.items() if field in hiding)
        raise InvalidRequest(
            f"{given} alone hides nothing: give l2_norm_clip and noise_multiplier too, or leave {given} out"
        )
    return found | ({"privacy": Privacy(**hiding)} if hiding else {})
