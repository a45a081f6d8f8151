"""The GPU cache changes where keys and values are read, never what: any size gives the same result bit by bit."""

from collections import OrderedDict
from typing import Any

import pytest
import torch

from sparsecache.cache.base import Shape
from sparsecache.kernels._triton import INTERPRETED, force_backend
from tests.methods.infinigen.compared import ComparedRun, GivenQuery, Step

SHAPE = Shape(layers=3, heads=4, kv_heads=2, head_dim=32)
TOKEN_NBYTES = 2 * SHAPE.head_dim * 4  # key and value in float32
LENGTHS = (30, 17)
OPTIONS: dict[str, Any] = {"budget": 6, "alpha": 2.0, "partial_weight_ratio": 0.5}


def _run(steps: int = 14, shape: Shape = SHAPE, **options: Any) -> tuple[list[Step], ComparedRun]:
    """Return all steps of all sparse layers, over the same random numbers every time."""
    run = ComparedRun(shape, LENGTHS, {**OPTIONS, **options}, new_tokens=steps + 1, compare="offload" not in options)
    return [step for _ in range(steps) for step in run.step()], run


def _num_selected(steps: list[Step], row: int) -> int:
    """Return how many tokens a row's sequence selected, over all steps, layers and KV heads."""
    return sum(len(positions) for step in steps for positions in step.selected[row])


@pytest.mark.parametrize("fetch", ["mean", "per_head"])
def test_any_size_gives_the_same_result_and_what_was_fetched_and_found_adds_up(fetch) -> None:
    plain, _ = _run(fetch=fetch)
    before = None
    for tokens in (0, 1, 5, 1000):
        found, run = _run(fetch=fetch, offload=True, gpu_cache=tokens)
        assert [step.selected for step in found] == [step.selected for step in plain]
        assert all(torch.equal(a.out, b.out) for a, b in zip(found, plain, strict=True))
        fetched = []
        for row in range(len(LENGTHS)):
            report, selected = run.report(row), _num_selected(found, row)
            hits = round(report["gpu_cache_hit"] * selected)
            assert hits / selected == report["gpu_cache_hit"]
            assert report["fetched_bytes"] == (selected - hits) * TOKEN_NBYTES
            fetched.append(report["fetched_bytes"])
            assert (hits == 0) == (tokens == 0)
        assert before is None or all(a <= b for a, b in zip(fetched, before, strict=True))
        before = fetched


def test_a_cache_for_everything_fetches_each_token_once() -> None:
    steps, run = _run(offload=True, gpu_cache=1000)
    for row in range(len(LENGTHS)):
        distinct = {
            (at % 2, kv, position)
            for at, step in enumerate(steps)
            for kv, positions in enumerate(step.selected[row])
            for position in positions
        }
        assert run.report(row)["fetched_bytes"] == len(distinct) * TOKEN_NBYTES


@pytest.mark.parametrize("tokens", [1, 2, 4])
def test_the_least_recently_used_leave_first(tokens) -> None:
    """With one token a step there is no tie: the hits are those of a textbook LRU cache."""
    steps, run = _run(40, budget=0.001, offload=True, gpu_cache=tokens)
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
        assert run.report(row)["gpu_cache_hit"] == hits / _num_selected(steps, row)


@pytest.mark.skipif(not INTERPRETED, reason="a GPU runs the kernels in test_cuda.py; a CPU needs the package triton")
@pytest.mark.parametrize(("tokens", "budget"), [(1000, 6), (2, 0.001)], ids=["for everything", "without ties"])
def test_kernels_find_what_the_references_find(tokens, budget) -> None:
    """Where no two tokens of a step are equally old, so that both have the same order: the same hits."""
    options = {"shape": Shape(2, 4, 2, 32), "budget": budget, "offload": True, "gpu_cache": tokens}
    plain, expected = _run(4, **options)
    with force_backend("kernels"):
        steps, run = _run(4, **options)
    assert [step.selected for step in steps] == [step.selected for step in plain]
    for step, other in zip(steps, plain, strict=True):
        torch.testing.assert_close(step.out, other.out, rtol=1e-4, atol=1e-5)
    found, wanted = (each.layer(1)._gpu_cache for each in (run, expected))
    assert found is not None and wanted is not None
    assert torch.equal(found.hits, wanted.hits) and wanted.hits.any()
    assert [run.report(row) for row in (0, 1)] == [expected.report(row) for row in (0, 1)]


def test_steps_that_name_a_free_slot_leave_nothing_in_the_cache() -> None:
    """What such a step fetched must not be found by the next sequence in the slot."""
    options = {**OPTIONS, "offload": True, "gpu_cache": 1000}
    fresh = ComparedRun(SHAPE, (12,), options, new_tokens=9)
    used = ComparedRun(SHAPE, (12,), options, new_tokens=9)
    slots = torch.tensor([1])
    used.cache.free_slot(1)
    for _ in range(5):
        for layer, cache in enumerate(used.cache.layers):
            if layer in used.sparse_layers:
                cache.speculate(torch.randn(1, 4, 1, 32), GivenQuery(), slots)
            cache.attend(torch.randn(1, 4, 1, 32), *torch.randn(2, 1, 2, 1, 32), slots)
        used.cache.end_step(slots)
    again = ComparedRun(SHAPE, (12,), options, new_tokens=9, cache=used.cache)
    for _ in range(8):
        for first, second in zip(fresh.step(), again.step(), strict=True):
            assert first.selected == second.selected and torch.equal(first.out, second.out)
    assert again.report(0) == fresh.report(0)
