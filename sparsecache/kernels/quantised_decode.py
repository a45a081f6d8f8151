"""Attention of one new token per sequence over quantised tokens, all or selected ones: flash decoding over codes.

The splits are those of `decode`. A program reads codes, minima and steps, and dequantises in registers. Tokens of the
full-precision tail are read from its ring. All sizes are fixed and the device finds the tokens, so a decode step can be
a CUDA graph.

In one file because the attention and the append of a token share the layout of codes.
"""

import math

import torch
from torch import Tensor

from sparsecache.kernels._triton import (
    next_power_of_2,
    pdl_launch,
    pdl_options,
    pdl_wait,
    tl,
    triton,
    use_kernel,
)
from sparsecache.kernels.decode import attend_rows, merge_kernel, place_split, split_count
from sparsecache.kernels.quantisation import QuantisedStore
from sparsecache.kernels.rows import mask_of_first

_MIN_CHANNELS = 32  # with 16, products of half precision and codes of 2 or 4 bits are wrong (Triton 3.6, H200)
_TILE, _SELECTED_TILE = 64, 32  # tokens that a program dequantises at a time; a selected token has a range of its own


def attend_quantised(q: Tensor, k: Tensor, v: Tensor, store: QuantisedStore, lengths: Tensor, slots: Tensor) -> Tensor:
    """Append one token to each slot and attend over the slot's past tokens and the new one: [B, H, 1, D].

    q: [B, H, 1, D]; k, v: [B, G, 1, D]; lengths: past tokens, int64, [slots] or per KV head [slots, G], not changed;
    slots: [B] int64, distinct. A full slot overwrites its last token.
    """
    if use_kernel(q):
        out = _launch(q, k, v, store, lengths, slots)
    else:
        past = store.past(lengths, slots)
        longest = int(past.max())
        keys, values = store.keys(lengths, slots, longest), store.values(lengths, slots, longest)
        out = attend_rows(q, k, v, keys, values, mask_of_first(past, longest))
    append_quantised(k, v, store, lengths, slots)
    return out


def attend_selected_quantised(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    store: QuantisedStore,
    lengths: Tensor,
    slots: Tensor,
    selected: Tensor,
    counts: Tensor,
) -> Tensor:
    """Attend over selected past tokens of each slot and the new token, which is not appended: [B, H, 1, D].

    selected: [B, G, N] int64; the first counts [B, G] (int64) of a KV head are valid and distinct. Other arguments:
    as in `attend_quantised`.
    """
    if use_kernel(q):
        return _launch(q, k, v, store, lengths, slots, selected, counts)
    mask = mask_of_first(counts, selected.shape[2])
    rows = selected.masked_fill(~mask, 0)
    return attend_rows(q, k, v, store.keys(lengths, slots, rows), store.values(lengths, slots, rows), mask)


