"""Complete listings of a cluster, asked page by page. Light to import: shell completion uses it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from msgspec.structs import replace

from potluck.client.connection import Connection
from potluck.wire.members import ListMembers, MemberInfo, MembersListed
from potluck.wire.questions import (
    DatasetInfo,
    DatasetsListed,
    DeploymentInfo,
    DeploymentsListed,
    JobChanged,
    JobsListed,
    ListDatasets,
    ListDeployments,
    ListJobs,
    ListModels,
    ListNodes,
    ModelInfo,
    ModelsListed,
    NodeInfo,
    NodesListed,
)

T = TypeVar("T")


async def jobs(connection: Connection) -> tuple[JobChanged, ...]:
    """Every job that the coordinator remembers, oldest first."""
    found: dict[str, JobChanged] = {}
    more = True
    while more:
        answer = await connection.ask(ListJobs(after=next(reversed(found), "")), JobsListed)
        more = answer.more and any(job.job_id not in found for job in answer.jobs)
        found |= {job.job_id: completed(job) for job in answer.jobs}
    return tuple(found.values())


async def models(connection: Connection) -> tuple[ModelInfo, ...]:
    """Every version of every registered model."""

    async def ask(last: ModelInfo | None) -> tuple[Sequence[ModelInfo], bool]:
        after = f"{last.name}:{last.version}" if last is not None else ""
        answer = await connection.ask(ListModels(after=after), ModelsListed)
        return answer.models, answer.more

    return await _all(ask)


async def deployments(connection: Connection) -> tuple[DeploymentInfo, ...]:
    """The deployments, with the nodes that they are on."""

    async def ask(last: DeploymentInfo | None) -> tuple[Sequence[DeploymentInfo], bool]:
        answer = await connection.ask(ListDeployments(after=last.name if last is not None else ""), DeploymentsListed)
        return answer.deployments, answer.more

    return await _all(ask)


async def datasets(connection: Connection) -> tuple[DatasetInfo, ...]:
    """The registered data sets, and those that live on nodes."""

    async def ask(last: DatasetInfo | None) -> tuple[Sequence[DatasetInfo], bool]:
        answer = await connection.ask(ListDatasets(after=last.name if last is not None else ""), DatasetsListed)
        return answer.datasets, answer.more

    return await _all(ask)


async def nodes(connection: Connection) -> tuple[tuple[NodeInfo, ...], float]:
    """The nodes by id, and the time of the answer by the coordinator's clock (0: unknown)."""
    sent_at = 0.0

    async def ask(last: NodeInfo | None) -> tuple[Sequence[NodeInfo], bool]:
        nonlocal sent_at
        answer = await connection.ask(ListNodes(after=last.node_id if last is not None else ""), NodesListed)
        sent_at = answer.sent_at
        return answer.nodes, answer.more

    return await _all(ask), sent_at


async def members(connection: Connection) -> tuple[MemberInfo, ...]:
    """The members of a closed cluster by identity, with those that were removed in the last days."""

    async def ask(last: MemberInfo | None) -> tuple[Sequence[MemberInfo], bool]:
        answer = await connection.ask(ListMembers(after=last.identity if last is not None else ""), MembersListed)
        return answer.members, answer.more

    return await _all(ask)


async def _all(ask: Callable[[T | None], Awaitable[tuple[Sequence[T], bool]]]) -> tuple[T, ...]:
    """All pages of a listing. `ask` gets the last entry of the page before; it returns the next page, and whether more follow."""
    found: list[T] = []
    more = True
    while more:
        page, more = await ask(found[-1] if found else None)
        found += page
        more = more and bool(page)
    return tuple(found)


def completed(state: JobChanged) -> JobChanged:
    """The same state. If the job succeeded, its progress shows all work as done, as the last count is from before the end."""
    if state.state != "succeeded":
        return state
    return replace(state, progress=replace(state.progress, done=state.progress.total, message=""))
