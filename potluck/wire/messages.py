"""Every message on the wire: read this first.

A message is a plain map whose `type` is the class name: commands in the imperative (`LeaseShard`), events in the past tense
(`ShardFinished`). Unknown fields are ignored, new fields have defaults, types never change; the golden files in
`tests/contract/golden` freeze the wire. A message is complete without MQTT 5: `id`, `reply_to` and `expires` are in
the body. An answer has the `id` of its question.

Units: `*_seconds` are seconds, `*_bytes` bytes, `*_at` and `expires` Unix time in seconds.

Where they stand, each file after those that it imports:

- `values.py`: what several messages are made of: limits, names and numbers, `BlobRef`, `Tensor`, `DataFormat`.
- `jobs.py`: jobs, as users ask for them (`AnyJobSpec`), and what is told of how they go.
- `tasks.py`: what one node does for a shard (`AnyTask`), and the results (`AnyTaskResult`).
- `questions.py`: what clients ask, and what the coordinator answers; `members.py`: the same about who belongs to a closed cluster.
- `births.py`: what nodes and the coordinator say of themselves.
- `commands.py`: what the coordinator tells a node.
- `reports.py`: what a node reports to the coordinator.
"""

from __future__ import annotations

from potluck.wire.births import AnyBirth
from potluck.wire.commands import AnyCommand
from potluck.wire.members import AnyMemberQuestion
from potluck.wire.questions import AnyQuestion
from potluck.wire.reports import AnyReport

AnyMessage = AnyQuestion | AnyMemberQuestion | AnyBirth | AnyCommand | AnyReport
