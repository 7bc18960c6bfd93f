"""The registry: models as `name:version`, immutable, with aliases and tags; and data sets by name. Event-sourced, stream `registry`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NoReturn

from msgspec import Struct
from msgspec.structs import replace

from coordinator.journal import Journal
from potluck.errors import InvalidRequest, NotFound
from potluck.wire.questions import DatasetInfo, ModelInfo
from potluck.wire.values import BlobRef, Dataset, ImageOptions, ModelFormat, Signature
from potluck.wording import counted

_STREAM = "registry"
DEFAULT_SCALE = 1.0 / 255.0
"""The factor for pixels that was the only default when older models were trained here."""
_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")
TAGS_LIMIT = 32
"""Most tags of a version: they travel with every list of models."""


class RegistryEvent(Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="event", tag=True):
    """Base of the events in the stream."""


class ModelAdded(RegistryEvent, frozen=True):
    model: ModelInfo


class SignatureLearnt(RegistryEvent, frozen=True):
    name: str
    version: int
    signature: Signature


class AliasSet(RegistryEvent, frozen=True):
    """The version that had the alias loses it."""

    name: str
    alias: str
    version: int


class AliasRemoved(RegistryEvent, frozen=True):
    name: str
    alias: str


class TagsSet(RegistryEvent, frozen=True):
    """`tags` are all tags of the version from now on."""

    name: str
    version: int
    tags: dict[str, str]


class ModelDeleted(RegistryEvent, frozen=True):
    name: str
    version: int


class DatasetRecorded(RegistryEvent, frozen=True, tag="DatasetAdded"):
    manifest: BlobRef
    dataset: Dataset
    packed: bool = False
    """Packed for a job; no user named it."""


class DatasetForgotten(RegistryEvent, frozen=True, tag="DatasetRemoved"):
    name: str


AnyRegistryEvent = (
    ModelAdded | SignatureLearnt | AliasSet | AliasRemoved | TagsSet | ModelDeleted | DatasetRecorded | DatasetForgotten
)


class Registry:
    """Models and data sets as the journal has them."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._models: dict[str, dict[int, ModelInfo]] = {}
        """By name and version, the newest last; a name without versions is not in it."""
        self._aliases: dict[str, dict[str, int]] = {}
        self._newest: dict[str, int] = {}
        """The highest version that each name ever had: numbers of deleted versions are not used again."""
        self._datasets: dict[str, DatasetRecorded] = {}
        self._left: dict[str, DatasetRecorded] = {}
        """Removed data sets that were packed for jobs: their blobs may still be in the store."""
        self._watchers: list[Callable[[], None]] = []
        with journal.applying(_STREAM):
            for event in journal.replay(_STREAM, AnyRegistryEvent):  # type: ignore[arg-type, var-annotated]
                if isinstance(event, DatasetRecorded):
                    self._left.pop(event.dataset.name, None)
                elif isinstance(event, DatasetForgotten) and self._datasets[event.name].packed:
                    self._left[event.name] = self._datasets[event.name]
                self._apply(event)

    def on_change(self, changed: Callable[[], None]) -> None:
        """From now on, call `changed` after every change."""
        self._watchers.append(changed)

    # --- models -------------------------------------------------------------------------------------------------------

    def add_model(
        self,
        name: str,
        model: BlobRef,
        *,
        format: ModelFormat = "keras",
        signature: Signature | None = None,
        image: ImageOptions | None = None,
        classes: Sequence[str] = (),
        rate: int = 0,
        metrics: dict[str, float] | None = None,
        tags: Mapping[str, str] | None = None,
        source: str = "",
        job_id: str = "",
        now: float,
    ) -> ModelInfo:
        """Add the next version of `name`. The same bytes, without a different image or classes, keep their version, and get the given
        tags. Raises InvalidRequest for a bad name or too many tags.
        """
        if not _NAME.match(name):
            raise InvalidRequest(
                f"model name {name!r}: use letters, digits, '.', '_' and '-' (potluck chooses the version)"
            )
        for known in reversed(self._models.get(name, {}).values()):
            if known.model.sha256 == model.sha256 and _says_the_same(known, image, classes):
                return self.tag(f"{name}:{known.version}", tags or {}) if tags else known
        info = ModelInfo(
            name=name,
            version=self._newest.get(name, 0) + 1,
            model=BlobRef(sha256=model.sha256, size=model.size),
            created_at=now,
            signature=signature,
            image=image,
            classes=tuple(classes),
            rate=rate,
            metrics=metrics or {},
            job_id=job_id,
            format=format,
            tags=_limited(name, tags or {}),
            source=source,
        )
        self._record(ModelAdded(model=info))
        return self._models[name][info.version]

    def describe(self, model: str, signature: Signature) -> None:
        """Keep a signature that was learnt when the model was loaded, if none is known or it says more than the known one."""
        info = self.model(model)
        if info.signature is None or (signature.pixel_scale and not info.signature.pixel_scale):
            self._record(SignatureLearnt(name=info.name, version=info.version, signature=signature))

    def model(self, model: str) -> ModelInfo:
        """`name` (its newest version), `name:version` or `name:alias`. Raises NotFound, naming similar names."""
        name, colon, version = model.partition(":")
        versions = self._models.get(name)
        if versions is None:
            _nothing("model", model, self._models, "`potluck models` lists them")
        if not colon:
            return next(reversed(versions.values()))
        aliases = self._aliases.get(name, {})
        found = versions.get(aliases.get(version, 0) or _number(version))
        if found is None:
            known = ", ".join([*map(str, list(versions)[-10:]), *aliases])
            raise NotFound(f"model {name!r} has no version {version!r}: it has {known}")
        return found

    def version_of(self, model: str) -> str:
        """`name:alias` as its present `name:version`; a text without an alias stays as it is."""
        name, _, alias = model.partition(":")
        version = self._aliases.get(name, {}).get(alias)
        return model if version is None else f"{name}:{version}"

    def models(self, after: str = "") -> tuple[ModelInfo, ...]:
        """All versions, by name and version; or those `after` this `name:version`, which need not exist any more."""
        name, _, version = after.partition(":")
        found = (info for known in sorted(self._models) if known >= name for info in self._models[known].values())
        return tuple(info for info in found if (info.name, info.version) > (name, _number(version or "0")))

    def versions(self, name: str) -> tuple[ModelInfo, ...]:
        """All versions of a name. Raises NotFound."""
        if name not in self._models:
            _nothing("model", name, self._models, "`potluck models` lists them")
        return tuple(self._models[name].values())

    def set_alias(self, model: str, alias: str) -> ModelInfo:
        """Let `name:alias` mean the version that `model` is. Raises NotFound."""
        info = self.model(model)
        if self._aliases.get(info.name, {}).get(alias) != info.version:
            self._record(AliasSet(name=info.name, alias=alias, version=info.version))
        return self._models[info.name][info.version]

    def remove_alias(self, model: str) -> ModelInfo:
        """Remove `name:alias`; returns the version that it named. Raises NotFound, InvalidRequest for a text that is no alias."""
        info = self.model(model)
        name, _, alias = model.partition(":")
        if alias not in self._aliases.get(name, {}):
            raise InvalidRequest(f"{model!r} is not an alias: name one, as in {name}:prod")
        self._record(AliasRemoved(name=name, alias=alias))
        return self._models[name][info.version]

    def tag(self, model: str, tags: Mapping[str, str], remove: Iterable[str] = ()) -> ModelInfo:
        """Set tags of a version, and remove others. Raises NotFound, InvalidRequest for too many."""
        info = self.model(model)
        gone = set(remove)
        after = _limited(model, {**{key: tag for key, tag in info.tags.items() if key not in gone}, **tags})
        if after != info.tags:
            self._record(TagsSet(name=info.name, version=info.version, tags=after))
        return self._models[info.name][info.version]

    def delete_models(self, models: Sequence[ModelInfo]) -> None:
        """Delete these versions. The caller has checked that nothing uses them."""
        self._record(*(ModelDeleted(name=info.name, version=info.version) for info in models))

    # --- data sets ----------------------------------------------------------------------------------------------------

    def add_dataset(self, name: str, manifest: BlobRef, dataset: Dataset, *, packed: bool = False) -> DatasetInfo:
        """Register a data set; it replaces another one with that name. Running jobs keep the one that they began with.

        `packed`: packed for a job, without a name from a user. A data set that a user named is kept even if it is also packed for a job.
        """
        named = replace(dataset, name=name)
        known = self._datasets.get(name)
        if known is None or known.dataset != named or (known.packed and not packed):
            ref = BlobRef(sha256=manifest.sha256, size=manifest.size)
            packed = packed and (known is None or known.packed)
            self._record(DatasetRecorded(manifest=ref, dataset=named, packed=packed))
        return _info(self._datasets[name])

    def packed(self) -> set[str]:
        """Names of data sets that were packed for jobs."""
        return {name for name, added in self._datasets.items() if added.packed}

    def left_behind(self) -> list[str]:
        """Blobs of packed data sets that were removed before this process started; returns them only once."""
        left, self._left = self._left, {}
        return [ref.sha256 for added in left.values() for ref in dataset_blobs(added.manifest, added.dataset)]

    def remove_dataset(self, name: str) -> None:
        """Remove a data set. The caller has checked that no job uses it. Raises NotFound."""
        self._added(name)
        self._record(DatasetForgotten(name=name))

    def dataset(self, name: str) -> Dataset:
        """The manifest of a data set. Raises NotFound, naming similar names."""
        return self._added(name).dataset

    def manifest(self, name: str) -> BlobRef:
        """The blob of a data set's manifest. Raises NotFound."""
        return self._added(name).manifest

    def datasets(self) -> tuple[DatasetInfo, ...]:
        return tuple(_info(self._datasets[name]) for name in sorted(self._datasets))

    def _added(self, name: str) -> DatasetRecorded:
        found = self._datasets.get(name)
        if found is None:
            _nothing("data set", name, self._datasets, "`potluck data list` lists them")
        return found

    # ------------------------------------------------------------------------------------------------------------------

    def check_invariants(self) -> None:
        """Aliases lead to existing versions, versions know their aliases, and no number is above the highest."""
        for name, aliases in self._aliases.items():
            assert aliases
            for alias, version in aliases.items():
                assert alias in self._models[name][version].aliases
        for name, versions in self._models.items():
            assert versions
            assert list(versions) == sorted(versions)
            assert max(versions) <= self._newest[name]
            for info in versions.values():
                assert all(self._aliases[name][alias] == info.version for alias in info.aliases)

    def _record(self, *events: AnyRegistryEvent) -> None:
        self._journal.append(_STREAM, *events)
        for event in events:
            self._apply(event)
        for changed in self._watchers:
            changed()

    def _apply(self, event: AnyRegistryEvent) -> None:
        match event:
            case ModelAdded(model=info):
                if info.job_id and not info.source:  # from before models had a source
                    info = replace(info, source=f"job {info.job_id}")
                # An entry without a scale is from before models had one.
                if info.job_id and info.image is not None and info.image.scale is None:
                    info = replace(info, image=replace(info.image, scale=DEFAULT_SCALE))
                self._models.setdefault(info.name, {})[info.version] = info
                self._newest[info.name] = max(info.version, self._newest.get(info.name, 0))
            case SignatureLearnt():
                self._change(event.name, event.version, signature=event.signature)
            case AliasSet():
                self._take_alias(event.name, event.alias)
                self._aliases.setdefault(event.name, {})[event.alias] = event.version
                had = self._models[event.name][event.version].aliases
                self._change(event.name, event.version, aliases=tuple(sorted((*had, event.alias))))
            case AliasRemoved():
                self._take_alias(event.name, event.alias)
            case TagsSet():
                self._change(event.name, event.version, tags=event.tags)
            case ModelDeleted():
                for alias in self._models[event.name][event.version].aliases:
                    self._take_alias(event.name, alias)
                del self._models[event.name][event.version]
                if not self._models[event.name]:
                    del self._models[event.name]
            case DatasetRecorded():
                self._datasets[event.dataset.name] = event
            case DatasetForgotten():
                del self._datasets[event.name]

    def _take_alias(self, name: str, alias: str) -> None:
        """Remove an alias from the version that has it, if any."""
        aliases = self._aliases.get(name, {})
        version = aliases.pop(alias, None)
        if version is not None:
            had = self._models[name][version].aliases
            self._change(name, version, aliases=tuple(one for one in had if one != alias))
        if not aliases:
            self._aliases.pop(name, None)

    def _change(self, name: str, version: int, **fields: object) -> None:
        self._models[name][version] = replace(self._models[name][version], **fields)


