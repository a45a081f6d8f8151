"""Store keys and values in a `QuantisedStore`: a prompt, or one new token per sequence.

A program quantises one group of tokens in one KV head. An append has fixed sizes and reads lengths on the device, so a
decode step can be a CUDA graph.
"""

from typing import Any

from torch import Tensor

from sparsecache.kernels._triton import next_power_of_2, pdl_options, pdl_wait, tl, triton, use_kernel
from sparsecache.kernels.quantisation import QuantisedStore


def append_quantised(k: Tensor, v: Tensor, store: QuantisedStore, lengths: Tensor, slots: Tensor) -> None:
    """Append one token to each slot, as `QuantisedStore.append` does, without waiting for the device.

    k, v: [B, G, 1, D]; lengths: tokens before it, int64, [slots] or per KV head [slots, G], not changed; slots: [B]
    int64, distinct. A full slot overwrites its last token.
    """
    if not use_kernel(k):
        store.append(k, v, lengths, slots)
        return
    _append_kernel[k.shape[:2]](
        k, v, k.stride(0), k.stride(1), store.key_codes, store.key_ranges, store.value_codes, store.value_ranges,
        store.key_tail, store.value_tail, lengths.contiguous(), slots, store.capacity, store.key_codes.shape[2],
        store.residual, PER_HEAD=lengths.dim() == 2, **_launch_options(store), **pdl_options(),
    )  # fmt: skip


def store_prompt_quantised(
    k: Tensor, v: Tensor, store: QuantisedStore, slot: int, counts: Tensor | None = None
) -> None:
    """Store a prompt in a slot, as `QuantisedStore.store_prompt` does.

    k, v: [G, L, D], L at most the capacity; counts: [G] int64, how many of the first tokens each KV head stores; None:
    all.
    """
    if not use_kernel(k):
        store.store_prompt(slot, k, v, counts)
        return
    groups = max(0, k.shape[1] - store.residual) // store.group
    if groups:
        k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (k, v))
        _prompt_kernel[(groups, len(k))](
            k, k.stride(0), k.stride(1), v, v.stride(0), v.stride(1), store.key_codes, store.key_ranges,
            store.value_codes, store.value_ranges, slot, store.key_codes.shape[2], **_launch_options(store),
        )  # fmt: skip
    store.store_tail(slot, k, v, counts)


def compiled_sizes(store: QuantisedStore) -> dict[str, int]:
    """Return the sizes of a store that are compile-time constants of the kernels, so that loads are wide."""
    return {
        "BITS": store.bits, "TOKENS": store.group, "HEAD_DIM": store.key_tail.shape[3],
        "WORDS": store.key_codes.shape[3], "VALUE_GROUPS": store.value_ranges.shape[4],
    }  # fmt: skip


