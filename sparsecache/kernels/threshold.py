"""Select the past tokens whose scores are near a head's best score, on the device alone.

The kernels do not sort and the host reads nothing. The distance to the best score is divided into 256 bins. The first
kernel counts tokens per bin; from the counts follows the bin that holds the threshold. The second kernel writes tokens
in higher bins directly, in ascending order. It sets tokens in the threshold bin aside, a few percent of all. A radix
select over those, 8 bits at a time, finds the exact threshold; the tokens at or above it are appended.

In one file because both kernels share their helpers. `radix_select` has the last step.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sparsecache.kernels._triton import next_power_of_2, pdl_options, pdl_wait, sortable, tl, triton
from sparsecache.kernels.radix_select import find_bin, radix_select, write_selected
from sparsecache.kernels.selection import (
    GroupRule,
    count_within,
    force_include,
    mass_count,
    score_margin,
    topk_indices,
)
from sparsecache.kernels.top_p_tokens import TopPTokens, find_top_p

_MIN_BLOCK, _MAX_BLOCK = 512, 2048  # tokens per iteration: a histogram costs nearly the same for few as for many


class SelectionParams(NamedTuple):
    """How to select tokens by score.

    alpha: tokens less than alpha below a head's best score count as near.
    budgets: [T + 1] int64, the most tokens to select of n past tokens, by n.
    mean: whether all KV heads select equally many, the mean of their counts, rounded up.
    sinks, recent: how many of the first and the last past tokens come before all others, within the budget. recent may
    be a table as `budgets`: [T + 1] int64, by past tokens.
    group: how a KV head joins the scores of its query heads, as in `score_margin`.
    top_p: at most as many tokens as make this share of the sum of exp(margin); 1: no limit.
    """

    alpha: float
    budgets: Tensor
    mean: bool
    sinks: int = 0
    recent: int | Tensor = 0
    group: GroupRule = "max"
    top_p: float = 1.0

    def force_include(self, margin: Tensor, position: Tensor, past: Tensor) -> Tensor:
        """Set the margin [B, G, T] of the first and the last past tokens to inf; position: [T]; past: [B]."""
        recent = self.recent[past] if isinstance(self.recent, Tensor) else self.recent
        return force_include(margin, position, past, self.sinks, recent)


class Scores(NamedTuple):
    """Scores by token, as made by `speculated_scores`.

    values: [B, G, H / G, T], float32, or float16 from the kernel if the keys are in half precision. Undefined beyond a
    slot's past tokens. From the kernel T is the capacity rounded up to 16; else it may be shorter than the capacity, as
    long as the longest of the B sequences.
    extremes: [2, B, H, splits] float32 from the kernel, the highest and lowest score per head and split; else None.
    For group "softmax" [3, B, H, splits]: also the sum of exp(score - highest) per head and split.
    top_p: from the kernels of `top_p_scores`, the top-p tokens of each of the B * H query heads. If set, a KV head
    selects by the highest log probability of its query heads, and a query head has one of its top-p tokens alone. The
    group must be "max", and the parameters' own top_p 1.
    """

    values: Tensor
    extremes: Tensor | None
    top_p: TopPTokens | None = None


class Selection(NamedTuple):
    """Selected tokens.

    positions: [B, G, N] int64, the first counts [B, G] (int64) of a KV head valid and distinct. They ascend; from the
    kernels they are two ascending runs, tokens above the threshold bin, then tokens in it. They depend on the scores
    alone, not on how these were split.
    """

    positions: Tensor
    counts: Tensor


def threshold_select(scores: Scores, seq_lens: Tensor, slots: Tensor, params: SelectionParams, width: int) -> Selection:
    """Select the tokens of largest score margin of each slot and KV head.

    The lower position wins a tie. seq_lens: [slots] int64, past tokens, at most the capacity; slots: [B] int64.
    width: positions to allocate, at least the smaller of the largest budget and the capacity. The reference returns
    positions only as wide as the largest count.
    """
    values, extremes, top_p = scores
    if extremes is not None:
        return _launch(values, extremes, top_p, seq_lens, slots, params, width)
    past = seq_lens[slots]
    longest = min(int(past.max()), values.shape[3])
    values, position = values[..., :longest].float(), torch.arange(longest, device=values.device)
    if len(slots) > 1:
        values = values.masked_fill(position >= past[:, None, None, None], -torch.inf)
    margin = score_margin(values.flatten(1, 2), values.shape[1], params.group)
    max_count = mass_count(margin, params.top_p) if params.top_p < 1 else None
    margin = params.force_include(margin, position, past)
    count = count_within(margin, params.alpha, params.budgets[past], "mean" if params.mean else "per_head", max_count)
    positions = topk_indices(margin, count)
    return Selection(positions.clamp(min=0), (positions >= 0).sum(2))


def _near_counts(values: Tensor, seq_lens: Tensor, slots: Tensor, params: SelectionParams) -> Tensor:
    """Return how many tokens each KV head selects by alpha and top_p, before the mean and the budget: [B, G] int32.

    values: as in Scores.
    """
    position, past = torch.arange(values.shape[3], device=values.device), seq_lens[slots]
    scores = values.float().masked_fill(position >= past[:, None, None, None], -torch.inf).flatten(1, 2)
    margin = score_margin(scores, values.shape[1], params.group)
    best = margin.amax(2, keepdim=True)
    extremes = torch.stack((best, best - 1e4))  # exp(-1e4) is 0 in float32, so lower tokens do not count
    top_p = find_top_p(margin, extremes, seq_lens, slots, params.top_p)
    threshold, tie_end = top_p.thresholds.view_as(best), top_p.tie_ends.view_as(best)
    is_top_p = (margin > threshold) | ((margin == threshold) & (position < tie_end))
    num_top_p = (is_top_p & (position < past[:, None, None])).sum(2)
    margin = params.force_include(margin, position, past)
    return torch.minimum((margin > -params.alpha).sum(2), num_top_p).int()


def _launch(
    scores: Tensor,
    extremes: Tensor,
    top_p: TopPTokens | None,
    seq_lens: Tensor,
    slots: Tensor,
    params: SelectionParams,
    width: int,
) -> Selection:
    batch, kv_heads, group, stride = scores.shape
    splits, device = extremes.shape[3], scores.device
    grid = (batch * kv_heads, splits)

    def empty(*size: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty((batch, kv_heads, *size), device=device, dtype=dtype)

    near_counts, histograms = empty(splits), empty(splits, 256)  # per split: tokens within alpha, tokens per bin
    undecided, finished = empty(2, stride), empty()
    selection = Selection(empty(width, dtype=torch.int64), empty(dtype=torch.int64))
    block = min(_MAX_BLOCK, next_power_of_2(-(-stride // splits), _MIN_BLOCK))
    sizes = {
        "KV_HEADS": kv_heads, "GROUP": group, "BLOCK_Q": next_power_of_2(group), "JOIN": params.group,
        "SPLITS": splits, "BLOCK_S": next_power_of_2(splits), "BLOCK_T": block,
        # Eight warps count faster. With several sequences, four are scheduled sooner beside the projections.
        "num_warps": 8 if batch == 1 and block > _MIN_BLOCK else 4,
        "RECENT_TABLE": isinstance(params.recent, Tensor), "TOP_P": top_p is not None, **pdl_options(),
    }  # fmt: skip
    unused = (extremes, seq_lens, extremes)  # in place of the top-p tokens
    inputs = (scores, extremes, *(top_p or unused), seq_lens, slots, stride, params.sinks, params.recent)
    alpha = min(params.alpha, 3e38)  # below inf, which is the margin of tokens that are always selected
    by_mass = params.top_p < 1
    if by_mass:  # the first split of a KV head holds its whole count
        near_counts.zero_()
        near_counts[:, :, 0] = _near_counts(scores, seq_lens, slots, params)
    _count_tokens_kernel[grid](
        *inputs, alpha, near_counts, histograms, finished, COUNT_NEAR=not by_mass, **sizes
    )  # fmt: skip
    _select_tokens_kernel[grid](
        *inputs, params.budgets, near_counts, histograms, undecided, finished, *selection, width,
        MEAN=params.mean, BLOCK_HS=next_power_of_2(kv_heads * splits), **sizes,
    )  # fmt: skip
    return selection


@triton.jit
def split_range(count, split, BLOCK_T: tl.constexpr, SPLITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the first token of a split and the one after its last. A split may be empty."""
    length = tl.cdiv(tl.cdiv(count, SPLITS), BLOCK_T) * BLOCK_T
    return split * length, tl.minimum(split * length + length, count)


