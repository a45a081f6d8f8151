"""A full pool: who leaves it, step by step against the slow one."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsecache.cache.base import Shape
from sparsecache.methods.infinigen import InfiniGen

CPU = torch.device("cpu")
every_eviction = pytest.mark.parametrize("eviction", ["fifo", "lru", "counter"])


@every_eviction
@pytest.mark.parametrize("length", [7, 30, 60], ids=["shorter", "a little longer", "much longer"])
@pytest.mark.parametrize("options", [{"capacity": 12}, {"capacity": 0.4, "fetch": "per_head", "sinks": 1}], ids=str)
def test_a_full_pool_evicts_as_the_page_says(options, length, eviction, play) -> None:
    """A prompt longer than the capacity is replayed; the other row of the batch is not full for a while."""
    shape = Shape(layers=3, heads=4, kv_heads=2, head_dim=32)
    options = {"alpha": 3.0, "budget": 5, "eviction": eviction, "partial_weight_ratio": 0.5, **options}
    played = play(shape, (length, 6), options, new_tokens=24)
    for _ in range(23):
        played.step()
    slow = played.slow[1, 0]
    evicted = length + 23 - slow.capacity
    assert [len(victims) for victims in slow.evicted] == [max(0, evicted)] * 2
    assert played.method._pool.rows_held(0) == max(slow.capacity, min(29, played.slow[1, 1].capacity))


@every_eviction
def test_a_full_pool_with_ties_evicts_the_lowest_position(eviction, play, small_numbers) -> None:
    shape = Shape(layers=2, heads=4, kv_heads=2, head_dim=16)
    options = {"skew": False, "alpha": 0.75, "budget": 6, "eviction": eviction, "capacity": 10}
    for length in (4, 45):
        played = play(shape, (length,), options, draw=small_numbers(length), new_tokens=31)
        for _ in range(30):
            played.step()


def test_counters_saturate_and_halve(play) -> None:
    """Over so many steps that the order of eviction tells it."""
    shape = Shape(layers=2, heads=1, kv_heads=1, head_dim=16)
    options = {"alpha": math.inf, "budget": 4, "capacity": 6, "skew": False}
    played = play(shape, (6,), options, new_tokens=700, draw=_drifting(16))
    most = 0
    for _ in range(690):
        played.step()
        most = max(most, *(token.selections for token in played.slow[1, 0].tokens[0].values()))
    assert most == 254
    assert played.method._pool.selections.max() <= 254


def _drifting(head_dim: int) -> Any:
    """Some keys are liked by all queries and stay for long; what is liked turns slowly."""
    generator, at = torch.Generator().manual_seed(2), 0

    def draw(*size: int) -> Tensor:
        nonlocal at
        at += 1
        angle = torch.tensor(at / 900 * math.pi)
        liked = torch.zeros(head_dim)
        liked[0], liked[1] = 3 * angle.cos(), 3 * angle.sin()
        return liked * torch.rand(*size[:-1], 1, generator=generator) + torch.randn(*size, generator=generator) / 2

    return draw


@every_eviction
def test_a_victim_is_never_selected_again_nor_read_from_the_gpu_cache(eviction, play) -> None:
    """Also where the victim was the best of all and still lies in the cache."""
    shape = Shape(layers=2, heads=2, kv_heads=1, head_dim=32)
    options = {"alpha": math.inf, "budget": 1.0, "capacity": 8, "eviction": eviction, "offload": True}
    for tokens in (0, 3, 100):
        played = play(shape, (15,), {**options, "gpu_cache": tokens}, new_tokens=31)
        for _ in range(30):
            (step,) = played.step()
            gone = played.slow[1, 0].evicted[0]
            held = set(played.slow[1, 0].tokens[0])
            assert len(step.selected[0][0]) == 8
            assert not gone & held
        assert len(gone) == 15 + 30 - 8


@pytest.mark.parametrize("capacity", [1.0, 70, 10**6])
def test_capacity_for_everything_evicts_nothing(capacity, play) -> None:
    shape = Shape(layers=2, heads=2, kv_heads=1, head_dim=32)
    played = play(shape, (40,), {"capacity": capacity, "budget": 1.0, "alpha": math.inf}, new_tokens=30)
    for at in range(29):
        (step,) = played.step()
        assert step.selected == [[list(range(40 + at))]]


@pytest.mark.parametrize(
    ("share", "length", "new", "capacity"),
    [(0.5, 10, 5, 8), (0.1, 25, 5, 3), (0.01, 5, 5, 1), (0.3, 7, 3, 3), (7, 90, 9, 7), (0.7, 9, 1, 7)],
)
def test_the_capacity_is_the_share_of_prompt_and_new_tokens_rounded_up(share, length, new, capacity, play) -> None:
    shape = Shape(layers=2, heads=2, kv_heads=1, head_dim=32)
    played = play(shape, (length,), {"capacity": share, "budget": 1.0, "alpha": math.inf}, new_tokens=new)
    (step,) = played.step()
    assert len(step.selected[0][0]) == min(length, capacity)


@pytest.mark.parametrize(("asked_at", "kept"), [(16, False), (17, False), (18, True), (19, True), (49, True)])
def test_a_prompt_is_replayed_with_its_last_32_true_queries(asked_at, kept) -> None:
    """Of 50 tokens 34 stay, by recency: 0, which every indifferent query selects, 18 to 49, and one more.

    That is 5 if its one query is among the last 32, from position 18 on, and 17 otherwise.
    """
    shape = Shape(layers=2, heads=1, kv_heads=1, head_dim=64)
    method = InfiniGen(budget=0.001, alpha=1.0, dense_layers=1, skew=False, capacity=34, eviction="lru")
    method.allocate(shape, 1, 60, CPU, torch.float32)
    q, k = torch.zeros(1, 50, 64), torch.zeros(1, 50, 64)
    q[0, asked_at, 3], k[0, 5, 3] = 40.0, 40.0
    for layer in range(2):
        method.prefill(layer, 0, q, k, torch.randn(1, 50, 64), 9)
    held = set(method._pool.positions[0, 0, 0, :34].tolist())
    assert held == {0, *range(18, 50), 5 if kept else 17}
