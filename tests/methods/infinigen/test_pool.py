"""The pool: who leaves when it is full, what a victim leaves behind, and what a prompt longer than it keeps."""

from typing import Any

import pytest
import torch
from sparsecache.methods.infinigen.pool import EVICTIONS, Pool, Selections
from torch import Tensor

from sparsecache.cache.base import Shape

CPU = torch.device("cpu")
KV_HEADS, HEAD_DIM, SLOT = 2, 4, 1
every_eviction = pytest.mark.parametrize("eviction", EVICTIONS)


class _Filled:
    """A pool of `capacity` tokens with a prompt of `length` in slot 1, whose keys and values are their positions."""

    def __init__(self, eviction: Any, length: int, capacity: int, *, rows: int = 12, layers: int = 1) -> None:
        shape = Shape(layers, KV_HEADS, KV_HEADS, HEAD_DIM)
        self.pool = Pool([CPU] * layers, 3, rows, shape, eviction, False, torch.float32)
        self.next = length
        for layer in range(layers):
            self.pool.fill(layer, SLOT, *[self._rows(length)] * 2, capacity, None)

    @staticmethod
    def _rows(length: int) -> Tensor:
        return torch.arange(float(length))[:, None].expand(KV_HEADS, -1, HEAD_DIM)

    def select(self, *positions: list[int], at: int) -> None:
        """Notes a selection of `positions` (of each KV head, as many) by the query at position `at`."""
        rows = [[self.held(kv).index(p) for p in chosen] for kv, chosen in enumerate(positions)]
        self.pool.note_selected(0, torch.tensor([SLOT]), torch.tensor([rows]), torch.tensor([at]))

    def append(self) -> list[int]:
        """One more token; returns the victim of each KV head (-1: there was room)."""
        before = [self.held(kv) for kv in range(KV_HEADS)]
        k = torch.full((1, KV_HEADS, 1, HEAD_DIM), float(self.next))
        rows = self.pool.append(0, torch.tensor([SLOT]), k, -k, torch.tensor([self.next]))
        assert [self.held(kv)[int(rows[0, kv])] for kv in range(KV_HEADS)] == [self.next] * KV_HEADS
        self.next += 1
        gone = [set(before[kv]) - set(self.held(kv)) for kv in range(KV_HEADS)]
        assert all(len(victims) <= 1 for victims in gone)
        return [victims.pop() if victims else -1 for victims in gone]

    def held(self, kv: int) -> list[int]:
        """Positions by row, of the rows that hold one."""
        rows = self.pool.rows_held(0)
        return self.pool.positions[0, SLOT, kv, :rows].tolist()


@every_eviction
def test_no_token_leaves_while_there_is_room(eviction) -> None:
    filled = _Filled(eviction, 5, 9)
    assert [filled.append() for _ in range(4)] == [[-1, -1]] * 4
    assert filled.held(0) == list(range(9))
    assert filled.pool.order(0, torch.tensor([SLOT]), 9) is None, "row i is position i"
    assert filled.append() == [0, 0]
    assert filled.pool.order(0, torch.tensor([SLOT]), 9) is not None


@every_eviction
def test_as_many_distinct_tokens_leave_as_are_asked_to(eviction) -> None:
    """The authors' LRU and counter kept evicting the same one."""
    generator = torch.Generator().manual_seed(1)
    filled = _Filled(eviction, 8, 8)
    victims: list[list[int]] = [[], []]
    for _ in range(60):
        chosen = [torch.randperm(8, generator=generator)[:3].tolist() for _ in range(KV_HEADS)]
        positions = [[filled.held(kv)[row] for row in chosen[kv]] for kv in range(KV_HEADS)]
        filled.select(*positions, at=filled.next)
        for kv, victim in enumerate(filled.append()):
            victims[kv].append(victim)
    for kv in range(KV_HEADS):
        assert len(set(victims[kv])) == 60
        assert set(victims[kv]) | set(filled.held(kv)) == set(range(68)), "nobody is lost, nobody is there twice"


