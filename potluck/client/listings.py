"""What there is in a cluster, asked to the end where it does not go into one message. Light to import: the shell asks while somebody types."""

from __future__ import annotations

from msgspec.structs import replace

from potluck.client.connection import Connection
from potluck.wire.messages import (
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
    found: list[ModelInfo] = []
    more = True
    while more:
        after = f"{found[-1].name}:{found[-1].version}" if found else ""
        answer = await connection.ask(ListModels(after=after), ModelsListed)
        found += answer.models
        more = answer.more and bool(answer.models)
    return tuple(found)


async def deployments(connection: Connection) -> tuple[DeploymentInfo, ...]:
    """What is deployed, and where."""
    found: list[DeploymentInfo] = []
    more = True
    while more:
        answer = await connection.ask(ListDeployments(after=found[-1].name if found else ""), DeploymentsListed)
        found += answer.deployments
        more = answer.more and bool(answer.deployments)
    return tuple(found)


async def datasets(connection: Connection) -> tuple[DatasetInfo, ...]:
    """The registered data sets, and those that live on nodes."""
    found: list[DatasetInfo] = []
    more = True
    while more:
        answer = await connection.ask(ListDatasets(after=found[-1].name if found else ""), DatasetsListed)
        found += answer.datasets
        more = answer.more and bool(answer.datasets)
    return tuple(found)


async def nodes(connection: Connection) -> tuple[tuple[NodeInfo, ...], float]:
    """The nodes by id, and when that was by the coordinator's clock (0: it does not say)."""
    found: list[NodeInfo] = []
    more = True
    while more:
        answer = await connection.ask(ListNodes(after=found[-1].node_id if found else ""), NodesListed)
        found += answer.nodes
        more = answer.more and bool(answer.nodes)
    return tuple(found), answer.sent_at


def completed(state: JobChanged) -> JobChanged:
    """The same state, with all of the work done where the job succeeded: the last count is from before the end."""
    if state.state != "succeeded":
        return state
    return replace(state, progress=replace(state.progress, done=state.progress.total, message=""))
