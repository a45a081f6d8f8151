"""The GPU cache changes where keys and values are read, never what: any size, same result bit by bit."""

from collections import OrderedDict
from typing import Any

import pytest
import torch

from sparsecache.cache.base import Shape
from sparsecache.kernels._triton import INTERPRETED, running
from sparsecache.methods.infinigen import InfiniGen

SHAPE = Shape(layers=3, heads=4, kv_heads=2, head_dim=32)
TOKEN_BYTES = 2 * SHAPE.head_dim * 4  # key and value in float32
LENGTHS = (30, 17)
OPTIONS: dict[str, Any] = {"budget": 6, "alpha": 2.0, "partial_weight_ratio": 0.5}
pools = pytest.mark.parametrize(
    "pool",
    [
        {},
        {"capacity": 0.5},
        {"capacity": 12, "eviction": "lru"},
        {"capacity": 20, "eviction": "fifo", "fetch": "per_head"},
    ],
    ids=str,
)


def _run(play: Any, steps: int = 14, **options: Any) -> tuple[list[Any], InfiniGen]:
    """All steps of all sparse layers, the same random ones every time."""
    played = play(SHAPE, LENGTHS, {**OPTIONS, **options}, new_tokens=steps + 1, compare="offload" not in options)
    return [step for _ in range(steps) for step in played.step()], played.method


def _read(steps: list[Any], row: int) -> int:
    """How many tokens a row's sequence selected, over all steps, layers and KV heads."""
    return sum(len(positions) for step in steps for positions in step.selected[row])


@pools
def test_offload_and_any_size_give_the_same_selections_and_outputs(pool, play) -> None:
    plain, _ = _run(play, **pool)
    for tokens in (0, 1, 3, 7, 1000):
        found, _ = _run(play, **pool, offload=True, gpu_cache=tokens)
        assert [step.selected for step in found] == [step.selected for step in plain]
        assert all(torch.equal(a.out, b.out) for a, b in zip(found, plain, strict=True))


@pools
def test_what_was_fetched_and_what_was_found_add_up(pool, play) -> None:
    fetched_before = None
    for tokens in (0, 1, 5, 1000):
        steps, method = _run(play, **pool, offload=True, gpu_cache=tokens)
        fetched = []
        for row in range(len(LENGTHS)):
            report, read = method.report(row + 1), _read(steps, row)
            hits = round(report["gpu_cache_hit"] * read)
            assert hits / read == report["gpu_cache_hit"]
            assert report["fetched_bytes"] == (read - hits) * TOKEN_BYTES
            fetched.append(report["fetched_bytes"])
            assert (hits == 0) == (tokens == 0)
        assert fetched_before is None or all(a <= b for a, b in zip(fetched, fetched_before, strict=True))
        fetched_before = fetched


def test_a_cache_for_everything_fetches_each_token_once(play) -> None:
    steps, method = _run(play, offload=True, gpu_cache=1000)
    for row in range(len(LENGTHS)):
        distinct = {
            (at % 2, kv, position)
            for at, step in enumerate(steps)
            for kv, positions in enumerate(step.selected[row])
            for position in positions
        }
        assert method.report(row + 1)["fetched_bytes"] == len(distinct) * TOKEN_BYTES


@pytest.mark.parametrize("tokens", [1, 2, 4])
def test_the_least_recently_used_go_first(tokens, play) -> None:
    """With one token a step there is no tie: the hits are those of a textbook LRU cache."""
    steps, method = _run(play, 40, budget=0.001, offload=True, gpu_cache=tokens)
    for row in range(len(LENGTHS)):
        caches: dict[tuple[int, int], OrderedDict[int, None]] = {}
        hits = 0
        for at, step in enumerate(steps):
            for kv, (position,) in enumerate(step.selected[row]):
                cache = caches.setdefault((at % 2, kv), OrderedDict())
                hits += position in cache
                cache[position] = None
                cache.move_to_end(position)
                if len(cache) > tokens:
                    cache.popitem(last=False)
        assert hits > 3
        assert method.report(row + 1)["gpu_cache_hit"] == hits / _read(steps, row)


