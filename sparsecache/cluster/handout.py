"""Which rows go to which worker, and what becomes of those whose worker dies. Knows nothing of Ray."""

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import count

from sparsecache.engine.base import Request

STRIKES = 3
Handed = list[tuple[int, Request]]
"""Requests with the tickets that their completions come back under."""


@dataclass
class Load:
    """What one worker has in hand: requests by ticket, in the order in which they were handed out."""

    requests: dict[int, Request] = field(default_factory=dict)
    alone: bool = False


class Handout:
    """The requests of a run on their way to workers that have `slots` in flight at a time.

    They are drawn one by one, a few ahead of need, and keep their order. A worker that dies gives back what it had.
    What was in flight there is suspected of having killed it, and is done again by a worker that has nothing else in
    hand; a request on which STRIKES workers died is given up.
    """

    def __init__(self, requests: Iterable[Request], workers: int, slots: int):
        self._fresh = iter(requests)
        self._workers, self._slots = workers, slots
        self._tickets = count()
        self._ready: deque[tuple[int, Request]] = deque()
        self._suspects: deque[tuple[int, Request]] = deque()
        self._deaths: Counter[int] = Counter()

    @property
    def empty(self) -> bool:
        """Whether there is nothing left to hand out."""
        return not self._suspects and not self._ready and not self.prepare()

    def prepare(self) -> bool:
        """Draws one more request, unless there are more ready than workers; returns whether it did."""
        return len(self._ready) <= self._workers and self._draw()

    def take(self, load: Load) -> Handed:
        """What a worker is to get now, noted in its load: enough to begin with, or one more.

        One at a time, a row that would only wait is held back when no more than one for each worker is left.
        """
        if not load.requests:
            load.alone = bool(self._suspects)
            # One more than can be in flight, so that the next one is there when the first one ends.
            handed = [self._suspects.popleft()] if load.alone else self._next(self._slots + (self._slots > 1))
        elif load.alone or (self._slots == 1 and self._is_nearly_empty()):
            return []
        else:
            handed = self._next(1)
        load.requests.update(handed)
        return handed

    def lost(self, load: Load) -> list[Request]:
        """Takes back what a dead worker had in hand; returns what it was the last of STRIKES workers to die on."""
        handed = list(load.requests.items())
        load.requests.clear()
        self._ready.extendleft(reversed(handed[self._slots :]))
        given_up = []
        for ticket, request in handed[: self._slots]:
            self._deaths[ticket] += 1
            if self._deaths[ticket] < STRIKES:
                self._suspects.append((ticket, request))
            else:
                given_up.append(request)
        return given_up

    def _is_nearly_empty(self) -> bool:
        while self.prepare():
            pass
        return len(self._ready) <= self._workers

    def _next(self, most: int) -> Handed:
        while len(self._ready) < most and self._draw():
            pass
        return [self._ready.popleft() for _ in range(min(most, len(self._ready)))]

    def _draw(self) -> bool:
        request = next(self._fresh, None)
        if request is not None:
            self._ready.append((next(self._tickets), request))
        return request is not None
