"""The registry: models as `name:version`, immutable, and data sets by name. Event-sourced, stream `registry`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import NoReturn

from msgspec import Struct
from msgspec.structs import replace

from coordinator.journal import Journal
from potluck.errors import InvalidRequest, NotFound
from potluck.messages import BlobRef, Dataset, DatasetInfo, ImageOptions, ModelInfo, Signature

_STREAM = "registry"
_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")


class RegistryEvent(Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="event", tag=True):
    """Base of what is in the stream."""


class ModelAdded(RegistryEvent, frozen=True):
    model: ModelInfo


class SignatureLearnt(RegistryEvent, frozen=True):
    name: str
    version: int
    signature: Signature


class DatasetAdded(RegistryEvent, frozen=True):
    manifest: BlobRef
    dataset: Dataset


AnyRegistryEvent = ModelAdded | SignatureLearnt | DatasetAdded


class Registry:
    """What the journal says of models and data sets."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._models: dict[str, list[ModelInfo]] = {}
        self._datasets: dict[str, DatasetAdded] = {}
        for event in journal.replay(_STREAM, AnyRegistryEvent):  # type: ignore[arg-type, var-annotated]
            self._apply(event)

    def add_model(
        self,
        name: str,
        model: BlobRef,
        *,
        signature: Signature | None = None,
        image: ImageOptions | None = None,
        classes: Sequence[str] = (),
        rate: int = 0,
        metrics: dict[str, float] | None = None,
        job_id: str = "",
        now: float,
    ) -> ModelInfo:
        """The next version of `name`; the same bytes again keep the version they have. Raises InvalidRequest for a bad name."""
        if not _NAME.match(name):
            raise InvalidRequest(
                f"model name {name!r}: use letters, digits, '.', '_' and '-' (the version is given by us)"
            )
        versions = self._models.get(name, [])
        for known in versions:
            if known.model.sha256 == model.sha256:
                return known
        info = ModelInfo(
            name=name,
            version=versions[-1].version + 1 if versions else 1,
            model=BlobRef(sha256=model.sha256, size=model.size),
            created_at=now,
            signature=signature,
            image=image,
            classes=tuple(classes),
            rate=rate,
            metrics=metrics or {},
            job_id=job_id,
        )
        self._record(ModelAdded(model=info))
        return info

    def describe(self, model: str, signature: Signature) -> None:
        """Keep a signature that was learnt when the model was loaded."""
        info = self.model(model)
        if info.signature is None:
            self._record(SignatureLearnt(name=info.name, version=info.version, signature=signature))

    def model(self, model: str) -> ModelInfo:
        """`name` (its newest version) or `name:version`. Raises NotFound, naming what is near."""
        name, _, version = model.partition(":")
        versions = self._models.get(name)
        if versions is None:
            _nothing("model", model, self._models, "`potluck models` lists them")
        if not version:
            return versions[-1]
        for info in versions:
            if str(info.version) == version:
                return info
        known = ", ".join(str(info.version) for info in versions[-10:])
        raise NotFound(f"model {name!r} has no version {version!r}: it has {known}")

    def models(self) -> tuple[ModelInfo, ...]:
        """All versions, by name."""
        return tuple(info for name in sorted(self._models) for info in self._models[name])

    def add_dataset(self, name: str, manifest: BlobRef, dataset: Dataset) -> DatasetInfo:
        """Register a data set; another one of that name is replaced. Jobs under way keep what they began with."""
        named = replace(dataset, name=name)
        known = self._datasets.get(name)
        if known is None or known.dataset != named:
            self._record(DatasetAdded(manifest=BlobRef(sha256=manifest.sha256, size=manifest.size), dataset=named))
        return _info(named)

    def dataset(self, name: str) -> Dataset:
        """Raises NotFound, naming what is near."""
        return self._added(name).dataset

    def manifest(self, name: str) -> BlobRef:
        """The blob of a data set's manifest. Raises NotFound."""
        return self._added(name).manifest

    def datasets(self) -> tuple[DatasetInfo, ...]:
        return tuple(_info(self._datasets[name].dataset) for name in sorted(self._datasets))

    def _added(self, name: str) -> DatasetAdded:
        found = self._datasets.get(name)
        if found is None:
            _nothing("data set", name, self._datasets, "`potluck data list` lists them")
        return found

    def _record(self, event: AnyRegistryEvent) -> None:
        self._journal.append(_STREAM, event)
        self._apply(event)

    def _apply(self, event: AnyRegistryEvent) -> None:
        match event:
            case ModelAdded(model=info):
                self._models.setdefault(info.name, []).append(info)
            case SignatureLearnt():
                versions = self._models[event.name]
                for index, info in enumerate(versions):
                    if info.version == event.version:
                        versions[index] = replace(info, signature=event.signature)
            case DatasetAdded():
                self._datasets[event.dataset.name] = event


def _info(dataset: Dataset) -> DatasetInfo:
    return DatasetInfo(
        name=dataset.name,
        kind=dataset.format.kind,
        count=dataset.count,
        shards=len(dataset.shards),
        size_bytes=sum(shard.blob.size for shard in dataset.shards),
        classes=dataset.format.classes,
        skipped=len(dataset.skipped),
    )


def _nothing(what: str, name: str, known: Iterable[str], hint: str) -> NoReturn:
    near = difflib.get_close_matches(name.partition(":")[0], list(known), n=3)
    meant = f"did you mean {' or '.join(repr(one) for one in near)}?" if near else hint
    raise NotFound(f"there is no {what} {name!r}: {meant}")
