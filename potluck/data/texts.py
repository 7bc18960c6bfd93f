"""Texts in shards: UTF-8, byte for byte."""

from __future__ import annotations

from potluck.data.folders import Checked, Kind, Unusable


def check(data: bytes) -> Checked:
    """Check a text. Raises Unusable if it is not UTF-8, or has only white space."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise Unusable(f"not UTF-8 ({error.reason} at byte {error.start}): save it again as UTF-8") from error
    if not text.strip():
        raise Unusable("an empty file")
    return Checked(len(data), "txt")


def write(data: bytes, checked: Checked) -> tuple[str, bytes]:
    """(suffix, bytes) for a shard. Raises Unusable."""
    check(data)
    return checked.suffix, data


KIND = Kind(name="texts", one="text", many="texts", suffixes=frozenset({".txt"}), check=check, write=write)
