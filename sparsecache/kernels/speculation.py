"""Score past tokens by partial keys with a speculated query, as in InfiniGen."""

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
from sparsecache.kernels.rows import index_slots
from sparsecache.kernels.scores import partial_scores, scaled_scores
from sparsecache.kernels.threshold import Scores, split_range

_MAX_BLOCK_T, _WARPS, _STAGES = 128, 4, 4  # tokens per iteration, unless their keys have less than _MIN_TILE_BYTES
_MIN_TILE_BYTES, _TILE_BYTES = 8192, 16384  # bytes of keys per iteration: fewer do not hide the latency of memory
_MAX_SPLITS = 64
_LONG_SPLIT = 1024  # tokens
_MAX_HALF = tl.constexpr(65504)  # the largest float16


def speculated_scores(
    q: Tensor,
    projection: Tensor | None,
    keys: Tensor,
    seq_lens: Tensor,
    slots: Tensor,
    high_priority: bool = False,
    with_sums: bool = False,
) -> Scores:
    """Score the past tokens of each slot by partial keys, for `threshold_select`.

    q: [B, H, 1, D]; projection: [slots, G, D, I] float32, from queries and keys to I partial channels; None: `keys` are
    the keys themselves, I = D. keys: [slots, G, T, I]; seq_lens: [slots] int64, past tokens, at most T; slots: [B].
    high_priority: whether the kernel runs on a stream of high priority. It affects speed alone. with_sums: whether
    the kernel also sums exp(score), which selecting with group "softmax" needs.
    """
    if use_kernel(q):
        return _launch(q, projection, keys, seq_lens, slots, high_priority, with_sums)
    longest = int(seq_lens[slots].max())
    keys = keys[:, :, :longest]
    if projection is None:
        scores = scaled_scores(q, index_slots(keys, slots), q.shape[3])
    else:
        scores = partial_scores(q, projection, keys, slots)
    kv_heads = keys.shape[1]
    return Scores(scores.view(len(q), kv_heads, q.shape[1] // kv_heads, longest), None)


def append_speculated(
    k: Tensor, v: Tensor, projection: Tensor, keys: Tensor, store: Tensor, seq_lens: Tensor, slots: Tensor
) -> None:
    """Append one token's key, value and partial key to each slot.

    k, v: [B, G, 1, D]; projection, keys, seq_lens, slots: as in `speculated_scores`; store: [slots, G, T, 2, D], keys
    and values, on the device or in pinned host memory. `seq_lens` is not changed. A full slot overwrites its last row.
    """
    batch, kv_heads, _, head_dim = k.shape
    if use_kernel(k):
        _append_speculated_kernel[(batch * kv_heads,)](
            k, v, k.stride(0), k.stride(1), projection, keys, store, seq_lens, slots,
            kv_heads, store.shape[2], head_dim, keys.shape[3],
            BLOCK_D=next_power_of_2(head_dim), BLOCK_I=next_power_of_2(keys.shape[3]), num_warps=4, **pdl_options(),
        )  # fmt: skip
        return
    row = seq_lens[slots].clamp(max=store.shape[2] - 1)
    keys[slots, :, row] = (k.float() @ index_slots(projection, slots))[:, :, 0].to(keys.dtype)
    slots, row = slots.to(store.device), row.to(store.device)
    store[slots, :, row] = torch.cat((k, v), 2).to(store.device)


def _launch(
    q: Tensor,
    projection: Tensor | None,
    keys: Tensor,
    seq_lens: Tensor,
    slots: Tensor,
    high_priority: bool,
    with_sums: bool,
) -> Scores:
    batch, heads, _, head_dim = q.shape
    kv_heads, capacity, channels = keys.shape[1:]
    group, device = heads // kv_heads, q.device
    splits = _split_count(batch, kv_heads, capacity, device, high_priority)
    stride = -(-capacity // 16) * 16  # rows of scores are aligned, so that wide loads are possible
    # float16 moves half as much. Its 11 bits are enough: bfloat16 keys have 8 bits, float16 keys as many.
    dtype = torch.float32 if keys.dtype == torch.float32 else torch.float16
    scores = torch.empty((batch, kv_heads, group, stride), device=device, dtype=dtype)
    extremes = torch.empty((3 if with_sums else 2, batch, heads, splits), device=device, dtype=torch.float32)
    block_i = next_power_of_2(channels, 16)
    row_bytes = block_i * keys.element_size()
    _score_kernel[(batch * kv_heads, splits)](
        q, q.stride(0), q.stride(1), q if projection is None else projection, keys, seq_lens, slots, scores, extremes,
        1 / math.sqrt(head_dim), kv_heads, capacity, stride, head_dim, channels, extremes[0].numel(),
        PROJECTED=projection is not None, BLOCK_D=next_power_of_2(head_dim, 16), BLOCK_I=block_i, GROUP=group,
        BLOCK_Q=next_power_of_2(group, 8),
        BLOCK_T=min(max(_MAX_BLOCK_T, _MIN_TILE_BYTES // row_bytes), _TILE_BYTES // row_bytes),
        SPLITS=splits, WITH_SUMS=with_sums,
        num_warps=_WARPS, num_stages=_STAGES, **pdl_options(),
    )  # fmt: skip
    return Scores(scores, extremes)


def _split_count(batch: int, kv_heads: int, capacity: int, device: torch.device, high_priority: bool) -> int:
    """Return how many splits each slot has, so that scoring and selection fill the GPU.

    The projections of one sequence are thousands of small programs. Beside them half as many splits disturb less,
    unless this kernel has priority and long splits.
    """
    splits = saturating_programs(device) // (batch * kv_heads)
    if batch == 1 and not (high_priority and capacity >= _LONG_SPLIT * splits):
        splits //= 2
    return max(1, min(_MAX_SPLITS, splits))


@triton.jit(do_not_specialize=["capacity"])
def _score_kernel(  # type: ignore[no-untyped-def]
    q, q_row_stride, q_head_stride, projection, keys, seq_lens, slots, scores, extremes, scale, kv_heads, capacity,
    stride, head_dim, channels, extremes_size,
    PROJECTED: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_I: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_T: tl.constexpr, SPLITS: tl.constexpr,
    WITH_SUMS: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Score one split of a slot for the query heads of a KV head; find each head's extremes."""
    pdl_wait(USE_PDL)
    row, kv, split = tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads, tl.program_id(1)
    slot = tl.load(slots + row).to(tl.int64)
    count = tl.load(seq_lens + slot)
    query, at, channel = tl.arange(0, BLOCK_Q)[None, :], tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_I)
    head = kv * GROUP + query
    q_mask = (query < GROUP) & (at < head_dim)[:, None]
    q_ptr = q + row * q_row_stride + head * q_head_stride + at[:, None]
    q_block = tl.load(q_ptr, mask=q_mask, other=0.0)
    owner = slot * kv_heads + kv
    if PROJECTED:
        projection_block = tl.load(
            projection + (owner * head_dim + at[None, :]) * channels + channel[:, None],
            mask=(at < head_dim)[None, :] & (channel < channels)[:, None], other=0.0,
        )  # fmt: skip
        partial = tl.dot(projection_block, q_block.to(tl.float32), input_precision="ieee")  # [BLOCK_I, BLOCK_Q]
        # The query is the sum of two values in the dtype of the keys: rounding it to one would change selections.
        q_high = partial.to(keys.dtype.element_ty)
        q_low = (partial - q_high.to(tl.float32)).to(keys.dtype.element_ty)
    else:
        q_high = q_block.to(keys.dtype.element_ty)

    best = tl.full((BLOCK_T, BLOCK_Q), float("-inf"), dtype=tl.float32)  # reduced over BLOCK_T after the loop
    worst = tl.full((BLOCK_T, BLOCK_Q), float("inf"), dtype=tl.float32)
    highest, total = tl.full((BLOCK_Q,), -3e38, dtype=tl.float32), tl.zeros((BLOCK_Q,), dtype=tl.float32)
    start, end = split_range(count, split, BLOCK_T, SPLITS)
    for first in tl.range(start, end, BLOCK_T):
        token = (first + tl.arange(0, BLOCK_T))[:, None]
        mask = (token < end) & (channel < channels)[None, :]
        key = tl.load(keys + (owner * capacity + token) * channels + channel[None, :], mask=mask, other=0.0)
        score = tl.dot(key, q_high, input_precision="ieee")
        if PROJECTED:
            score = tl.dot(key, q_low, score, input_precision="ieee")
        score *= scale
        if scores.dtype.element_ty == tl.float16:
            # The extremes are those of the stored scores. Clamped, because a margin from infinity is NaN.
            score = tl.minimum(tl.maximum(score, -_MAX_HALF), _MAX_HALF).to(tl.float16).to(tl.float32)
        best = tl.maximum(best, tl.where(token < end, score, float("-inf")))
        worst = tl.minimum(worst, tl.where(token < end, score, float("inf")))
        if WITH_SUMS:
            new_highest = tl.maximum(highest, tl.max(tl.where(token < end, score, -3e38), axis=0))
            weights = tl.where(token < end, tl.exp(score - new_highest[None, :]), 0.0)
            total = total * tl.exp(highest - new_highest) + tl.sum(weights, axis=0)
            highest = new_highest
        target = scores + (row * kv_heads * GROUP + head).to(tl.int64) * stride + token
        inside = (query < GROUP) & (token < stride)
        # The selection reads the scores next; weights that stream through L2 meanwhile must not evict them.
        tl.store(target, score, mask=inside, eviction_policy="evict_last")
    extreme = extremes + (row * kv_heads * GROUP + kv * GROUP + tl.arange(0, BLOCK_Q)) * SPLITS + split
    tl.store(extreme, tl.max(best, axis=0), mask=tl.arange(0, BLOCK_Q) < GROUP)
    tl.store(extreme + extremes_size, tl.min(worst, axis=0), mask=tl.arange(0, BLOCK_Q) < GROUP)
    if WITH_SUMS:
        tl.store(extreme + 2 * extremes_size, total, mask=tl.arange(0, BLOCK_Q) < GROUP)


@triton.jit(do_not_specialize=["capacity"])
def _append_speculated_kernel(  # type: ignore[no-untyped-def]
    k, v, k_row_stride, k_head_stride, projection, keys, store, seq_lens, slots, kv_heads, capacity, head_dim, channels,
    BLOCK_D: tl.constexpr, BLOCK_I: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Append the new token of one slot and KV head."""
    pdl_wait(USE_PDL)
    row, kv = tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads
    slot = tl.load(slots + row).to(tl.int64)
    owner = slot * kv_heads + kv
    place = owner * capacity + tl.minimum(tl.load(seq_lens + slot), capacity - 1)
    at, channel = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_I)
    key = tl.load(k + row * k_row_stride + kv * k_head_stride + at, mask=at < head_dim, other=0.0)
    value = tl.load(v + row * k_row_stride + kv * k_head_stride + at, mask=at < head_dim, other=0.0)
    mask = (at < head_dim)[:, None] & (channel < channels)[None, :]
    projection_block = tl.load(
        projection + (owner * head_dim + at[:, None]) * channels + channel[None, :], mask=mask, other=0.0
    )
    partial = tl.sum(key.to(tl.float32)[:, None] * projection_block, axis=0)
    tl.store(keys + place * channels + channel, partial, mask=channel < channels)
    tl.store(store + place * 2 * head_dim + at, key, mask=at < head_dim)
    tl.store(store + (place * 2 + 1) * head_dim + at, value, mask=at < head_dim)
