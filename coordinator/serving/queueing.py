"""The requests of one deployment that wait for a replica: higher priorities first, first come first served within one. Pure.

In strict order, low priorities would never have a turn. So one turn in SHARE goes to the request that has waited longest, and a
class keeps that share of the queue when higher classes push other requests out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice

from coordinator.serving.batches import Request

SHARE = 8
LOOK_AHEAD = 16
"""How many requests are looked at to find one for a certain replica."""


@dataclass(eq=False, slots=True)
class _Class:
    """The requests of one priority."""

    priority: int
    requests: deque[Request] = field(default_factory=deque)
    rows: int = 0


class RequestQueue:
    """`rows` counts the rows of all requests; `len` counts requests."""

    __slots__ = ("_classes", "_size", "_turn", "held", "rows")

    def __init__(self) -> None:
        self.rows = 0
        self.held = 0
        """Requests with `held_by`."""
        self._size = 0
        self._classes = [_Class(0)]
        """Highest first; none is empty unless it is the only one."""
        self._turn = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Request]:
        """Highest priority first; the queue may not change meanwhile."""
        for one in self._classes:
            yield from one.requests

    def push(self, request: Request) -> None:
        """Add a request at the end of its class."""
        own = self._class(request.priority)
        own.requests.append(request)
        own.rows += request.rows
        self.rows += request.rows
        self.held += bool(request.held_by)
        self._size += 1

    def push_front(self, request: Request) -> None:
        """Add a request at the head of its class: it had its turn, but was not answered."""
        own = self._class(request.priority)
        own.requests.appendleft(request)
        own.rows += request.rows
        self.rows += request.rows
        self.held += bool(request.held_by)
        self._size += 1

    def head(self) -> Request:
        """The request whose turn it is. The queue must not be empty."""
        own = self._classes[0] if len(self._classes) == 1 else self._next()
        return own.requests[0]

    def first(self) -> Iterator[Request]:
        """The head, and some of those that come after it."""
        head = self.head()
        yield head
        if self.held:
            yield from [request for request in islice(self, LOOK_AHEAD) if request is not head]

    def next_for(self, near: str) -> Request | None:
        """The first request whose inputs are held at `near` (`Lane.near`), or by no node; None: none of those looked at."""
        if not self._size:
            return None
        if not self.held:
            return self.head()
        return next((request for request in self.first() if request.held_by in ("", near)), None)

    def pop(self) -> Request:
        """Take the head out."""
        head = self.head()
        self.take(head)
        return head

    def take(self, request: Request) -> None:
        """Take out a request that is in the queue: it had its turn."""
        own = self._classes[0] if len(self._classes) == 1 else self._class(request.priority)
        if own.requests[0] is request:
            own.requests.popleft()
        else:
            own.requests.remove(request)
        self._turn += 1
        self._taken(own, request)

    def remove(self, request: Request) -> bool:
        """Take out a request if it is in the queue. Returns whether it was."""
        for own in self._classes:
            if own.priority == request.priority and request in own.requests:
                own.requests.remove(request)
                self._taken(own, request)
                return True
        return False

    def remove_if(self, unwanted: Callable[[Request], bool]) -> list[Request]:
        """Take out all that are unwanted."""
        found = [request for request in self if unwanted(request)]
        for request in found:
            self.remove(request)
        return found

    def crowd_out(self, priority: int) -> Request | None:
        """Take out the newest request of the lowest class below `priority`. None: such classes have no more than their share."""
        for own in reversed(self._classes):
            if own.priority >= priority:
                break
            if len(own.requests) * SHARE > self._size:
                request = own.requests.pop()
                self._taken(own, request)
                return request
        return None

    def rows_before(self, priority: int) -> int:
        """How many rows come before a new request of this priority, if no more requests come."""
        if len(self._classes) == 1:
            return self.rows if self._classes[0].priority >= priority else 0
        return sum([own.rows for own in self._classes if own.priority >= priority])

    def check_invariants(self) -> None:
        assert self._size == sum(len(own.requests) for own in self._classes)
        assert self.rows == sum(own.rows for own in self._classes)
        assert self.held == sum(bool(request.held_by) for request in self)
        for own in self._classes:
            assert own.rows == sum(request.rows for request in own.requests)
            assert all(request.priority == own.priority and not request.answered for request in own.requests)
            assert own.requests or len(self._classes) == 1
        priorities = [own.priority for own in self._classes]
        assert priorities == sorted(set(priorities), reverse=True)

    def _next(self) -> _Class:
        if self._turn % SHARE == SHARE - 1:
            return min(self._classes, key=lambda own: own.requests[0].asked_at)
        return self._classes[0]

    def _class(self, priority: int) -> _Class:
        first = self._classes[0]
        if first.priority == priority:
            return first
        if not self._size:
            self._classes[0] = own = _Class(priority)
            return own
        place = sum([own.priority > priority for own in self._classes])
        if place < len(self._classes) and self._classes[place].priority == priority:
            return self._classes[place]
        own = _Class(priority)
        self._classes.insert(place, own)
        return own

    def _taken(self, own: _Class, request: Request) -> None:
        own.rows -= request.rows
        self.rows -= request.rows
        self.held -= bool(request.held_by)
        self._size -= 1
        if not own.requests and len(self._classes) > 1:
            self._classes.remove(own)
