"""Makes data sets number their classes as a model does: by the classes' names. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from potluck.errors import InvalidRequest
from potluck.wire.questions import ModelInfo
from potluck.wire.values import Dataset
from potluck.wording import printable


def as_trained_on(held_out: Dataset, data: Dataset) -> Dataset:
    """Validation data for a model that learns `data`: they may lack classes, or have them in another order.

    Raises InvalidRequest if they have other classes, or if only one of the two has classes.
    """
    ours, theirs = data.format.classes, held_out.format.classes
    if ours == theirs:
        return held_out
    unknown = [label for label in theirs if label not in ours]
    if not ours or not theirs:
        raise InvalidRequest(
            f"data sets {data.name!r} and {held_out.name!r} have different classes: {listed(ours)} and {listed(theirs)}: "
            "write both with the same labels"
        )
    if unknown:
        raise InvalidRequest(
            f"data set {held_out.name!r} has classes that {data.name!r} does not have: {listed(unknown)} "
            f"(it has {listed(ours)}): write both with the same labels"
        )
    return counted(held_out, ours)


def as_known(data: Dataset, model: ModelInfo) -> Dataset:
    """Data to evaluate a registered model on. If no class name is one of the model's, but the number of classes is equal, their order counts.

    Raises InvalidRequest if only some names are the model's, or if the numbers of classes differ: the classes cannot be matched.
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
    """`data` with the numbers of `classes`, which contain all classes of `data`."""
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
    """The first classes, for people; or "none"."""
    return ", ".join(map(printable, classes[:12])) + (", ..." if len(classes) > 12 else "") if classes else "none"
