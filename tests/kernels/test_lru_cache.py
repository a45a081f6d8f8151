"""The LRU cache against a textbook LRU cache, and its kernels against their references."""

from collections import OrderedDict

import pytest
import torch

from sparsecache.kernels import lru_cache
from sparsecache.kernels._triton import force_backend
from sparsecache.kernels.lru_cache import LRUCache
from tests.kernels.lru import CASES, empty_cache, selections

cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.fixture(autouse=True, params=["default blocks", "small blocks"])
def _blocks(request, monkeypatch) -> None:
    """Small blocks make every loop of the kernels iterate: over blocks, and over more KV heads than programs."""
    if request.param == "small blocks":
        for name, size in {"_LOOKUP_BLOCK": 16, "_INSERT_BLOCK": 16, "_COPY_ROWS": 8, "_COPY_PROGRAMS": 4}.items():
            monkeypatch.setattr(lru_cache, name, size)


@cases
@pytest.mark.parametrize("backend", ["kernels", "reference"])
def test_equals_a_textbook_lru_cache(case, backend, device) -> None:
    slots, kv_heads, tokens, size, _ = case
    lru, textbook = empty_cache(case, device), {}
    hits, latest_hits = torch.zeros(2, slots, kv_heads, dtype=torch.int64)
    store = torch.randn(slots, kv_heads, tokens, 2, 16, generator=torch.Generator().manual_seed(1))
    for order, selected, counts in selections(case, 9):
        rows = store[order[:, None, None], torch.arange(kv_heads)[:, None], selected]
        with force_backend(backend):
            step = order.to(device), selected.to(device), counts.to(device)
            lru.insert(*step, lru.lookup(*step).places, rows.to(device))
        for row, slot in enumerate(order.tolist()):
            for kv in range(kv_heads):
                cache = textbook.setdefault((slot, kv), OrderedDict())  # token to cache row, the least recent first
                valid = selected[row, kv, : counts[row, kv]].tolist()
                found = [token for token in valid if token in cache]
                for token in found:
                    cache.move_to_end(token)
                free = sorted(set(range(size)) - set(cache.values()))
                for token in [token for token in valid if token not in found][: size - len(found)]:
                    cache[token] = free.pop(0) if free else cache.popitem(last=False)[1]
                latest_hits[slot, kv] = len(found)
                hits[slot, kv] += len(found)
        for (slot, kv), cache in textbook.items():
            cached, places = list(cache), list(cache.values())
            where, held, kept = (x[slot, kv].cpu() for x in (lru.row_of_token, lru.token_of_row, lru.rows))
            expected = torch.full_like(where, -1)
            expected[cached] = torch.tensor(places, dtype=torch.int32)
            assert torch.equal(where, expected) and held[places].tolist() == cached
            assert torch.equal(kept[places], store[slot, kv, cached])
        assert torch.equal(lru.hits.cpu(), torch.stack((hits, latest_hits)))
    assert hits.sum() > 0


@cases
def test_kernels_leave_the_state_that_references_leave(case, device, agree) -> None:
    lru, width = empty_cache(case, device), case[4]
    for order, selected, counts in selections(case, 6):
        order, selected, counts = (x.to(device) for x in (order, selected, counts))
        rows = torch.randn(*selected.shape, *lru.rows.shape[3:]).to(device)

        def step(order, selected, counts, rows, *state):
            lru = LRUCache(*state)
            places, ranks, tokens, misses = lru.lookup(order, selected, counts)
            lru.insert(order, selected, counts, places, rows)
            part_size = -(-width // misses.shape[2])
            rank = torch.arange(width, device=device)
            listed = rank % part_size < misses.repeat_interleave(part_size, 2)[..., :width]
            return places.where(rank < counts[..., None], 0), ranks.where(listed, 0), tokens.where(listed, 0), misses

        agree(step, order, selected, counts, rows, *lru)
        lru.insert(order, selected, counts, lru.lookup(order, selected, counts).places, rows)


@pytest.mark.parametrize("backend", ["kernels", "reference"])
def test_hits_may_be_a_slice_of_a_wider_tensor(backend, device) -> None:
    """As where all layers share one tensor: what lies beside it is not written."""
    case = CASES["as many"]
    hits = torch.full((2, 3, case[0], case[1]), 7, dtype=torch.int64, device=device)
    lru = empty_cache(case, device)._replace(hits=hits[:, 1])
    hits[:, 1] = 0
    own = empty_cache(case, device)
    for step in selections(case, 3):
        order, selected, counts = (x.to(device) for x in step)
        rows = torch.zeros(*selected.shape, 2, 16, device=device)
        with force_backend(backend):
            for cache in (lru, own):
                cache.insert(order, selected, counts, cache.lookup(order, selected, counts).places, rows)
    assert torch.equal(hits[:, 1], own.hits) and own.hits[0].sum() > 0
    assert (hits[:, ::2] == 7).all()


def test_nothing_selected(device) -> None:
    """The reference takes a selection of width 0, as threshold_select may return."""
    case = CASES["as many"]
    lru, nothing = empty_cache(case, device), torch.zeros(1, case[1], 0, dtype=torch.int64, device=device)
    slots, counts = torch.tensor([1], device=device), torch.zeros(1, case[1], dtype=torch.int64, device=device)
    with force_backend("reference"):
        places = lru.lookup(slots, nothing, counts).places
        lru.insert(slots, nothing, counts, places, torch.zeros(1, case[1], 0, 2, 16, device=device))
    assert (lru.token_of_row == -1).all() and lru.hits.sum() == 0
