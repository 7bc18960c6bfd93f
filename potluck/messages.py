"""`potluck.wire.messages`, by the name that programs of users have it by."""

from potluck.wire.messages import *  # noqa: F403
