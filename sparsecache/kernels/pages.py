"""Pages of keys, as in Quest: bounds of their channels, upper bounds of their scores, and the selection of pages.

In one file because the selection of a prompt's tokens uses the kernel that selects pages.
"""

from typing import Literal

import torch
from torch import Tensor

from sparsecache.kernels._triton import next_power_of_2, pdl_options, pdl_wait, sortable, tl, triton, use_kernel
from sparsecache.kernels.page_bounds import channel_bounds
from sparsecache.kernels.rows import index_slots, take_rows
from sparsecache.kernels.threshold import Selection

Limit = Literal["table", "excluded", "count"]
_BLOCK_P = 32  # pages per program
_MAX_BLOCK_T = 64  # tokens of a page at a time
_MAX_BLOCK_S = 8192  # pages per iteration of a selection; below 2^15, so that one int32 holds two counts
_LOWEST, _HIGHEST = tl.constexpr(-2139095041), tl.constexpr(2139095040)  # -inf and inf as `sortable` integers


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
    slots: [B] int64; page: tokens in a page. capacity: the most tokens of a slot, by default T. If it is more than T,
    keys are a ring of the last tokens, at least a page of them: position p is in row p % T.
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


def select_pages(
    scores: Tensor,
    seq_lens: Tensor,
    slots: Tensor,
    page: int,
    width: int,
    *,
    budgets: Tensor | None = None,
    num_excluded: Tensor | None = None,
    force_newest: bool = False,
) -> Selection:
    """Select past tokens by pages: those of highest score, up to the budget. Positions ascend.

    The earlier page wins a tie. Of the last page selected, only the latest tokens are selected if not all of them fit
    into the budget.

    scores: [B, G, pages] float32; seq_lens: [slots] int64, past tokens; slots: [B] int64; page: tokens in a page.
    The budget is given in one of two ways. budgets: [T + 1] int64, the most tokens to select of n past tokens, by n.
    num_excluded: [slots] int64, how many past tokens not to select. width: the highest budget. force_newest: select the
    newest page before all others. Positions beyond the counts are 0 from the kernel.
    """
    batch, kv_heads, pages = scores.shape
    limits = budgets if num_excluded is None else num_excluded
    assert limits is not None
    if use_kernel(scores):
        counts = torch.empty((batch, kv_heads), device=scores.device, dtype=torch.int64)
        limit: Limit = "table" if num_excluded is None else "excluded"
        positions = _launch_select(scores, seq_lens, slots, limits, counts, page, width, limit, force_newest)
        return Selection(positions, counts)
    past = seq_lens[slots]
    budget = limits[past] if num_excluded is None else past - limits[slots]
    index = torch.arange(pages, device=scores.device)
    page_tokens = (past[:, None] - page * index).clamp(0, page)  # [B, pages]
    if force_newest:
        scores = scores.masked_fill(index == (past[:, None, None] - 1) // page, torch.inf)
    scores = scores.masked_fill((page_tokens == 0)[:, None], -torch.inf)
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    in_order = page_tokens[:, None].expand_as(order).gather(2, order)
    before = in_order.cumsum(2) - in_order
    taken = torch.minimum((budget.clamp(max=width)[:, None, None] - before).clamp(min=0), in_order)
    taken = torch.zeros_like(taken).scatter_(2, order, taken)
    return _positions_of_runs((page * index + page_tokens)[:, None] - taken, taken, width)


def _positions_of_runs(start: Tensor, count: Tensor, width: int) -> Selection:
    """Return the positions of runs that begin at start [B, G, N] and have count [B, G, N] tokens, at most `width`."""
    ends = count.cumsum(2)
    place = torch.arange(width, device=start.device).expand(*start.shape[:2], -1).contiguous()
    run = torch.searchsorted(ends, place, right=True).clamp(max=start.shape[2] - 1)
    positions = (start - ends + count).gather(2, run) + place
    return Selection(positions, ends[..., -1])


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


@triton.jit
def _page_keys(scores, page, num_pages, FORCE_NEWEST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the scores of pages as integers in the same order. Pages from num_pages on are below all others."""
    key = sortable(tl.load(scores + page, mask=page < num_pages, other=0.0))
    key = tl.minimum(tl.maximum(key, _LOWEST), _HIGHEST)  # a NaN counts as inf
    if FORCE_NEWEST:
        key = tl.where(page == num_pages - 1, _HIGHEST, key)
    return tl.where(page < num_pages, key, _LOWEST - 1)


def highest_of_prompt(scores: Tensor, count: int) -> Tensor:
    """Return the positions of the `count` highest scores of [G, L] float32, ascending: [G, count] int64, by the kernel.

    The lower position wins a tie. count: 1 to L. Needs fewer operations of the host than `select_pages`.
    """
    return _launch_select(
        scores[None], seq_lens=scores.shape[1], slots=None, limits=count, counts=None, page=1, width=count,
        limit="count", force_newest=False,
    )[0]  # fmt: skip


def _launch_select(
    scores: Tensor,
    seq_lens: Tensor | int,
    slots: Tensor | None,
    limits: Tensor | int,
    counts: Tensor | None,
    page: int,
    width: int,
    limit: Limit,
    force_newest: bool,
) -> Tensor:
    """Launch the kernel of `select_pages`; return the positions [B, G, width] int64, and set counts.

    limit: whether limits are a table of budgets, the excluded tokens of each slot, or one budget. With the latter
    seq_lens is the number of past tokens, and slots and counts are None.
    """
    batch, kv_heads, pages = scores.shape
    positions = torch.empty((batch, kv_heads, width), device=scores.device, dtype=torch.int64)
    selected = torch.empty((batch, kv_heads, pages), device=scores.device, dtype=torch.int32)
    block = min(_MAX_BLOCK_S, next_power_of_2(pages, 128))
    _select_kernel[(batch * kv_heads,)](
        scores.contiguous(), seq_lens, slots, limits, selected, positions, counts, kv_heads, pages, width,
        PAGE=page, LIMIT=limit, FORCE_NEWEST=force_newest, BLOCK_P=block,
        BLOCK_W=max(256, min(1024, next_power_of_2(width))), num_warps=max(4, block // 512), **pdl_options(),
    )  # fmt: skip
    return positions


@triton.jit(do_not_specialize=["seq_lens", "limits", "pages", "width"])
def _select_kernel(  # type: ignore[no-untyped-def]
    scores, seq_lens, slots, limits, selected, positions, counts, kv_heads, pages, width,
    PAGE: tl.constexpr, LIMIT: tl.constexpr, FORCE_NEWEST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_W: tl.constexpr,
    USE_PDL: tl.constexpr,
):  # fmt: skip
    """Select the pages of one slot and KV head, list them in `selected`, and write their positions.

    A bisection over scores finds where the budget ends. All pages with a score of `high` or more fit into the budget.
    Those with a score of `low` or more fill it. The bisection ends when one page, or one score, is between the two. All
    pages but the last have PAGE tokens, so a number of tokens follows from a number of pages.
    """
    pdl_wait(USE_PDL)
    owner = tl.program_id(0).to(tl.int64)
    if LIMIT == "count":
        past, budget = seq_lens.to(tl.int64), limits.to(tl.int64)
    else:
        slot = tl.load(slots + tl.program_id(0) // kv_heads)
        past = tl.load(seq_lens + slot)
        budget = past - tl.load(limits + slot) if LIMIT == "excluded" else tl.load(limits + past)
    tokens = tl.minimum(past, pages.to(tl.int64) * PAGE).to(tl.int32)
    budget = tl.maximum(tl.minimum(tl.minimum(budget, tokens), width), 0).to(tl.int32)
    num_pages, at = tl.cdiv(tokens, PAGE), tl.arange(0, BLOCK_P)
    missing = num_pages * PAGE - tokens  # in the newest page
    scores += owner * pages
    selected += owner * pages
    newest_key = _page_keys(scores, tl.maximum(num_pages - 1, 0), num_pages, FORCE_NEWEST)
    first_keys = _page_keys(scores, at, num_pages, FORCE_NEWEST)  # stay in registers

    low, high = _LOWEST + 0, _HIGHEST + 1
    from_low, from_high = tokens, 0  # tokens of the pages with a score of low, or of high, or more
    while (low + 1 < high) & (from_low - from_high > PAGE):
        middle = (low & high) + ((low ^ high) >> 1)  # the mean, without overflow
        is_from = (first_keys >= middle).to(tl.int32)
        for first in tl.range(BLOCK_P, num_pages, BLOCK_P):
            is_from += (_page_keys(scores, first + at, num_pages, FORCE_NEWEST) >= middle).to(tl.int32)
        found = tl.sum(is_from) * PAGE - tl.where(newest_key >= middle, missing, 0)
        fills = found >= budget
        low, from_low = tl.where(fills, middle, low), tl.where(fills, found, from_low)
        high, from_high = tl.where(fills, high, middle), tl.where(fills, from_high, found)

    # Of the pages with a score between both, the earliest are selected. The last of these loses its first tokens.
    num_between = tl.cdiv(budget - from_high, PAGE)
    whole, between, cut_rank, num_cut = 0, 0, 0, 0
    for first in tl.range(0, num_pages, BLOCK_P):
        page = first + at
        key = _page_keys(scores, page, num_pages, FORCE_NEWEST)
        is_whole, is_between = key >= high, (key >= low) & (key < high)
        packed = tl.cumsum(is_whole.to(tl.int32) + (is_between.to(tl.int32) << 16), axis=0)  # one scan for two counts
        ordinal = between + (packed >> 16)
        rank = whole + (packed & 0xFFFF) + tl.minimum(ordinal, num_between) - 1
        is_between &= ordinal <= num_between
        tl.store(selected + rank, page, mask=is_whole | is_between)
        is_cut = is_between & (ordinal == num_between)
        page_tokens = tl.minimum(tokens - page * PAGE, PAGE)
        cut_rank += tl.sum(tl.where(is_cut, rank, 0))
        num_cut += tl.sum(tl.where(is_cut, page_tokens - (budget - from_high - (num_between - 1) * PAGE), 0))
        last = tl.sum(tl.where(at == BLOCK_P - 1, packed, 0))
        whole += last & 0xFFFF
        between += last >> 16

    tl.debug_barrier()  # other threads have listed pages
    for first in tl.range(0, width, BLOCK_W):
        place = first + tl.arange(0, BLOCK_W)
        token = place + tl.where(place >= cut_rank * PAGE, num_cut, 0)  # its index in all selected pages
        position = tl.load(selected + token // PAGE, mask=place < budget, other=0) * PAGE + token % PAGE
        tl.store(
            positions + owner * width + place, tl.where(place < budget, position, 0).to(tl.int64), mask=place < width
        )
    if counts is not None:
        tl.store(counts + owner, budget.to(tl.int64))
