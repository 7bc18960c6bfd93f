"""Data sets whose classes are counted as a model counts them: by their names. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from potluck.errors import InvalidRequest
from potluck.wire.messages import Dataset, ModelInfo
from potluck.wording import printable


def as_trained_on(held_out: Dataset, data: Dataset) -> Dataset:
    """Validation data for a model that learns `data`: they may lack classes, or have them in another order.

    Raises InvalidRequest where they have others, or where only one of the two has any.
    """
    ours, theirs = data.format.classes, held_out.format.classes
    if ours == theirs:
        return held_out
    unknown = [label for label in theirs if label not in ours]
    if not ours or not theirs:
        raise InvalidRequest(
            f"data sets {data.name!r} and {held_out.name!r} have other classes: {listed(ours)} and {listed(theirs)}: "
            "write both with the same labels"
        )
    if unknown:
        raise InvalidRequest(
            f"data set {held_out.name!r} has classes that {data.name!r} has not: {listed(unknown)} "
            f"(beside {listed(ours)}): write both with the same labels"
        )
    return counted(held_out, ours)


def as_known(data: Dataset, model: ModelInfo) -> Dataset:
    """Data to evaluate a registered model on. Where no name of theirs is one of the model's, and they are as many, their order counts.

    Raises InvalidRequest where some are the model's, and some not, or where they are more or fewer: which is which?
    """
    ours, theirs = model.classes, data.format.classes
    if not ours or not theirs or ours == theirs:
        return data
    unknown = [label for label in theirs if label not in ours]
    if not unknown:
        return counted(data, ours)
    if len(unknown) == len(theirs) == len(ours):
        return data
    raise InvalidRequest(
        f"data set {data.name!r} has classes that model {model.name}:{model.version} does not know: {listed(unknown)}; it knows "
        f"{listed(ours)}: name them as the model does"
    )


def counted(data: Dataset, classes: tuple[str, ...]) -> Dataset:
    """`data` as a set of these classes, among which are all of its own."""
    own = data.format
    number = {label: index for index, label in enumerate(classes)}
    there = own.places or range(len(own.classes))
    places = tuple(number[own.classes[place]] for place in there)
    counts = dict(zip(own.classes, data.class_counts, strict=False))
    return replace(
        data,
        format=replace(own, classes=classes, places=places),
        class_counts=tuple(counts.get(label, 0) for label in classes) if counts else (),
    )


def listed(classes: Sequence[str]) -> str:
    """For people: the first of them, or "none"."""
    return ", ".join(map(printable, classes[:12])) + (", ..." if len(classes) > 12 else "") if classes else "none"
