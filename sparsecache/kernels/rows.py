"""Rows of a store of slots in plain torch: copied once, or not at all."""

import torch
from torch import Tensor


def of_slots(store: Tensor, slots: Tensor) -> Tensor:
    """store[slots] of store [S, ..] and slots [B], to be read only: where it has one slot, the store itself."""
    return store if len(store) == len(slots) == 1 else store[slots]


def take_rows(store: Tensor, slots: Tensor, rows: Tensor) -> Tensor:
    """Rows of each slot's KV heads: store [S, G, T, ..], slots [B], rows [B, G, N] int64 below T; [B, G, N, ..].

    All of a store whose first three dimensions do not lie as one is copied.
    """
    kv_heads, room = store.shape[1:3]
    heads = torch.arange(kv_heads, device=rows.device)
    index = (slots[:, None, None] * kv_heads + heads[:, None]) * room + rows
    return store.flatten(0, 2).index_select(0, index.flatten()).view(*rows.shape, *store.shape[3:])
