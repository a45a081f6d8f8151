"""Attention of one new token per sequence over all, or selected, tokens of a slot.

The kernels use flash decoding (https://pytorch.org/blog/flash-decoding/): each sequence is cut into splits of equal
length, one program attends to one split, and a second kernel merges the results. All sequences share one grid that
fills the GPU, so a long sequence gets more splits than a short one. The device computes the length of a split and its
place. The host therefore never reads a sequence length, and a decode step can be a CUDA graph.

In one file because all entry points share one kernel.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsecache.kernels._triton import (
    next_power_of_2,
    pdl_launch,
    pdl_options,
    pdl_wait,
    saturating_programs,
    tl,
    triton,
    use_kernel,
)
from sparsecache.kernels.attention import attention_over_rows
from sparsecache.kernels.rows import mask_of_first, take_rows

_TILE_BYTES = 32768  # bytes of keys, and of values, that a program loads at a time
_MAX_SPLITS = 64  # per sequence
_ALIGNMENT = tl.constexpr(16)  # tokens: the length of a split is a multiple of it


def attend_and_append(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, slots: Tensor
) -> Tensor:
    """Append one token to each slot and attend over the slot's past tokens and the new one.

    q: [B, H, 1, D]; k, v: [B, G, 1, D]; keys, values: [slots, G, T, D], written in place; slots: [B] int64, distinct.
    lengths: past tokens, int64, [slots] or per KV head [slots, G]; not changed, the caller counts the new token.
    The new token goes to row min(length, T - 1), so a full slot overwrites its last row. Returns [B, H, 1, D].
    """
    if use_kernel(q):
        return _launch(q, k, v, keys, values, slots, None, lengths=lengths)
    append_kv(k, v, keys, values, lengths, slots)
    longest = min(int(lengths[slots].max()) + 1, keys.shape[2])
    keys, values = keys[:, :, :longest], values[:, :, :longest]
    if len(lengths) == 1 and int(lengths.min()) + 1 >= longest:
        return attention_over_rows(q, keys, values)
    # One call over all slots, because indexing the slots would copy the cache. Unused slots are dropped afterwards.
    queries = q.new_zeros((len(lengths), *q.shape[1:]))
    queries[slots] = q
    mask = torch.arange(longest, device=q.device) <= lengths.view(len(lengths), -1, 1)  # [slots, 1 or G, longest]
    return attention_over_rows(queries, keys, values, mask)[slots]


def append_kv(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, slots: Tensor) -> None:
    """Append one token to each slot. Arguments as in `attend_and_append`."""
    row = lengths[slots].clamp(max=keys.shape[2] - 1)
    if row.dim() == 1:
        keys[slots, :, row] = k[:, :, 0]
        values[slots, :, row] = v[:, :, 0]
        return
    index = slots[:, None], torch.arange(k.shape[1], device=k.device), row
    keys[index] = k[:, :, 0]
    values[index] = v[:, :, 0]


def attend_selected(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    selected: Tensor,
    counts: Tensor,
    lengths: Tensor | None = None,
) -> Tensor:
    """Attend over selected rows of each slot and the new token.

    q, k, v, keys, values, slots: as in `attend_and_append`; keys and values may be strided except in D.
    selected: [B, G, N] int64 or int32; the first counts [B, G] (int64) of a KV head are valid and distinct.
    lengths: as in `attend_and_append`, the row at which the new token is appended; None: it is not.
    Returns [B, H, 1, D].
    """
    if use_kernel(q):
        return _launch(q, k, v, keys, values, slots, counts, selected=selected, lengths=lengths)
    mask = _mask(counts, selected.shape[2])
    rows = selected.long() if mask is None else selected.long().masked_fill(~mask, 0)
    out = attend_rows(q, k, v, take_rows(keys, slots, rows), take_rows(values, slots, rows), mask)
    if lengths is not None:
        append_kv(k, v, keys, values, lengths, slots)
    return out


class CachedRows(NamedTuple):
    """Where some rows of a step lie in a cache of rows.

    rows: [slots, G, C, 2, D], keys and values; slots: [B] int64; places: [B, G, N] int32, the cache row of each row of
    the step, or -1 if the cache does not hold it.
    """

    rows: Tensor
    slots: Tensor
    places: Tensor

    def merge(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Return rows [B, G, N, 2, D], the valid ones read from the cache if it holds them.

        The first counts [B, G] of a KV head are valid.
        """
        slot, head = self.slots[:, None, None], torch.arange(rows.shape[1], device=rows.device)[:, None]
        places = self.places.masked_fill(~mask_of_first(counts, rows.shape[2]), -1).long()
        return torch.where((places >= 0)[..., None, None], self.rows[slot, head, places.clamp(min=0)], rows)


