"""The model and the data of a job: checked against each other here, then brought to where the cluster finds them."""

from __future__ import annotations

import asyncio
import dataclasses
import difflib
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potluck.client import arguments, listings, sources
from potluck.client.connection import Connection
from potluck.client.matching import ANYTHING, Wanted, check_fit
from potluck.client.models import (
    MODEL_FIRST,
    ModelFile,
    image_argument,
    image_options,
    is_model_path,
    keras_file,
    model_file,
)
from potluck.data.packing import Target
from potluck.errors import InvalidRequest, NotFound
from potluck.wire.questions import DatasetInfo, GetModel, ModelInfo, ModelRegistered
from potluck.wire.values import BlobRef, ImageOptions


@dataclass(frozen=True)
class Asked:
    """The model of a job: its name or blob, its name for people, image options, and what it requires of data."""

    model: str | BlobRef
    called: str
    image: ImageOptions | None
    wanted: Wanted

    @property
    def fields(self) -> dict[str, Any]:
        """The model as fields of a job."""
        return {"model": self.model, "model_name": self.called, "image": self.image}


@dataclass(frozen=True)
class Roles:
    """The names that `target` and `sample_weight` give to columns or arrays of files and maps."""

    target: Target
    sample_weight: str | None

    @classmethod
    def of(cls, target: object, sample_weight: object, *given: object) -> Roles:
        """The arguments, checked. Raises InvalidRequest where none of the data are packed with one of them: it would have no effect."""
        found = cls(arguments.target(target), arguments.sample_weight(sample_weight))
        if not any(map(sources.takes_target, given)):
            for name, value in (("target", found.target), ("sample_weight", found.sample_weight)):
                if value is not None:
                    raise InvalidRequest(
                        f"{name} {value!r} names a column or array of a file or a map, but the data is neither: "
                        f"leave out {name} (--{name.replace('_', '-')})"
                    )
        return found

    def given(self, argument: str, data: object) -> sources.GivenData | str:
        """The part of `data` to be packed, or its name. Raises InvalidData."""
        return sources.given(data, self.target, self.sample_weight, argument)


class JobParts:
    """`connected` opens the connection when it is first needed: what can be checked here is checked before."""

    def __init__(self, connected: Callable[[], Awaitable[Connection]]) -> None:
        self._connected = connected

    async def model(self, model: object, image: object, *, compiled: bool) -> Asked:
        """The model for a job. Raises NotFound, InvalidModel, InvalidRequest: before the job's data are packed."""
        image = image_argument(image)
        if isinstance(model, str) and not is_model_path(model):
            info = await self._registered(model)
            signature = info.signature
            one = signature.inputs[0] if signature is not None and len(signature.inputs) == 1 else None
            shape = tuple(None if size < 0 else size for size in one.shape) if one is not None else None
            options = image_options(image, shape)
            return Asked(
                model, "", options, Wanted(shape, None, options is not None, (options or info.image) is not None)
            )
        file, ref = await self.push(model, for_jobs=True, compiled=compiled)
        called = Path(model).name if isinstance(model, str | Path) else file.name
        options = image_options(image, file.input_shape)
        known = options is not None
        return Asked(ref, called[:256], options, Wanted(file.input_shape, file.room, known, known))

    async def push(self, model: object, *, for_jobs: bool = False, compiled: bool = False) -> tuple[ModelFile, BlobRef]:
        """Check a model; only then connect, and push it."""
        with tempfile.TemporaryDirectory(prefix="potluck-") as folder:
            if for_jobs:
                file = await asyncio.to_thread(keras_file, model, Path(folder), compiled=compiled)
            else:
                file = await asyncio.to_thread(model_file, model, Path(folder))
            ref = await (await self._connected()).push(file.path)
        return file, BlobRef(sha256=ref.sha256, size=ref.size)

    async def data(
        self, argument: str, given: sources.GivenData | str, asked: Asked | None, *, for_prediction: bool = False
    ) -> str:
        """The name of a data set; data that are not registered are registered now. For prediction they keep their order and need no labels.

        Raises InvalidData, InvalidRequest and InvalidModel where the data cannot fit the model: before anything is sent, and where
        possible before anything is packed. Errors call the data `argument`.
        """
        wanted = ANYTHING if asked is None else dataclasses.replace(asked.wanted, target=not for_prediction)
        if isinstance(given, str):
            if wanted.shape is not None or wanted.only_images:
                for info in await self._datasets():
                    if info.name == given:
                        wanted.check(argument, info.kind, info.classes)
            return given
        check_fit(argument, given.item_shape, wanted.shape)
        if given.name and any(info.name == given.name and not info.packed for info in await self._datasets()):
            sources.remark_hidden(argument, given.name)
        added = await sources.add(
            await self._connected(),
            given,
            name=None,
            for_job=True,
            shuffle=not for_prediction,
            labels=not for_prediction,
            wanted=wanted,
            argument=argument,
        )
        return added.name

    async def check_known(self, name: str) -> None:
        """Raises NotFound where no data set has this name: before other data are packed for nothing."""
        known = [info.name for info in await self._datasets()]
        if name not in known:
            near = difflib.get_close_matches(name, known)
            meant = f"did you mean {' or '.join(map(repr, near))}?" if near else "`potluck data list` lists them"
            raise NotFound(f"there is no data set {name!r}: {meant}")

    async def _registered(self, model: str) -> ModelInfo:
        """A registered model. Raises NotFound, with a hint where `model` may be meant as a file, a folder or data."""
        try:
            return (await (await self._connected()).ask(GetModel(model=model), ModelRegistered)).model
        except NotFound as error:
            if sources.is_data_file(model) or any(info.name == model for info in await self._datasets()):
                raise NotFound(f"{error.message} ({model} is data: {MODEL_FIRST})") from error
            if not sources.is_here(model):
                raise
            raise NotFound(
                f"{error.message} (there is a file or folder of that name here: if that is the model, write ./{model})"
            ) from error

    async def _datasets(self) -> tuple[DatasetInfo, ...]:
        return await listings.datasets(await self._connected())
