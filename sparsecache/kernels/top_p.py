"""Find the top-p tokens of query heads, so that `threshold_select` selects among them."""

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
from sparsecache.kernels.threshold import Scores, split_range
from sparsecache.kernels.top_p_tokens import TopPTokens, find_top_p

_MAX_SPLITS = 64
_MAX_UNJOINED = 16_384  # tokens; joining twice, in both kernels of the selection, takes longer than a kernel for more
_MIN_BLOCK, _MAX_BLOCK = 512, 2048  # tokens per iteration


def top_p_scores(scores: Scores, seq_lens: Tensor, slots: Tensor, p: float) -> Scores:
    """Return scores by which a KV head selects the top-p tokens of its query heads alone.

    A query head's top-p tokens are the fewest past tokens of highest probability that make the share p of its attention
    to past tokens; of tokens with equal probability, the earlier come first. A KV head takes the highest probability of
    its query heads.

    scores: of query heads, values [B, G, H / G, T], extremes or None; seq_lens: [slots] int64, past tokens, at most T;
    slots: [B] int64; p: above 0, at most 1. Returns one head per KV head, values [B, G, 1, T] float32: the log
    probabilities of the top-p tokens, else -inf. With kernels and up to 16,384 tokens, `threshold_select` joins the
    query heads instead, and values stay [B, G, H / G, T].
    """
    values = scores.values
    if not use_kernel(values):
        is_past = _is_past(values, seq_lens, slots)
        log_probs = values.float().masked_fill(~is_past, -math.inf).log_softmax(3)
        log_probs = log_probs.masked_fill(log_probs.isnan(), -math.inf)  # a slot without past tokens gives NaN
        falling, order = log_probs.sort(dim=3, descending=True, stable=True)
        probs = falling.exp()
        is_top_p = probs.cumsum(3) - probs < (p if p < 1 else math.inf)  # the sum of all may round to more than 1
        is_top_p = torch.zeros_like(is_past.expand_as(log_probs)).scatter_(3, order, is_top_p)
        return Scores(log_probs.masked_fill(~is_top_p, -math.inf).amax(2, keepdim=True), None)
    values = values.contiguous()
    extremes = _extremes(values, seq_lens, slots) if scores.extremes is None else scores.extremes
    top_p = find_top_p(values.flatten(1, 2), extremes, seq_lens, slots, p)
    if values.shape[3] <= _MAX_UNJOINED:
        return Scores(values, extremes, top_p)
    return _join(values, seq_lens, slots, top_p)


def _join(values: Tensor, seq_lens: Tensor, slots: Tensor, top_p: TopPTokens) -> Scores:
    """Return one head per KV head, as `top_p_scores`."""
    batch, kv_heads, group, tokens = values.shape
    device, stride, splits = values.device, -(-tokens // 16) * 16, _split_count(values)
    joined = torch.empty((batch, kv_heads, 1, stride), device=device, dtype=torch.float32)
    extremes = torch.empty((2, batch, kv_heads, splits), device=device, dtype=torch.float32)
    _join_kernel[(batch * kv_heads, splits)](
        values, seq_lens, slots, *top_p, joined, extremes, kv_heads, tokens, stride,
        GROUP=group, BLOCK_Q=next_power_of_2(group), SPLITS=splits,
        BLOCK_T=min(_MAX_BLOCK, next_power_of_2(-(-stride // splits), _MIN_BLOCK)), num_warps=8, **pdl_options(),
    )  # fmt: skip
    return Scores(joined, extremes)


def _split_count(values: Tensor) -> int:
    """Return how many splits of values [B, G, H / G, T] fill the GPU, one program each per slot and KV head."""
    return max(1, min(_MAX_SPLITS, saturating_programs(values.device) // (values.shape[0] * values.shape[1])))


def _is_past(values: Tensor, seq_lens: Tensor, slots: Tensor) -> Tensor:
    """Return which tokens of values [B, G, H / G, T] are past tokens: [B, 1, 1, T] bool."""
    return torch.arange(values.shape[3], device=values.device) < seq_lens[slots][:, None, None, None]


def _extremes(values: Tensor, seq_lens: Tensor, slots: Tensor) -> Tensor:
    """Return the highest and lowest score of past tokens per query head: [2, B, H, splits] float32.

    All splits of a head have its extremes. There are as many as fill the GPU, since each is selected from by a program.
    """
    is_past = _is_past(values, seq_lens, slots)
    highest = values.masked_fill(~is_past, -math.inf).amax(3)
    lowest = values.masked_fill(~is_past, math.inf).amin(3)
    extremes = torch.stack((highest, lowest)).flatten(2)[..., None].float()
    return extremes.expand(-1, -1, -1, _split_count(values)).contiguous()


@triton.jit
def _join_kernel(  # type: ignore[no-untyped-def]
    values, seq_lens, slots, thresholds, tie_ends, log_totals, joined, extremes, kv_heads, tokens, stride,
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_T: tl.constexpr, SPLITS: tl.constexpr,
    USE_PDL: tl.constexpr,
):  # fmt: skip
    """Join the top-p tokens of the query heads of a KV head over a split, and find their extremes."""
    pdl_wait(USE_PDL)
    owner, query = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_Q)
    count = tl.minimum(tl.load(seq_lens + tl.load(slots + tl.program_id(0) // kv_heads)), tokens).to(tl.int32)
    load_end = tl.minimum(tl.cdiv(count, 16) * 16, tokens)  # a mask in multiples of 16 keeps the loads wide
    head = owner * GROUP + query
    threshold = tl.load(thresholds + head, mask=query < GROUP, other=0.0)[:, None]
    tie_end = tl.load(tie_ends + head, mask=query < GROUP, other=0)[:, None]
    log_total = tl.load(log_totals + head, mask=query < GROUP, other=0.0)[:, None]
    best, worst = tl.full((BLOCK_T,), float("-inf"), tl.float32), tl.full((BLOCK_T,), float("inf"), tl.float32)
    start, end = split_range(count, tl.program_id(1), BLOCK_T, SPLITS)
    for first in tl.range(start, end, BLOCK_T):
        token = first + tl.arange(0, BLOCK_T)
        mask = (query < GROUP)[:, None] & (token < load_end)[None, :]
        score = tl.load(values + head[:, None] * tokens + token[None, :], mask=mask, other=0.0).to(tl.float32)
        is_top_p = (score > threshold) | ((score == threshold) & (token[None, :] < tie_end))
        is_top_p = is_top_p & (query < GROUP)[:, None] & (token < end)[None, :]
        log_prob = tl.max(tl.where(is_top_p, score - log_total, float("-inf")), axis=0)
        tl.store(joined + owner * stride + token, log_prob, mask=token < stride)
        best = tl.maximum(best, log_prob)
        worst = tl.minimum(worst, tl.where(log_prob > float("-inf"), log_prob, float("inf")))
    target = extremes + owner * SPLITS + tl.program_id(1)
    tl.store(target, tl.max(best, axis=0))
    tl.store(target + tl.num_programs(0) * SPLITS, tl.min(worst, axis=0))
