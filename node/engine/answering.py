"""The engine's boundary: an error that the user's model or data raises goes to the user, and the engine goes on."""

from __future__ import annotations

import traceback
from collections.abc import Callable

from node.engine import frames
from node.engine.memory import shortage
from node.engine.runtimes import Send
from node.engine.wording import one_line
from potluck.blobs.store import disk_full
from potluck.errors import EngineFailed, InvalidModel, PotluckError
from potluck.wire.failures import error_info


def answer(send: Send, number: int, make: Callable[[], frames.Frame | None]) -> None:
    """Send the answer to the frame of this number, or the error."""
    failure: PotluckError
    try:
        found = make()
        if found is not None:
            send(found)
        return
    except ConnectionError:
        return  # the parent is gone, and the reading thread sees that too
    except PotluckError as error:
        failure = error
    except OSError as error:
        failure = disk_full(error) or EngineFailed(f"the engine could not read or write a file: {error}")
    except Exception as error:  # noqa: BLE001 - the boundary
        short = shortage(error)
        if short is None:
            traceback.print_exc()
        failure = short or InvalidModel(f"{type(error).__name__}: {one_line(error, 600)}")
    send(failed(number, failure))


def failed(number: int, error: PotluckError) -> frames.Failed:
    return frames.Failed(number=number, error=error_info(error))
