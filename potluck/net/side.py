"""Which of the brokers that mDNS names are for us: those of open clusters, or those of our own closed one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from potluck.settings import BrokerSettings

if TYPE_CHECKING:
    from potluck.net.discovery import Service

CA_DIGITS: Final = 16
CLOSED_PORT, CLOSED_CLIENT_PORT = BrokerSettings().closed_port, BrokerSettings().client_port
"""The ports of a closed cluster's broker, where an address names none: for nodes, and for clients."""


def ca_hint(fingerprint: bytes) -> str:
    """What mDNS says of a closed cluster: the beginning of the SHA-256 of its CA's public key, in hexadecimal digits."""
    return fingerprint.hex()[:CA_DIGITS]


@dataclass(frozen=True)
class Side:
    """Whose broker is looked for: one of an open cluster, or the one of a closed cluster, by its members or by its clients."""

    ca: str = ""
    """As in `Service.ca`."""
    client: bool = False

    def broker(self, service: Service) -> tuple[str, int] | None:
        """The broker that a service leads us to; None: none. What is not of our kind is not even tried."""
        port = service.client_port if self.ca and self.client else service.broker_port
        if service.role != "coordinator" or service.ca != self.ca or not port:
            return None
        return service.broker_host or service.host, port


OPEN = Side()
