"""`potluck.wire.messages`, under the name that users' programs import."""

from potluck.wire.messages import *  # noqa: F403
