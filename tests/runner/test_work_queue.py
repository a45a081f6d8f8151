"""Who gets which row next, and what becomes of a dead worker's rows; no Ray here."""

import random
from collections.abc import Iterator

import pytest

from sparsecache.cluster.work_queue import MAX_ATTEMPTS, Assigned, WorkQueue
from sparsecache.engine.base import Request


def _requests(count: int) -> list[Request]:
    return [Request(key, [key], 1, ()) for key in range(count)]


def _keys(handed: list[tuple[int, Request]]) -> list[int]:
    return [request.key for _, request in handed]


def _end(assigned: Assigned, key: int) -> None:
    (ticket,) = (ticket for ticket, request in assigned.requests.items() if request.key == key)
    del assigned.requests[ticket]


def test_rows_go_out_in_their_order_and_one_more_than_a_worker_has_slots() -> None:
    queue, first, second = WorkQueue(_requests(20), 2, slots=3), Assigned(), Assigned()
    assert _keys(queue.take(first)) == [0, 1, 2, 3]
    assert _keys(queue.take(second)) == [4, 5, 6, 7]
    assert _keys(queue.take(first)) == [8]
    assert [request.key for request in first.requests.values()] == [0, 1, 2, 3, 8]


def test_with_one_slot_the_last_rows_go_to_whoever_is_free() -> None:
    queue, busy, free = WorkQueue(_requests(6), 2, slots=1), Assigned(), Assigned()
    assert _keys(queue.take(busy)) == [0]
    assert _keys(queue.take(busy)) == [1]  # 4 left: more than one for each
    assert _keys(queue.take(free)) == [2]
    assert _keys(queue.take(busy)) == [3]
    assert _keys(queue.take(busy)) == []  # 2 left, one for each
    _end(free, 2)
    assert _keys(queue.take(free)) == [4]
    assert not queue.empty
    _end(free, 4)
    assert _keys(queue.take(free)) == [5]
    assert queue.empty


def test_requests_are_drawn_no_further_ahead_than_needed() -> None:
    drawn = []

    def requests() -> Iterator[Request]:
        for request in _requests(100):
            drawn.append(request.key)
            yield request

    queue = WorkQueue(requests(), 2, slots=2)
    assert drawn == []
    while queue.prefetch():
        pass
    assert drawn == [0, 1, 2]
    queue.take(Assigned())
    assert drawn == [0, 1, 2]


def test_a_dead_workers_waiting_rows_come_next_and_those_in_flight_are_done_alone() -> None:
    queue, dead, other = WorkQueue(_requests(20), 2, slots=2), Assigned(), Assigned()
    queue.take(dead)
    queue.take(dead)
    assert _keys(queue.take(other)) == [4, 5, 6]
    _end(dead, 1)  # so 0 and 2 were in flight, and 3 waited
    assert queue.requeue(dead) == [] and dead.requests == {}
    assert _keys(queue.take(other)) == [3]  # it has other rows in hand, and gets no suspect
    fresh = Assigned()
    assert _keys(queue.take(fresh)) == [0]
    assert queue.take(fresh) == []  # until it has ended
    _end(fresh, 0)
    assert _keys(queue.take(fresh)) == [2]
    _end(fresh, 2)
    assert _keys(queue.take(fresh)) == [7, 8, 9]
    assert _keys(queue.take(fresh)) == [10]


@pytest.mark.parametrize("slots", [1, 4])
def test_a_row_that_kills_its_worker_is_given_up_and_takes_no_other_with_it(slots) -> None:
    """Workers die on row 5, and once by accident: each other row ends once, and 5 is given up after three deaths."""
    for seed in range(50):
        draw = random.Random(seed)
        queue, holders, ended, given_up = (
            WorkQueue(_requests(30), 3, slots),
            [Assigned(), Assigned(), Assigned()],
            [],
            [],
        )
        deaths, accidents = 0, 1
        while True:
            for assigned in holders:
                while queue.take(assigned):
                    pass
            working = [assigned for assigned in holders if assigned.requests]
            if not working:
                break
            assigned = draw.choice(working)
            flying = [request.key for request in assigned.requests.values()][:slots]
            accident = 5 not in flying and accidents and draw.random() < 0.1
            if 5 in flying or accident:
                accidents, deaths = accidents - bool(accident), deaths + (5 in flying)
                given_up += [request.key for request in queue.requeue(assigned)]
            else:
                ended.append(draw.choice(flying))
                _end(assigned, ended[-1])
        assert queue.empty, seed
        assert (given_up, deaths) == ([5], MAX_ATTEMPTS), seed
        assert sorted([*ended, 5]) == list(range(30)), seed
