"""Logging as the daemons do it: one line an event, `key=value`, to standard error."""

from __future__ import annotations

import logging
import os
import sys


class _KeyValueFormatter(logging.Formatter):
    default_msec_format = "%s.%03d"


def configure(level: str = "INFO") -> None:
    """Send the logs of this process to standard error; without timestamps under systemd, which adds its own."""
    stamp = "" if "JOURNAL_STREAM" in os.environ else "%(asctime)s "
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_KeyValueFormatter(f"{stamp}%(levelname)-7s %(name)s %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for noisy in ("amqtt", "transitions", "mqtt", "aiohttp.access", "zeroconf", "asyncio"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, root.level))


def fields(**values: object) -> str:
    """`key=value ...` in the order given, leaving out None; text with spaces is quoted."""
    shown = ((key, str(value)) for key, value in values.items() if value is not None)
    return " ".join(f"{key}={text!r}" if not text or " " in text else f"{key}={text}" for key, text in shown)
