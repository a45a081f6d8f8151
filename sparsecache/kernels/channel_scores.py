"""Approximate attention by a few channels of each query, from keys stored by channel, as in SparQ."""

import math
from typing import NamedTuple

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
from sparsecache.kernels.rows import mask_of_first
from sparsecache.kernels.threshold import Scores, Selection, SelectionParams, split_range, threshold_select

_TINY = 1e-30  # a query of zeros scores nothing
_ALWAYS = 100.0  # above the logarithm of any sum of probabilities
_MAX_HALF = tl.constexpr(65504)  # the largest float16
_TILE_BYTES, _MAX_SPLITS = 16384, 64  # bytes of keys per iteration; splits per slot and KV head


class Channels(NamedTuple):
    """The channels by which the query heads of a KV head score tokens.

    chosen: [B, G, I] int64, those in which the queries are largest. scale: [B, G, H / G] float32, which divides scores.
    """

    chosen: Tensor
    scale: Tensor


class ApproximateAttention(NamedTuple):
    """The attention of each query head to past tokens and the current one, by some channels.

    From the reference values are its logarithms, [B, G, H / G, T] float32. From the kernel values are scores, T a
    multiple of 16, float16 for keys in half precision, and a large number for tokens that are always selected.
    statistics: [4, B, H, splits] float32 from the kernel, per split the highest score, the lowest one, the sum of
    exp(score - highest), and the part of the sum that the current token and those always selected have; else None.
    """

    values: Tensor
    statistics: Tensor | None


def append_and_choose(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, value_sums: Tensor, seq_lens: Tensor, slots: Tensor, count: int
) -> Channels:
    """Append one token to each slot, and choose `count` channels per KV head.

    q: [B, H, 1, D]; k, v: [B, G, 1, D]; keys: [slots, G, D, T]; value_sums: [slots, G, D] float32; seq_lens: [slots]
    int64, past tokens, not changed; slots: [B] int64. A full slot overwrites its last key.
    """
    batch, kv_heads, _, head_dim = k.shape
    group = q.shape[1] // kv_heads
    if not use_kernel(q):
        row = seq_lens[slots].clamp(max=keys.shape[3] - 1)
        keys[slots, :, :, row] = k[:, :, 0]
        value_sums.index_add_(0, slots, v[:, :, 0].float())
        magnitude = q.float().view(batch, kv_heads, group, head_dim).abs()
        chosen = magnitude.sum(2).topk(count, dim=-1).indices
        of_heads = magnitude.gather(3, chosen[:, :, None].expand(-1, -1, group, -1)).sum(3)
        coverage = of_heads / magnitude.sum(3).clamp(min=_TINY)
        return Channels(chosen, (coverage * head_dim).clamp(min=_TINY).sqrt())
    chosen = torch.empty((batch, kv_heads, count), device=q.device, dtype=torch.int64)
    scale = torch.empty((batch, kv_heads, group), device=q.device, dtype=torch.float32)
    _choose_kernel[(batch * kv_heads,)](
        q, q.stride(0), q.stride(1), k, v, k.stride(0), k.stride(1), keys, value_sums, seq_lens, slots, chosen, scale,
        kv_heads, keys.shape[3], head_dim, count,
        GROUP=group, BLOCK_Q=next_power_of_2(group), BLOCK_D=next_power_of_2(head_dim, 16), num_warps=4,
        **pdl_options(),
    )  # fmt: skip
    return Channels(chosen, scale)