def test_fifo_evicts_the_oldest_whatever_was_selected() -> None:
    filled = _Filled("fifo", 4, 4)
    victims = []
    for _ in range(6):
        filled.select([min(filled.held(0))], [min(filled.held(1))], at=filled.next)
        victims.append(filled.append())
    assert victims == [[at, at] for at in range(6)]


def test_lru_evicts_who_was_selected_longest_ago_in_each_head() -> None:
    filled = _Filled("lru", 4, 4)
    filled.select([0], [1], at=4)
    assert filled.append() == [1, 0]  # never selected: its own position counts; 4 itself came at 4
    filled.select([2], [3], at=5)
    assert filled.append() == [3, 2]
    assert filled.append() == [0, 1]  # selected at 4, as the token 4 came then: the tie goes to the lower position
    assert filled.append() == [4, 4]


def test_counter_evicts_who_was_selected_least_and_the_lowest_of_equals() -> None:
    filled = _Filled("counter", 4, 4)
    filled.select([0, 1, 3], [0, 2, 3], at=4)
    filled.select([0, 1], [0, 3], at=5)
    assert filled.append() == [2, 1]
    assert filled.append() == [4, 4], "a new token starts at zero"
    filled.select([5], [5], at=6)
    filled.select([5], [5], at=7)
    assert filled.append() == [3, 2]
    assert filled.append() == [6, 6]
    filled.select([7, 7], [7, 7], at=8)  # once in a step, however often it is named
    assert filled.append() == [7, 7]
    assert sorted(filled.held(0)) == [0, 1, 5, 8] and sorted(filled.held(1)) == [0, 3, 5, 8]


def test_counters_of_a_head_halve_when_one_of_them_saturates() -> None:
    filled = _Filled("counter", 3, 3)
    slots = torch.tensor([SLOT])
    for at in range(254):
        rows = torch.tensor([[[0, 1 if at < 7 else -1], [0, -1] if at < 100 else [-1, -1]]])
        filled.pool.note_selected(0, slots, rows, torch.tensor([at]))
    counts = filled.pool.selections[0, SLOT, :, :3]
    assert counts.tolist() == [[254, 7, 0], [100, 0, 0]]
    filled.select([0, 2], [0, 1], at=254)
    assert counts.tolist() == [[127, 3, 0], [101, 1, 0]], "of the one head only"
    assert filled.pool.selections.max() < 255


def test_a_row_is_taken_over_whole() -> None:
    filled = _Filled("counter", 4, 4)
    filled.select([0, 1, 3], [0, 1, 2], at=4)
    assert filled.append() == [2, 3]
    slots, rows = torch.tensor([SLOT]), torch.tensor([[[2, 0], [3, 0]]])
    keys, values = filled.pool.fetch(0, slots, rows)
    assert keys[0, :, :, 0].tolist() == [[4.0, 0.0], [4.0, 0.0]]
    assert values[0, :, :, 0].tolist() == [[-4.0, 0.0], [-4.0, 0.0]]
    assert filled.pool.selections[0, SLOT, 0, 2] == 0 and filled.pool.last_selected[0, SLOT, 0, 2] == 4
    assert filled.pool.order(0, slots, 4).tolist() == [[[0, 1, 3, 2], [0, 1, 2, 3]]]


@every_eviction
def test_a_long_prompt_keeps_who_would_be_evicted_last(eviction) -> None:
    selections = Selections(KV_HEADS, 6, CPU)
    selections.note(torch.tensor([[0, 2], [1, -1]]), 4)
    selections.note(torch.tensor([[0, 4], [1, 3]]), 5)
    survivors = {
        "fifo": [[3, 4, 5], [3, 4, 5]],
        "lru": [[0, 4, 5], [1, 3, 5]],  # head 0: 5 5 5; 1 3 2 4 before; head 1: 5 5 5
        "counter": [[0, 2, 4], [1, 3, 5]],
    }[eviction]
    assert selections.survivors(eviction, 3).tolist() == survivors
    shape = Shape(1, KV_HEADS, KV_HEADS, HEAD_DIM)
    pool = Pool([CPU], 2, 8, shape, eviction, False, torch.float32)
    kept = pool.fill(0, 1, *[_Filled._rows(6)] * 2, 3, selections)
    assert kept.tolist() == survivors and pool.rows_held(0) == 3
    keys, _ = pool.fetch(0, torch.tensor([1]), torch.arange(3).expand(1, KV_HEADS, -1))
    assert keys[0, :, :, 0].tolist() == survivors
    for name in ("last_selected", "selections"):
        held = getattr(pool, name)[0, 1, :, :3].tolist()
        counted = getattr(selections, name).tolist()
        assert held == [[counted[kv][at] for at in survivors[kv]] for kv in range(KV_HEADS)]


