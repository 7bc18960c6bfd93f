"""How often an address may try in vain to join. Pure: time is an argument."""

from __future__ import annotations

from collections import deque
from ipaddress import IPv6Address, ip_address, ip_network

MINUTE = 60.0
EACH = 10
"""Wrong tries of one address in a minute."""
ALL = 60
"""Wrong tries of all addresses in a minute."""
KEPT = 1_000
"""How many tries are remembered: a network full of addresses costs no more."""


def neighbourhood(host: str) -> str:
    """What counts as one address: an IPv4 address, or the /64 that one machine has of IPv6."""
    try:
        found = ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(found, IPv6Address):
        if found.ipv4_mapped is not None:
            return str(found.ipv4_mapped)
        return str(ip_network((found, 64), strict=False))
    return str(found)


class Tries:
    """The wrong tries of the last minute."""

    def __init__(self, each: int = EACH, all: int = ALL) -> None:
        self._each = each
        self._all = all
        self._tries: deque[tuple[float, str]] = deque(maxlen=KEPT)
        self.count = 0
        """All of them, ever."""

    def wait(self, place: str, now: float) -> float:
        """How many seconds this place has to wait before its next try; 0: it may try."""
        self._forget(now)
        mine = [at for at, where in self._tries if where == place]
        return mine[-self._each] + MINUTE - now if len(mine) >= self._each else 0.0

    def wrong(self, place: str, now: float) -> float:
        """Count a wrong try. How many seconds to wait, if there were too many of all addresses together; 0: there were not."""
        self.count += 1
        self._forget(now)
        self._tries.append((now, place))
        return self._tries[-self._all][0] + MINUTE - now if len(self._tries) > self._all else 0.0

    def _forget(self, now: float) -> None:
        while self._tries and self._tries[0][0] + MINUTE <= now:
            self._tries.popleft()
