"""Registered and deployed models, as `Control` answers, for protocols that report them in their own words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from coordinator.control import Control
from potluck.errors import NotFound
from potluck.wire.questions import (
    DeploymentInfo,
    DeploymentsListed,
    GetModel,
    ListDeployments,
    ListModels,
    ModelInfo,
    ModelRegistered,
    ModelsListed,
)
from potluck.wire.values import Message

M = TypeVar("M", bound=Message)


class Catalog:
    """Answers of `Control`, all pages of them."""

    def __init__(self, control: Control) -> None:
        self._control = control

    def info(self, model: str) -> ModelInfo:
        """The registry's entry of `name` (the newest version), `name:version` or `name:alias`. Raises NotFound."""
        return self._ask(GetModel(model=model), ModelRegistered).model

    def models(self) -> Iterator[ModelInfo]:
        """All registered versions."""
        after, more = "", True
        while more:
            page = self._ask(ListModels(after=after), ModelsListed)
            yield from page.models
            more = page.more
            after = f"{page.models[-1].name}:{page.models[-1].version}" if page.models else ""

    def deployments(self, model: str = "") -> list[DeploymentInfo]:
        """All deployments that take requests, or those of `name` (all versions), `name:version` or `name:alias`."""
        found: list[DeploymentInfo] = []
        after, more = "", True
        while more:
            page = self._ask(ListDeployments(model=model, after=after), DeploymentsListed)
            found += [one for one in page.deployments if one.state != "retired"]
            more = page.more
            after = page.deployments[-1].name if page.deployments else ""
        return found

    def ready(self, model: str) -> bool:
        """Whether the deployment that answers for `model` takes requests now. Raises NotFound if there is none."""
        found = self.deployments(model)
        if ":" not in model:
            found = stable(found)
        if not found:
            self.info(model)  # raises another error for a name that is not registered
            raise NotFound(f"{model} is not deployed: deploy it with `potluck deploy {model}`")
        return answers(found[0])

    def _ask(self, question: Message, kind: type[M]) -> M:
        answer = self._control.answer(question)
        assert isinstance(answer, kind)
        return answer


def stable(deployments: list[DeploymentInfo]) -> list[DeploymentInfo]:
    """The deployments that answer for the plain names of their models."""
    return [one for one in deployments if one.role == "stable"]


def answers(deployment: DeploymentInfo) -> bool:
    """Whether it takes requests now: a replica is ready, or is loaded on demand."""
    parked = deployment.state in ("idle", "evicted", "withdrawn")
    return parked or any(replica.state == "ready" for replica in deployment.replicas)


def version_of(deployment: DeploymentInfo) -> str:
    return deployment.name.partition(":")[2]
