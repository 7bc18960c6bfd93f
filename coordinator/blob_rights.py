"""Who may get which blob from a closed cluster's coordinator, and put one there: what the blob server asks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from coordinator.callers import RoleOf
from potluck.wire.questions import JobEnded
from potluck.wire.refs import blob_refs
from potluck.wire.roles import Caller

_ALL_BLOBS = ("node", "coordinator")
"""Any node may be given any shard, so all may get all blobs."""


class BlobRights:
    """Nodes and coordinators may get every blob. Users and operators may get what the registry names, what jobs made, and what they
    have put there themselves. They alone may put blobs; how many, the store knows (its `quota_bytes`).

    `named`: whether the registry names a blob; `results`: those of all jobs that are remembered; `sent`: whether this member (the second)
    has sent a blob that has no name yet. How much one may send is for the store to say.
    """

    def __init__(
        self,
        role_of: RoleOf,
        *,
        named: Callable[[str], bool],
        results: Callable[[], Iterable[JobEnded]],
        sent: Callable[[str, str], bool],
    ) -> None:
        self._role_of = role_of
        self._named = named
        self._results = results
        self._sent = sent
        self._made: dict[str, frozenset[str]] = {}
        """The blobs of each job's result: to find them takes long, and a result never changes."""

    def allowed(self, identity: str, sha256: str) -> bool:
        """Whether this member may get the blob. It is asked of blobs that are not there, too."""
        role = self._role_of(identity)
        if role in _ALL_BLOBS:
            return True
        if not _computes(identity, role):
            return False
        return self._named(sha256) or self._sent(sha256, identity) or self._is_result(sha256)

    def may_put(self, identity: str, size: int) -> bool:
        """Whether this member may put blobs, of whatever size."""
        return _computes(identity, self._role_of(identity))

    def _is_result(self, sha256: str) -> bool:
        known, self._made = self._made, {}
        for ended in self._results():
            found = known.get(ended.job_id)
            self._made[ended.job_id] = found if found is not None else frozenset(ref.sha256 for ref in blob_refs(ended))
        return any(sha256 in made for made in self._made.values())


def _computes(identity: str, role: str | None) -> bool:
    return role is not None and Caller(identity, role).may("user")
