"""Grouped-query attention in plain torch, for prefill and for decode steps without a kernel."""

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from sparsecache.kernels._triton import uses_kernels

# cuDNN builds an execution plan on the host when it first sees a shape.
_ROUNDING = 512  # tokens: prompts are padded to a multiple of this, so that few plans are needed
_MAX_WARMED = 32768  # tokens: running attention to build a plan takes longer than the plan itself beyond this length
_WITH_CUDNN = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
_WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# H, G, padded length, D, device, dtype and whether with log-sum-exp, of the plans in this process
_planned: set[tuple[object, ...]] = set()


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v: [B, H, Lq, D]. Query head h reads KV head h // (H / G).

    q: [B, H, Lq, D]; k, v: [B, G, Lk, D], H a multiple of G. mask: [B, 1, Lq, Lk] bool, True where a query attends; the
    output of a query with no True entry is undefined. causal: a query attends to keys up to its own position; needs
    Lq == Lk and no mask. Without a mask no tensor of shape Lq x Lk is built. Raises ValueError if shapes do not match.
    """
    batch, heads, queries, head_dim = q.shape
    kv_heads, length = k.shape[1], k.shape[2]
    if k.shape != (batch, kv_heads, length, head_dim) or v.shape != k.shape or heads % kv_heads:
        raise ValueError(f"The shapes of q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not match.")
    if causal and mask is not None:
        raise ValueError("causal attention takes no mask; pass either causal=True or a mask that includes it.")
    if causal and queries != length:
        raise ValueError(f"causal attention needs as many queries as keys, got {queries} and {length}.")
    if mask is not None and (mask.shape != (batch, 1, queries, length) or mask.dtype != torch.bool):
        raise ValueError(
            f"mask is {mask.dtype} of shape {tuple(mask.shape)}; it must be torch.bool of shape "
            f"{(batch, 1, queries, length)} (batch, 1, queries, keys)."
        )
    if queries == 1:
        return attention_over_rows(q, k, v, None if mask is None else mask[:, :, 0])
    group = heads // kv_heads
    k, v = (x.repeat_interleave(group, dim=1) if group > 1 else x for x in (k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


def attention_over_rows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the attention of one query per head over rows of its KV head: [B, H, 1, D].

    q: [B, H, 1, D]; k, v: [B, G, N, D]; mask: [B, G or 1, N] bool, True for at least one row per KV head.
    """
    folded = q.reshape(len(q), k.shape[1], -1, q.shape[3])  # heads of a group as queries: K and V are read only once
    mask = None if mask is None else mask[:, :, None]
    # Not cuDNN on a GPU: N differs at each step, and each would need a plan.
    with sdpa_kernel(_WITHOUT_CUDNN) if q.is_cuda else nullcontext():
        return scaled_dot_product_attention(folded, k, v, attn_mask=mask).reshape(q.shape)


def padded_prompt_length(x: Tensor) -> int:
    """Return the length to which q, k and v of a prompt should be padded for fast attention.

    x: [L, ..], any tensor of the prompt, on the device and in the dtype of the attention.
    """
    return _padded(len(x)) if _uses_cudnn(x.device, x.dtype) else len(x)


def prompt_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return the causal attention of a prompt, or of its last token alone: [H, L or 1, D].

    q: [H, L or 1, D]; k, v: [G, L, D]. On a GPU, half precision uses the fastest backend that supports the shape. No
    L x L tensor is built.
    """
    causal = q.shape[1] > 1
    if not (_uses_cudnn(q.device, q.dtype) and causal):
        return attention(q[None], k[None], v[None], causal=causal)[0]
    _planned.add((len(q), len(k), *q.shape[1:], q.device, q.dtype, False))
    with sdpa_kernel(_WITH_CUDNN, set_priority=True):
        return scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=len(q) > len(k))[0]


def prompt_attention_with_logsumexp(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the causal attention of a prompt [H, L, D], and its log-sum-exp [H, L] float32 where cuDNN computes both.

    The log-sum-exp of a query is the logarithm of the sum of exp(score) over the tokens up to its own. q: [H, L, D];
    k, v: [G, L, D].
    """
    batch = q[None], k[None], v[None]
    if not (_uses_cudnn(q.device, q.dtype) and _cudnn_supports(*batch)):
        return prompt_attention(q, k, v), None
    _planned.add((len(q), len(k), *q.shape[1:], q.device, q.dtype, True))
    # scaled_dot_product_attention calls this operator too, but returns the output alone.
    out, logsumexp, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *batch, None, compute_log_sumexp=True, is_causal=True
    )
    return out[0], logsumexp.reshape(q.shape[:2])


def _cudnn_supports(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Return whether cuDNN computes the causal attention of q [B, H, L, D] over k and v [B, G, L, D]."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        parameters = SDPAParams(q, k, v, None, 0.0, True, q.shape[1] > k.shape[1])
        return can_use_cudnn_attention(parameters)


def warm_attention_plan(
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    device: torch.device,
    dtype: torch.dtype,
    with_logsumexp: bool = False,
) -> None:
    """Build the cuDNN plan of prompt_attention for a prompt of `tokens`, unless it exists.

    A later prompt of this padded length then does not wait for the plan. with_logsumexp: the plan of
    prompt_attention_with_logsumexp instead.
    """
    length = _padded(tokens)
    plan = (heads, kv_heads, length, head_dim, device, dtype, with_logsumexp)
    if tokens > _MAX_WARMED or plan in _planned or not _uses_cudnn(device, dtype):
        return
    qkv = torch.empty((heads + 2 * kv_heads, length, head_dim), device=device, dtype=dtype)
    attend = prompt_attention_with_logsumexp if with_logsumexp else prompt_attention
    attend(*qkv.tensor_split((heads, heads + kv_heads)))
    _planned.add(plan)  # also if cuDNN does not support the shape


def _padded(tokens: int) -> int:
    return -(-tokens // _ROUNDING) * _ROUNDING


def _uses_cudnn(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether prompt attention prefers cuDNN."""
    return uses_kernels(device) and dtype in (torch.bfloat16, torch.float16)