def append_quantised(k: Tensor, v: Tensor, store: QuantisedStore, lengths: Tensor, slots: Tensor) -> None:
    """Append one token to each slot, as `QuantisedStore.append`, without the host."""
    if not use_kernel(k):
        store.append(k, v, lengths, slots)
        return
    _append_kernel[k.shape[:2]](
        k, v, k.stride(0), k.stride(1), store.key_codes, store.key_ranges, store.value_codes, store.value_ranges,
        store.key_tail, store.value_tail, lengths.contiguous(), slots, store.capacity, store.key_codes.shape[2],
        store.residual, PER_HEAD=lengths.dim() == 2, num_warps=4, **_sizes(store), **pdl_options(),
    )  # fmt: skip


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    store: QuantisedStore,
    lengths: Tensor,
    slots: Tensor,
    selected: Tensor | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """Launch the attention and merge its splits."""
    batch, heads, _, head_dim = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    num_splits = split_count(batch, kv_heads, q.device)
    partial_out = torch.empty((heads, num_splits, head_dim), device=q.device, dtype=torch.float32)
    softmax_stats = torch.empty((2, heads, num_splits), device=q.device, dtype=torch.float32)  # maxima, sums
    split_ranges = torch.empty((batch, kv_heads, 2), device=q.device, dtype=torch.int32)  # first split, how many
    out = torch.empty((batch, heads, 1, head_dim), device=q.device, dtype=q.dtype)
    lengths = lengths.contiguous()
    # An unused pointer argument takes any tensor.
    indices = lengths if selected is None else selected.contiguous()
    _attend_kernel[(kv_heads, num_splits)](
        q, q.stride(0), q.stride(1), k, v, k.stride(0), k.stride(1), store.key_codes, store.key_ranges,
        store.value_codes, store.value_ranges, store.key_tail, store.value_tail, lengths, slots, indices,
        lengths if counts is None else counts.contiguous(), partial_out, softmax_stats, split_ranges,
        1 / math.sqrt(head_dim), batch, num_splits, store.capacity, store.key_codes.shape[2], store.residual,
        heads * num_splits, 0 if selected is None else selected.shape[2], SELECTED=selected is not None,
        PER_HEAD=lengths.dim() == 2, GROUP=group, BLOCK_Q=next_power_of_2(group, 16), BLOCK_B=next_power_of_2(batch),
        BLOCK_T=max(_TILE, store.group) if selected is None else _SELECTED_TILE, BLOCK_TAIL=_TILE, num_warps=4,
        num_stages=3 if selected is None else 2, **_sizes(store), **pdl_options(),
    )  # fmt: skip
    merge_kernel[(batch, heads)](
        partial_out, softmax_stats, split_ranges, out, num_splits, head_dim, heads * num_splits,
        GROUP=group, BATCHED=batch > 1, BLOCK_S=next_power_of_2(-(-num_splits // batch)),
        BLOCK_D=next_power_of_2(head_dim, 16), num_warps=2, **pdl_options(),
    )  # fmt: skip
    return out


def _sizes(store: QuantisedStore) -> dict[str, int]:
    """Return the sizes of a store that are compiled into the kernels, so that loads are as wide as possible."""
    head_dim = store.key_tail.shape[3]
    block_d = next_power_of_2(head_dim, _MIN_CHANNELS)
    return {
        "BITS": store.bits, "PER_BYTE": 8 // store.bits, "TOKENS": store.group, "HEAD_DIM": head_dim,
        "WIDTH": store.key_codes.shape[3], "VALUE_GROUPS": store.value_ranges.shape[4], "BLOCK_D": block_d,
        "BLOCK_C": max(1, block_d // store.group),
    }  # fmt: skip


@triton.jit
def _num_quantised(length, residual, TOKENS: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.maximum(length - residual, 0) // TOKENS * TOKENS


@triton.jit
def _load_codes(codes, row, mask, WIDTH: tl.constexpr, BITS: tl.constexpr, BLOCK_W: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the codes of rows [N] as float32 [N, 8 / BITS * BLOCK_W]."""
    byte = tl.arange(0, BLOCK_W)
    packed = tl.load(
        codes + row[:, None] * WIDTH + byte[None, :], mask=mask[:, None] & (byte < WIDTH)[None, :], other=0
    )
    if BITS == 8:
        numbers = packed
    elif BITS == 4:
        numbers = tl.interleave(packed & 15, packed >> 4)
    else:
        even, odd = tl.interleave(packed & 3, packed >> 4 & 3), tl.interleave(packed >> 2 & 3, packed >> 6)
        numbers = tl.interleave(even, odd)
    return numbers.to(tl.float32)


@triton.jit
def _accumulate(q_block, key, value, mask, scale, maximum, weight_sum, total):  # type: ignore[no-untyped-def]
    """Add a tile of keys and values [T, D] to a running softmax."""
    scores = tl.dot(q_block, tl.trans(key), input_precision="ieee") * scale
    scores = tl.where(mask[None, :], scores, float("-inf"))
    new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
    weights, rescale = tl.exp(scores - new_maximum[:, None]), tl.exp(maximum - new_maximum)
    weight_sum = weight_sum * rescale + tl.sum(weights, axis=1)
    total = tl.dot(weights.to(value.dtype), value, total * rescale[:, None], input_precision="ieee")
    return new_maximum, weight_sum, total


@triton.jit(do_not_specialize=["batch", "num_splits", "capacity", "code_rows", "residual", "stats_size", "width"])
def _attend_kernel(  # type: ignore[no-untyped-def]
    q, q_row_stride, q_head_stride, new_key, new_value, new_row_stride, new_head_stride, key_codes, key_ranges,
    value_codes, value_ranges, key_tail, value_tail, lengths, slots, indices, counts_ptr, partial_out, softmax_stats,
    split_ranges, scale, batch, num_splits, capacity, code_rows, residual, stats_size, width,
    SELECTED: tl.constexpr, PER_HEAD: tl.constexpr, GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_TAIL: tl.constexpr, BITS: tl.constexpr, PER_BYTE: tl.constexpr, TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_GROUPS: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Attend to one split for the query heads of a KV head. The last split takes the new token."""
    pdl_wait(USE_PDL)
    kv, kv_heads, program, rows = tl.program_id(0), tl.num_programs(0), tl.program_id(1), tl.arange(0, BLOCK_B)
    in_batch = rows < batch
    row_slots = tl.load(slots + rows, mask=in_batch, other=0)
    at_length = row_slots * kv_heads + kv if PER_HEAD else row_slots
    all_past = tl.minimum(tl.load(lengths + at_length, mask=in_batch, other=0), capacity - 1).to(tl.int32)
    counts = all_past
    if SELECTED:
        counts = tl.load(counts_ptr + rows * kv_heads + kv, mask=in_batch, other=0).to(tl.int32)
    # A split of all tokens begins with a group of keys.
    row, slot, count, split, splits, length = place_split(
        program, counts, row_slots, in_batch, rows, batch, num_splits, BLOCK_B, TOKENS
    )
    if BLOCK_B > 1:
        if row >= batch:
            return
        if split == 0:
            split_range = split_ranges + (row * kv_heads + kv) * 2
            tl.store(split_range, program)
            tl.store(split_range + 1, splits)
    quantised = _num_quantised(tl.sum(tl.where(rows == row, all_past, 0)), residual, TOKENS)
    query, channel, channel_group = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_C)
    in_head = channel < HEAD_DIM
    q_mask = (query < GROUP)[:, None] & in_head[None, :]
    head = kv * GROUP + query
    q_block = tl.load(q + row * q_row_stride + head[:, None] * q_head_stride + channel[None, :], mask=q_mask, other=0.0)
    slot_head = slot * kv_heads + kv
    ring = residual + TOKENS
    key_tail += slot_head * ring * HEAD_DIM
    value_tail += slot_head * ring * HEAD_DIM
    key_codes += slot_head * code_rows * WIDTH
    value_codes += slot_head * code_rows * WIDTH
    key_ranges += slot_head * (code_rows // TOKENS) * 2 * HEAD_DIM
    value_ranges += slot_head * code_rows * 2 * VALUE_GROUPS

    maximum = tl.full((BLOCK_Q,), float("-inf"), dtype=tl.float32)
    weight_sum = tl.zeros((BLOCK_Q,), dtype=tl.float32)
    total = tl.zeros((BLOCK_Q, BLOCK_D), dtype=tl.float32)
    if split == splits - 1:
        key = tl.load(new_key + row * new_row_stride + kv * new_head_stride + channel, mask=in_head, other=0.0)
        value = tl.load(new_value + row * new_row_stride + kv * new_head_stride + channel, mask=in_head, other=0.0)
        maximum = tl.sum(q_block.to(tl.float32) * key.to(tl.float32)[None, :], axis=1) * scale
        weight_sum += 1.0
        total += value.to(tl.float32)[None, :]

    start, end = split * length, tl.minimum(split * length + length, count)
    coded_end = end if SELECTED else tl.minimum(end, quantised)
    for first in tl.range(start, coded_end, BLOCK_T):
        token = first + tl.arange(0, BLOCK_T)
        mask = token < coded_end
        if SELECTED:
            token = tl.load(indices + (row * kv_heads + kv) * width + token, mask=mask, other=0).to(tl.int32)
        is_coded = mask & (token < quantised)
        key = _load_codes(key_codes, token, is_coded, WIDTH, BITS, BLOCK_D // PER_BYTE)
        if SELECTED:
            at_range = key_ranges + (token // TOKENS)[:, None] * (2 * HEAD_DIM) + channel[None, :]
            range_mask = is_coded[:, None] & in_head[None, :]
            minimum = tl.load(at_range, mask=range_mask, other=0.0).to(tl.float32)
            key = key * tl.load(at_range + HEAD_DIM, mask=range_mask, other=0.0).to(tl.float32) + minimum
        else:
            group = first // TOKENS + tl.arange(0, BLOCK_T // TOKENS)
            at_range = key_ranges + group[:, None] * (2 * HEAD_DIM) + channel[None, :]
            range_mask = (group * TOKENS < coded_end)[:, None] & in_head[None, :]
            minimum = tl.load(at_range, mask=range_mask, other=0.0).to(tl.float32)
            step = tl.load(at_range + HEAD_DIM, mask=range_mask, other=0.0).to(tl.float32)
            key = tl.reshape(key, (BLOCK_T // TOKENS, TOKENS, BLOCK_D)) * step[:, None, :] + minimum[:, None, :]
            key = tl.reshape(key, (BLOCK_T, BLOCK_D))
        value = _load_codes(value_codes, token, is_coded, WIDTH, BITS, BLOCK_D // PER_BYTE)
        at_range = value_ranges + token[:, None] * (2 * VALUE_GROUPS) + channel_group[None, :]
        range_mask = is_coded[:, None] & (channel_group < VALUE_GROUPS)[None, :]
        minimum = tl.load(at_range, mask=range_mask, other=0.0).to(tl.float32)
        step = tl.load(at_range + VALUE_GROUPS, mask=range_mask, other=0.0).to(tl.float32)
        value = tl.reshape(value, (BLOCK_T, BLOCK_C, BLOCK_D // BLOCK_C)) * step[:, :, None] + minimum[:, :, None]
        value = tl.reshape(value, (BLOCK_T, BLOCK_D))
        if SELECTED:
            at_tail = (token % ring)[:, None] * HEAD_DIM + channel[None, :]
            tail_mask = (mask & (token >= quantised))[:, None] & in_head[None, :]
            key = tl.where(is_coded[:, None], key, tl.load(key_tail + at_tail, mask=tail_mask, other=0.0))
            value = tl.where(is_coded[:, None], value, tl.load(value_tail + at_tail, mask=tail_mask, other=0.0))
        maximum, weight_sum, total = _accumulate(
            q_block, key.to(q_block.dtype), value.to(q_block.dtype), mask, scale, maximum, weight_sum, total
        )
    if not SELECTED:
        for first in tl.range(tl.maximum(start, quantised), end, BLOCK_TAIL):
            token = first + tl.arange(0, BLOCK_TAIL)
            mask = token < end
            at_tail = (token % ring)[:, None] * HEAD_DIM + channel[None, :]
            tail_mask = mask[:, None] & in_head[None, :]
            key = tl.load(key_tail + at_tail, mask=tail_mask, other=0.0)
            value = tl.load(value_tail + at_tail, mask=tail_mask, other=0.0)
            maximum, weight_sum, total = _accumulate(q_block, key, value, mask, scale, maximum, weight_sum, total)

    pdl_launch(USE_PDL)
    target = head * num_splits + program
    tl.store(softmax_stats + target, maximum, mask=query < GROUP)
    tl.store(softmax_stats + stats_size + target, weight_sum, mask=query < GROUP)
    tl.store(partial_out + target[:, None] * HEAD_DIM + channel[None, :], total, mask=q_mask)


@triton.jit
def _quantise(x, mask, AXIS: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the codes of x, and the minimum and step along an axis, which has size 1 in them. As `quantise`."""
    numbers = x.to(tl.float32)
    minimum = tl.min(tl.where(mask, numbers, float("inf")), axis=AXIS, keep_dims=True)
    maximum = tl.max(tl.where(mask, numbers, float("-inf")), axis=AXIS, keep_dims=True)
    is_any = minimum <= maximum  # there is a channel in the group
    minimum, maximum = tl.where(is_any, minimum, 0.0), tl.where(is_any, maximum, 0.0)
    top: tl.constexpr = (1 << BITS) - 1
    step = tl.div_rn(maximum - minimum, tl.full(minimum.shape, top, tl.float32)).to(x.dtype)
    divisor = tl.where(step == 0, 1.0, step.to(tl.float32))
    steps = tl.div_rn(numbers - minimum, tl.broadcast_to(divisor, x.shape))
    steps = tl.where(mask, tl.minimum(tl.maximum(steps, 0.0), top), 0.0)
    # Adding and subtracting 1.5 * 2^23 rounds to the nearest even number.
    return ((steps + 12582912.0) - 12582912.0).to(tl.int32), minimum, step


@triton.jit
def _store_codes(codes, numbers, row, WIDTH: tl.constexpr, BITS: tl.constexpr, PER_BYTE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Pack numbers [N, D] into bytes and store them in rows [N]."""
    size: tl.constexpr = numbers.shape[1] // PER_BYTE
    shift = tl.arange(0, PER_BYTE) * BITS
    packed = tl.sum(tl.reshape(numbers, (numbers.shape[0], size, PER_BYTE)) << shift[None, None, :], axis=2)
    byte = tl.arange(0, size)
    tl.store(codes + row[:, None] * WIDTH + byte[None, :], packed.to(tl.uint8), mask=(byte < WIDTH)[None, :])


@triton.jit(do_not_specialize=["capacity", "code_rows", "residual"])
def _append_kernel(  # type: ignore[no-untyped-def]
    new_key, new_value, new_row_stride, new_head_stride, key_codes, key_ranges, value_codes, value_ranges, key_tail,
    value_tail, lengths, slots, capacity, code_rows, residual,
    PER_HEAD: tl.constexpr, BITS: tl.constexpr, PER_BYTE: tl.constexpr, TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr, VALUE_GROUPS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
    USE_PDL: tl.constexpr,
):  # fmt: skip
    """Store the new token of a sequence and KV head in the ring; quantise the oldest group if the ring is full."""
    pdl_wait(USE_PDL)
    row, kv, kv_heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    slot = tl.load(slots + row)
    past = tl.minimum(tl.load(lengths + (slot * kv_heads + kv if PER_HEAD else slot)), capacity - 1).to(tl.int32)
    ring, channel = residual + TOKENS, tl.arange(0, BLOCK_D)
    slot_head, in_head = slot.to(tl.int64) * kv_heads + kv, channel < HEAD_DIM
    at_new = row * new_row_stride + kv * new_head_stride + channel
    key, value = (
        tl.load(new_key + at_new, mask=in_head, other=0.0),
        tl.load(new_value + at_new, mask=in_head, other=0.0),
    )
    key_tail += slot_head * ring * HEAD_DIM
    value_tail += slot_head * ring * HEAD_DIM
    tl.store(key_tail + past % ring * HEAD_DIM + channel, key, mask=in_head)
    tl.store(value_tail + past % ring * HEAD_DIM + channel, value, mask=in_head)
    start = _num_quantised(past, residual, TOKENS)
    if past + 1 - start < ring:
        return
    token = start + tl.arange(0, TOKENS)
    mask = (token < past)[:, None] & in_head[None, :]  # the new token may be in the group: it is not read back
    at_tail = (token % ring)[:, None] * HEAD_DIM + channel[None, :]
    is_new = (token == past)[:, None]
    keys = tl.where(is_new, key[None, :], tl.load(key_tail + at_tail, mask=mask, other=0.0))
    values = tl.where(is_new, value[None, :], tl.load(value_tail + at_tail, mask=mask, other=0.0))

    numbers, minimum, step = _quantise(keys, in_head[None, :], 0, BITS)
    _store_codes(key_codes + slot_head * code_rows * WIDTH, numbers, token, WIDTH, BITS, PER_BYTE)
    key_ranges += (slot_head * (code_rows // TOKENS) + start // TOKENS) * 2 * HEAD_DIM
    at_range = tl.arange(0, 1)[:, None] + channel[None, :]
    tl.store(key_ranges + at_range, minimum, mask=in_head[None, :])
    tl.store(key_ranges + HEAD_DIM + at_range, step, mask=in_head[None, :])

    size: tl.constexpr = BLOCK_D // BLOCK_C
    in_group = tl.reshape(in_head, (1, BLOCK_C, size))
    numbers, minimum, step = _quantise(tl.reshape(values, (TOKENS, BLOCK_C, size)), in_group, 2, BITS)
    numbers = tl.reshape(numbers, (TOKENS, BLOCK_D))
    _store_codes(value_codes + slot_head * code_rows * WIDTH, numbers, token, WIDTH, BITS, PER_BYTE)
    group = tl.arange(0, BLOCK_C)
    value_ranges += slot_head * code_rows * 2 * VALUE_GROUPS
    at_range = (token[:, None] * (2 * VALUE_GROUPS) + group[None, :])[:, :, None]
    group_mask = (group < VALUE_GROUPS)[None, :, None]
    tl.store(value_ranges + at_range, minimum, mask=group_mask)
    tl.store(value_ranges + VALUE_GROUPS + at_range, step, mask=group_mask)
