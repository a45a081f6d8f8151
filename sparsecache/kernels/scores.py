"""Attention scores in plain torch, for whoever chooses by them."""

import math

from torch import Tensor

from sparsecache.kernels.rows import of_slots


def partial_scores(q: Tensor, mixing: Tensor, keys: Tensor, slots: Tensor) -> Tensor:
    """A query's scores of a slot's partial keys: q [B, H, 1, D], slots [B]; returns [B, H, T] in float32.

    mixing: [S, G, D, I] float32, what makes a query of each slot's KV heads partial; keys: [S, G, T, I], partial.
    """
    batch, heads, _, head_dim = q.shape
    mixing, keys = of_slots(mixing, slots), of_slots(keys, slots)
    partial = q.float().view(batch, mixing.shape[1], -1, head_dim) @ mixing  # [B, G, H / G, I]
    return scaled_scores(partial.view(batch, heads, 1, -1), keys, head_dim)[:, :, 0]


def scaled_scores(q: Tensor, k: Tensor, head_dim: int) -> Tensor:
    """q [.., H, Lq, I] times k [.., G, Lk, I], over sqrt(head_dim): [.., H, Lq, Lk] in float32."""
    *batch, heads, queries, columns = q.shape
    kv_heads, length = k.shape[-3:-1]
    grouped = q.float().reshape(*batch, kv_heads, heads // kv_heads * queries, columns)
    scores: Tensor = grouped @ k.float().mT / math.sqrt(head_dim)
    return scores.view(*batch, heads, queries, length)