def pixel_scale(info: ModelInfo) -> float:
    """The factor for pixels in 8-bit arrays, the same as for image files; 1: they stay as they are; 0: unknown.

    A model that was trained here on other data than image files has seen arrays as they are.
    """
    if info.image is not None and info.image.scale is not None:
        return info.image.scale
    return 1.0 if info.job_id and info.format == "keras" and info.image is None else 0.0


def _number(version: str) -> int:
    """The number of a version text; 0, which no version has, for a text that is no number."""
    return int(version) if version.isascii() and version.isdigit() and len(version) < 10 and version[0] != "0" else 0


def _says_the_same(known: ModelInfo, image: ImageOptions | None, classes: Sequence[str]) -> bool:
    """Whether adding it again with these would make the same version; what is not given does not differ."""
    return image in (None, known.image) and tuple(classes) in ((), known.classes)


def _limited(model: str, tags: Mapping[str, str]) -> dict[str, str]:
    if len(tags) > TAGS_LIMIT:
        raise InvalidRequest(
            f"model {model!r} would have {counted(len(tags), 'tag')}: the limit is {TAGS_LIMIT}: remove some"
        )
    return dict(tags)


def dataset_blobs(manifest: BlobRef, dataset: Dataset) -> list[BlobRef]:
    """Every blob that a registered data set needs."""
    keys = [dataset.keys] if dataset.keys else []
    return [manifest, *keys, *(shard.blob for shard in dataset.shards)]


def _info(added: DatasetRecorded) -> DatasetInfo:
    dataset = added.dataset
    return DatasetInfo(
        name=dataset.name,
        kind=dataset.format.kind,
        count=dataset.count,
        shards=len(dataset.shards),
        size_bytes=sum(shard.blob.size for shard in dataset.shards),
        classes=dataset.format.classes,
        skipped=len(dataset.skipped),
        packed=added.packed,
    )


def _nothing(what: str, name: str, known: Iterable[str], hint: str) -> NoReturn:
    near = difflib.get_close_matches(name.partition(":")[0], list(known), n=3)
    meant = f"did you mean {' or '.join(repr(one) for one in near)}?" if near else hint
    raise NotFound(f"there is no {what} {name!r}: {meant}")
