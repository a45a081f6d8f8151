"""Attention scores in plain torch, for whoever chooses by them."""

import math

from torch import Tensor


def scaled_scores(q: Tensor, k: Tensor, head_dim: int) -> Tensor:
    """q [.., H, Lq, I] times k [.., G, Lk, I], over sqrt(head_dim): [.., H, Lq, Lk] in float32."""
    *batch, heads, queries, columns = q.shape
    kv_heads, length = k.shape[-3:-1]
    grouped = q.float().reshape(*batch, kv_heads, heads // kv_heads * queries, columns)
    scores: Tensor = grouped @ k.float().mT / math.sqrt(head_dim)
    return scores.view(*batch, heads, queries, length)
