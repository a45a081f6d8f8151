"""Find the past tokens that make a share of the attention of a query head.

The kernels do not sort. The first one searches the score at which the share is reached, eight ways at a time, per query
head. The second one joins the query heads of a KV head.
"""

import math

import torch
from torch import Tensor

from sparsecache.kernels._triton import (
    next_power_of_2,
    pdl_options,
    pdl_wait,
    saturating_programs,
    tl,
    triton,
    use_kernel,
)
from sparsecache.kernels.threshold import Scores, sortable, split_range

_SEARCH_BLOCK, _JOIN_BLOCK = 2048, 512  # tokens per iteration
_MAX_SPLITS = 64


def needed_scores(values: Tensor, seq_lens: Tensor, slots: Tensor, p: float) -> Scores:
    """Return the log probability of each past token that a query head of its KV head needs, else -inf, in float32.

    values: [B, G, H / G, T], scores, undefined beyond a slot's past tokens; seq_lens: [slots] int64, at most T; slots:
    [B] int64. A head needs a token if the tokens of higher probability, of equal ones the earlier, have less than the
    share p, at most 1, of the probability of the past tokens. A KV head takes the highest probability of its heads.
    The result has one head per KV head: values [B, G, 1, T].
    """
    batch, kv_heads, group, tokens = values.shape
    if not use_kernel(values):
        is_past = torch.arange(tokens, device=values.device) < seq_lens[slots][:, None, None, None]
        logs = values.float().masked_fill(~is_past, -math.inf).log_softmax(3)
        logs = logs.masked_fill(logs.isnan(), -math.inf)  # a slot without past tokens gives NaN
        falling, order = logs.sort(dim=3, descending=True, stable=True)
        weights = falling.exp()
        needed = weights.cumsum(3) - weights < (p if p < 1 else math.inf)  # the sum of all may round
        needed = torch.zeros_like(is_past.expand_as(logs)).scatter_(3, order, needed)
        return Scores(logs.masked_fill(~needed, -math.inf).amax(2, keepdim=True), None)
    values, stride = values.contiguous(), -(-tokens // 16) * 16
    heads, device = batch * kv_heads * group, values.device
    splits = max(1, min(_MAX_SPLITS, saturating_programs(device) // (batch * kv_heads)))
    limits = torch.empty((2, heads), device=device, dtype=torch.int32)  # lowest score, and the place in its ties
    normalizers = torch.empty(heads, device=device, dtype=torch.float32)
    joined = torch.empty((batch, kv_heads, 1, stride), device=device, dtype=torch.float32)
    extremes = torch.empty((2, batch, kv_heads, splits), device=device, dtype=torch.float32)
    sizes = {"SHIFT": 0 if values.dtype == torch.float32 else 13, "num_warps": 8, **pdl_options()}
    _search_kernel[(heads,)](
        values, seq_lens, slots, limits, normalizers, p, kv_heads * group, tokens, BLOCK_T=_SEARCH_BLOCK, **sizes
    )
    _join_kernel[(batch * kv_heads, splits)](
        values, seq_lens, slots, limits, normalizers, joined, extremes, kv_heads, tokens, stride, heads,
        GROUP=group, BLOCK_Q=next_power_of_2(group), BLOCK_T=_JOIN_BLOCK, SPLITS=splits, **sizes,
    )  # fmt: skip
    return Scores(joined, extremes)


@triton.jit
def _key(score, SHIFT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Map scores to integers in the same order. SHIFT: the low bits that are no information."""
    return sortable(score.to(tl.float32)) >> SHIFT


@triton.jit
def _mass_above(  # type: ignore[no-untyped-def]
    row, count, inside, highest, low, step, SHIFT: tl.constexpr, BLOCK_T: tl.constexpr
):  # fmt: skip
    """Return the sums of exp(score - highest) over the scores whose keys exceed low + n * step: [8], n = 0 to 7."""
    way = tl.arange(0, 8)[:, None]
    masses = tl.zeros((8, BLOCK_T), dtype=tl.float32)
    for first in tl.range(0, count, BLOCK_T):
        token = first + tl.arange(0, BLOCK_T)
        score = tl.load(row + token, mask=token < inside, other=0.0).to(tl.float32)
        weight = tl.where(token < count, tl.exp(score - highest), 0.0)
        key = _key(score, SHIFT).to(tl.int64)
        masses += tl.where(key[None, :] > low + way * step, weight[None, :], 0.0)
    return tl.sum(masses, axis=1)


@triton.jit
def _search_kernel(  # type: ignore[no-untyped-def]
    values, seq_lens, slots, limits, normalizers, p, heads, tokens,
    SHIFT: tl.constexpr, BLOCK_T: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Find the lowest score that a query head needs, and the position before which tokens of this score are needed."""
    pdl_wait(USE_PDL)
    head = tl.program_id(0)
    count = tl.minimum(tl.load(seq_lens + tl.load(slots + head // heads)), tokens).to(tl.int32)
    inside = tl.minimum(tl.cdiv(count, 16) * 16, tokens)
    row, offset = values + head.to(tl.int64) * tokens, tl.arange(0, BLOCK_T)
    best, worst = tl.full((BLOCK_T,), -3e38, tl.float32), tl.full((BLOCK_T,), 3e38, tl.float32)
    for first in tl.range(0, count, BLOCK_T):
        score = tl.load(row + first + offset, mask=first + offset < inside, other=0.0).to(tl.float32)
        best = tl.maximum(best, tl.where(first + offset < count, score, -3e38))
        worst = tl.minimum(worst, tl.where(first + offset < count, score, 3e38))
    highest = tl.max(best, axis=0)
    # Of the keys low and high, those above low have the share or more, those above high have less.
    low = _key(tl.min(worst, axis=0), SHIFT).to(tl.int64) - 1
    high = tl.maximum(_key(highest, SHIFT).to(tl.int64), low + 1)
    total = tl.max(_mass_above(row, count, inside, highest, low, low * 0, SHIFT, BLOCK_T), axis=0)
    way = tl.arange(0, 8)
    if p < 1:
        wanted = p * total
        while high - low > 1:
            step = (high - low + 7) // 8
            masses = _mass_above(row, count, inside, highest, low, step, SHIFT, BLOCK_T)
            reached = tl.sum(((masses >= wanted) & (way > 0) & (low + way * step < high)).to(tl.int32), axis=0)
            high = tl.minimum(high, low + (reached + 1) * step)
            low += reached * step
        above = tl.max(_mass_above(row, count, inside, highest, high, low * 0, SHIFT, BLOCK_T), axis=0)
        seen, until, rest = 0, count, wanted - above
        for first in tl.range(0, count, BLOCK_T):
            token = first + offset
            score = tl.load(row + token, mask=token < inside, other=0.0).to(tl.float32)
            is_equal = (_key(score, SHIFT).to(tl.int64) == high) & (token < count)
            number = seen + tl.cumsum(is_equal.to(tl.int32), axis=0) - 1  # how many equal scores precede it
            is_beyond = is_equal & (number * tl.exp(score - highest) >= rest)
            until = tl.minimum(until, tl.min(tl.where(is_beyond, token, count), axis=0))
            seen += tl.sum(is_equal.to(tl.int32), axis=0)
        tl.store(limits + head, high.to(tl.int32))
        tl.store(limits + tl.num_programs(0) + head, until)
    else:
        tl.store(limits + head, low.to(tl.int32))
        tl.store(limits + tl.num_programs(0) + head, 0)
    tl.store(normalizers + head, highest + tl.log(total))


@triton.jit(do_not_specialize=["heads"])
def _join_kernel(  # type: ignore[no-untyped-def]
    values, seq_lens, slots, limits, normalizers, joined, extremes, kv_heads, tokens, stride, heads,
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_T: tl.constexpr, SPLITS: tl.constexpr, SHIFT: tl.constexpr,
    USE_PDL: tl.constexpr,
):  # fmt: skip
    """Join the query heads of a KV head over the tokens of a split, and find the extremes of the tokens needed."""
    pdl_wait(USE_PDL)
    owner, query = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_Q)
    count = tl.minimum(tl.load(seq_lens + tl.load(slots + tl.program_id(0) // kv_heads)), tokens).to(tl.int32)
    inside = tl.minimum(tl.cdiv(count, 16) * 16, tokens)
    head = owner * GROUP + query
    lowest = tl.load(limits + head, mask=query < GROUP, other=0)[:, None]
    until = tl.load(limits + heads + head, mask=query < GROUP, other=0)[:, None]
    normalizer = tl.load(normalizers + head, mask=query < GROUP, other=0.0)[:, None]
    best, worst = tl.full((BLOCK_T,), float("-inf"), tl.float32), tl.full((BLOCK_T,), float("inf"), tl.float32)
    start, end = split_range(count, tl.program_id(1), BLOCK_T, SPLITS)
    for first in tl.range(start, end, BLOCK_T):
        token = first + tl.arange(0, BLOCK_T)
        mask = (query < GROUP)[:, None] & (token < inside)[None, :]
        score = tl.load(values + head[:, None] * tokens + token[None, :], mask=mask, other=0.0).to(tl.float32)
        key = _key(score, SHIFT)
        is_needed = (key > lowest) | ((key == lowest) & (token[None, :] < until))
        is_needed = is_needed & (query < GROUP)[:, None] & (token < end)[None, :]
        found = tl.max(tl.where(is_needed, score - normalizer, float("-inf")), axis=0)
        tl.store(joined + owner * stride + token, found, mask=token < stride)
        best = tl.maximum(best, found)
        worst = tl.minimum(worst, tl.where(found > float("-inf"), found, float("inf")))
    target = extremes + owner * SPLITS + tl.program_id(1)
    tl.store(target, tl.max(best, axis=0))
    tl.store(target + tl.num_programs(0) * SPLITS, tl.min(worst, axis=0))
