"""Attention scores before the softmax, in plain torch."""

import math

import torch
from torch import Tensor

from sparsecache.kernels.rows import index_slots


def partial_scores(q: Tensor, projection: Tensor, keys: Tensor, slots: Tensor) -> Tensor:
    """Score the partial keys of each slot with a query: [B, H, T] float32.

    q: [B, H, 1, D]; projection: [S, G, D, I] float32, from the query to partial channels; keys: [S, G, T, I], partial;
    slots: [B] int64.
    """
    return scaled_scores(partial_query(q, projection, slots), index_slots(keys, slots), q.shape[3])[:, :, 0]


def partial_query(q: Tensor, projection: Tensor, slots: Tensor) -> Tensor:
    """Return the partial channels of a query: [B, H, 1, I] float32; arguments as in `partial_scores`."""
    batch, heads, _, head_dim = q.shape
    projection = index_slots(projection, slots)
    partial_q = q.float().view(batch, projection.shape[1], -1, head_dim) @ projection  # [B, G, H / G, I]
    return partial_q.view(batch, heads, 1, -1)


def scaled_scores(q: Tensor, k: Tensor, head_dim: int) -> Tensor:
    """Return q k^T / sqrt(head_dim) in float32: [.., H, Lq, Lk].

    q: [.., H, Lq, I]; k: [.., G, Lk, I].
    """
    *batch, heads, queries, channels = q.shape
    kv_heads, length = k.shape[-3:-1]
    grouped = q.reshape(*batch, kv_heads, heads // kv_heads * queries, channels)
    if q.is_cuda and not batch and q.dtype == k.dtype in (torch.bfloat16, torch.float16):
        scores = torch.bmm(grouped, k.mT, out_dtype=torch.float32)  # makes no copy of the keys in float32
    else:
        scores = grouped.float() @ k.float().mT
    return scores.div_(math.sqrt(head_dim)).view(*batch, heads, queries, length)
