"""Texts in shards: UTF-8, byte for byte."""

from __future__ import annotations

from potluck.data.folders import Checked, Kind, Unusable


def check(data: bytes) -> Checked:
    """Raises Unusable for what is not UTF-8, or holds nothing but white space."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise Unusable(f"not UTF-8 ({error.reason} at byte {error.start}): write it anew in UTF-8") from error
    if not text.strip():
        raise Unusable("an empty file")
    return Checked(len(data), "txt")


def write(data: bytes, checked: Checked) -> tuple[str, bytes]:
    """(suffix, bytes) as in a shard. Raises Unusable."""
    check(data)
    return checked.suffix, data


KIND = Kind(name="texts", one="text", many="texts", suffixes=frozenset({".txt"}), check=check, write=write)
