"""Plain torch attention with grouped-query heads: what prefill and decode go through without a faster kernel."""

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from sparsecache.kernels._triton import uses_kernels

# cuDNN makes a plan for every new shape, on the host, at the first attention over it.
_ROUND = 512  # tokens, to which lengths of prompts are rounded for it
_MOST_PLANNED = 32768  # tokens: beyond them, attending once more costs more than the plan
_FASTEST_FIRST = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
_WITHOUT_PLANS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_plans: set[tuple[object, ...]] = set()  # of this process, whose one thread attends: H, G, room, D, device, dtype


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, query head h reading key/value head h // (H / G).

    q: [B, H, Lq, D]; k, v: [B, G, Lk, D] with H a multiple of G; returns [B, H, Lq, D]. Without a mask every
    query sees every key, or with `causal` (Lq == Lk) those up to its own position; no Lq x Lk tensor is built
    then. `mask` is a bool tensor [B, 1, Lq, Lk], True where a query may look. A query that may look nowhere
    gives undefined output. Raises ValueError, naming the shapes, when they do not fit; nothing is reshaped to fit.
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
    if queries == 1:  # the heads of a group are as good as queries: K and V are read once, not repeated
        return attention_over_rows(q, k, v, None if mask is None else mask[:, :, 0])
    group = heads // kv_heads
    k, v = (x.repeat_interleave(group, dim=1) if group > 1 else x for x in (k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


def attention_over_rows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of one query each, q [B, H, 1, D], over rows k, v [B, G, N, D] of its own, or those of a mask.

    mask: [B, G or 1, N] bool, True for one row of each KV head at least.
    """
    folded = q.reshape(len(q), k.shape[1], -1, q.shape[3])  # the heads of a group as queries
    per_query = None if mask is None else mask[:, :, None]
    # On a GPU by whatever makes no plans: what one token attends to is of a new length each time.
    with sdpa_kernel(_WITHOUT_PLANS) if q.is_cuda else nullcontext():
        return scaled_dot_product_attention(folded, k, v, attn_mask=per_query).reshape(q.shape)


def padded_prompt_length(x: Tensor) -> int:
    """How many tokens a prompt's q, k and v should have room for to be attended to fast; x: [L, ..] is the prompt."""
    return _room(len(x)) if _is_planned(x.device, x.dtype) else len(x)


def prompt_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of a prompt, or of its last token alone: q [H, L or 1, D], k, v [G, L, D]; returns [H, .., D].

    On a GPU in half precision through the fastest backend that takes the shape; no L x L tensor is built.
    """
    causal = q.shape[1] > 1
    if not (_is_planned(q.device, q.dtype) and causal):
        return attention(q[None], k[None], v[None], causal=causal)[0]
    _plans.add((len(q), len(k), *q.shape[1:], q.device, q.dtype))
    with sdpa_kernel(_FASTEST_FIRST, set_priority=True):
        return scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=len(q) > len(k))[0]


def warm_attention_plan(
    tokens: int, heads: int, kv_heads: int, head_dim: int, device: torch.device, dtype: torch.dtype
) -> None:
    """Has cuDNN plan what prompt_attention does over so many tokens, unless it has: so that no prompt waits for it."""
    room = _room(tokens)
    plan = (heads, kv_heads, room, head_dim, device, dtype)
    if tokens > _MOST_PLANNED or plan in _plans or not _is_planned(device, dtype):
        return
    anything = torch.empty((heads + 2 * kv_heads, room, head_dim), device=device, dtype=dtype)
    prompt_attention(*anything.tensor_split((heads, heads + kv_heads)))


def _room(tokens: int) -> int:
    return -(-tokens // _ROUND) * _ROUND


def _is_planned(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the attention of prompts goes through cuDNN, where that takes the shape."""
    return uses_kernels(device) and dtype in (torch.bfloat16, torch.float16)
