"""Select past tokens by pages: the pages of highest score, and of the last one selected only its latest tokens.

A prompt's tokens of highest score are selected as pages of one token. In one file because all entry points share one
kernel.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sparsecache.kernels._triton import (
    next_power_of_2,
    pdl_launch,
    pdl_options,
    pdl_wait,
    sortable,
    tl,
    triton,
    use_kernel,
)
from sparsecache.kernels.threshold import Selection

Limit = Literal["table", "excluded", "count"]
# A program keeps tiles of pages in registers. Two counts of their pages, at most 2^14, fit into one int32.
_TILE_PAGES, _MAX_TILES, _WARPS = 1024, 16, 8
_MAX_TILES_OF_PROMPT = 8  # the lengths of prompts vary, and each number of tiles is compiled
_LOWEST, _HIGHEST = tl.constexpr(-2139095041), tl.constexpr(2139095040)  # -inf and inf as `sortable` integers


class PageSelection(NamedTuple):
    """Past tokens selected by pages.

    pages: [B, G, P] int32, ascending; P is the capacity of the list. cuts: [B, G, 3] int32: the number of valid pages,
    the page that is selected in part, and how many of its first tokens are not selected (0 if no page is). counts:
    [B, G] int64, the selected tokens. page: tokens in a page.
    """

    pages: Tensor
    cuts: Tensor
    counts: Tensor
    page: int


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

    The earlier page wins a tie. Of the selected page with the lowest score, only the newest tokens that fit into the
    budget are selected.

    scores: [B, G, pages] float32; seq_lens: [slots] int64, past tokens; slots: [B] int64; page: tokens in a page.
    The budget is given in one of two ways. budgets: [T + 1] int64, the most tokens to select of n past tokens, by n; T
    is the capacity. num_excluded: [slots] int64, how many past tokens not to select. width: the highest budget.
    force_newest: select the newest page before all others. Positions beyond the counts are undefined.
    """
    batch, kv_heads, pages = scores.shape
    limits = budgets if num_excluded is None else num_excluded
    assert limits is not None
    if use_kernel(scores):
        counts = torch.empty((batch, kv_heads), device=scores.device, dtype=torch.int64)
        positions = torch.empty((batch, kv_heads, width), device=scores.device, dtype=torch.int64)
        limit: Limit = "table" if num_excluded is None else "excluded"
        _launch_select(scores, seq_lens, slots, limits, positions, counts, None, page, width, limit, force_newest)
        return Selection(positions, counts)
    past = seq_lens[slots]
    budget = limits[past] if num_excluded is None else past - limits[slots]
    taken, page_tokens = _taken(scores, past, budget.clamp(max=width), page, force_newest)
    start = page * torch.arange(pages, device=scores.device) + page_tokens[:, None] - taken
    return _positions_of_runs(start, taken, width)


def list_pages(
    scores: Tensor,
    seq_lens: Tensor,
    slots: Tensor,
    page: int,
    width: int,
    *,
    budgets: Tensor,
    force_newest: bool = False,
) -> PageSelection:
    """Select as `select_pages` does, and return the pages. Arguments as there."""
    if use_kernel(scores):
        counts = torch.empty(scores.shape[:2], device=scores.device, dtype=torch.int64)
        cuts = torch.empty((*scores.shape[:2], 3), device=scores.device, dtype=torch.int32)
        listed = _launch_select(
            scores, seq_lens, slots, budgets, None, counts, cuts, page, width, "table", force_newest
        )
        return PageSelection(listed, cuts, counts, page)
    past = seq_lens[slots]
    taken, page_tokens = _taken(scores, past, budgets[past].clamp(max=width), page, force_newest)
    num_cut = torch.where(taken > 0, page_tokens[:, None] - taken, 0)
    cut_page = num_cut.argmax(2, keepdim=True)
    cuts = torch.cat(((taken > 0).sum(2, keepdim=True), cut_page, num_cut.gather(2, cut_page)), 2)
    pages = (taken == 0).sort(dim=2, stable=True).indices
    return PageSelection(pages.int(), cuts.int(), taken.sum(2), page)


def positions_of_pages(selection: PageSelection, past: Tensor) -> Selection:
    """Return the selected tokens, in ascending order. past: [B], past tokens."""
    pages, cuts, counts, page = selection
    is_valid = torch.arange(pages.shape[2], device=pages.device) < cuts[..., :1]
    start = page * pages.long()
    end = torch.minimum(start + page, past[:, None, None])
    start = start + torch.where(pages == cuts[..., 1:2], cuts[..., 2:], 0)
    return _positions_of_runs(start, (end - start) * is_valid, int(counts.max()))