@pytest.mark.skipif(not INTERPRETED, reason="a GPU runs the kernels in test_cuda.py; a CPU needs the package triton")
@pytest.mark.parametrize(("tokens", "budget"), [(1000, 6), (2, 0.001)], ids=["for everything", "without ties"])
def test_kernels_find_what_the_plain_path_finds(tokens, budget, play) -> None:
    """Where no two tokens of a step are as old, so that both have the same order: the same hits, layer by layer."""
    plain, expected = _run(play, 7, budget=budget, offload=True, gpu_cache=tokens)
    with running("kernels"):
        steps, method = _run(play, 7, budget=budget, offload=True, gpu_cache=tokens)
        assert method._unbounded is not None
    assert [step.selected for step in steps] == [step.selected for step in plain]
    for step, other in zip(steps, plain, strict=True):
        torch.testing.assert_close(step.out, other.out, rtol=1e-4, atol=1e-5)
    assert torch.equal(method._gpu_cache.found, expected._gpu_cache.found) and expected._gpu_cache.found.any()
    assert [method.report(slot) for slot in (1, 2)] == [expected.report(slot) for slot in (1, 2)]


def test_a_row_that_holds_another_token_now_is_fetched_anew() -> None:
    """A pool of four tokens, all of them selected at every step and in the cache when one is replaced."""
    shape = Shape(layers=2, heads=1, kv_heads=1, head_dim=8)
    slots, past = torch.tensor([0]), 4
    runs = []
    for tokens in (0, 50):
        torch.manual_seed(5)
        method = InfiniGen(
            budget=9, alpha=torch.inf, dense_layers=1, skew=False, capacity=4, offload=True, gpu_cache=tokens
        )
        method.allocate(shape, 1, 30, torch.device("cpu"), torch.float32)
        for layer in range(2):
            method.prefill(layer, 0, *torch.randn(3, 1, past, 8), 26)
        outs = []
        for _ in range(9):
            for layer in range(2):
                if method.guesses(layer):
                    method.anticipate(layer, torch.randn(1, 1, 1, 8), slots)
                outs.append(method.attend(layer, *torch.randn(3, 1, 1, 1, 8), slots))
        runs.append(torch.stack(outs))
        if tokens:  # 4 tokens at the first step, then only the one that came in: 12 of 36 selected
            assert method.report(0) | {"kept": None} == {
                "kept": None,
                "sparse_steps": 9,
                "capped_steps": 3,
                "dense_layers": 1,
                "fetched_bytes": 12 * 2 * 8 * 4,
                "gpu_cache_hit": 24 / 36,
            }
    assert torch.equal(*runs)


def test_steps_that_name_an_empty_slot_leave_nothing_in_the_cache(play) -> None:
    """What such a step fetched must not be found by the sequence that comes into the slot."""
    options = {**OPTIONS, "offload": True, "gpu_cache": 1000}
    fresh = play(SHAPE, (12,), options, new_tokens=9)
    disturbed = play(SHAPE, (12,), options, new_tokens=9)
    method, slots = disturbed.method, torch.tensor([1])
    method.release(1)
    for _ in range(5):
        for layer in range(3):
            if method.guesses(layer):
                method.anticipate(layer, torch.randn(1, 4, 1, 32), slots)
            method.attend(layer, torch.randn(1, 4, 1, 32), *torch.randn(2, 1, 2, 1, 32), slots)
    again = play(SHAPE, (12,), options, new_tokens=9, method=method)
    for _ in range(8):
        for first, second in zip(fresh.step(), again.step(), strict=True):
            assert first.selected == second.selected and torch.equal(first.out, second.out)
    assert method.report(1) == fresh.method.report(1)
