"""Pages of keys, as in Quest: their bounds, the scores that a query can have in them, and their selection."""

import torch
from torch import Tensor

from sparsecache.kernels._triton import next_power_of_2, pdl_options, pdl_wait, tl, triton, use_kernel
from sparsecache.kernels.rows import index_slots, take_rows
from sparsecache.kernels.threshold import Selection, sortable

_BLOCK_P = 32  # pages per program
_BLOCK_J = 128  # pages that a program compares its own with at a time
_MAX_BLOCK_T = 64  # tokens of a page at a time


def channel_bounds(keys: Tensor, is_used: Tensor, mean: bool) -> tuple[Tensor, Tensor]:
    """Return the lowest and the highest value of each channel in pages: [.., D] each.

    keys: [.., page, D]; is_used: [.., page] bool, the tokens that a page has so far, one at least. mean: return the
    middle of both instead, less and plus the mean distance of the keys from it.
    """
    is_free = ~is_used[..., None]
    lowest, highest = keys.masked_fill(is_free, torch.inf).amin(-2), keys.masked_fill(is_free, -torch.inf).amax(-2)
    if not mean:
        return lowest, highest
    centre = (lowest.float() + highest.float()) / 2
    distances = (keys - centre.unsqueeze(-2)).abs().masked_fill(is_free, 0)
    distance = distances.sum(-2) / is_used.sum(-1, keepdim=True)
    return centre - distance, centre + distance


def update_newest_page(
    keys: Tensor, lowest: Tensor, highest: Tensor, seq_lens: Tensor, slots: Tensor, page: int, mean: bool
) -> None:
    """Update the bounds of the page of each slot's new token, which is in row seq_lens, or in the last one if full.

    keys: [slots, G, T, D]; lowest, highest: [slots, G, P, D], as `channel_bounds` gives them; seq_lens: [slots] int64;
    slots: [B] int64; page: tokens in a page.
    """
    kv_heads, capacity, head_dim = keys.shape[1:]
    if use_kernel(keys):
        _update_kernel[(len(slots) * kv_heads,)](
            keys, lowest, highest, seq_lens, slots, kv_heads, capacity, lowest.shape[2], head_dim,
            PAGE=page, MEAN=mean, BLOCK_T=min(_MAX_BLOCK_T, next_power_of_2(page)),
            BLOCK_D=next_power_of_2(head_dim, 16), num_warps=4, **pdl_options(),
        )  # fmt: skip
        return
    newest, rows, is_used = newest_page(seq_lens[slots], page, capacity)
    bounds = channel_bounds(take_rows(keys, slots, rows.expand(-1, kv_heads, -1)), is_used, mean)
    for stored, found in zip((lowest, highest), bounds, strict=True):
        stored[slots, :, newest] = found.to(stored.dtype)