@triton.jit
def _bin(margin, lowest):  # type: ignore[no-untyped-def]
    """Return which of 256 equal bins from `lowest` to 0 a margin lies in; monotonic."""
    scale = 255.0 / tl.maximum(-lowest, 1e-30)
    index = tl.maximum(tl.minimum((margin - lowest) * scale, 255.0), 0.0).to(tl.int32)
    return tl.maximum(tl.minimum(index, 255), 0)  # a NaN score gives any integer


@triton.jit
def _joined(margin, mask, JOIN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Join margins [BLOCK_Q, N] of the query heads of a KV head, as `score_margin` does: [N]."""
    joined = tl.max(tl.where(mask, margin, float("-inf")), axis=0)
    if JOIN == "softmax":
        joined += tl.log(tl.sum(tl.where(mask, tl.exp(margin - joined[None, :]), 0.0), axis=0))
    return joined


@triton.jit
def _best_and_lowest(  # type: ignore[no-untyped-def]
    extremes, thresholds, log_totals, kv, GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr, JOIN: tl.constexpr, TOP_P: tl.constexpr,
):  # fmt: skip
    """Return what to subtract from the scores of each query head [BLOCK_Q], and from all margins; their lower bound.

    A head's best score is subtracted. JOIN "softmax" also subtracts the log of the sum of exp(score - best score), and
    the log of the sum over the heads of the inverse of that sum. TOP_P subtracts the log of the sum of exp(score), and
    then the best log probability of the KV head.
    """
    query, split = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_S)
    mask = (query < GROUP)[:, None] & (split < SPLITS)[None, :]
    source = extremes + (kv * GROUP + query)[:, None] * SPLITS + split[None, :]
    size = tl.num_programs(0) * GROUP * SPLITS
    of_split = tl.load(source, mask=mask, other=float("-inf"))
    best = tl.max(of_split, axis=1)
    worst = tl.min(tl.load(source + size, mask=mask, other=float("inf")), axis=1)
    if TOP_P:
        log_total = tl.load(log_totals + kv * GROUP + query, mask=query < GROUP, other=0.0)
        threshold = tl.load(thresholds + kv * GROUP + query, mask=query < GROUP, other=0.0)
        highest = tl.max(tl.where(query < GROUP, best - log_total, float("-inf")))
        # A token may be a top-p token of any one head, so the lowest of all heads counts.
        worst = tl.maximum(worst, threshold) - log_total
        best, lowest = log_total, tl.min(tl.where(query < GROUP, worst, float("inf"))) - highest
    else:
        if JOIN == "softmax":
            sums = tl.load(source + 2 * size, mask=mask, other=0.0)  # 0 for an empty split
            total = tl.sum(tl.where(sums > 0, sums * tl.exp(of_split - best[:, None]), 0.0), axis=1)
            best += tl.log(total) + tl.log(tl.sum(tl.where(query < GROUP, 1 / total, 0.0), axis=0))
        best, highest = tl.where(query < GROUP, best, 0.0), 0.0
        lowest = tl.max(tl.where(query < GROUP, worst - best, float("-inf")))  # margins are not joined to less
    return best, highest, lowest


@triton.jit
def _first_recent(recent, count, RECENT_TABLE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the position of the first recent token. recent: the number of them, or a table of it by `count`."""
    if RECENT_TABLE:
        number = tl.load(recent + count).to(tl.int32)
    else:
        number = recent
    return count - number


@triton.jit
def _margins(  # type: ignore[no-untyped-def]
    scores, thresholds, tie_ends, best, highest, kv, token, end, sinks, first_recent, stride,
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, JOIN: tl.constexpr, TOP_P: tl.constexpr,
):  # fmt: skip
    """Return each token's margin, joined over the query heads; inf if always selected.

    best, highest: of `_best_and_lowest`. With TOP_P the margin is -inf if no query head needs the token.
    """
    query = tl.arange(0, BLOCK_Q)
    head = (kv * GROUP + query).to(tl.int64)
    valid = (query < GROUP)[:, None] & (token < end)[None, :]
    inside = (query < GROUP)[:, None] & (token < stride)[None, :]  # a mask in multiples of 16 keeps the loads wide
    score = tl.load(scores + head[:, None] * stride + token[None, :], mask=inside, other=0.0).to(tl.float32)
    if TOP_P:
        threshold = tl.load(thresholds + head, mask=query < GROUP, other=0.0)[:, None]
        tie_end = tl.load(tie_ends + head, mask=query < GROUP, other=0)[:, None]
        valid = valid & ((score > threshold) | ((score == threshold) & (token[None, :] < tie_end)))
    margin = _joined(score - best[:, None], valid, JOIN)
    if TOP_P:
        margin -= highest
    return tl.where((token < sinks) | (token >= first_recent), float("inf"), margin)


@triton.jit
def _count_tokens_kernel(  # type: ignore[no-untyped-def]
    scores, extremes, thresholds, tie_ends, log_totals, seq_lens, slots, stride, sinks, recent, alpha, near_counts,
    histograms, finished,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr, JOIN: tl.constexpr, COUNT_NEAR: tl.constexpr, RECENT_TABLE: tl.constexpr,
    TOP_P: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Count the tokens of a split that are within alpha of the best, and all its tokens per bin."""
    pdl_wait(USE_PDL)
    kv, split = tl.program_id(0), tl.program_id(1)
    count = tl.load(seq_lens + tl.load(slots + kv // KV_HEADS)).to(tl.int32)
    first_recent = _first_recent(recent, count, RECENT_TABLE)
    best, highest, lowest = _best_and_lowest(
        extremes, thresholds, log_totals, kv, GROUP, BLOCK_Q, SPLITS, BLOCK_S, JOIN, TOP_P
    )
    if split == 0:  # reset the counter of the next kernel
        tl.store(finished + kv, 0)
    near = tl.zeros((BLOCK_T,), dtype=tl.int32)
    histogram = tl.zeros((256,), dtype=tl.int32)
    start, end = split_range(count, split, BLOCK_T, SPLITS)
    for first in tl.range(start, end, BLOCK_T):
        token = first + tl.arange(0, BLOCK_T)
        margin = _margins(
            scores, thresholds, tie_ends, best, highest, kv, token, end, sinks, first_recent, stride,
            GROUP, BLOCK_Q, JOIN, TOP_P,
        )  # fmt: skip
        near += ((margin > -alpha) & (token < end)).to(tl.int32)
        histogram += tl.histogram(_bin(margin, lowest), 256, mask=token < end)
    if COUNT_NEAR:
        tl.store(near_counts + kv * SPLITS + split, tl.sum(near))
    tl.store(histograms + (kv * SPLITS + split) * 256 + tl.arange(0, 256), histogram)


@triton.jit
def _select_tokens_kernel(  # type: ignore[no-untyped-def]
    scores, extremes, thresholds, tie_ends, log_totals, seq_lens, slots, stride, sinks, recent, budgets, near_counts,
    histograms, undecided, finished, positions, counts, width, MEAN: tl.constexpr, BLOCK_HS: tl.constexpr,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr, JOIN: tl.constexpr, RECENT_TABLE: tl.constexpr, TOP_P: tl.constexpr,
    USE_PDL: tl.constexpr,
):  # fmt: skip
    """Write the tokens of a split that are above the threshold bin, and set those in it aside.

    The last program of a KV head to finish selects among all tokens set aside, and appends those selected.
    """
    pdl_wait(USE_PDL)
    kv, split = tl.program_id(0), tl.program_id(1)
    row, head = kv // KV_HEADS, kv % KV_HEADS
    count = tl.load(seq_lens + tl.load(slots + row)).to(tl.int32)
    first_recent = _first_recent(recent, count, RECENT_TABLE)
    entry = tl.arange(0, BLOCK_HS)
    near = tl.load(near_counts + row * KV_HEADS * SPLITS + entry, mask=entry < KV_HEADS * SPLITS, other=0)
    if MEAN:
        wanted = (tl.sum(near) + KV_HEADS - 1) // KV_HEADS
    else:
        wanted = tl.sum(tl.where(entry // SPLITS == head, near, 0))
    wanted = tl.minimum(wanted.to(tl.int64), tl.load(budgets + count)).to(tl.int32)  # a budget may exceed int32
    if split == 0:
        tl.store(counts + kv, wanted)

    other_split, bins = tl.arange(0, BLOCK_S), tl.arange(0, 256)
    split_histograms = tl.load(
        histograms + (kv * SPLITS + other_split[:, None]) * 256 + bins[None, :],
        mask=(other_split < SPLITS)[:, None], other=0,
    )  # fmt: skip
    histogram = tl.sum(split_histograms, axis=0)
    threshold_bin, above = find_bin(histogram, wanted)
    earlier = tl.where((other_split < split)[:, None], split_histograms, 0)
    written = tl.sum(tl.where(bins[None, :] > threshold_bin, earlier, 0))  # tokens that earlier splits write
    set_aside = tl.sum(tl.where(bins[None, :] == threshold_bin, earlier, 0))

    best, highest, lowest = _best_and_lowest(
        extremes, thresholds, log_totals, kv, GROUP, BLOCK_Q, SPLITS, BLOCK_S, JOIN, TOP_P
    )
    target, values = positions + kv.to(tl.int64) * width, undecided + kv.to(tl.int64) * 2 * stride
    start, end = split_range(count, split, BLOCK_T, SPLITS)
    if wanted == 0:  # nothing is selected, so skip the loop
        end = start
    for first in tl.range(start, end, BLOCK_T):
        token = first + tl.arange(0, BLOCK_T)
        margin = _margins(
            scores, thresholds, tie_ends, best, highest, kv, token, end, sinks, first_recent, stride,
            GROUP, BLOCK_Q, JOIN, TOP_P,
        )  # fmt: skip
        index = _bin(margin, lowest)
        is_above, is_undecided = (index > threshold_bin) & (token < end), (index == threshold_bin) & (token < end)
        packed = is_above.to(tl.int32) + (is_undecided.to(tl.int32) << 16)  # one scan for two counts: BLOCK_T < 2^15
        scanned = tl.cumsum(packed, axis=0)
        tl.store(target + written + (scanned & 0xFFFF) - 1, token.to(tl.int64), mask=is_above)
        value_ptr = values + set_aside + (scanned >> 16) - 1
        tl.store(value_ptr, sortable(margin), mask=is_undecided)
        tl.store(value_ptr + stride, token, mask=is_undecided)
        total = tl.sum(packed)
        written += total & 0xFFFF
        set_aside += total >> 16

    tl.debug_barrier()  # all threads must have written before the program counts as finished
    if tl.atomic_add(finished + kv, 1, sem="acq_rel") == SPLITS - 1:
        if wanted > 0:
            number = tl.sum(tl.where(bins == threshold_bin, histogram, 0))
            threshold, ties = radix_select(values, number, wanted - above, BLOCK_T)
            write_selected(values, values + stride, number, threshold, ties, target + above, BLOCK_T)
