"""Gathered rows, and attention over them: equal to reading the store, with and without an LRU cache in front of it."""

import pytest
import torch

from sparsecache.kernels import gather, lru_cache
from sparsecache.kernels._triton import force_backend
from sparsecache.kernels.decode import attend_selected
from sparsecache.kernels.gather import gather_rows
from tests.kernels.lru import CASES, empty_cache, selections

cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.fixture(autouse=True, params=["default blocks", "small blocks"])
def _blocks(request, monkeypatch) -> None:
    """Small blocks make every loop of the kernels iterate: over blocks, and over more KV heads than programs."""
    if request.param == "small blocks":
        monkeypatch.setattr(gather, "_PROGRAMS", 2)
        monkeypatch.setattr(gather, "_ROWS", 8)
        for name, size in {"_LOOKUP_BLOCK": 16, "_INSERT_BLOCK": 16, "_COPY_ROWS": 8, "_COPY_PROGRAMS": 4}.items():
            monkeypatch.setattr(lru_cache, name, size)


@cases
@pytest.mark.parametrize("backend", ["kernels", "reference"])
def test_rows_equal_those_of_the_store(case, backend, device) -> None:
    slots, kv_heads, tokens, _, width = case
    store = torch.randn(slots, kv_heads, tokens, 2, 16, generator=torch.Generator().manual_seed(1)).to(device)
    lru = empty_cache(case, device)
    for order, selected, counts in selections(case, 4):
        order, selected, counts = (x.to(device) for x in (order, selected, counts))
        with force_backend(backend):
            # Cached rows must not be read from the store: there they are overwritten.
            overwritten, valid = store.clone(), torch.arange(width, device=device) < counts[..., None]
            slot, head = order[:, None, None].expand_as(valid), torch.arange(kv_heads, device=device)[:, None]
            head = head.expand_as(valid)
            cached = (lru.row_of_token[slot, head, selected] >= 0) & valid
            overwritten[slot[cached], head[cached], selected[cached]] = torch.nan
            gathered = gather_rows(overwritten, order, selected, counts, lru)
            read = gathered.cached.merge(gathered.rows, counts)
            gathered.insert(order, selected, counts)
        assert torch.equal(read[valid], store[slot[valid], head[valid], selected[valid]])


@pytest.mark.parametrize(
    ("group", "head_dim", "width", "size"),
    [(4, 32, 1, 40), (4, 32, 130, None), (4, 32, 90, 131), (1, 128, 130, 40), (8, 64, 130, 40), (8, 64, 70, None)],
)
def test_attention_over_gathered_rows(group, head_dim, width, size, device, gpu_dtype, agree) -> None:
    """Equal to attention over the rows in the store; `size` is that of the LRU cache."""
    _check_attention(group, head_dim, width, size, device, gpu_dtype, agree)


def test_attention_over_gathered_rows_in_half_precision(device, agree) -> None:
    _check_attention(4, 32, 70, 40, device, torch.float16, agree)


def _check_attention(group, head_dim, width, size, device, dtype, agree) -> None:
    slots, kv_heads, capacity, batch = 3, 2, 200, 2
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    q, k, v = draw(batch, kv_heads * group, 1, head_dim), *draw(2, batch, kv_heads, 1, head_dim)
    store = draw(slots, kv_heads, capacity, 2, head_dim)
    order = torch.tensor([2, 0], device=device)
    selected = torch.rand(2, batch, kv_heads, capacity, generator=generator).argsort(-1)[..., :width]
    selected = selected.contiguous().to(device)
    counts = torch.randint(0, width + 1, (2, batch, kv_heads), generator=generator).to(device)
    counts[:, 0, 0] = width

    def attend(q, k, v, store, order, selected, counts):
        lru = None
        if size is not None:  # filled by the step before
            lru = empty_cache((slots, kv_heads, capacity, size, width), device, head_dim, dtype)
            gather_rows(store, order, selected[0], counts[0], lru).insert(order, selected[0], counts[0])
        gathered = gather_rows(store, order, selected[1], counts[1], lru)
        if lru is not None:  # cached rows must be read from the cache
            valid = torch.arange(width, device=device) < counts[1][..., None]
            gathered.rows[(gathered.cached.places >= 0) & valid] = torch.nan
        return gathered.attend(q, k, v, counts[1])

    agree(attend, q, k, v, store, order, selected, counts)
    with force_backend("reference"):
        expected = attend_selected(q, k, v, store[..., 0, :], store[..., 1, :], order, selected[1], counts[1])
        found = attend(q, k, v, store, order, selected, counts)
    torch.testing.assert_close(found, expected)