def newest_page(past: Tensor, page: int, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the page of the token after past [B]: its number [B], its rows, and which are in use, [B, 1, page] each.

    Rows are below the capacity. If there is no token after past, the page is the last one.
    """
    last = past.clamp(max=capacity - 1)
    newest = last // page
    position = newest[:, None] * page + torch.arange(page, device=past.device)
    return newest, position.clamp(max=capacity - 1)[:, None], (position <= last[:, None])[:, None]


def score_bounds(
    q: Tensor, lowest: Tensor, highest: Tensor, slots: Tensor, pages: int, join_heads: bool = False
) -> Tensor:
    """Return an upper bound of q . k over the keys k of each page: [B, G, H / G, pages] float32.

    q: [B, H, 1, D]; lowest, highest: [slots, G, P, D], the extremes of each channel in a page; slots: [B] int64;
    pages: how many pages to score, at most P. The bound is the sum over channels of max(q * lowest, q * highest).
    join_heads: return the highest bound of a KV head's queries, [B, G, pages].
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


def select_pages(scores: Tensor, past: Tensor, budget: Tensor, page: int, width: int) -> Selection:
    """Return the past positions of the pages of highest score, as many as the budget allows.

    scores: [B, G, pages] float32; past, budget: [B] int64, tokens; width: the highest budget. A page that fits in part
    gives its latest tokens. Ties go to the earlier page. Positions beyond the counts are 0 from the kernel.
    """
    batch, kv_heads, pages = scores.shape
    if use_kernel(scores):
        positions = torch.empty((batch, kv_heads, width), device=scores.device, dtype=torch.int64)
        counts = torch.empty((batch, kv_heads), device=scores.device, dtype=torch.int64)
        _select_kernel[(batch * kv_heads, -(-pages // _BLOCK_P))](
            scores.contiguous(), past, budget, positions, counts, kv_heads, pages, width,
            PAGE=page, BLOCK_P=_BLOCK_P, BLOCK_J=_BLOCK_J, BLOCK_T=min(_MAX_BLOCK_T, next_power_of_2(page)),
            num_warps=4, **pdl_options(),
        )  # fmt: skip
        return Selection(positions, counts)
    first = page * torch.arange(pages, device=scores.device)
    page_tokens = (past[:, None] - first).clamp(0, page)  # [B, pages], tokens per page
    scores = scores.masked_fill((page_tokens == 0)[:, None], -torch.inf)
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    order = order[..., : min(pages, -(-width // page) + 1)]  # one page may hold a token only
    in_order = page_tokens[:, None].expand(*scores.shape[:2], -1).gather(2, order)
    before = in_order.cumsum(2) - in_order
    taken = torch.minimum((budget[:, None, None] - before).clamp(min=0), in_order)
    return _positions_of_runs(order * page + in_order - taken, taken, width)


def _positions_of_runs(start: Tensor, count: Tensor, width: int) -> Selection:
    """Return the positions of runs that begin at start [B, G, N] and have count [B, G, N] tokens, at most `width`."""
    ends = count.cumsum(2)
    place = torch.arange(width, device=start.device).expand(*start.shape[:2], -1).contiguous()
    run = torch.searchsorted(ends, place, right=True).clamp(max=start.shape[2] - 1)
    positions = (start - ends + count).gather(2, run) + place
    return Selection(positions, ends[..., -1])


@triton.jit(do_not_specialize=["capacity", "pages"])
def _update_kernel(  # type: ignore[no-untyped-def]
    keys, lowest, highest, seq_lens, slots, kv_heads, capacity, pages, head_dim,
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
    base = keys + (owner * capacity + newest * PAGE) * head_dim + channel[None, :]
    count = (past - newest * PAGE + 1).to(tl.int32)
    low, high = tl.full((BLOCK_D,), float("inf"), tl.float32), tl.full((BLOCK_D,), float("-inf"), tl.float32)
    for first in tl.range(0, count, BLOCK_T):
        at = first + tl.arange(0, BLOCK_T)[:, None]
        key = tl.load(base + at * head_dim, mask=(at < count) & in_head[None, :], other=0.0).to(tl.float32)
        low = tl.minimum(low, tl.min(tl.where(at < count, key, float("inf")), axis=0))
        high = tl.maximum(high, tl.max(tl.where(at < count, key, float("-inf")), axis=0))
    if MEAN:
        centre = (low + high) / 2
        distance = tl.zeros((BLOCK_D,), dtype=tl.float32)
        for first in tl.range(0, count, BLOCK_T):
            at = first + tl.arange(0, BLOCK_T)[:, None]
            key = tl.load(base + at * head_dim, mask=(at < count) & in_head[None, :], other=0.0).to(tl.float32)
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


@triton.jit(do_not_specialize=["pages", "width"])
def _select_kernel(  # type: ignore[no-untyped-def]
    scores, past, budget, positions, counts, kv_heads, pages, width,
    PAGE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_T: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Write the positions of some pages of a KV head at the place that the tokens of better pages leave them."""
    pdl_wait(USE_PDL)
    owner, row = tl.program_id(0).to(tl.int64), tl.program_id(0) // kv_heads
    tokens = tl.load(past + row)
    most = tl.minimum(tl.minimum(tl.load(budget + row), tokens), width).to(tl.int32)
    tokens = tokens.to(tl.int32)
    page = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    page_tokens = tl.minimum(tl.maximum(tokens - page * PAGE, 0), PAGE)
    score = sortable(tl.load(scores + owner * pages + page, mask=page < pages, other=0.0))
    before = tl.zeros((BLOCK_P,), dtype=tl.int32)
    for first in tl.range(0, tl.minimum(tl.cdiv(tokens, PAGE), pages), BLOCK_J):
        other = first + tl.arange(0, BLOCK_J)
        of_other = sortable(tl.load(scores + owner * pages + other, mask=other < pages, other=0.0))
        is_better = of_other[None, :] > score[:, None]
        is_better |= (of_other[None, :] == score[:, None]) & (other[None, :] < page[:, None])
        other_tokens = tl.minimum(tl.maximum(tokens - other * PAGE, 0), PAGE)
        before += tl.sum(tl.where(is_better, other_tokens[None, :], 0), axis=1)
    taken = tl.minimum(tl.maximum(most - before, 0), page_tokens)
    taken = tl.where(page < pages, taken, 0)
    position = page * PAGE + page_tokens - taken
    target = positions + owner * width
    for first in tl.range(0, PAGE, BLOCK_T):
        at = first + tl.arange(0, BLOCK_T)[None, :]
        tl.store(target + before[:, None] + at, (position[:, None] + at).to(tl.int64), mask=at < taken[:, None])
    if tl.program_id(1) == 0:
        tl.store(counts + owner, most.to(tl.int64))
    for first in tl.range(most + tl.program_id(1) * 256, width, tl.num_programs(1) * 256):
        at = first + tl.arange(0, 256)
        tl.store(target + at, tl.zeros((256,), dtype=tl.int64), mask=at < width)
