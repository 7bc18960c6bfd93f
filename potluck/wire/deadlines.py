"""By when a message is good, by the clock of whoever reads it: clocks of machines differ. Pure."""

from __future__ import annotations

from math import inf

from potluck.wire.messages import Infer, Message, RunInference


def deadline(message: Message, now: float) -> float:
    """Unix time by this clock until which a message that came `now` is good; infinity: for ever.

    What says for how long from its receipt (`valid_seconds`) needs no clocks that agree; else it is the sender's `expires`.
    """
    if isinstance(message, Infer | RunInference) and message.valid_seconds:
        return now + message.valid_seconds
    return message.expires or inf


def too_late(message: Message, now: float, whose: str) -> str:
    """What to say of one that came when its time was up; `whose`: the clock that `now` is of."""
    return (
        f"it came {now - message.expires:.0f} s after its time was up (`expires`) by {whose} clock: where clocks differ, set them (NTP), "
        "or say `valid_seconds`, which counts from the receipt"
    )
