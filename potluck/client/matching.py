"""Checks, before anything is sent, whether data fit a model, as far as the client can know. Nodes find the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from potluck.data.packing import Roles
from potluck.errors import InvalidData, InvalidModel, InvalidRequest
from potluck.wire.tensors import shape_text
from potluck.wire.values import Dataset

_RANKS = {"images": (4,), "audio": (2, 3)}
"""How many axes the input of a model for such files has, with the batch axis."""
_TAKEN = {"images": "(height, width, channels)", "audio": "(samples,) or (samples, channels)"}
_FIRST, _LAST = 8, 3
"""How many column names an error shows, from the front and the end: the last one is often the target."""


@dataclass(frozen=True)
class Wanted:
    """What a job requires of its data. `shape`: of the model's only input; `room`: how many classes it can learn; None: unknown here.

    `only_images`: an option is given that is only for images. `sized`: the size of the images is known, even where `shape` leaves it
    open. `target`: the job learns or measures, and needs a target.
    """

    shape: tuple[int | None, ...] | None = None
    room: int | None = None
    only_images: bool = False
    sized: bool = False
    target: bool = False

    def check(self, argument: str, kind: str, classes: Sequence[str]) -> None:
        """Check a data set's kind and classes. Raises InvalidRequest, InvalidModel."""
        if self.only_images and kind != "images":
            raise InvalidRequest(
                f"image (--image) is only for images, and {argument} holds no images: leave image out, or give images"
            )
        shape = self.shape
        if shape is not None and kind in _RANKS:
            if len(shape) not in _RANKS[kind]:
                raise InvalidRequest(
                    f"{argument} holds {'images' if kind == 'images' else 'recordings'}, each {_TAKEN[kind]}, but the model's input "
                    f"has shape {shape_text(shape)}: give data of that shape, or a model for these data"
                )
            if kind == "images" and not self.sized and None in shape[1:]:
                raise InvalidRequest(
                    f"{argument} holds images, but the model's input has shape {shape_text(shape)}: give the size of the images, "
                    "image=(height, width) (--image HxW)"
                )
        self.check_classes(argument, classes)

    def check_classes(self, argument: str, classes: Sequence[str]) -> None:
        """Check that the model has room for the classes. Raises InvalidModel."""
        if self.target and self.room is not None and len(classes) > self.room:
            raise InvalidModel(
                f"{argument} has {len(classes)} classes, but the model takes {self.room}: give its last layer {len(classes)} units"
            )

    def check_packed(
        self, argument: str, dataset: Dataset, item: tuple[int, ...] | None, roles: Callable[[], Roles | None]
    ) -> None:
        """Check data that were packed here. `item`: the shape of one item, where the data are one array; `roles`: which part is what.

        Raises InvalidData, InvalidRequest, InvalidModel.
        """
        self.check(argument, dataset.format.kind, ())  # a wrong shape says more than wrong classes
        labelled = dataset.format.kind != "arrays" or dataset.format.target or dataset.format.targets
        if self.target and not labelled and (found := roles()) is not None:
            raise InvalidData(f"{argument} has no target to learn or to compare with: {_untold(found)}")
        try:
            check_fit(argument, item, self.shape)
        except InvalidRequest as error:
            if (found := roles()) is None or len(found.names) < 2:
                raise
            raise InvalidRequest(f"{error.message}; {_told(found, item, self.shape)}") from error
        self.check_classes(argument, dataset.format.classes)


ANYTHING = Wanted()


def check_fit(argument: str, given: tuple[int, ...] | None, shape: tuple[int | None, ...] | None) -> None:
    """Check that items of an array fit a model's input; None: unknown. Raises InvalidRequest, naming both shapes."""
    # A column of numbers can be an input of one number.
    if given is None or shape is None or (not given and shape[1:] == (1,)):
        return
    if len(given) != len(shape) - 1 or any(
        want is not None and want != have for want, have in zip(shape[1:], given, strict=True)
    ):
        raise InvalidRequest(
            f"{argument}: the model's input has shape {shape_text(shape)}, but the data has ({', '.join(map(str, given))}) per item"
        )


def _untold(roles: Roles) -> str:
    """Why no target was found, and what to type."""
    if len(roles.names) == 1:
        (name,) = roles.names
        return f"it holds only {name!r}, so give both, as arrays (x, y) or in one file"
    return (
        f"none of its {roles.what} ({listed(roles.names)}) is called {', '.join(roles.usual[:-1])} or {roles.usual[-1]}: "
        "name the one with target=NAME (--target NAME)"
    )


def _told(roles: Roles, item: tuple[int, ...] | None, shape: tuple[int | None, ...] | None) -> str:
    """Which columns were taken as inputs and target, and what helps."""
    if roles.what == "columns" and shape is not None and len(shape) == 4:
        return "the model takes images, but a table holds none: give a folder of images, or a model for the table"
    if not roles.targets:
        return (
            f"its {roles.what} are {listed(roles.names)}, none of them is the target: name the target with target=NAME "
            "(--target NAME)"
        )
    rest = [name for name in roles.names if name not in roles.targets]
    return (
        f"its {roles.what} are {listed(rest)} without the target {', '.join(map(repr, roles.targets))}: make the model's input "
        f"{item}, or give data that fit"
    )


def listed(names: Sequence[str]) -> str:
    """The names, or of many the first and the last ones."""
    names = [name or "(no name)" for name in names]
    if len(names) <= _FIRST + _LAST + 1:
        return ", ".join(names)
    return f"{', '.join(names[:_FIRST])}, ..., {', '.join(names[-_LAST:])}; {len(names)} in all"
