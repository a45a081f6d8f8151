"""Bounds of the scores that a query can have in pages of keys, as in Quest."""

import torch
from torch import Tensor

from sparsecache.kernels._triton import next_power_of_2, pdl_options, pdl_wait, tl, triton, use_kernel
from sparsecache.kernels.rows import index_slots

_BLOCK_P = 32  # pages per program


def page_bounds(q: Tensor, lowest: Tensor, highest: Tensor, slots: Tensor, pages: int) -> Tensor:
    """Return an upper bound of q . k over the keys k of each page: [B, G, H / G, pages] float32.

    q: [B, H, 1, D]; lowest, highest: [slots, G, P, D], the extremes of each channel in a page; slots: [B] int64;
    pages: how many pages to score, at most P. The bound is the sum over channels of max(q * lowest, q * highest).
    """
    batch, heads, _, head_dim = q.shape
    kv_heads, capacity = lowest.shape[1:3]
    group = heads // kv_heads
    if not use_kernel(q):
        low, high = (index_slots(x, slots)[:, :, :pages].float().mT for x in (lowest, highest))
        grouped = q.float().view(batch, kv_heads, group, head_dim)
        return grouped.clamp(min=0) @ high + grouped.clamp(max=0) @ low
    bounds = torch.empty((batch, kv_heads, group, pages), device=q.device, dtype=torch.float32)
    _bound_kernel[(batch * kv_heads, -(-pages // _BLOCK_P))](
        q, q.stride(0), q.stride(1), lowest, highest, slots, bounds, kv_heads, capacity, pages, head_dim,
        GROUP=group, BLOCK_Q=next_power_of_2(group, 8), BLOCK_P=_BLOCK_P, BLOCK_D=next_power_of_2(head_dim, 16),
        num_warps=4, **pdl_options(),
    )  # fmt: skip
    return bounds


@triton.jit(do_not_specialize=["capacity", "pages"])
def _bound_kernel(  # type: ignore[no-untyped-def]
    q, q_row_stride, q_head_stride, lowest, highest, slots, bounds, kv_heads, capacity, pages, head_dim,
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Bound the scores of some pages for the query heads of a KV head."""
    pdl_wait(USE_PDL)
    row, kv = tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads
    slot = tl.load(slots + row).to(tl.int64)
    query, channel = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D)
    page = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    q_mask = (query < GROUP)[None, :] & (channel < head_dim)[:, None]
    q_ptr = q + row * q_row_stride + (kv * GROUP + query)[None, :] * q_head_stride + channel[:, None]
    q_block = tl.load(q_ptr, mask=q_mask, other=0.0)
    positive = tl.maximum(q_block, 0.0).to(q_block.dtype)
    negative = tl.minimum(q_block, 0.0).to(q_block.dtype)
    offset = ((slot * kv_heads + kv) * capacity + page[:, None]) * head_dim + channel[None, :]
    mask = (page < pages)[:, None] & (channel < head_dim)[None, :]
    high, low = tl.load(highest + offset, mask=mask, other=0.0), tl.load(lowest + offset, mask=mask, other=0.0)
    bound = tl.dot(high, positive, input_precision="ieee")
    bound = tl.dot(low, negative, bound, input_precision="ieee")
    target = bounds + ((row * kv_heads + kv) * GROUP + query).to(tl.int64)[None, :] * pages + page[:, None]
    tl.store(target, bound, mask=(query < GROUP)[None, :] & (page < pages)[:, None])
