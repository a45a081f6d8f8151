"""Caches and selections for the tests of the LRU cache."""

import torch

from sparsecache.kernels.lru_cache import LRUCache

CASES = {  # slots, KV heads, tokens, cache rows, most tokens selected per step
    "one row": (2, 1, 20, 1, 5),
    "fewer rows than are selected": (3, 2, 50, 7, 20),
    "as many": (2, 3, 130, 64, 64),
    "rows for everything": (1, 2, 40, 40, 40),
}
if torch.cuda.is_available():
    CASES |= {"several blocks": (2, 8, 9000, 5000, 3001), "more than a block is new": (1, 4, 70_001, 3000, 7003)}
    CASES |= {"a full batch": (16, 8, 900, 200, 128)}


def empty_cache(case, device, head_dim: int = 16, dtype: torch.dtype = torch.float32) -> LRUCache:
    """An empty cache. Its rows are filled with 100, which no store holds."""
    slots, kv_heads, tokens, size, _ = case

    def full(*shape: int, fill: int = -1) -> torch.Tensor:
        return torch.full((slots, kv_heads, *shape), fill, dtype=torch.int32, device=device)

    order = torch.arange(size, dtype=torch.int32, device=device).expand(slots, kv_heads, -1).contiguous()
    rows = torch.full((slots, kv_heads, size, 2, head_dim), 100.0, device=device, dtype=dtype)
    hits = torch.zeros(2, slots, kv_heads, dtype=torch.int64, device=device)
    return LRUCache(rows, full(tokens), full(size), order, hits)


def selections(case, steps: int):
    """Yield slots, selected tokens and counts per step: two ascending runs, similar to those of the step before."""
    slots, kv_heads, tokens, _, width = case
    generator = torch.Generator().manual_seed(3)
    scores = torch.rand(slots, kv_heads, tokens, generator=generator)
    for step in range(steps):
        order = torch.randperm(slots, generator=generator)[: 1 + step % slots]
        scores += torch.rand(scores.shape, generator=generator) * 0.3
        counts = torch.randint(0, width + 1, (len(order), kv_heads), generator=generator)
        selected = scores[order].topk(width).indices
        selected = selected.masked_fill(torch.arange(width) >= counts[..., None], tokens)
        in_second_run = torch.rand(selected.shape, generator=generator) < 0.3
        run = torch.where(selected == tokens, 2, in_second_run.long())
        selected = selected.gather(-1, (selected + tokens * run).argsort(-1))
        yield order, selected.masked_fill(selected == tokens, 0), counts
