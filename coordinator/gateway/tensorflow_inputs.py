"""Converts requests of TensorFlow Serving's REST (rows, columns, examples) to tensors, and outputs to rows."""

from __future__ import annotations

import math
from typing import Any

from coordinator.gateway import json_arrays
from potluck.errors import InvalidRequest
from potluck.wire.values import Signature, Tensor, TensorSpec


def from_rows(signature: Signature, instances: Any) -> tuple[Tensor, ...]:
    """Inputs of the row format. Raises InvalidRequest."""
    if not isinstance(instances, list):
        raise InvalidRequest("JSON Value: Excepting 'instances' to be an list/array")
    if not instances:
        raise InvalidRequest("JSON Value: No values in 'instances' array")
    specs = {spec.name: spec for spec in signature.inputs}
    named = _is_map(instances[0])
    if not named and len(specs) > 1:
        raise InvalidRequest(
            "instances is a plain list, but expecting list of objects as multiple input tensors required as per tensorinfo_map"
        )
    for number, item in enumerate(instances):
        if _is_map(item) != named:
            expected, got = ("object", "list") if named else ("value/list", "object")
            raise InvalidRequest(f"Expecting {expected} but got {got} at item {number} of input list")
        if named and item.keys() != specs.keys():
            unknown = next((key for key in item if key not in specs), None)
            error = f"key: {unknown} of 'instances' list. Error: JSON object: does not have named input: {unknown}"
            if unknown is None:
                error = f"of 'instances' list. JSON object must only have keys: {','.join(sorted(specs))}"
            raise InvalidRequest(f"Failed to process element: {number} {error}")
    if not named:
        (spec,) = specs.values()
        return (_stacked(spec, instances),)
    return tuple(_stacked(spec, [item[name] for item in instances]) for name, spec in specs.items())


def from_columns(signature: Signature, inputs: Any) -> tuple[Tensor, ...]:
    """Inputs of the column format. Raises InvalidRequest."""
    specs = signature.inputs
    if not _is_map(inputs):
        if len(specs) > 1:
            raise InvalidRequest(
                "inputs is a plain value/list, but expecting an object as multiple input tensors required as per tensorinfo_map"
            )
        return (json_arrays.tensor(specs[0], inputs),)
    for spec in specs:
        if spec.name not in inputs:
            raise InvalidRequest(f"Missing named input: {spec.name} in 'inputs' object.")
    return tuple(json_arrays.tensor(spec, inputs[spec.name]) for spec in specs)


def from_examples(signature: Signature, asked: dict[str, Any], verb: str) -> tuple[Tensor, ...]:
    """Inputs from examples: each feature is the input of that name, flat if the input has more axes. Raises InvalidRequest."""
    if "examples" not in asked:
        raise InvalidRequest(f"JSON Value: When method is {verb}, key 'examples' is expected and was not found")
    examples, context = asked["examples"], asked.get("context", {})
    if not isinstance(examples, list):
        raise InvalidRequest("JSON Value: Expecting 'examples' value to be an list/array")
    if not examples:
        raise InvalidRequest("JSON Value: 'examples' value is an empty array")
    for example in (context, *examples):
        if not isinstance(example, dict):
            raise InvalidRequest(f"Example must be JSON object but got JSON {json_arrays.kind_of(example)}")
    found = []
    for spec in signature.inputs:
        size = math.prod(spec.shape[1:]) if min(spec.shape[1:], default=1) > 0 else 0  # 0: any size
        values = []
        for number, example in enumerate(examples):
            if spec.name not in example and spec.name not in context:
                wanted = json_arrays.type_name(spec.datatype)
                raise InvalidRequest(
                    f"Name: <unknown>, Feature: {spec.name} (data type: {wanted}) is required but could not be found, in example {number}."
                )
            value = example.get(spec.name, context.get(spec.name))
            values.append(value if isinstance(value, list) else [value])
            if any(isinstance(one, list) for one in values[-1]):
                raise InvalidRequest(f"Feature: {spec.name} of example {number} is not a flat list of values")
            if size > 0 and len(values[-1]) != size:
                raise InvalidRequest(
                    f"Key: {spec.name}, Index: {number}. Number of {json_arrays.type_name(spec.datatype)} values != expected. "
                    f"values size: {len(values[-1])} but output shape: [{','.join(map(str, spec.shape[1:]))}]"
                )
        flat = _stacked(spec, values)
        shape = (len(examples), *spec.shape[1:]) if size > 0 else flat.shape
        found.append(Tensor(name=flat.name, datatype=flat.datatype, shape=shape, data=flat.data))
    return tuple(found)


def as_rows(columns: dict[str, Any]) -> list[Any]:
    """Outputs in the row format: plain values for one output, else a map for each row. Raises InvalidRequest."""
    if len(columns) == 1:
        (values,) = columns.values()
        return values if isinstance(values, list) else [values]
    counts = {len(values) if isinstance(values, list) else -1 for values in columns.values()}
    if len(counts) > 1 or -1 in counts:
        raise InvalidRequest(
            "Tensor name: outputs have inconsistent batch size: ask for them in the column format, with 'inputs'"
        )
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _stacked(spec: TensorSpec, items: list[Any]) -> Tensor:
    """Items of rows as one tensor. An error names the item that does not fit."""
    try:
        return json_arrays.tensor(spec, items)
    except InvalidRequest as error:
        first = json_arrays.shape_of(items[0])
        for number, item in enumerate(items):
            try:
                json_arrays.tensor(spec, item)
            except InvalidRequest as own:
                raise InvalidRequest(
                    f"Failed to process element: {number} of 'instances' list. Error: {own.message}"
                ) from error
            given = json_arrays.shape_of(item)
            if given != first:
                what = f"shape {list(first)} but got: {list(given)}"
                if math.prod(first) != math.prod(given):
                    what = f"tensor size: {math.prod(first)} but got: {math.prod(given)}"
                raise InvalidRequest(
                    f"Failed to process element: {number} of 'instances' list. Error: Expecting {what}"
                ) from error
        raise


def _is_map(value: object) -> bool:
    return isinstance(value, dict) and not json_arrays.is_binary(value)
