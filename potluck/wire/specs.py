"""Checks that a request fits a model's signature: before it is sent anywhere, and again where it is computed. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from potluck.errors import InvalidRequest
from potluck.wire.values import Tensor, TensorSpec
from potluck.wording import counted


def matched(request: Sequence[Tensor], specs: Sequence[TensorSpec]) -> list[Tensor]:
    """The tensors in the order of the model's inputs. Raises InvalidRequest, naming what is expected and given: number, names, shapes.

    A single input may have any name. Does not check that data fit their shape.
    """
    if len(request) != len(specs):
        raise InvalidRequest(
            f"the model has {counted(len(specs), 'input')} ({_names(specs)}), the request {len(request)}"
        )
    by_name = {tensor.name: tensor for tensor in request}
    if len(specs) == 1:
        ordered = list(request)
    elif {spec.name for spec in specs} == set(by_name):
        ordered = [by_name[spec.name] for spec in specs]
    else:
        raise InvalidRequest(f"the model's inputs are {_names(specs)}, the request's {', '.join(by_name)}")
    for spec, tensor in zip(specs, ordered, strict=True):
        given = shape_for(tensor, spec)
        if len(given) != len(spec.shape) or any(
            w >= 0 and w != h for w, h in zip(spec.shape[1:], given[1:], strict=True)
        ):
            raise InvalidRequest(
                f"input '{spec.name}' takes {spec.datatype} of shape {shown(spec.shape)} (first the batch), "
                f"but the request has {shown(given)}"
            )
    rows = ordered[0].shape[:1]
    if rows in ((), (0,)) or any(tensor.shape[:1] != rows for tensor in ordered):
        raise InvalidRequest("all inputs of a request need the same number of rows, at least one")
    return ordered


def shape_for(tensor: Tensor, spec: TensorSpec) -> tuple[int, ...]:
    """The tensor's shape for this input. For a model with items like `keras.Input((1,), dtype="string")`, a list of texts gets a second axis."""
    texts = tensor.datatype == "BYTES" and len(tensor.shape) == 1 and tuple(spec.shape[1:]) == (1,)
    return (*tensor.shape, 1) if texts else tensor.shape


def shown(dimensions: Sequence[int | None]) -> str:
    """`(any, 32, 32, 3)`: None and -1 are dimensions of any size."""
    return "(" + ", ".join("any" if d is None or d < 0 else str(d) for d in dimensions) + ")"


def _names(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(spec.name for spec in specs)
