"""Pages of keys, as in Quest: bounds of their channels, and upper bounds of their scores."""

import torch
from torch import Tensor

from sparsecache.kernels._triton import next_power_of_2, pdl_launch, pdl_options, pdl_wait, tl, triton, use_kernel
from sparsecache.kernels.page_bounds import channel_bounds
from sparsecache.kernels.rows import index_slots, take_rows

_BLOCK_P = 32  # pages per program
_MAX_BLOCK_T = 64  # tokens of a page at a time


def update_newest_page(
    keys: Tensor,
    lowest: Tensor,
    highest: Tensor,
    seq_lens: Tensor,
    slots: Tensor,
    page: int,
    mean: bool,
    capacity: int | None = None,
) -> None:
    """Update the bounds of the page of each slot's new token, which has position seq_lens, or the last one if full.

    keys: [slots, G, T, D]; lowest, highest: [slots, G, P, D], as `channel_bounds` gives them; seq_lens: [slots] int64;
    slots: [B] int64; page: tokens in a page; mean: as in `channel_bounds`. capacity: the most tokens of a slot, by
    default T. If it is more than T, keys are a ring of the last tokens, at least a page of them: position p is in row
    p % T.
    """
    kv_heads, rows, head_dim = keys.shape[1:]
    capacity = rows if capacity is None else capacity
    if use_kernel(keys):
        _update_kernel[(len(slots) * kv_heads,)](
            keys, lowest, highest, seq_lens, slots, kv_heads, rows, capacity, lowest.shape[2], head_dim,
            PAGE=page, MEAN=mean, BLOCK_T=min(_MAX_BLOCK_T, next_power_of_2(page)),
            BLOCK_D=next_power_of_2(head_dim, 16), num_warps=4, **pdl_options(),
        )  # fmt: skip
        return
    newest, positions, is_used = newest_page(seq_lens[slots], page, capacity)
    bounds = channel_bounds(take_rows(keys, slots, positions.expand(-1, kv_heads, -1) % rows), is_used, mean)
    for stored, found in zip((lowest, highest), bounds, strict=True):
        stored[slots, :, newest] = found.to(stored.dtype)


def newest_page(past: Tensor, page: int, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the page of the token at position past [B]: its index [B], its positions and which are used [B, 1, page].

    Positions are below the capacity. A position beyond the capacity stands for the last one.
    """
    last = past.clamp(max=capacity - 1)
    newest = last // page
    position = newest[:, None] * page + torch.arange(page, device=past.device)
    return newest, position.clamp(max=capacity - 1)[:, None], (position <= last[:, None])[:, None]


def score_bounds(
    q: Tensor, lowest: Tensor, highest: Tensor, slots: Tensor, pages: int, join_heads: bool = False
) -> Tensor:
    """Return an upper bound of q . k over the keys k of each page: [B, G, H / G, pages] float32.

    q: [B, H, 1, D]; lowest, highest: [slots, G, P, D], the bounds of each channel in a page; slots: [B] int64;
    pages: how many pages to score, at most P. The bound is the sum over channels of max(q * lowest, q * highest).
    join_heads: return only the highest bound of a KV head's queries, [B, G, pages].
    """
    batch, heads, _, head_dim = q.shape
    kv_heads, capacity = lowest.shape[1:3]
    group = heads // kv_heads
    if not use_kernel(q):
        low, high = (index_slots(x, slots)[:, :, :pages].float().mT for x in (lowest, highest))
        grouped = q.float().view(batch, kv_heads, group, head_dim)
        of_heads = grouped.clamp(min=0) @ high + grouped.clamp(max=0) @ low
        return of_heads.amax(2) if join_heads else of_heads
    size = (batch, kv_heads, pages) if join_heads else (batch, kv_heads, group, pages)
    bounds = torch.empty(size, device=q.device, dtype=torch.float32)
    _bound_kernel[(batch * kv_heads, -(-pages // _BLOCK_P))](
        q, q.stride(0), q.stride(1), lowest, highest, slots, bounds, kv_heads, capacity, pages, head_dim,
        JOIN_HEADS=join_heads, GROUP=group, BLOCK_Q=next_power_of_2(group, 8), BLOCK_P=_BLOCK_P,
        BLOCK_D=next_power_of_2(head_dim, 16), num_warps=4, **pdl_options(),
    )  # fmt: skip
    return bounds


@triton.jit(do_not_specialize=["rows", "capacity", "pages"])
def _update_kernel(  # type: ignore[no-untyped-def]
    keys, lowest, highest, seq_lens, slots, kv_heads, rows, capacity, pages, head_dim,
    PAGE: tl.constexpr, MEAN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Bound the newest page of one slot and KV head."""
    pdl_wait(USE_PDL)
    slot = tl.load(slots + tl.program_id(0) // kv_heads).to(tl.int64)
    owner = slot * kv_heads + tl.program_id(0) % kv_heads
    past = tl.minimum(tl.load(seq_lens + slot), capacity - 1)
    newest = past // PAGE
    channel = tl.arange(0, BLOCK_D)
    in_head = channel < head_dim
    base = keys + owner * rows * head_dim + channel[None, :]
    first_row = (newest * PAGE % rows).to(tl.int32)
    count = (past - newest * PAGE + 1).to(tl.int32)
    low, high = tl.full((BLOCK_D,), float("inf"), tl.float32), tl.full((BLOCK_D,), float("-inf"), tl.float32)
    for first in tl.range(0, count, BLOCK_T):
        at = first + tl.arange(0, BLOCK_T)[:, None]
        row = (first_row + at) % rows
        key = tl.load(base + row * head_dim, mask=(at < count) & in_head[None, :], other=0.0).to(tl.float32)
        low = tl.minimum(low, tl.min(tl.where(at < count, key, float("inf")), axis=0))
        high = tl.maximum(high, tl.max(tl.where(at < count, key, float("-inf")), axis=0))
    if MEAN:
        centre = (low + high) / 2
        distance = tl.zeros((BLOCK_D,), dtype=tl.float32)
        for first in tl.range(0, count, BLOCK_T):
            at = first + tl.arange(0, BLOCK_T)[:, None]
            row = (first_row + at) % rows
            key = tl.load(base + row * head_dim, mask=(at < count) & in_head[None, :], other=0.0).to(tl.float32)
            distance += tl.sum(tl.where(at < count, tl.abs(key - centre[None, :]), 0.0), axis=0)
        distance /= count
        low, high = centre - distance, centre + distance
    target = (owner * pages + newest) * head_dim + channel
    tl.store(lowest + target, low, mask=in_head)
    tl.store(highest + target, high, mask=in_head)


@triton.jit(do_not_specialize=["capacity", "pages"])
def _bound_kernel(  # type: ignore[no-untyped-def]
    q, q_row_stride, q_head_stride, lowest, highest, slots, bounds, kv_heads, capacity, pages, head_dim,
    JOIN_HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
    USE_PDL: tl.constexpr,
):  # fmt: skip
    """Bound the scores of some pages for the query heads of a KV head."""
    pdl_wait(USE_PDL)
    pdl_launch(USE_PDL)  # early: the next kernel has few programs, which fit beside these
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
    owner = (row * kv_heads + kv).to(tl.int64)
    if JOIN_HEADS:
        joined = tl.max(tl.where((query < GROUP)[None, :], bound, float("-inf")), axis=1)
        tl.store(bounds + owner * pages + page, joined, mask=page < pages)
    else:
        target = bounds + (owner * GROUP + query)[None, :] * pages + page[:, None]
        tl.store(target, bound, mask=(query < GROUP)[None, :] & (page < pages)[:, None])
