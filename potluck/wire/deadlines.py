"""Until when a message is good, by the reader's clock: clocks of machines differ. Pure."""

from __future__ import annotations

from math import inf

from potluck.wire.commands import RunInference
from potluck.wire.questions import Infer
from potluck.wire.values import Message


def deadline(message: Message, now: float) -> float:
    """Unix time by this machine's clock until which a message that came at `now` is good; infinity: for ever.

    `valid_seconds` counts from receipt, so clocks need not agree; without it, the sender's `expires` counts.
    """
    if isinstance(message, Infer | RunInference) and message.valid_seconds:
        return now + message.valid_seconds
    return message.expires or inf


def too_late(message: Message, now: float, whose: str) -> str:
    """The error text for a message that came after its time; `whose`: the clock of `now`."""
    return (
        f"it came {now - message.expires:.0f} s after its time was up (`expires`) by {whose} clock: if the clocks differ, set them (NTP), "
        "or send `valid_seconds`, which counts from receipt"
    )
