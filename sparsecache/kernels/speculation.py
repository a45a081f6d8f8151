"""A guessed query's scores of a slot's past tokens by partial keys, which a cut (cut.py) then selects by."""

import math

import torch
from torch import Tensor

from sparsecache.kernels._triton import (
    after_previous,
    fast,
    launching,
    many_programs,
    tl,
    triton,
    up_to_power,
)
from sparsecache.kernels.cut import Scores, part_of
from sparsecache.kernels.scores import partial_scores

_TOKENS, _WARPS, _STAGES = 128, 4, 4  # that a program scores at a time, by so many warps, so many blocks ahead
_MOST_SPLITS = 64
_LONG = 1024  # tokens of a part
_MOST_HALF = tl.constexpr(65504)  # that float16 holds


def speculate(q: Tensor, mixing: Tensor, keys: Tensor, past: Tensor, slots: Tensor, first: bool = False) -> Scores:
    """Scores past tokens of each slot by partial keys; behind the last one lies anything.

    q: [B, H, 1, D], guessed; mixing: [slots, G, D, I] float32, what makes it partial; keys: [slots, G, T, I], partial;
    past: [slots] int64, tokens held; slots: [B] int64. first: whether all else waits for it.
    """
    if fast(q):
        return _kernel(q, mixing, keys, past, slots, first)
    scores = partial_scores(q, mixing, keys, slots)
    kv_heads = keys.shape[1]
    return Scores(scores.view(len(q), kv_heads, q.shape[1] // kv_heads, keys.shape[2]), None)


def remember(k: Tensor, v: Tensor, mixing: Tensor, keys: Tensor, store: Tensor, past: Tensor, slots: Tensor) -> None:
    """Puts a new token behind each slot's past ones: k and v [B, G, 1, D], and of k the columns that speculate.

    mixing, keys, past, slots as in `speculate`; store: [slots, G, T, 2, D], keys and values, may lie in pinned host
    memory. `past` is not changed. In a slot that is full the last row is written again.
    """
    batch, kv_heads, _, head_dim = k.shape
    if fast(k):
        _remember[(batch * kv_heads,)](
            k, v, k.stride(0), k.stride(1), mixing, keys, store, past, slots,
            kv_heads, store.shape[2], head_dim, keys.shape[3],
            SIZE=up_to_power(head_dim), WIDE=up_to_power(keys.shape[3]), num_warps=4, **launching(),
        )  # fmt: skip
        return
    row = past[slots].clamp(max=store.shape[2] - 1)
    keys[slots, :, row] = (k.float() @ mixing[slots])[:, :, 0].to(keys.dtype)
    store[slots, :, row] = torch.stack((k, v), 3)[:, :, 0]


def _kernel(q: Tensor, mixing: Tensor, keys: Tensor, past: Tensor, slots: Tensor, first: bool) -> Scores:
    batch, heads, _, head_dim = q.shape
    kv_heads, room, wide = keys.shape[1:]
    group, device = heads // kv_heads, q.device
    splits = _split_count(batch, kv_heads, room, device, first)
    apart = -(-room // 16) * 16  # rows of scores begin, and end, where wide reads may
    # Half as much to move. It has 11 bits: bfloat16 keys have been rounded to 8, float16 ones as finely as this.
    precise = torch.float32 if keys.dtype == torch.float32 else torch.float16
    scores = torch.empty((batch, kv_heads, group, apart), device=device, dtype=precise)
    extremes = torch.empty((2, batch, heads, splits), device=device, dtype=torch.float32)
    _score[(batch * kv_heads, splits)](
        q, q.stride(0), q.stride(1), mixing, keys, past, slots, scores, extremes,
        1 / math.sqrt(head_dim), kv_heads, room, apart, head_dim, wide, extremes[0].numel(),
        SIZE=up_to_power(head_dim, 16), WIDE=up_to_power(wide, 16), GROUP=group, QUERIES=up_to_power(group, 8),
        TOKENS=_TOKENS, SPLITS=splits, num_warps=_WARPS, num_stages=_STAGES, **launching(),
    )  # fmt: skip
    return Scores(scores, extremes)


def _split_count(batch: int, kv_heads: int, room: int, device: torch.device, first: bool) -> int:
    """Into how many parts each slot is split, so that its programs, and those of the cut, fill the GPU.

    One sequence's projections are thousands of small programs: beside those, half as many are less in the way, unless
    they go first and have long parts.
    """
    splits = many_programs(device) // (batch * kv_heads)
    if batch == 1 and not (first and room >= _LONG * splits):
        splits //= 2
    return max(1, min(_MOST_SPLITS, splits))


@triton.jit(do_not_specialize=["room"])
def _score(  # type: ignore[no-untyped-def]
    q, q_row, q_head, mixing, keys, past, slots, scores, extremes, scale, kv_heads, room, apart,
    size, wide, all_extremes,
    SIZE: tl.constexpr, WIDE: tl.constexpr,
    GROUP: tl.constexpr, QUERIES: tl.constexpr, TOKENS: tl.constexpr, SPLITS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Speculated scores of a part of a slot for the heads of a KV head, and each head's highest and lowest."""
    after_previous(EARLY)
    row, kv, split = tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads, tl.program_id(1)
    slot = tl.load(slots + row).to(tl.int64)
    count = tl.load(past + slot)
    query, at, column = tl.arange(0, QUERIES)[None, :], tl.arange(0, SIZE), tl.arange(0, WIDE)
    head = kv * GROUP + query
    asked = (query < GROUP) & (at < size)[:, None]
    question = tl.load(q + row * q_row + head * q_head + at[:, None], mask=asked, other=0.0).to(tl.float32)
    mixed = (at < size)[None, :] & (column < wide)[:, None]
    owner = slot * kv_heads + kv
    mixes = tl.load(mixing + (owner * size + at[None, :]) * wide + column[:, None], mask=mixed, other=0.0)
    partial = tl.dot(mixes, question, input_precision="ieee")  # [WIDE, QUERIES]
    whole = partial.to(keys.dtype.element_ty)
    rest = (partial - whole.to(tl.float32)).to(keys.dtype.element_ty)  # so that rounding q does not cost a choice

    best = tl.full((TOKENS, QUERIES), float("-inf"), dtype=tl.float32)  # of every TOKENS-th token: reduced at the end
    worst = tl.full((TOKENS, QUERIES), float("inf"), dtype=tl.float32)
    start, end = part_of(count, split, TOKENS, SPLITS)
    for first in tl.range(start, end, TOKENS):
        token = (first + tl.arange(0, TOKENS))[:, None]
        there = (token < end) & (column < wide)[None, :]
        key = tl.load(keys + (owner * room + token) * wide + column[None, :], mask=there, other=0.0)
        score = tl.dot(key, whole, input_precision="ieee")
        score = tl.dot(key, rest, score, input_precision="ieee") * scale
        if scores.dtype.element_ty == tl.float16:  # as it is stored, extremes too; distances to infinity are none
            score = tl.minimum(tl.maximum(score, -_MOST_HALF), _MOST_HALF).to(tl.float16).to(tl.float32)
        best = tl.maximum(best, tl.where(token < end, score, float("-inf")))
        worst = tl.minimum(worst, tl.where(token < end, score, float("inf")))
        target = scores + (row * kv_heads * GROUP + head).to(tl.int64) * apart + token
        kept = (query < GROUP) & (token < apart)
        tl.store(target, score, mask=kept, eviction_policy="evict_last")  # is read at once; weights pass by meanwhile
    mark = extremes + (row * kv_heads * GROUP + kv * GROUP + tl.arange(0, QUERIES)) * SPLITS + split
    tl.store(mark, tl.max(best, axis=0), mask=tl.arange(0, QUERIES) < GROUP)
    tl.store(mark + all_extremes, tl.min(worst, axis=0), mask=tl.arange(0, QUERIES) < GROUP)


@triton.jit(do_not_specialize=["room"])
def _remember(  # type: ignore[no-untyped-def]
    k, v, k_row, k_head, mixing, keys, store, past, slots, kv_heads, room, size, wide,
    SIZE: tl.constexpr, WIDE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One KV head's new token."""
    after_previous(EARLY)
    row, kv = tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads
    slot = tl.load(slots + row).to(tl.int64)
    owner = slot * kv_heads + kv
    place = owner * room + tl.minimum(tl.load(past + slot), room - 1)
    at, column = tl.arange(0, SIZE), tl.arange(0, WIDE)
    key = tl.load(k + row * k_row + kv * k_head + at, mask=at < size, other=0.0)
    value = tl.load(v + row * k_row + kv * k_head + at, mask=at < size, other=0.0)
    mixed = (at < size)[:, None] & (column < wide)[None, :]
    mixes = tl.load(mixing + (owner * size + at[:, None]) * wide + column[None, :], mask=mixed, other=0.0)
    partial = tl.sum(key.to(tl.float32)[:, None] * mixes, axis=0)
    tl.store(keys + place * wide + column, partial, mask=column < wide)
    tl.store(store + place * 2 * size + at, key, mask=at < size)
    tl.store(store + (place * 2 + 1) * size + at, value, mask=at < size)
