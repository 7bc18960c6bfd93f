"""What each plane is given of who we are."""

from __future__ import annotations

import ssl

import pytest

from potluck.credentials import Credentials


def test_nobody_in_particular_says_nothing() -> None:
    assert Credentials().headers == {}
    assert Credentials().scheme == "http"


def test_who_has_a_name_says_it_in_every_request() -> None:
    assert Credentials.of("node", "n-1").headers == {"Potluck-Caller": "node:n-1"}
    first, second = Credentials.of_client(), Credentials.of_client()
    assert first.identity.startswith("client:")
    assert first.identity != second.identity


def test_a_server_with_tls_is_found_at_https() -> None:
    served = Credentials(server_tls=ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
    assert served.scheme == "https"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    assert Credentials(client_tls=context, broker_tls=context).scheme == "http"
    for one in ({"client_tls": context}, {"broker_tls": context}):
        with pytest.raises(ValueError, match="the other without"):
            Credentials(**one)
