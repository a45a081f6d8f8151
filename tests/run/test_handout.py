"""Who gets which row next, and what becomes of a dead worker's rows; no Ray here."""

import random
from collections.abc import Iterator

import pytest

from sparsecache.cluster.handout import STRIKES, Handout, Load
from sparsecache.engine.base import Request


def _requests(count: int) -> list[Request]:
    return [Request(key, [key], 1, ()) for key in range(count)]


def _keys(handed: list[tuple[int, Request]]) -> list[int]:
    return [request.key for _, request in handed]


def _end(load: Load, key: int) -> None:
    (ticket,) = (ticket for ticket, request in load.requests.items() if request.key == key)
    del load.requests[ticket]


def test_rows_go_out_in_their_order_and_one_more_than_a_worker_has_slots() -> None:
    handout, first, second = Handout(_requests(20), 2, slots=3), Load(), Load()
    assert _keys(handout.take(first)) == [0, 1, 2, 3]
    assert _keys(handout.take(second)) == [4, 5, 6, 7]
    assert _keys(handout.take(first)) == [8]
    assert [request.key for request in first.requests.values()] == [0, 1, 2, 3, 8]


def test_with_one_slot_the_last_rows_go_to_whoever_is_free() -> None:
    handout, busy, free = Handout(_requests(6), 2, slots=1), Load(), Load()
    assert _keys(handout.take(busy)) == [0]
    assert _keys(handout.take(busy)) == [1]  # 4 left: more than one for each
    assert _keys(handout.take(free)) == [2]
    assert _keys(handout.take(busy)) == [3]
    assert _keys(handout.take(busy)) == []  # 2 left, one for each
    _end(free, 2)
    assert _keys(handout.take(free)) == [4]
    assert not handout.empty
    _end(free, 4)
    assert _keys(handout.take(free)) == [5]
    assert handout.empty


def test_requests_are_drawn_no_further_ahead_than_needed() -> None:
    drawn = []

    def requests() -> Iterator[Request]:
        for request in _requests(100):
            drawn.append(request.key)
            yield request

    handout = Handout(requests(), 2, slots=2)
    assert drawn == []
    while handout.prepare():
        pass
    assert drawn == [0, 1, 2]
    handout.take(Load())
    assert drawn == [0, 1, 2]


def test_a_dead_workers_waiting_rows_come_next_and_those_in_flight_are_done_alone() -> None:
    handout, dead, other = Handout(_requests(20), 2, slots=2), Load(), Load()
    handout.take(dead)
    handout.take(dead)
    assert _keys(handout.take(other)) == [4, 5, 6]
    _end(dead, 1)  # so 0 and 2 were in flight, and 3 waited
    assert handout.lost(dead) == [] and dead.requests == {}
    assert _keys(handout.take(other)) == [3]  # it has other rows in hand, and gets no suspect
    fresh = Load()
    assert _keys(handout.take(fresh)) == [0]
    assert handout.take(fresh) == []  # until it has ended
    _end(fresh, 0)
    assert _keys(handout.take(fresh)) == [2]
    _end(fresh, 2)
    assert _keys(handout.take(fresh)) == [7, 8, 9]
    assert _keys(handout.take(fresh)) == [10]


@pytest.mark.parametrize("slots", [1, 4])
def test_a_row_that_kills_its_worker_is_given_up_and_takes_no_other_with_it(slots) -> None:
    """Workers die on row 5, and once by accident: each other row ends once, and 5 is given up after three deaths."""
    for seed in range(50):
        draw = random.Random(seed)
        handout, loads, ended, given_up = Handout(_requests(30), 3, slots), [Load(), Load(), Load()], [], []
        deaths, accidents = 0, 1
        while True:
            for load in loads:
                while handout.take(load):
                    pass
            working = [load for load in loads if load.requests]
            if not working:
                break
            load = draw.choice(working)
            flying = [request.key for request in load.requests.values()][:slots]
            accident = 5 not in flying and accidents and draw.random() < 0.1
            if 5 in flying or accident:
                accidents, deaths = accidents - bool(accident), deaths + (5 in flying)
                given_up += [request.key for request in handout.lost(load)]
            else:
                ended.append(draw.choice(flying))
                _end(load, ended[-1])
        assert handout.empty, seed
        assert (given_up, deaths) == ([5], STRIKES), seed
        assert sorted([*ended, 5]) == list(range(30)), seed
