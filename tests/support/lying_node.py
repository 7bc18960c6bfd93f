"""`potluck-node` with a fake engine that claims to have evaluated more items than there are. Takes the daemon's arguments."""

from __future__ import annotations

from typing import Any

from fake_engine_node import FakeEngine

import node.daemon
from node.__main__ import main
from potluck.wire.tasks import AnyTaskResult, EvaluateResult


class LyingEngine(FakeEngine):
    async def run_task(self, *_: Any) -> AnyTaskResult:
        return EvaluateResult(count=2**53, sums={"loss": 0.0, "accuracy": 2.0**53})


if __name__ == "__main__":
    node.daemon.Engine = LyingEngine  # type: ignore[attr-defined, assignment, misc]
    main()
