"""Whether data can be what a model takes, as far as that is known here: said before anything is sent. What only a node knows, it says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from potluck.data.packing import Roles
from potluck.errors import InvalidData, InvalidModel, InvalidRequest
from potluck.wire.messages import Dataset
from potluck.wire.tensors import shape_text

_RANKS = {"images": (4,), "audio": (2, 3)}
"""Axes of an input, the batch's among them, that takes files of a kind."""
_TAKEN = {"images": "(height, width, channels)", "audio": "(samples,) or (samples, channels)"}
_FIRST, _LAST = 8, 3
"""Names of columns that an error has: the last one is often the target."""


@dataclass(frozen=True)
class Wanted:
    """What a job asks of its data. `shape` is that of the model's only input, `room` how many classes it can learn; None: not known here.

    `only_images`: an option says how images become that input. `sized`: of what size they are is known, also where `shape` leaves it
    open. `target`: the job learns, or measures, and needs one.
    """

    shape: tuple[int | None, ...] | None = None
    room: int | None = None
    only_images: bool = False
    sized: bool = False
    target: bool = False

    def check(self, argument: str, kind: str, classes: Sequence[str]) -> None:
        """A data set of a kind. Raises InvalidRequest, InvalidModel."""
        if self.only_images and kind != "images":
            raise InvalidRequest(
                f"image says how images become tensors, and {argument} holds no images: leave out image (--image), or give some"
            )
        shape = self.shape
        if shape is not None and kind in _RANKS:
            if len(shape) not in _RANKS[kind]:
                raise InvalidRequest(
                    f"{argument} holds {'images' if kind == 'images' else 'recordings'}, each {_TAKEN[kind]}, and the model's input "
                    f"has shape {shape_text(shape)}: give data of that shape, or a model for these"
                )
            if kind == "images" and not self.sized and None in shape[1:]:
                raise InvalidRequest(
                    f"{argument} holds images, and the model's input has shape {shape_text(shape)}: say the size of the images, "
                    "image=(height, width) (--image HxW)"
                )
        self.check_classes(argument, classes)

    def check_classes(self, argument: str, classes: Sequence[str]) -> None:
        """Raises InvalidModel."""
        if self.target and self.room is not None and len(classes) > self.room:
            raise InvalidModel(
                f"{argument} has {len(classes)} classes, but the model takes {self.room}: make its last layer {len(classes)} units"
            )

    def check_packed(
        self, argument: str, dataset: Dataset, item: tuple[int, ...] | None, roles: Callable[[], Roles | None]
    ) -> None:
        """Data that were packed here. `item` is the shape of an item where they are one array, `roles` says what in them is what.

        Raises InvalidData, InvalidRequest, InvalidModel.
        """
        self.check(argument, dataset.format.kind, ())  # a wrong shape says more than wrong classes
        labelled = dataset.format.kind != "arrays" or dataset.format.target or dataset.format.targets
        if self.target and not labelled and (found := roles()) is not None:
            raise InvalidData(f"{argument} has no target to learn or to measure by: {_untold(found)}")
        try:
            check_fit(argument, item, self.shape)
        except InvalidRequest as error:
            if (found := roles()) is None or len(found.names) < 2:
                raise
            raise InvalidRequest(f"{error.message}; {_told(found, item, self.shape)}") from error
        self.check_classes(argument, dataset.format.classes)


ANYTHING = Wanted()


def check_fit(argument: str, given: tuple[int, ...] | None, shape: tuple[int | None, ...] | None) -> None:
    """Whether items of an array can be the input of a model; None is not known. Raises InvalidRequest naming both shapes."""
    if given is None or shape is None or (not given and shape[1:] == (1,)):  # a column of numbers is an input of one
        return
    if len(given) != len(shape) - 1 or any(
        want is not None and want != have for want, have in zip(shape[1:], given, strict=True)
    ):
        raise InvalidRequest(
            f"{argument}: the model's input has shape {shape_text(shape)}, but the data has ({', '.join(map(str, given))}) per item"
        )


def _untold(roles: Roles) -> str:
    """Why none was found, and what to type."""
    if len(roles.names) == 1:
        (name,) = roles.names
        return f"it holds only {name!r}, so give both, as arrays (x, y) or in one file"
    return (
        f"none of its {roles.what} ({listed(roles.names)}) is called {', '.join(roles.usual[:-1])} or {roles.usual[-1]}: "
        "name the one with target=NAME (--target NAME)"
    )


def _told(roles: Roles, item: tuple[int, ...] | None, shape: tuple[int | None, ...] | None) -> str:
    """What was taken for what, and what helps."""
    if roles.what == "columns" and shape is not None and len(shape) == 4:
        return "the model takes images, and a table holds none: give a folder of images, or a model for the table"
    if not roles.targets:
        return (
            f"its {roles.what} are {listed(roles.names)}, none of them the target: name what is the target with target=NAME "
            "(--target NAME)"
        )
    rest = [name for name in roles.names if name not in roles.targets]
    return (
        f"its {roles.what} are {listed(rest)} without the target {', '.join(map(repr, roles.targets))}: make the model's input "
        f"{item}, or give data that fit"
    )


def listed(names: Sequence[str]) -> str:
    """The first of them and the last ones."""
    names = [name or "(no name)" for name in names]
    if len(names) <= _FIRST + _LAST + 1:
        return ", ".join(names)
    return f"{', '.join(names[:_FIRST])}, ..., {', '.join(names[-_LAST:])}; {len(names)} in all"