def attend_gathered(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, counts: Tensor, cached: CachedRows | None = None
) -> Tensor:
    """Attend over gathered rows and the new token.

    q, k, v: as in `attend_and_append`; rows: [B, G, N, 2, D], keys and values, the first counts [B, G] of a KV head
    valid; cached: the rows to read from a cache instead. Returns [B, H, 1, D].
    """
    if use_kernel(q):
        return _launch(q, k, v, rows[..., 0, :], rows[..., 1, :], None, counts, cached=cached)
    if cached is not None:
        rows = cached.merge(rows, counts)
    mask = _mask(counts, rows.shape[2])
    if mask is not None:  # rows beyond the count may hold NaN, which a weight of 0 does not remove
        rows = rows.masked_fill(~mask[..., None, None], 0)
    return attend_rows(q, k, v, rows[..., 0, :], rows[..., 1, :], mask)


def _mask(counts: Tensor, width: int) -> Tensor | None:
    """Return mask_of_first, or None if all entries are valid."""
    # Attention without a mask is faster on a CPU.
    return None if int(counts.min()) == width else mask_of_first(counts, width)


def attend_rows(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Attend over keys, values [B, G, N, D], where mask [B, G, N] is True, and the new token: [B, H, 1, D]."""
    mask = None if mask is None else pad(mask, (0, 1), value=True)
    return attention_over_rows(q, torch.cat((keys, k), 2), torch.cat((values, v), 2), mask)


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor | None,
    counts: Tensor | None,
    *,
    selected: Tensor | None = None,
    cached: CachedRows | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Launch both kernels.

    counts: [B, G], how many rows, or entries of `selected`; None: the first `lengths` rows. lengths: [slots] or
    [slots, G], the row to which the new token is written; None: it is not written.
    slots: None if row b of keys and values belongs to sequence b, as `cached` requires.
    """
    batch, heads, _, head_dim = q.shape
    kv_heads, capacity = k.shape[1], keys.shape[2]
    num_splits = split_count(batch, kv_heads, q.device)
    partial_out = torch.empty((heads, num_splits, head_dim), device=q.device, dtype=torch.float32)
    softmax_stats = torch.empty((2, heads, num_splits), device=q.device, dtype=torch.float32)  # maxima, sums
    split_ranges = torch.empty((batch, kv_heads, 2), device=q.device, dtype=torch.int32)  # first split, how many
    out = torch.empty((batch, heads, 1, head_dim), device=q.device, dtype=q.dtype)
    block_d = next_power_of_2(head_dim, 16)
    block_t = max(16, min(128, _TILE_BYTES // (block_d * keys.element_size())))
    group = heads // kv_heads
    counts, lengths, selected = (None if x is None else x.contiguous() for x in (counts, lengths, selected))
    # An unused pointer argument takes any tensor; the constexpr flags turn its loads off.
    indices = cached.places if cached is not None else selected
    cache = (keys, q, 0) if cached is None else (cached.rows, cached.slots, cached.rows.shape[2])
    _attend_kernel[(kv_heads, num_splits)](
        q, q.stride(0), q.stride(1), k, v, k.stride(0), k.stride(1), keys, values, *keys.stride()[:3],
        *(q if x is None else x for x in (slots, indices, counts, lengths)), *cache,
        partial_out, softmax_stats, split_ranges, 1 / math.sqrt(head_dim),
        batch, num_splits, capacity, head_dim, heads * num_splits, 0 if indices is None else indices.shape[2],
        HAS_COUNTS=counts is not None, APPEND=lengths is not None,
        PER_HEAD=lengths is not None and lengths.dim() == 2, HAS_SLOTS=slots is not None,
        SELECTED=selected is not None, CACHED=cached is not None, GROUP=group, BLOCK_Q=next_power_of_2(group, 16),
        BLOCK_B=next_power_of_2(batch), BLOCK_T=block_t, BLOCK_D=block_d, num_warps=4, num_stages=2, **pdl_options(),
    )  # fmt: skip
    merge_kernel[(batch, heads)](
        partial_out, softmax_stats, split_ranges, out, num_splits, head_dim, heads * num_splits,
        GROUP=group, BATCHED=batch > 1, BLOCK_S=next_power_of_2(-(-num_splits // batch)), BLOCK_D=block_d,
        num_warps=2, **pdl_options(),
    )  # fmt: skip
    return out


def split_count(batch: int, kv_heads: int, device: torch.device) -> int:
    """Return how many splits all sequences share: enough to fill the GPU, at least one each."""
    return max(batch, min(_MAX_SPLITS * batch, saturating_programs(device) // kv_heads))


@triton.jit
def _split_length(counts, num_splits, ALIGNMENT: tl.constexpr = _ALIGNMENT):  # type: ignore[no-untyped-def]
    """Return a split length with which rows of `counts` tokens need at most `num_splits`.

    It is the least of 64 candidates that suffices. These run from an even share to twice that in equal steps, then to
    the longest row in equal ratios.
    """
    even, longest, candidate = tl.cdiv(tl.sum(counts), num_splits), tl.max(counts), tl.arange(0, 64)
    ratio = tl.exp2(tl.log2(tl.maximum(longest / (2.0 * even), 1.0)) * (candidate - 31) / 32) * 2 * even
    length = tl.where(candidate < 32, even + tl.cdiv(even, 32) * candidate, ratio.to(tl.int32))
    length = tl.cdiv(length, ALIGNMENT) * ALIGNMENT
    needed = tl.sum(tl.cdiv(counts[:, None], length[None, :]), axis=0)
    return tl.min(tl.where(needed <= num_splits, length, tl.cdiv(longest, ALIGNMENT) * ALIGNMENT))


@triton.jit
def place_split(  # type: ignore[no-untyped-def]
    program, counts, row_slots, in_batch, rows, batch, num_splits, BLOCK_B: tl.constexpr, ALIGNMENT: tl.constexpr,
    RESERVED: tl.constexpr = 0,
):  # fmt: skip
    """Return what a program attends to: its row, the row's slot and tokens, the split, of how many, and its length.

    counts: the tokens of each row. The row is `batch` or more for a program that has nothing to do. RESERVED: how many
    splits at the end of each row have none of these tokens; num_splits includes them.
    """
    row, split, splits = 0, program, num_splits  # the splits at the end of a single row may be empty
    if BLOCK_B == 1:
        slot, count = tl.sum(row_slots).to(tl.int64), tl.sum(counts)
        length = tl.cdiv(tl.cdiv(count, num_splits - RESERVED), ALIGNMENT) * ALIGNMENT
    else:
        sizes = tl.where(in_batch, tl.maximum(counts, 1), 0)  # a row without past tokens needs a split for the new one
        length = _split_length(sizes, num_splits - RESERVED * batch, ALIGNMENT)
        row_splits = tl.where(in_batch, tl.cdiv(sizes, length) + RESERVED, 0)
        ends = tl.cumsum(row_splits, axis=0)
        row = tl.sum((ends <= program).to(tl.int32))
        is_row = rows == row
        slot, count = tl.sum(tl.where(is_row, row_slots, 0)).to(tl.int64), tl.sum(tl.where(is_row, counts, 0))
        splits = tl.sum(tl.where(is_row, row_splits, 0))
        split = program - tl.sum(tl.where(is_row, ends, 0)) + splits
    return row, slot, count, split, splits, length


@triton.jit(do_not_specialize=["batch", "num_splits", "capacity", "stats_size", "width"])
def _attend_kernel(  # type: ignore[no-untyped-def]
    q, q_row_stride, q_head_stride, new_key, new_value, new_row_stride, new_head_stride,
    keys, values, slot_stride, head_stride, row_stride, slots, indices, counts_ptr, lengths, cache, cache_slots,
    cache_capacity, partial_out, softmax_stats, split_ranges, scale, batch, num_splits, capacity, head_dim, stats_size,
    width,
    HAS_COUNTS: tl.constexpr, APPEND: tl.constexpr, PER_HEAD: tl.constexpr, HAS_SLOTS: tl.constexpr,
    SELECTED: tl.constexpr, CACHED: tl.constexpr, GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Attend to one split for the query heads of a KV head. The last split takes the new token."""
    pdl_wait(USE_PDL)
    kv, kv_heads, program, rows = tl.program_id(0), tl.num_programs(0), tl.program_id(1), tl.arange(0, BLOCK_B)
    in_batch = rows < batch
    row_slots = tl.load(slots + rows, mask=in_batch, other=0) if HAS_SLOTS else rows
    if HAS_COUNTS:
        counts = tl.load(counts_ptr + rows * kv_heads + kv, mask=in_batch, other=0).to(tl.int32)
    else:
        at_lengths = row_slots * kv_heads + kv if PER_HEAD else row_slots
        counts = tl.minimum(tl.load(lengths + at_lengths, mask=in_batch, other=0), capacity - 1).to(tl.int32)
    row, slot, count, split, splits, length = place_split(
        program, counts, row_slots, in_batch, rows, batch, num_splits, BLOCK_B, _ALIGNMENT
    )
    if BLOCK_B > 1:
        if row >= batch:
            return
        if split == 0:
            split_range = split_ranges + (row * kv_heads + kv) * 2
            tl.store(split_range, program)
            tl.store(split_range + 1, splits)
    query, channel = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D)
    in_head = channel < head_dim
    q_mask = (query < GROUP)[:, None] & in_head[None, :]
    head = kv * GROUP + query
    q_block = tl.load(q + row * q_row_stride + head[:, None] * q_head_stride + channel[None, :], mask=q_mask, other=0.0)
    base = slot * slot_stride + kv.to(tl.int64) * head_stride

    maximum = tl.full((BLOCK_Q,), float("-inf"), dtype=tl.float32)
    weight_sum = tl.zeros((BLOCK_Q,), dtype=tl.float32)
    total = tl.zeros((BLOCK_Q, BLOCK_D), dtype=tl.float32)
    if split == splits - 1:
        key = tl.load(new_key + row * new_row_stride + kv * new_head_stride + channel, mask=in_head, other=0.0)
        value = tl.load(new_value + row * new_row_stride + kv * new_head_stride + channel, mask=in_head, other=0.0)
        maximum = tl.sum(q_block.to(tl.float32) * key.to(tl.float32)[None, :], axis=1) * scale
        weight_sum += 1.0
        total += value.to(tl.float32)[None, :]
        if APPEND:
            new_row = count.to(tl.int64)
            if HAS_COUNTS:
                new_row = tl.minimum(tl.load(lengths + (slot * kv_heads + kv if PER_HEAD else slot)), capacity - 1)
            tl.store(keys + base + new_row * row_stride + channel, key, mask=in_head)
            tl.store(values + base + new_row * row_stride + channel, value, mask=in_head)

    start, end = split * length, tl.minimum(split * length + length, count)
    if CACHED:
        cache_head = tl.load(cache_slots + row).to(tl.int64) * kv_heads + kv
    for first in tl.range(start, end, BLOCK_T):
        token = first + tl.arange(0, BLOCK_T)
        mask = token < end
        if SELECTED:
            token = tl.load(indices + (row * kv_heads + kv) * width + token, mask=mask, other=0)
        offset = base + token.to(tl.int64)[:, None] * row_stride + channel[None, :]
        kv_mask = mask[:, None] & in_head[None, :]
        key_ptr, value_ptr = keys + offset, values + offset
        if CACHED:
            place = tl.load(indices + (row * kv_heads + kv) * width + token, mask=mask, other=-1)
            cached_ptr = cache + (cache_head * cache_capacity + place)[:, None] * (2 * head_dim) + channel[None, :]
            key_ptr = tl.where((place >= 0)[:, None], cached_ptr, key_ptr)
            value_ptr = tl.where((place >= 0)[:, None], cached_ptr + head_dim, value_ptr)
        key_block = tl.load(key_ptr, mask=kv_mask, other=0.0)
        value_block = tl.load(value_ptr, mask=kv_mask, other=0.0)
        scores = tl.dot(q_block, tl.trans(key_block), input_precision="ieee") * scale
        scores = tl.where(mask[None, :], scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
        weights = tl.exp(scores - new_maximum[:, None])
        rescale = tl.exp(maximum - new_maximum)
        weight_sum = weight_sum * rescale + tl.sum(weights, axis=1)
        total = tl.dot(weights.to(value_block.dtype), value_block, total * rescale[:, None], input_precision="ieee")
        maximum = new_maximum

    pdl_launch(USE_PDL)
    target = head * num_splits + program
    tl.store(softmax_stats + target, maximum, mask=query < GROUP)
    tl.store(softmax_stats + stats_size + target, weight_sum, mask=query < GROUP)
    tl.store(partial_out + target[:, None] * head_dim + channel[None, :], total, mask=q_mask)


@triton.jit(do_not_specialize=["num_splits", "stats_size"])
def merge_kernel(  # type: ignore[no-untyped-def]
    partial_out, softmax_stats, split_ranges, out, num_splits, head_dim, stats_size,
    GROUP: tl.constexpr, BATCHED: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Merge the splits of one row and query head, BLOCK_S at a time."""
    pdl_wait(USE_PDL)
    row, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    start, count = 0, num_splits
    if BATCHED:
        split_range = split_ranges + (row * heads + head) // GROUP * 2
        start, count = tl.load(split_range), tl.load(split_range + 1)
    channel = tl.arange(0, BLOCK_D)
    maximum, weight_sum = tl.full((), float("-inf"), dtype=tl.float32), tl.zeros((), dtype=tl.float32)
    total = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for first in tl.range(0, count, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        source = head * num_splits + start + split
        maxima = tl.load(softmax_stats + source, mask=split < count, other=float("-inf"))
        sums = tl.load(softmax_stats + stats_size + source, mask=split < count, other=0.0)
        mask = (split < count)[:, None] & (channel < head_dim)[None, :]
        parts = tl.load(partial_out + source[:, None] * head_dim + channel[None, :], mask=mask, other=0.0)
        new_maximum = tl.maximum(maximum, tl.max(maxima, axis=0))
        base = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)  # the last split may be the first with a token
        weights, rescale = tl.exp(maxima - base), tl.exp(maximum - base)
        weight_sum = weight_sum * rescale + tl.sum(sums * weights, axis=0)
        total = total * rescale + tl.sum(parts * weights[:, None], axis=0)
        maximum = new_maximum
    pdl_launch(USE_PDL)
    total /= weight_sum
    tl.store(out + (row * heads + head) * head_dim + channel, total, mask=channel < head_dim)