def approximate_attention(
    q: Tensor, channels: Channels, keys: Tensor, seq_lens: Tensor, slots: Tensor, recent: Tensor, width: int
) -> ApproximateAttention:
    """Return the approximate attention to past tokens and the current one.

    q, keys, seq_lens, slots: as in `append_and_choose`, the current token appended. recent: [max_tokens + 1] int64, how
    many of the last past tokens are always selected, by past tokens. width: the positions that the reference scores.
    """
    batch, heads, _, head_dim = q.shape
    kv_heads, capacity = keys.shape[1], keys.shape[3]
    group, count = heads // kv_heads, channels.chosen.shape[2]
    if not use_kernel(q):
        head = torch.arange(kv_heads, device=q.device)[:, None]
        of_channels = keys[..., :width][slots[:, None, None], head, channels.chosen].float()  # [B, G, I, width]
        index = channels.chosen[:, :, None].expand(-1, -1, group, -1)
        scores = q.float().view(batch, kv_heads, group, head_dim).gather(3, index) @ of_channels
        is_later = torch.arange(width, device=q.device) > seq_lens[slots][:, None]
        scores = (scores / channels.scale[..., None]).masked_fill(is_later[:, None, None], -torch.inf)
        return ApproximateAttention(scores.log_softmax(3), None)
    splits = max(1, min(_MAX_SPLITS, saturating_programs(q.device) // (batch * kv_heads)))
    stride = -(-capacity // 16) * 16
    dtype = torch.float32 if keys.dtype == torch.float32 else torch.float16  # as in `speculated_scores`
    values = torch.empty((batch, kv_heads, group, stride), device=q.device, dtype=dtype)
    statistics = torch.empty((4, batch, heads, splits), device=q.device, dtype=torch.float32)
    block_i = next_power_of_2(count, 16)
    _approximate_kernel[(batch * kv_heads, splits)](
        q, q.stride(0), q.stride(1), *channels, keys, seq_lens, slots, recent, values, statistics,
        kv_heads, head_dim, capacity, stride, count, statistics[0].numel(),
        GROUP=group, BLOCK_Q=next_power_of_2(group, 16), BLOCK_I=block_i,
        BLOCK_T=min(512, _TILE_BYTES // (block_i * keys.element_size())), SPLITS=splits,
        num_warps=4, num_stages=4, **pdl_options(),
    )  # fmt: skip
    return ApproximateAttention(values, statistics)


def select_by_attention(
    attention: ApproximateAttention, seq_lens: Tensor, slots: Tensor, budgets: Tensor, recent: Tensor, width: int
) -> Selection:
    """Select the recent tokens and those with the most approximate attention of all query heads of a KV head.

    budgets: [max_tokens + 1] int64, the most tokens to select, by past tokens; width: at least the most of them. The
    others as in `approximate_attention`.
    """
    values, statistics = attention
    if statistics is not None:
        params = SelectionParams(math.inf, budgets, mean=False, group="softmax")
        return threshold_select(Scores(values, statistics), seq_lens, slots, params, width)
    past = seq_lens[slots]
    is_recent = torch.arange(values.shape[3], device=past.device) >= (past - recent[past])[:, None]
    joined = values.logsumexp(2).masked_fill(is_recent[:, None], _ALWAYS)
    params = SelectionParams(math.inf, budgets, mean=False)
    return threshold_select(Scores(joined[:, :, None], None), seq_lens, slots, params, width)


def add_mean_value(
    out: Tensor,
    attention: ApproximateAttention,
    selection: Selection,
    value_sums: Tensor,
    seq_lens: Tensor,
    slots: Tensor,
    recent: Tensor,
) -> Tensor:
    """Return out [B, H, 1, D], weighted by its share of the approximate attention, plus the mean value with the rest.

    out: the attention over the selected tokens and the current one. value_sums: those of past tokens and the current
    one. The others as in `select_by_attention`.
    """
    batch, _, _, head_dim = out.shape
    (values, statistics), (positions, counts) = attention, selection
    kv_heads, group, stride = values.shape[1:]
    if statistics is not None:
        out = out.contiguous()
        weighted, splits = torch.empty_like(out), statistics.shape[3]
        _mean_value_kernel[(batch * kv_heads,)](
            out, weighted, values, statistics, positions, counts, value_sums, seq_lens, slots, recent,
            kv_heads, head_dim, stride, positions.shape[2], statistics[0].numel(),
            GROUP=group, BLOCK_Q=next_power_of_2(group), BLOCK_D=next_power_of_2(head_dim, 16), BLOCK_N=512,
            SPLITS=splits, BLOCK_S=next_power_of_2(splits), num_warps=4, **pdl_options(),
        )  # fmt: skip
        return weighted
    past = seq_lens[slots]
    is_selected = mask_of_first(counts, positions.shape[2])
    index = positions.masked_fill(~is_selected, 0)[:, :, None].expand(-1, -1, group, -1)
    current = past.clamp(max=stride - 1)[:, None, None, None].expand(-1, kv_heads, group, 1)
    shares = values.exp()
    share = shares.gather(3, index).masked_fill(~is_selected[:, :, None], 0).sum(3, keepdim=True)
    share = share + shares.gather(3, current)  # [B, G, H / G, 1]
    mean = (value_sums[slots] / (past + 1)[:, None, None])[:, :, None]  # [B, G, 1, D]
    return mean.lerp(out.view(batch, kv_heads, group, head_dim).float(), share).to(out.dtype).view_as(out)


@triton.jit(do_not_specialize=["capacity"])
def _choose_kernel(  # type: ignore[no-untyped-def]
    q, q_row_stride, q_head_stride, k, v, k_row_stride, k_head_stride, keys, value_sums, seq_lens, slots, chosen, scale,
    kv_heads, capacity, head_dim, count,
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Append the new token of one slot and KV head, and choose its channels by their rank."""
    pdl_wait(USE_PDL)
    row, kv = tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads
    slot = tl.load(slots + row).to(tl.int64)
    owner = slot * kv_heads + kv
    query, channel = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D)
    in_head = channel < head_dim
    at = row * k_row_stride + kv * k_head_stride + channel
    place = tl.minimum(tl.load(seq_lens + slot), capacity - 1)
    tl.store(keys + (owner * head_dim + channel) * capacity + place, tl.load(k + at, mask=in_head), mask=in_head)
    sums = value_sums + owner * head_dim + channel
    value = tl.load(v + at, mask=in_head, other=0.0).to(tl.float32)
    tl.store(sums, tl.load(sums, mask=in_head, other=0.0) + value, mask=in_head)

    q_ptr = q + row * q_row_stride + (kv * GROUP + query)[:, None] * q_head_stride + channel[None, :]
    q_block = tl.load(q_ptr, mask=(query < GROUP)[:, None] & in_head[None, :], other=0.0)
    magnitude = tl.abs(q_block.to(tl.float32))
    size = tl.where(in_head, tl.sum(magnitude, axis=0), -1.0)
    is_larger = size[:, None] > size[None, :]
    is_earlier = (size[:, None] == size[None, :]) & (channel[:, None] < channel[None, :])
    rank = tl.sum((is_larger | is_earlier).to(tl.int32), axis=0)
    tl.store(chosen + tl.program_id(0) * count + rank, channel.to(tl.int64), mask=rank < count)
    coverage = tl.sum(tl.where((rank < count)[None, :], magnitude, 0.0), axis=1)
    coverage /= tl.maximum(tl.sum(magnitude, axis=1), 1e-30)  # as _TINY in the reference
    tl.store(scale + tl.program_id(0) * GROUP + query, tl.sqrt(tl.maximum(coverage * head_dim, 1e-30)), query < GROUP)


@triton.jit
def _approximate_kernel(  # type: ignore[no-untyped-def]
    q, q_row_stride, q_head_stride, chosen, scale, keys, seq_lens, slots, recent, values, statistics,
    kv_heads, head_dim, capacity, stride, count, statistics_size,
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_T: tl.constexpr, SPLITS: tl.constexpr,
    USE_PDL: tl.constexpr,
):  # fmt: skip
    """Score the tokens of a split for the query heads of a KV head, and find each head's statistics."""
    pdl_wait(USE_PDL)
    row, kv, split = tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads, tl.program_id(1)
    slot = tl.load(slots + row).to(tl.int64)
    past = tl.load(seq_lens + slot)
    first_recent = past - tl.load(recent + past)
    query, at = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_I)
    channel = tl.load(chosen + tl.program_id(0) * count + at, mask=at < count, other=0)
    head = kv * GROUP + query
    q_ptr = q + row * q_row_stride + head[:, None] * q_head_stride + channel[None, :]
    q_block = tl.load(q_ptr, mask=(query < GROUP)[:, None] & (at < count)[None, :], other=0.0)
    divisor = tl.load(scale + tl.program_id(0) * GROUP + query, mask=query < GROUP, other=1.0)
    channel_ptr = keys + ((slot * kv_heads + kv) * head_dim + channel) * capacity

    highest = tl.full((BLOCK_Q,), -3e38, dtype=tl.float32)  # not -inf, whose difference from itself is NaN
    lowest = tl.full((BLOCK_Q,), float("inf"), dtype=tl.float32)
    total, always = tl.zeros((BLOCK_Q,), dtype=tl.float32), tl.zeros((BLOCK_Q,), dtype=tl.float32)
    tokens = tl.minimum(past + 1, capacity).to(tl.int32)
    inside = tl.cdiv(tokens, 16) * 16  # a mask in multiples of 16 keeps the loads wide
    start, end = split_range(tokens, split, BLOCK_T, SPLITS)
    for first in tl.range(start, end, BLOCK_T):
        token = first + tl.arange(0, BLOCK_T)
        key_mask = (at < count)[:, None] & (token < inside)[None, :]
        key = tl.load(channel_ptr[:, None] + token[None, :], mask=key_mask, other=0.0)
        score = tl.dot(q_block, key, input_precision="ieee") / divisor[:, None]
        largest = 3e38  # above any score: recent tokens are always selected
        if values.dtype.element_ty == tl.float16:
            # The statistics are those of the stored scores. Clamped, because a margin from infinity is NaN.
            score = tl.minimum(tl.maximum(score, -_MAX_HALF), _MAX_HALF).to(tl.float16).to(tl.float32)
            largest = 65504.0
        is_seen, is_recent = (token < end)[None, :], (token >= first_recent)[None, :]
        new_highest = tl.maximum(highest, tl.max(tl.where(is_seen, score, -3e38), axis=1))
        rescale = tl.exp(highest - new_highest)
        weight = tl.where(is_seen, tl.exp(score - new_highest[:, None]), 0.0)
        total = total * rescale + tl.sum(weight, axis=1)
        always = always * rescale + tl.sum(tl.where(is_recent, weight, 0.0), axis=1)
        highest = new_highest
        lowest = tl.minimum(lowest, tl.min(tl.where(is_seen, score, float("inf")), axis=1))
        target = values + (row * kv_heads * GROUP + head).to(tl.int64)[:, None] * stride + token[None, :]
        tl.store(target, tl.where(is_recent, largest, score), mask=(query < GROUP)[:, None] & (token < inside)[None, :])
    target = statistics + (tl.program_id(0) * GROUP + query) * SPLITS + split
    tl.store(target, highest, mask=query < GROUP)
    tl.store(target + statistics_size, lowest, mask=query < GROUP)
    tl.store(target + 2 * statistics_size, total, mask=query < GROUP)
    tl.store(target + 3 * statistics_size, always, mask=query < GROUP)


@triton.jit(do_not_specialize=["width"])
def _mean_value_kernel(  # type: ignore[no-untyped-def]
    out, weighted, values, statistics, positions, counts, value_sums, seq_lens, slots, recent,
    kv_heads, head_dim, stride, width, statistics_size,
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Weight the outputs of the query heads of a KV head, and add the mean value."""
    pdl_wait(USE_PDL)
    row, kv, pair = tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads, tl.program_id(0)
    slot = tl.load(slots + row).to(tl.int64)
    past, count = tl.load(seq_lens + slot), tl.load(counts + pair).to(tl.int32)
    first_recent = past - tl.load(recent + past)
    query, channel, split = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_S)
    source = statistics + (pair * GROUP + query)[:, None] * SPLITS + split[None, :]
    mask = (query < GROUP)[:, None] & (split < SPLITS)[None, :]
    of_split = tl.load(source, mask=mask, other=-3e38)
    highest = tl.max(of_split, axis=1)
    rescale = tl.exp(of_split - highest[:, None])
    total = tl.sum(tl.load(source + 2 * statistics_size, mask=mask, other=0.0) * rescale, axis=1)
    share = tl.sum(tl.load(source + 3 * statistics_size, mask=mask, other=0.0) * rescale, axis=1)
    for first in tl.range(0, count, BLOCK_N):
        at = first + tl.arange(0, BLOCK_N)
        position = tl.load(positions + pair.to(tl.int64) * width + at, mask=at < count, other=0)
        is_counted = (at < count) & (position < first_recent)
        value_ptr = values + (pair * GROUP + query).to(tl.int64)[:, None] * stride + position[None, :]
        value = tl.load(value_ptr, mask=(query < GROUP)[:, None] & is_counted[None, :], other=0.0).to(tl.float32)
        share += tl.sum(tl.where(is_counted[None, :], tl.exp(value - highest[:, None]), 0.0), axis=1)
    share /= tl.where(query < GROUP, total, 1.0)
    in_head = channel < head_dim
    sums = tl.load(value_sums + (slot * kv_heads + kv) * head_dim + channel, mask=in_head, other=0.0)
    mean = (sums / (past + 1).to(tl.float32))[None, :]
    offset = (pair * GROUP + query)[:, None] * head_dim + channel[None, :]
    mask = (query < GROUP)[:, None] & in_head[None, :]
    exact = tl.load(out + offset, mask=mask, other=0.0).to(tl.float32)
    tl.store(weighted + offset, mean + share[:, None] * (exact - mean), mask=mask)
