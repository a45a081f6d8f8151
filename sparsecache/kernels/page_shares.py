"""Shares of pages in a softmax, as in FreeKV and ShadowKV, and the queries that select pages, as in FreeKV."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, pad

from sparsecache.kernels._triton import next_power_of_2, pdl_options, pdl_wait, tl, triton, use_kernel
from sparsecache.kernels.rows import index_slots

_MAX_BLOCK_P = 2048  # pages per iteration


def choose_queries(q: Tensor, last: Tensor, slots: Tensor, kv_heads: int, similarity: float) -> Tensor:
    """Return each KV head's queries of the previous step, or q if the mean cosine similarity to them is too low.

    q: [B, H, 1, D]; last: [slots, H, D], the queries of the previous step, which q replaces; slots: [B] int64;
    similarity: the threshold. Returns [B, H, 1, D].
    """
    batch, heads, _, head_dim = q.shape
    group = heads // kv_heads
    if use_kernel(q):
        chosen = torch.empty((batch, heads, 1, head_dim), device=q.device, dtype=q.dtype)
        _choose_kernel[(batch * kv_heads,)](
            q, q.stride(0), q.stride(1), last, slots, chosen, similarity, kv_heads, head_dim,
            GROUP=group, BLOCK_Q=next_power_of_2(group), BLOCK_D=next_power_of_2(head_dim, 16), num_warps=4,
            **pdl_options(),
        )  # fmt: skip
        return chosen
    before = last[slots][:, :, None]
    found = cosine_similarity(q.float(), before.float(), dim=3).view(batch, kv_heads, group)
    has_changed = found.mean(2) < similarity  # [B, G]
    last[slots] = q[:, :, 0]
    return torch.where(has_changed.repeat_interleave(group, 1)[:, :, None, None], q, before)


def page_shares(bounds: Tensor, seq_lens: Tensor, slots: Tensor, sinks: Tensor, recent: Tensor, page: int) -> Tensor:
    """Return the logarithm of each page's softmax share, summed over query heads: [B, G, pages] float32.

    The softmax of a query head is over the pages in use. bounds: [B, G, H / G, pages] float32; seq_lens: [slots] int64,
    past tokens; slots: [B] int64. sinks, recent: [max_tokens + 1] int64, how many of the first and the last pages get
    inf, by past tokens. page: tokens in a page.
    """
    batch, kv_heads, group, pages = bounds.shape
    if use_kernel(bounds):
        shares = torch.empty((batch, kv_heads, pages), device=bounds.device, dtype=torch.float32)
        _share_kernel[(batch * kv_heads,)](
            bounds, seq_lens, slots, sinks, recent, shares, kv_heads, pages, PAGE=page, **_sizes(group, pages)
        )  # fmt: skip
        return shares
    past = seq_lens[slots][:, None]
    num_pages, index = -(-past // page), torch.arange(pages, device=bounds.device)
    is_free = (index >= num_pages)[:, None]
    shares = bounds.masked_fill(is_free[:, None], -torch.inf).log_softmax(3).logsumexp(2)
    is_kept = (index < sinks[past]) | (index >= num_pages - recent[past])
    return shares.masked_fill(is_kept[:, None], torch.inf)


def highest_page_shares(scores: Tensor, is_exact: Tensor, slots: Tensor) -> Tensor:
    """Return the logarithm of each page's softmax share, the highest of the query heads: [B, G, pages] float32.

    The softmax of a query head is over the pages that are not exact. Exact page i gets 1 + i, more than any other page.
    scores: [B, G, H / G, N]; all pages from N on must be exact. is_exact: [slots, G, pages] bool; slots: [B] int64.
    """
    batch, kv_heads, group, stride = scores.shape
    pages = is_exact.shape[2]
    if use_kernel(scores):
        shares = torch.empty((batch, kv_heads, pages), device=scores.device, dtype=torch.float32)
        _highest_share_kernel[(batch * kv_heads,)](
            scores, is_exact, slots, shares, kv_heads, pages, stride, **_sizes(group, pages)
        )  # fmt: skip
        return shares
    is_exact = index_slots(is_exact, slots)
    scores = pad(scores.float(), (0, max(0, pages - stride)))[..., :pages].masked_fill(is_exact[:, :, None], -torch.inf)
    priority = 1.0 + torch.arange(pages, device=scores.device)
    return torch.where(is_exact, priority, scores.log_softmax(3).amax(2))


def _sizes(group: int, pages: int) -> dict[str, Any]:
    """Return the sizes and options of the kernels that find shares."""
    block = min(_MAX_BLOCK_P, next_power_of_2(pages, 64))
    return {
        "GROUP": group, "BLOCK_Q": next_power_of_2(group), "BLOCK_P": block, "num_warps": 8 if block > 512 else 4,
        **pdl_options(),
    }  # fmt: skip


@triton.jit
def _choose_kernel(  # type: ignore[no-untyped-def]
    q, q_row_stride, q_head_stride, last, slots, chosen, similarity, kv_heads, head_dim,
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Choose the queries of one KV head, and store the new ones in `last`."""
    pdl_wait(USE_PDL)
    row, kv = tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads
    slot = tl.load(slots + row).to(tl.int64)
    head, channel = kv * GROUP + tl.arange(0, BLOCK_Q)[:, None], tl.arange(0, BLOCK_D)[None, :]
    is_head = tl.arange(0, BLOCK_Q) < GROUP
    mask = is_head[:, None] & (channel < head_dim)
    new = tl.load(q + row * q_row_stride + head * q_head_stride + channel, mask=mask, other=0.0)
    last_ptr = last + (slot * kv_heads * GROUP + head) * head_dim + channel
    old = tl.load(last_ptr, mask=mask, other=0.0)
    x, y = new.to(tl.float32), old.to(tl.float32)
    # 1e-8 as in torch's cosine_similarity.
    norms = tl.maximum(tl.sqrt(tl.sum(x * x, axis=1)), 1e-8) * tl.maximum(tl.sqrt(tl.sum(y * y, axis=1)), 1e-8)
    mean = tl.sum(tl.where(is_head, tl.sum(x * y, axis=1) / norms, 0.0)) / GROUP
    target = chosen + (row * kv_heads * GROUP + head) * head_dim + channel
    tl.store(target, tl.where(mean < similarity, new, old), mask=mask)
    tl.store(last_ptr, new, mask=mask)


