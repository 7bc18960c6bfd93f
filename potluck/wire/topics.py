"""Every topic: who publishes to it, at what QoS, retained or not. Root: `potluck/v1/<cluster>/`.

| topic                 | publisher   | QoS | retained | messages                                             |
|-----------------------|-------------|-----|----------|------------------------------------------------------|
| coordinator/status    | coordinator | 1   | yes      | CoordinatorStatus (also its will)                    |
| coordinator/inbox     | clients     | 1   | no       | questions: List*, Get*, CancelJob, StopTraining, FollowEvents, of data sets and models |
| nodes/<id>/status     | node        | 1   | yes      | NodeStatus (also its will)                           |
| nodes/<id>/capacity   | node        | 1   | yes      | NodeCapacity                                         |
| nodes/<id>/telemetry  | node        | 0   | no       | NodeTelemetry, always JSON                           |
| nodes/<id>/inbox      | coordinator | 1/0 | no       | commands to the node (inference at QoS 0)            |
| nodes/<id>/outbox     | node        | 1/0 | no       | events of the node (InferenceFinished at QoS 0)      |
| jobs/submit           | clients     | 1   | no       | SubmitJob                                            |
| jobs/<id>/status      | coordinator | 1   | expires  | JobChanged                                           |
| jobs/<id>/events      | coordinator | 0   | no       | JobChanged, as often as there is something new       |
| jobs/<id>/result      | coordinator | 1   | expires  | JobEnded                                             |
| models/<name>/infer   | clients     | any | no       | Infer, CancelInfer                                   |
| clients/<id>/inbox    | coordinator | any | no       | answers                                              |

In a closed cluster the topic of each message proves who sent it, because the broker lets nobody write another's topics:

| topic                           | publisher   | QoS | retained | messages                                   |
|---------------------------------|-------------|-----|----------|--------------------------------------------|
| clients/<name>/to/<topic>       | client      | any | no       | what goes to <topic> in an open cluster    |
| clients/<name>/<session>/inbox  | coordinator | any | no       | answers                                    |
| coordinator/proof               | coordinator | 1   | yes      | CoordinatorProof                           |
| nodes/<id>/inbox                | coordinator | 1/0 | no       | Sealed commands                            |
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from potluck.errors import InvalidRequest, InvalidSettings

ROOT = "potluck/v1"
NODE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SEGMENT = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,160}\Z")


def check_node_id(node_id: str) -> None:
    """Raises InvalidSettings for an id that a topic cannot contain."""
    if not NODE_ID.fullmatch(node_id):
        raise InvalidSettings(
            f"node id {node_id!r}: use letters, digits, '.', '_' and '-', beginning with a letter or digit, at most 64"
        )


@dataclass(frozen=True)
class Topics:
    """The topics of one cluster. Raises InvalidSettings for a cluster name that a topic cannot contain.

    `client`: the name of the member of a closed cluster whose questions these topics are for; "": an open cluster, or no client.
    """

    cluster: str
    client: str = ""

    def __post_init__(self) -> None:
        if not _SEGMENT.match(self.cluster):
            raise InvalidSettings(f"cluster name {self.cluster!r}: use letters, digits, '.', '_' and '-'")

    @property
    def root(self) -> str:
        return f"{ROOT}/{self.cluster}"

    @property
    def coordinator_status(self) -> str:
        return f"{self.root}/coordinator/status"

    @property
    def coordinator_proof(self) -> str:
        return f"{self.root}/coordinator/proof"

    @property
    def coordinator_inbox(self) -> str:
        return self._asked("coordinator/inbox")

    @property
    def jobs_submit(self) -> str:
        return self._asked("jobs/submit")

    def node(self, node_id: str, leaf: str) -> str:
        """`leaf` is status, capacity, telemetry, inbox or outbox; `node_id` may be `+` in a filter."""
        return f"{self.root}/nodes/{node_id}/{leaf}"

    def job(self, job_id: str, leaf: str) -> str:
        """`leaf` is status, events or result; `job_id` may be `+` in a filter."""
        return f"{self.root}/jobs/{job_id}/{leaf}"

    def infer(self, name: str) -> str:
        return self._asked(f"models/{name}/infer")

    def client_inbox(self, client_id: str) -> str:
        """Where the answers to a client's process come, which `client_id` names. Raises ValueError for `to`, which is no process."""
        if client_id == "to":
            raise ValueError("no client's process may be called 'to'")
        return f"{self.root}/clients/{self.client + '/' if self.client else ''}{client_id}/inbox"

    @property
    def asked(self) -> str:
        """The filter of all that clients of a closed cluster ask."""
        return f"{self.root}/clients/+/to/#"

    def asked_by(self, topic: str) -> tuple[str, str]:
        """(the client's name, the topic as in an open cluster) of a question in a closed cluster; ("", `topic`) of all else."""
        parts = topic.removeprefix(f"{self.root}/").split("/", 3) if topic.startswith(f"{self.root}/clients/") else []
        if len(parts) == 4 and parts[2] == "to":
            return parts[1], f"{self.root}/{parts[3]}"
        return "", topic

    def _asked(self, leaf: str) -> str:
        return f"{self.root}/{f'clients/{self.client}/to/' if self.client else ''}{leaf}"

    def segment(self, topic: str, index: int) -> str:
        """The `index`-th segment below the cluster's root: `segment('.../nodes/n1/inbox', 1)` is `n1`."""
        return topic[len(self.root) + 1 :].split("/")[index]

    def is_question(self, topic: str) -> bool:
        """Whether a message on this topic may be answered. On all other topics several listen, and each would answer."""
        parts = topic[len(self.root) + 1 :].split("/") if topic.startswith(f"{self.root}/") else []
        return parts in (["coordinator", "inbox"], ["jobs", "submit"]) or (
            len(parts) == 3 and parts[0] == "models" and parts[2] == "infer"
        )

    def check_reply_to(self, topic: str, caller: str = "") -> str:
        """`topic`, if an answer may go there. Raises InvalidRequest: nobody may make the coordinator write to a node.

        `caller`: the identity of the client of a closed cluster that asks; its answers go to its own processes only.
        """
        # a broker disconnects a client that publishes to a topic with control characters or hundreds of levels
        usable = topic.isprintable() and topic.count("/") < 100 and not any(sign in topic for sign in "+#")
        if not topic or not usable or len(topic.encode()) > 1024 or topic.startswith("$"):
            raise InvalidRequest(f"reply_to {topic[:80]!r} is not a topic that can be published to")
        if caller:
            own = f"{self.root}/clients/{caller.partition(':')[2]}/"
            session = topic.removeprefix(own).removesuffix("/inbox")
            if topic != f"{own}{session}/inbox" or not _SEGMENT.match(session) or session == "to":
                raise InvalidRequest(f"reply_to {topic[:80]!r}: {caller} may use only {own}<process>/inbox")
        elif topic.startswith(f"{ROOT}/") and not topic.startswith(f"{self.root}/clients/"):
            raise InvalidRequest(
                f"reply_to {topic[:80]!r}: below {ROOT}/ only {self.root}/clients/<id>/... may be used"
            )
        return topic