def _launch_options(store: QuantisedStore) -> dict[str, Any]:
    """Return the sizes and launch options of a program that quantises a group of tokens."""
    block_d = 16 // store.bits * next_power_of_2(store.key_codes.shape[3])
    return {**compiled_sizes(store), "BLOCK_D": block_d, "BLOCK_C": max(1, block_d // store.group), "num_warps": 4}


@triton.jit
def num_quantised(length, residual, TOKENS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return how many of the first tokens are quantised, as `QuantisedStore.num_quantised` does."""
    return tl.maximum(length - residual, 0) // TOKENS * TOKENS


@triton.jit
def _quantise(x, mask, AXIS: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the codes of x, and the minima and steps of its groups along an axis, as `quantise` does."""
    numbers = x.to(tl.float32)
    minimum = tl.min(tl.where(mask, numbers, float("inf")), axis=AXIS, keep_dims=True)
    maximum = tl.max(tl.where(mask, numbers, float("-inf")), axis=AXIS, keep_dims=True)
    is_any = minimum <= maximum  # False for a group of padding
    minimum, maximum = tl.where(is_any, minimum, 0.0), tl.where(is_any, maximum, 0.0)
    top: tl.constexpr = (1 << BITS) - 1
    step = tl.div_rn(maximum - minimum, tl.full(minimum.shape, top, tl.float32)).to(x.dtype)
    divisor = tl.where(step == 0, 1.0, step.to(tl.float32))
    steps = tl.div_rn(numbers - minimum, tl.broadcast_to(divisor, x.shape))
    steps = tl.where(mask, tl.minimum(tl.maximum(steps, 0.0), top), 0.0)
    # Adding and subtracting 1.5 * 2^23 rounds to the nearest even number.
    return ((steps + 12582912.0) - 12582912.0).to(tl.int32), minimum, step


@triton.jit
def _store_codes(codes, numbers, row, WORDS: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Pack numbers [N, D] into words, as `pack` does, and store them in rows [N]."""
    planes: tl.constexpr = 16 // BITS
    size: tl.constexpr = numbers.shape[1] // planes
    plane, word = tl.arange(0, planes), tl.arange(0, size)
    if size != WORDS:  # a plane has WORDS channels, not the power of two above it
        channel = tl.reshape(plane[:, None] * WORDS + tl.minimum(word, WORDS - 1)[None, :], (numbers.shape[1],))
        numbers = tl.gather(numbers, tl.broadcast_to(channel[None, :], numbers.shape), axis=1)
    packed = tl.reshape(numbers, (numbers.shape[0], planes, size)) << (plane * BITS)[None, :, None]
    packed = tl.sum(packed, axis=1).to(tl.int16)
    tl.store(codes + row[:, None] * WORDS + word[None, :], packed, mask=(word < WORDS)[None, :])


@triton.jit
def _store_group(  # type: ignore[no-untyped-def]
    keys, values, slot_head, start, in_head, key_codes, key_ranges, value_codes, value_ranges, code_rows,
    BITS: tl.constexpr, TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr, WORDS: tl.constexpr, VALUE_GROUPS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Quantise one group of tokens, keys and values [TOKENS, BLOCK_D], and store it in a slot and KV head.

    start: position of the group's first token. slot_head: the slot times the number of KV heads, plus the KV head.
    """
    token, channel = start + tl.arange(0, TOKENS), tl.arange(0, BLOCK_D)
    numbers, minimum, step = _quantise(keys, in_head[None, :], 0, BITS)
    _store_codes(key_codes + slot_head * code_rows * WORDS, numbers, token, WORDS, BITS)
    key_ranges += (slot_head * (code_rows // TOKENS) + start // TOKENS) * 2 * HEAD_DIM
    at_range = tl.arange(0, 1)[:, None] + channel[None, :]
    tl.store(key_ranges + at_range, minimum, mask=in_head[None, :])
    tl.store(key_ranges + HEAD_DIM + at_range, step, mask=in_head[None, :])

    size: tl.constexpr = BLOCK_D // BLOCK_C
    in_group = tl.reshape(in_head, (1, BLOCK_C, size))
    numbers, minimum, step = _quantise(tl.reshape(values, (TOKENS, BLOCK_C, size)), in_group, 2, BITS)
    numbers = tl.reshape(numbers, (TOKENS, BLOCK_D))
    _store_codes(value_codes + slot_head * code_rows * WORDS, numbers, token, WORDS, BITS)
    group = tl.arange(0, BLOCK_C)
    value_ranges += slot_head * code_rows * 2 * VALUE_GROUPS
    at_range = (token[:, None] * (2 * VALUE_GROUPS) + group[None, :])[:, :, None]
    group_mask = (group < VALUE_GROUPS)[None, :, None]
    tl.store(value_ranges + at_range, minimum, mask=group_mask)
    tl.store(value_ranges + VALUE_GROUPS + at_range, step, mask=group_mask)


@triton.jit(do_not_specialize=["capacity", "code_rows", "residual"])
def _append_kernel(  # type: ignore[no-untyped-def]
    new_key, new_value, new_row_stride, new_head_stride, key_codes, key_ranges, value_codes, value_ranges, key_tail,
    value_tail, lengths, slots, capacity, code_rows, residual,
    PER_HEAD: tl.constexpr, BITS: tl.constexpr, TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr, WORDS: tl.constexpr,
    VALUE_GROUPS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Store the new token of a sequence and KV head in the ring; quantise the oldest group if the ring is full."""
    pdl_wait(USE_PDL)
    row, kv, kv_heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    slot = tl.load(slots + row)
    past = tl.minimum(tl.load(lengths + (slot * kv_heads + kv if PER_HEAD else slot)), capacity - 1).to(tl.int32)
    ring, channel = residual + TOKENS, tl.arange(0, BLOCK_D)
    slot_head, in_head = slot.to(tl.int64) * kv_heads + kv, channel < HEAD_DIM
    at_new = row * new_row_stride + kv * new_head_stride + channel
    key = tl.load(new_key + at_new, mask=in_head, other=0.0)
    value = tl.load(new_value + at_new, mask=in_head, other=0.0)
    key_tail += slot_head * ring * HEAD_DIM
    value_tail += slot_head * ring * HEAD_DIM
    tl.store(key_tail + past % ring * HEAD_DIM + channel, key, mask=in_head)
    tl.store(value_tail + past % ring * HEAD_DIM + channel, value, mask=in_head)
    start = num_quantised(past, residual, TOKENS)
    if past + 1 - start < ring:
        return
    token = start + tl.arange(0, TOKENS)
    mask = (token < past)[:, None] & in_head[None, :]  # the new token, which may be in the group, is not read back
    at_tail = (token % ring)[:, None] * HEAD_DIM + channel[None, :]
    is_new = (token == past)[:, None]
    keys = tl.where(is_new, key[None, :], tl.load(key_tail + at_tail, mask=mask, other=0.0))
    values = tl.where(is_new, value[None, :], tl.load(value_tail + at_tail, mask=mask, other=0.0))
    _store_group(
        keys, values, slot_head, start, in_head, key_codes, key_ranges, value_codes, value_ranges, code_rows,
        BITS, TOKENS, HEAD_DIM, WORDS, VALUE_GROUPS, BLOCK_D, BLOCK_C,
    )  # fmt: skip


@triton.jit(do_not_specialize=["slot", "code_rows"])
def _prompt_kernel(  # type: ignore[no-untyped-def]
    k, k_head_stride, k_stride, v, v_head_stride, v_stride, key_codes, key_ranges, value_codes, value_ranges, slot,
    code_rows,
    BITS: tl.constexpr, TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr, WORDS: tl.constexpr, VALUE_GROUPS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Quantise one group of a prompt's tokens in one KV head, from k and v [G, L, D]."""
    start, kv = tl.program_id(0) * TOKENS, tl.program_id(1).to(tl.int64)
    token, channel = start + tl.arange(0, TOKENS), tl.arange(0, BLOCK_D)
    in_head = channel < HEAD_DIM
    row, mask = token.to(tl.int64)[:, None], in_head[None, :]
    keys = tl.load(k + kv * k_head_stride + row * k_stride + channel[None, :], mask=mask, other=0.0)
    values = tl.load(v + kv * v_head_stride + row * v_stride + channel[None, :], mask=mask, other=0.0)
    _store_group(
        keys, values, slot * tl.num_programs(1) + kv, start, in_head, key_codes, key_ranges, value_codes, value_ranges,
        code_rows, BITS, TOKENS, HEAD_DIM, WORDS, VALUE_GROUPS, BLOCK_D, BLOCK_C,
    )  # fmt: skip
