"""Join tokens: they survive being typed, and each typing error is found."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck.errors import InvalidRequest
from potluck.wire import tokens
from potluck.wire.tokens import JoinToken, parse

LETTERS = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
TOKEN = JoinToken(bytes(range(16)), ("192.168.1.7:7814",), b"token", b"sixteen letters!")
ENDPOINTS = st.lists(st.sampled_from(["10.0.0.1:7814", "[fe80::1]:1", "attic.lan:65535"]), max_size=4).map(tuple)
TOKENS = st.builds(
    JoinToken,
    st.binary(min_size=16, max_size=16),
    ENDPOINTS,
    st.binary(min_size=5, max_size=5),
    st.binary(min_size=16, max_size=16),
)


@given(TOKENS)
def test_there_and_back(token: JoinToken) -> None:
    text = token.text()
    assert parse(text) == token
    assert parse(f"  {text.lower()}\n") == token
    # as people read digits
    assert parse(tokens.PREFIX + text[len(tokens.PREFIX) :].replace("0", "o").replace("1", "l")) == token
    fields = text.split("-")
    assert [len(field) for field in (fields[2], *fields[4:])] == [26, 8, 26, 2]


@given(TOKENS, st.data())
def test_each_wrong_letter_is_found(token: JoinToken, data: st.DataObject) -> None:
    text = token.text()
    place = data.draw(st.integers(len(tokens.PREFIX), len(text) - 1))
    letter = data.draw(st.sampled_from(LETTERS + "-!U"))
    if letter != text[place]:
        with pytest.raises(InvalidRequest, match="copy it again"):
            parse(text[:place] + letter + text[place + 1 :])


@given(TOKENS, st.data())
def test_letters_that_changed_places_are_found(token: JoinToken, data: st.DataObject) -> None:
    text = token.text()
    place = data.draw(st.integers(len(tokens.PREFIX), len(text) - 2))
    pair = text[place : place + 2]
    if pair[0] != pair[1]:
        with pytest.raises(InvalidRequest):
            parse(text[:place] + pair[::-1] + text[place + 2 :])


@given(TOKENS, st.data())
def test_a_part_of_a_token_is_none(token: JoinToken, data: st.DataObject) -> None:
    text = token.text()
    with pytest.raises(InvalidRequest):
        parse(text[: data.draw(st.integers(0, len(text) - 1))])


@given(st.text(max_size=200))
def test_other_texts_are_none(text: str) -> None:
    for word in (text, tokens.PREFIX + text):
        with pytest.raises(InvalidRequest, match="join token"):
            parse(word)


def test_the_secret_is_not_shown() -> None:
    assert "sixteen" not in repr(TOKEN)


def test_what_is_stored_is_no_secret() -> None:
    found = tokens.hashed(TOKEN.secret)
    assert len(found) == 32
    assert found == tokens.hashed(TOKEN.secret) != tokens.hashed(b"sixteen letters?")
    assert found != hashlib.sha256(TOKEN.secret).digest(), "a hash for another purpose must differ"


@pytest.mark.parametrize("endpoint", ["", "host", "host:", ":80", "a b:1", "a,b:1", "http://a:1", "a\n:1", "a:٣"])
def test_endpoints_that_are_none(endpoint: str) -> None:
    with pytest.raises(InvalidRequest, match="not host:port"):
        JoinToken(bytes(16), (endpoint,), bytes(5), bytes(16))


def test_fields_of_other_sizes() -> None:
    for sizes in ((15, 5, 16), (16, 6, 16), (16, 5, 17)):
        with pytest.raises(InvalidRequest, match="cannot have fields"):
            JoinToken(bytes(sizes[0]), (), bytes(sizes[1]), bytes(sizes[2]))
    with pytest.raises(InvalidRequest, match="so many endpoints"):
        JoinToken(bytes(16), ("10.0.0.1:7814",) * 60, bytes(5), bytes(16))
