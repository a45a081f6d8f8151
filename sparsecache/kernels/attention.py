"""Plain torch attention with grouped-query heads: what prefill and decode go through without a faster kernel."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, query head h reading key/value head h // (H / G).

    q: [B, H, Lq, D]; k, v: [B, G, Lk, D] with H a multiple of G; returns [B, H, Lq, D]. Without a mask every
    query sees every key, or with `causal` (Lq == Lk) those up to its own position; no Lq x Lk tensor is built
    then. `mask` is a bool tensor [B, 1, Lq, Lk], True where a query may look; rows without a single True give
    undefined output. Raises ValueError, naming the shapes, when they do not fit; nothing is reshaped to fit.
    """
    batch, heads, queries, head_dim = q.shape
    kv_heads, length = k.shape[1], k.shape[2]
    if k.shape != (batch, kv_heads, length, head_dim) or v.shape != k.shape or heads % kv_heads:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together.")
    if causal and mask is not None:
        raise ValueError("causal attention takes no mask: build the causal rule into the mask, or leave one out.")
    if causal and queries != length:
        raise ValueError(f"causal attention needs as many queries as keys, got {queries} and {length}.")
    if mask is not None and (mask.shape != (batch, 1, queries, length) or mask.dtype != torch.bool):
        raise ValueError(
            f"mask is {mask.dtype} of shape {tuple(mask.shape)}; it must be torch.bool of shape "
            f"{(batch, 1, queries, length)} (batch, 1, queries, keys)."
        )
    group = heads // kv_heads
    if queries == 1:  # the heads of a group are as good as queries: K and V are read once, not repeated
        folded = q.reshape(batch, kv_heads, group, head_dim)
        return scaled_dot_product_attention(folded, k, v, attn_mask=mask).reshape(q.shape)
    k, v = (x.repeat_interleave(group, dim=1) if group > 1 else x for x in (k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
