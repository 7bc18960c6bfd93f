"""Deletes models and data sets that nothing uses, with their blobs if nothing else refers to them."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from coordinator.dispatch.jobstore import JobStore
from coordinator.plans.job import Job, data_of
from coordinator.registry import Registry, dataset_blobs
from coordinator.serving.serving import Serving
from potluck.blobs.store import BlobStore
from potluck.errors import Conflict, InvalidRequest
from potluck.logs import fields
from potluck.wire.questions import ModelInfo
from potluck.wording import counted

log = logging.getLogger(__name__)


class Deletion:
    """Checks for use, removes names, and frees the store."""

    def __init__(self, registry: Registry, serving: Serving, jobs: JobStore, store: BlobStore) -> None:
        self._registry = registry
        self._serving = serving
        self._jobs = jobs
        self._store = store

    def delete_models(self, model: str, *, every: bool) -> tuple[str, ...]:
        """Delete a version, or `every` version of a name; returns the deleted versions. Deletes all or none.

        Raises NotFound; InvalidRequest if the version is ambiguous; Conflict, naming the use, if one is in use.
        """
        if every:
            models = self._registry.versions(model)
        else:
            models = (self._registry.model(model),)
            versions = self._registry.versions(models[0].name)
            if ":" not in model and len(versions) > 1:
                raise InvalidRequest(
                    f"model {model!r} has {counted(len(versions), 'version')}: name one, as in {_named(versions[-1])}, or delete all of them (--all)"
                )
        for info in models:
            self._check_model(info)
        self._registry.delete_models(models)
        deleted = tuple(map(_named, models))
        self.free([info.model.sha256 for info in models])
        log.info("models deleted %s", fields(models=",".join(deleted)))
        return deleted

    def remove_dataset(self, name: str) -> None:
        """Remove a data set. Raises NotFound; Conflict if a running job uses it."""
        blobs = dataset_blobs(self._registry.manifest(name), self._registry.dataset(name))
        if (job := self.user_of(name)) is not None:
            raise Conflict(
                f"job {job.job_id} ({job.kind}) uses data set {name!r}: wait for it, or `potluck cancel {job.job_id}` first"
            )
        self._registry.remove_dataset(name)
        self.free(ref.sha256 for ref in blobs)
        log.info("data set removed %s", fields(dataset=name))

    def user_of(self, dataset: str) -> Job | None:
        """A running job that uses a data set."""
        return next((job for job in self._active() if dataset in data_of(job.submitted.spec)), None)

    def free(self, blobs: Iterable[str]) -> list[str]:
        """Delete blobs that are not pinned and that no remembered job may still need; returns the blobs that stay."""
        results = self._jobs.results()
        return [
            sha256
            for sha256 in blobs
            if self._store.has(sha256) and (sha256 in results or not self._store.delete(sha256))
        ]

    def _check_model(self, info: ModelInfo) -> None:
        named = _named(info)
        if any(deployment.name == named for deployment in self._serving.deployments()):
            raise Conflict(f"model {named} is deployed: `potluck undeploy {named}` first")
        if info.aliases:
            alias = f"{info.name}:{info.aliases[0]}"
            raise Conflict(
                f"model {named} has the alias {alias}: give the alias to another version, or remove it, before you delete this one"
            )
        for job in self._active():
            asked = job.submitted.spec.model
            its_name = isinstance(asked, str) and asked.partition(":")[0] == info.name
            if its_name and job.submitted.model is not None and job.submitted.model.sha256 == info.model.sha256:
                raise Conflict(
                    f"job {job.job_id} ({job.kind}) uses model {named}: wait for it, or `potluck cancel {job.job_id}` first"
                )

    def _active(self) -> list[Job]:
        return [self._jobs.jobs[job_id] for job_id in self._jobs.active]


def _named(info: ModelInfo) -> str:
    return f"{info.name}:{info.version}"