def test_evicting_one_by_one_or_at_once_keeps_the_same() -> None:
    """A prompt is cut at once; a token at a time must leave the same ones."""
    for eviction in EVICTIONS:
        filled = _Filled(eviction, 8, 8)
        selections = Selections(KV_HEADS, 8, CPU)
        for at, chosen in enumerate(([0, 5], [0, 1], [5, 2]), 8):
            filled.select(chosen, chosen, at=at)
            selections.note(torch.tensor([chosen, chosen]), at)
        victims = {filled.append()[0] for _ in range(3)} & set(range(8))
        assert set(range(8)) - victims >= set(selections.survivors(eviction, 5)[0].tolist())


def test_slots_and_layers_have_rows_of_their_own() -> None:
    filled = _Filled("fifo", 3, 3, layers=2)
    pool = filled.pool
    pool.fill(0, 2, *[_Filled._rows(5)] * 2, 12, None)
    filled.append()
    assert pool.positions[0, SLOT, 0, :3].tolist() == [3, 1, 2]
    assert pool.positions[1, SLOT, 0, :3].tolist() == [0, 1, 2]
    assert pool.positions[0, 2, 0, :5].tolist() == [0, 1, 2, 3, 4]
    assert pool.empty(0, torch.tensor([2, SLOT]), 5).tolist() == [[False] * 5, [False] * 3 + [True] * 2]


def test_a_released_slot_is_empty_and_takes_any_capacity_anew() -> None:
    filled = _Filled("counter", 4, 4)
    filled.append()
    filled.pool.release(SLOT)
    assert filled.pool.rows_held(0) == 0 and filled.pool.empty(0, torch.tensor([SLOT]), 4).all()
    filled.pool.fill(0, SLOT, *[_Filled._rows(3)] * 2, 6, None)
    filled.next = 3
    assert filled.pool.order(0, torch.tensor([SLOT]), 3) is None
    assert [filled.append() for _ in range(3)] == [[-1, -1]] * 3
    assert filled.append() == [0, 0], "nothing is left of what was counted before"


def test_offloaded_rows_lie_in_host_memory_and_are_the_same() -> None:
    shape = Shape(1, KV_HEADS, KV_HEADS, HEAD_DIM)
    pools = [Pool([CPU], 2, 8, shape, "fifo", offload, torch.float32) for offload in (False, True)]
    for pool in pools:
        pool.fill(0, 1, *[_Filled._rows(6)] * 2, 8, None)
        assert pool.keys.device == CPU and not pool.keys.is_pinned()
    fetched = [pool.fetch(0, torch.tensor([1]), torch.tensor([[[0, 5], [2, -1]]])) for pool in pools]
    assert all(torch.equal(a, b) for a, b in zip(*fetched, strict=True))


@pytest.mark.parametrize("offload", [False, True])
def test_offload_moves_keys_and_values_to_the_host_and_nothing_else(offload) -> None:
    """Seen with the device that only has shapes, in place of a GPU."""
    device = torch.device("meta")
    pool = Pool([device], 2, 8, Shape(1, KV_HEADS, KV_HEADS, HEAD_DIM), "fifo", offload, torch.float32)
    assert {pool.keys.device, pool.values.device} == {CPU if offload else device}
    assert {pool.positions.device, pool.selections.device, pool.last_selected.device} == {device}