def _taken(scores: Tensor, past: Tensor, budget: Tensor, page: int, force_newest: bool) -> tuple[Tensor, Tensor]:
    """Return how many tokens of each page are selected [B, G, pages], and how many each page has [B, pages].

    scores: [B, G, pages]; past, budget: [B].
    """
    index = torch.arange(scores.shape[2], device=scores.device)
    page_tokens = (past[:, None] - page * index).clamp(0, page)
    if force_newest:
        scores = scores.masked_fill(index == (past[:, None, None] - 1) // page, torch.inf)
    scores = scores.masked_fill((page_tokens == 0)[:, None], -torch.inf)
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    in_order = page_tokens[:, None].expand_as(order).gather(2, order)
    before = in_order.cumsum(2) - in_order
    taken = torch.minimum((budget[:, None, None] - before).clamp(min=0), in_order)
    return torch.zeros_like(taken).scatter_(2, order, taken), page_tokens


def highest_of_prompt(scores: Tensor, count: int) -> Tensor:
    """Return the positions of the `count` highest scores of [G, L] float32, ascending: [G, count] int64, by the kernel.

    The lower position wins a tie. count: 1 to L. Needs fewer operations of the host than `select_pages`.
    """
    positions = torch.empty((1, len(scores), count), device=scores.device, dtype=torch.int64)
    _launch_select(scores[None], scores.shape[1], None, count, positions, None, None, 1, count, "count", False)
    return positions[0]


def _positions_of_runs(start: Tensor, count: Tensor, width: int) -> Selection:
    """Return the positions of runs that begin at start [B, G, N] and have count [B, G, N] tokens, at most `width`."""
    ends = count.cumsum(2)
    place = torch.arange(width, device=start.device).expand(*start.shape[:2], -1).contiguous()
    run = torch.searchsorted(ends, place, right=True).clamp(max=start.shape[2] - 1)
    positions = (start - ends + count).gather(2, run) + place
    return Selection(positions, ends[..., -1])


def _launch_select(
    scores: Tensor,
    seq_lens: Tensor | int,
    slots: Tensor | None,
    limits: Tensor | int,
    positions: Tensor | None,
    counts: Tensor | None,
    cuts: Tensor | None,
    page: int,
    width: int,
    limit: Limit,
    force_newest: bool,
) -> Tensor:
    """Launch the kernel of `select_pages`; set positions, counts and cuts; return the selected pages [B, G, P] int32.

    limit: whether limits are a table of budgets, the excluded tokens of each slot, or one budget. With the latter
    seq_lens is the number of past tokens, and slots and counts are None.
    """
    batch, kv_heads, pages = scores.shape
    max_selected = min(pages, width // page + 2)  # the newest page and that of the cut may be incomplete
    selected = torch.empty((batch, kv_heads, max_selected), device=scores.device, dtype=torch.int32)
    tile = min(_TILE_PAGES, next_power_of_2(pages, 128))
    tiles, warps = min(_MAX_TILES, -(-pages // tile)), max(4, _WARPS * tile // _TILE_PAGES)
    if limit == "count":
        tiles = min(_MAX_TILES_OF_PROMPT, next_power_of_2(tiles))
    _select_kernel[(batch * kv_heads,)](
        scores.contiguous(), seq_lens, slots, limits, selected, positions, counts, cuts, kv_heads, pages, width,
        max_selected, PAGE=page, LIMIT=limit, FORCE_NEWEST=force_newest, TILES=tiles, BLOCK_P=tile,
        BLOCK_W=min(512 * warps, next_power_of_2(width, 256)), num_warps=warps, **pdl_options(),
    )  # fmt: skip
    return selected


@triton.jit
def _page_key(score, page, num_pages, FORCE_NEWEST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the scores of pages as integers in the same order. Pages from num_pages on are below all others."""
    key = tl.minimum(tl.maximum(sortable(score), _LOWEST), _HIGHEST)  # a NaN counts as inf of its sign
    if FORCE_NEWEST:
        key = tl.where(page == num_pages - 1, _HIGHEST, key)
    return tl.where(page < num_pages, key, _LOWEST - 1)


@triton.jit
def _load_tiles(scores, first, pages, TILES: tl.constexpr, BLOCK_P: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the scores of TILES * BLOCK_P pages as a tuple. Element n of tile t is page first + n * TILES + t.

    So the elements n of all tiles are consecutive pages, and one scan over n counts the pages before each.
    """
    tiles = ()
    for tile in tl.static_range(TILES):
        page = first + tl.arange(0, BLOCK_P) * TILES + tile
        tiles = tiles + (tl.load(scores + page, mask=page < pages, other=0.0),)  # type: ignore[assignment]  # noqa: RUF005
    return tiles


@triton.jit
def _keys_of_tiles(tiles, first, num_pages, FORCE_NEWEST: tl.constexpr, TILES: tl.constexpr, BLOCK_P: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the keys of tiles of scores, as `_page_key`."""
    keys = ()
    for tile in tl.static_range(TILES):
        page = first + tl.arange(0, BLOCK_P) * TILES + tile
        keys = keys + (_page_key(tiles[tile], page, num_pages, FORCE_NEWEST),)  # type: ignore[assignment]  # noqa: RUF005
    return keys


@triton.jit
def _count_from(keys, limit, TILES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return per element how many of its keys are `limit` or more."""
    count = (keys[0] >= limit).to(tl.int32)
    for tile in tl.static_range(1, TILES):
        count += (keys[tile] >= limit).to(tl.int32)
    return count


@triton.jit
def _finite_range(keys, lowest, highest, TILES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return per element the lowest key of a page, and the highest one that is not that of inf or a forced page."""
    for tile in tl.static_range(TILES):
        lowest = tl.minimum(lowest, tl.where(keys[tile] >= _LOWEST, keys[tile], _HIGHEST))
        highest = tl.maximum(highest, tl.where(keys[tile] < _HIGHEST, keys[tile], _LOWEST - 1))
    return lowest, highest


@triton.jit
def _list_pages(  # type: ignore[no-untyped-def]
    keys, first, selected, low, high, num_between, whole, between, TILES: tl.constexpr, BLOCK_P: tl.constexpr
):  # fmt: skip
    """List the selected pages among those of tiles, as `_load_tiles` orders them, in `selected`.

    whole, between: how many earlier pages have keys of `high` or more, and of `low` or more but below `high`. Return
    them with these pages. Return the place in the list, and the page, of the num_between-th page between; 0 if it is
    not one of these.
    """
    num_whole, num_from = _count_from(keys, high, TILES), _count_from(keys, low, TILES)
    packed = num_whole + ((num_from - num_whole) << 16)  # one scan for two counts
    total, packed = tl.sum(packed), tl.cumsum(packed, axis=0) - packed
    cut_rank, cut_page = tl.zeros((BLOCK_P,), dtype=tl.int32), tl.zeros((BLOCK_P,), dtype=tl.int32)
    for tile in tl.static_range(TILES):
        page = first + tl.arange(0, BLOCK_P) * TILES + tile
        is_whole = keys[tile] >= high
        is_between = (keys[tile] >= low) & (keys[tile] < high)
        packed += tl.where(is_whole, 1, tl.where(is_between, 1 << 16, 0))
        ordinal = between + (packed >> 16)
        rank = whole + (packed & 0xFFFF) + tl.minimum(ordinal, num_between) - 1
        tl.store(selected + rank, page, mask=is_whole | (is_between & (ordinal <= num_between)))
        is_cut = is_between & (ordinal == num_between)
        cut_rank, cut_page = tl.where(is_cut, rank, cut_rank), tl.where(is_cut, page, cut_page)
    return whole + (total & 0xFFFF), between + (total >> 16), tl.sum(cut_rank), tl.sum(cut_page)


@triton.jit
def _next_threshold(low, high, from_low, from_high, budget, steps, PAGE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the next threshold of the search of `_select_kernel`, between low and high: high is at least low + 2.

    It is interpolated by the number of pages, as if their keys were spread evenly, and then moved towards the middle by
    1 / sqrt(pages), so that mostly both ends move. After 15 steps it is the middle, so the search ends for any keys.
    """
    inv_sqrt_pages = tl.rsqrt(tl.maximum((from_low - from_high).to(tl.float32) * (1 / PAGE), 1.0))
    fraction = ((from_low - budget).to(tl.float32) * (1 / PAGE) + 0.5) * inv_sqrt_pages * inv_sqrt_pages
    fraction = tl.where(steps < 16, fraction + (0.5 - fraction) * inv_sqrt_pages, 0.5)
    distance = high.to(tl.uint32) - low.to(tl.uint32)  # may be more than an int32
    step = (distance.to(tl.float32) * fraction).to(tl.uint32)
    return low + tl.minimum(tl.maximum(step, 1), distance - 1).to(tl.int32)


@triton.jit(do_not_specialize=["seq_lens", "limits", "pages", "width", "max_selected"])
def _select_kernel(  # type: ignore[no-untyped-def]
    scores, seq_lens, slots, limits, selected, positions, counts, cuts, kv_heads, pages, width, max_selected,
    PAGE: tl.constexpr, LIMIT: tl.constexpr, FORCE_NEWEST: tl.constexpr, TILES: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_W: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Select the pages of one slot and KV head, list them in `selected`, and write their positions.

    An interpolation search over keys of scores finds where the budget ends. All pages with a score of `high` or more
    fit into the budget. Those with a score of `low` or more fill it. The search ends when one page, or one score, is
    between the two. It begins between the lowest and the highest finite score. All pages but the last have PAGE tokens,
    so a number of tokens follows from a number of pages.
    """
    pdl_wait(USE_PDL)
    pdl_launch(USE_PDL)  # early: few programs, beside which the next kernel fits
    owner = tl.program_id(0).to(tl.int64)
    scores += owner * pages
    selected += owner * max_selected
    first_scores = _load_tiles(scores, 0, pages, TILES, BLOCK_P)  # first, since the next loads wait for each other
    if LIMIT == "count":
        past, budget = seq_lens.to(tl.int64), limits.to(tl.int64)
    else:
        slot = tl.load(slots + tl.program_id(0) // kv_heads)
        past = tl.load(seq_lens + slot)
        budget = past - tl.load(limits + slot) if LIMIT == "excluded" else tl.load(limits + past)
    tokens = tl.minimum(past, pages.to(tl.int64) * PAGE).to(tl.int32)
    budget = tl.maximum(tl.minimum(tl.minimum(budget, tokens), width), 0).to(tl.int32)
    num_pages = tl.cdiv(tokens, PAGE)
    missing = num_pages * PAGE - tokens  # in the newest page
    newest = tl.maximum(num_pages - 1, 0)
    newest_key = _page_key(tl.load(scores + newest), newest, num_pages, FORCE_NEWEST)
    block: tl.constexpr = TILES * BLOCK_P
    first_keys = _keys_of_tiles(first_scores, 0, num_pages, FORCE_NEWEST, TILES, BLOCK_P)  # stay in registers

    lowest, highest = tl.full((BLOCK_P,), _HIGHEST, tl.int32), tl.full((BLOCK_P,), _LOWEST - 1, tl.int32)
    lowest, highest = _finite_range(first_keys, lowest, highest, TILES)
    for first in tl.range(block, num_pages, block):
        tiles = _load_tiles(scores, first, pages, TILES, BLOCK_P)
        keys = _keys_of_tiles(tiles, first, num_pages, FORCE_NEWEST, TILES, BLOCK_P)
        lowest, highest = _finite_range(keys, lowest, highest, TILES)
    low, high, middle = tl.min(lowest), _HIGHEST + 1, tl.max(highest) + 1
    from_low, from_high = tokens, 0  # tokens of the pages with a score of low, or of high, or more
    steps = 0
    while (low + 1 < high) & (from_low - from_high > PAGE):
        is_from = _count_from(first_keys, middle, TILES)
        for first in tl.range(block, num_pages, block):
            tiles = _load_tiles(scores, first, pages, TILES, BLOCK_P)
            keys = _keys_of_tiles(tiles, first, num_pages, FORCE_NEWEST, TILES, BLOCK_P)
            is_from += _count_from(keys, middle, TILES)
        found = tl.sum(is_from) * PAGE - tl.where(newest_key >= middle, missing, 0)
        fills = found >= budget
        low, from_low = tl.where(fills, middle, low), tl.where(fills, found, from_low)
        high, from_high = tl.where(fills, high, middle), tl.where(fills, from_high, found)
        steps += 1
        middle = _next_threshold(low, high, from_low, from_high, budget, steps, PAGE)

    # Of the pages with a score between both, the earliest are selected. The last of these loses its first tokens.
    num_between = tl.cdiv(budget - from_high, PAGE)
    whole, between, cut_rank, cut_page = _list_pages(
        first_keys, 0, selected, low, high, num_between, 0, 0, TILES, BLOCK_P
    )
    for first in tl.range(block, num_pages, block):
        tiles = _load_tiles(scores, first, pages, TILES, BLOCK_P)
        keys = _keys_of_tiles(tiles, first, num_pages, FORCE_NEWEST, TILES, BLOCK_P)
        whole, between, rank, page = _list_pages(
            keys, first, selected, low, high, num_between, whole, between, TILES, BLOCK_P
        )
        cut_rank += rank
        cut_page += page
    num_cut = tl.minimum(tokens - cut_page * PAGE, PAGE) - (budget - from_high - (num_between - 1) * PAGE)
    num_cut = tl.where(num_between > 0, num_cut, 0)

    if cuts is not None:
        tl.store(cuts + owner * 3, whole + tl.minimum(between, num_between))
        tl.store(cuts + owner * 3 + 1, cut_page)
        tl.store(cuts + owner * 3 + 2, num_cut)
    if positions is not None:
        tl.debug_barrier()  # other threads have listed pages
        for first in tl.range(0, width, BLOCK_W):
            place = first + tl.arange(0, BLOCK_W)
            token = place + tl.where(place >= cut_rank * PAGE, num_cut, 0)  # its index in all selected pages
            position = tl.load(selected + token // PAGE, mask=place < budget, other=0) * PAGE + token % PAGE
            position = tl.where(place < budget, position, 0).to(tl.int64)
            tl.store(positions + owner * width + place, position, mask=place < width)
    if counts is not None:
        tl.store(counts + owner, budget.to(tl.int64))
