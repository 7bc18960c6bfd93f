"""`potluck-node` that says in its log why it takes each message not, and not only the first of a minute. Takes the daemon's arguments."""

from __future__ import annotations

import logging

from node.__main__ import main
from potluck.bus.exchange import Bus
from potluck.wire.seals import SealRefused

log = logging.getLogger("potluck.telling")
refuse = Bus._refuse_seal


def tell(bus: Bus, topic: str, error: SealRefused) -> None:
    refuse(bus, topic, error)
    log.warning("refused_seals=%d reason=%s", bus.counters["refused_seals"], error.message)


if __name__ == "__main__":
    Bus._refuse_seal = tell  # type: ignore[method-assign]
    main()
