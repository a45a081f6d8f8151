"""Distributes requests to workers, and requeues those of a worker that died. Does not import Ray."""

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import count

from sparsecache.engine.base import Request

MAX_ATTEMPTS = 3
Tickets = list[tuple[int, Request]]
"""Requests with the numbers that their completions carry."""


@dataclass
class Assigned:
    """The requests that one worker holds, by ticket, in the order in which it got them.

    isolated: whether it holds one request alone, because a worker died on that request before.
    """

    requests: dict[int, Request] = field(default_factory=dict)
    isolated: bool = False


class WorkQueue:
    """The requests of a run, for `workers` workers that decode `slots` requests at a time.

    Requests are drawn one by one, a few ahead of need, and keep their order. When a worker dies, the requests it was
    decoding are suspects: each is tried again in a worker that holds nothing else. A request on which MAX_ATTEMPTS
    workers died is given up.
    """

    def __init__(self, requests: Iterable[Request], workers: int, slots: int):
        self._fresh = iter(requests)
        self._workers, self._slots = workers, slots
        self._numbers = count()
        self._ready: deque[tuple[int, Request]] = deque()
        self._suspects: deque[tuple[int, Request]] = deque()
        self._deaths: Counter[int] = Counter()

    @property
    def empty(self) -> bool:
        """Returns whether all requests are assigned."""
        return not self._suspects and not self._ready and not self.prefetch()

    def prefetch(self) -> bool:
        """Draws one more request unless more are ready than there are workers; returns whether it did."""
        return len(self._ready) <= self._workers and self._draw()

    def take(self, assigned: Assigned) -> Tickets:
        """Assigns a worker its next requests: its first batch, or one more.

        With one slot, a worker gets no second request once there are no more requests than workers, since it would
        only wait there.
        """
        if not assigned.requests:
            assigned.isolated = bool(self._suspects)
            # One more than can be in flight, so that the next request waits when the first one ends.
            taken = [self._suspects.popleft()] if assigned.isolated else self._next(self._slots + (self._slots > 1))
        elif assigned.isolated or (self._slots == 1 and self._is_nearly_empty()):
            return []
        else:
            taken = self._next(1)
        assigned.requests.update(taken)
        return taken

    def requeue(self, assigned: Assigned) -> list[Request]:
        """Takes back the requests of a dead worker; returns those on which MAX_ATTEMPTS workers have died."""
        requests = list(assigned.requests.items())
        assigned.requests.clear()
        self._ready.extendleft(reversed(requests[self._slots :]))
        given_up = []
        for ticket, request in requests[: self._slots]:
            self._deaths[ticket] += 1
            if self._deaths[ticket] < MAX_ATTEMPTS:
                self._suspects.append((ticket, request))
            else:
                given_up.append(request)
        return given_up

    def _is_nearly_empty(self) -> bool:
        while self.prefetch():
            pass
        return len(self._ready) <= self._workers

    def _next(self, limit: int) -> Tickets:
        while len(self._ready) < limit and self._draw():
            pass
        return [self._ready.popleft() for _ in range(min(limit, len(self._ready)))]

    def _draw(self) -> bool:
        request = next(self._fresh, None)
        if request is not None:
            self._ready.append((next(self._numbers), request))
        return request is not None
