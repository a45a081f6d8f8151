"""Index rows of a cache of slots in plain torch, with at most one copy."""

import torch
from torch import Tensor


def index_slots(store: Tensor, slots: Tensor) -> Tensor:
    """Return store[slots], read-only. A store of one slot is returned as it is, without a copy.

    store: [S, ..]; slots: [B] int64.
    """
    return store if len(store) == len(slots) == 1 else store[slots]


def take_rows(store: Tensor, slots: Tensor, rows: Tensor) -> Tensor:
    """Gather rows of each slot's KV heads: [B, G, N, ..].

    store: [S, G, T, ..]; slots: [B] int64; rows: [B, G, N] int64, below T. The first three dimensions of the store
    should merge into one without a copy, else the whole store is copied.
    """
    kv_heads, capacity = store.shape[1:3]
    heads = torch.arange(kv_heads, device=rows.device)
    index = (slots[:, None, None] * kv_heads + heads[:, None]) * capacity + rows
    return store.flatten(0, 2).index_select(0, index.flatten()).view(*rows.shape, *store.shape[3:])


def mask_of_first(counts: Tensor, width: int) -> Tensor:
    """Return a mask [B, G, width], True for the first counts [B, G] entries of each KV head."""
    return torch.arange(width, device=counts.device) < counts[..., None]
