"""Every message and what it is made of, under the name that users' programs import. The map is `potluck.wire.messages`."""

from potluck.wire.births import *  # noqa: F403
from potluck.wire.commands import *  # noqa: F403
from potluck.wire.jobs import *  # noqa: F403
from potluck.wire.members import *  # noqa: F403
from potluck.wire.messages import *  # noqa: F403
from potluck.wire.questions import *  # noqa: F403
from potluck.wire.reports import *  # noqa: F403
from potluck.wire.tasks import *  # noqa: F403
from potluck.wire.values import *  # noqa: F403