@triton.jit
def _add_exponentials(bound, highest, total):  # type: ignore[no-untyped-def]
    """Add a tile of bounds [Q, N] to a running softmax: highest [Q] so far, total [Q] of exp(bound - highest)."""
    new_highest = tl.maximum(highest, tl.max(bound, axis=1))
    total = total * tl.exp(highest - new_highest) + tl.sum(tl.exp(bound - new_highest[:, None]), axis=1)
    return new_highest, total


@triton.jit(do_not_specialize=["pages"])
def _share_kernel(  # type: ignore[no-untyped-def]
    bounds, seq_lens, slots, sinks, recent, shares, kv_heads, pages,
    PAGE: tl.constexpr, GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Sum the shares of each page over the query heads of one KV head."""
    pdl_wait(USE_PDL)
    owner = tl.program_id(0).to(tl.int64)
    past = tl.load(seq_lens + tl.load(slots + tl.program_id(0) // kv_heads))
    num_pages = tl.minimum(tl.cdiv(past, PAGE), pages).to(tl.int32)
    first_kept, last_kept = tl.load(sinks + past), num_pages - tl.load(recent + past)
    query, offset = tl.arange(0, BLOCK_Q)[:, None], tl.arange(0, BLOCK_P)
    row = bounds + (owner * GROUP + query) * pages
    highest = tl.full((BLOCK_Q,), -3e38, dtype=tl.float32)  # not -inf, whose difference from itself is NaN
    total = tl.zeros((BLOCK_Q,), dtype=tl.float32)
    for first in tl.range(0, num_pages, BLOCK_P):
        page = first + offset
        bound = tl.load(row + page[None, :], mask=(query < GROUP) & (page < num_pages)[None, :], other=float("-inf"))
        highest, total = _add_exponentials(bound, highest, total)
    normalizer = (highest + tl.log(tl.maximum(total, 1e-30)))[:, None]
    for first in tl.range(0, num_pages, BLOCK_P):
        page = first + offset
        bound = tl.load(row + page[None, :], mask=(query < GROUP) & (page < num_pages)[None, :], other=float("-inf"))
        share = bound - normalizer
        largest = tl.max(share, axis=0)
        share = largest + tl.log(tl.sum(tl.exp(share - largest[None, :]), axis=0))
        is_kept = (page < first_kept) | (page >= last_kept)
        tl.store(shares + owner * pages + page, tl.where(is_kept, float("inf"), share), mask=page < num_pages)


@triton.jit(do_not_specialize=["pages"])
def _highest_share_kernel(  # type: ignore[no-untyped-def]
    scores, is_exact, slots, shares, kv_heads, pages, stride,
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Find the highest share of each page in the query heads of one KV head."""
    pdl_wait(USE_PDL)
    owner = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + tl.program_id(0) // kv_heads).to(tl.int64)
    is_exact += (slot * kv_heads + tl.program_id(0) % kv_heads) * pages
    query, offset = tl.arange(0, BLOCK_Q)[:, None], tl.arange(0, BLOCK_P)
    row = scores + (owner * GROUP + query) * stride
    highest = tl.full((BLOCK_Q,), -3e38, dtype=tl.float32)  # not -inf, whose difference from itself is NaN
    total = tl.zeros((BLOCK_Q,), dtype=tl.float32)
    for first in tl.range(0, pages, BLOCK_P):
        page = first + offset
        exact = tl.load(is_exact + page, mask=page < pages, other=1) != 0
        score = tl.load(row + page[None, :], mask=(query < GROUP) & ~exact[None, :], other=float("-inf"))
        highest, total = _add_exponentials(score.to(tl.float32), highest, total)
    normalizer = (highest + tl.log(tl.maximum(total, 1e-30)))[:, None]
    for first in tl.range(0, pages, BLOCK_P):
        page = first + offset
        exact = tl.load(is_exact + page, mask=page < pages, other=1) != 0
        score = tl.load(row + page[None, :], mask=(query < GROUP) & ~exact[None, :], other=float("-inf"))
        share = tl.max(score.to(tl.float32) - normalizer, axis=0)
        tl.store(shares + owner * pages + page, tl.where(exact, 1.0 + page, share), mask=page < pages)
