"""From a guessed query to the tokens worth fetching, on the device alone: speculated scores, a count, a selection.

Nothing is sorted and the host is asked nothing: scores are counted by their leading bits, eight at a time, until the
bits of the lowest score that is still taken are known; then the taken are written in ascending order.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sparsecache.kernels._triton import after_previous, fast, launching, tl, triton, up_to_power
from sparsecache.kernels.decode import split_count
from sparsecache.kernels.scores import scaled_scores
from sparsecache.kernels.selection import count_near, distance_to_best, highest

_TOKENS = 256  # that a program scores at a time
_FEWEST, _MOST = 512, 2048  # tokens that a program counts at a time: counting costs about as much for few as for many
_DIGITS = 4  # of eight bits


class Rule(NamedTuple):
    """What is near enough: InfiniGen's options, and the most tokens to take of so many past ones, caps [T + 1]."""

    alpha: float
    caps: Tensor
    mean: bool  # one count for all KV heads, the mean over them, rounded up
    sinks: int = 0
    recent: int = 0


class Selected(NamedTuple):
    """Ascending positions [B, G, N] int64, of which the first counts [B, G] (int64) are meant."""

    positions: Tensor
    counts: Tensor


def speculate(
    q: Tensor, columns: Tensor, keys: Tensor, past: Tensor, slots: Tensor, rule: Rule, width: int
) -> Selected:
    """Selects past tokens of each slot by partial scores.

    q: [B, H, 1, D], guessed; columns: [slots, G, D, I] float32, what makes it partial; keys: [slots, G, T, I], partial;
    past: [slots] int64, tokens held; slots: [B] int64. width: room for the positions, the highest cap there can be.
    """
    if fast(q):
        return _kernels(q, columns, keys, past, slots, rule, width)
    heads, kv_heads, head_dim = q.shape[1], keys.shape[1], q.shape[3]
    mixing = columns[slots].repeat_interleave(heads // kv_heads, 1)
    scores = scaled_scores(q.float() @ mixing, keys[slots], head_dim)[:, :, 0]  # [B, H, T]
    position, held = torch.arange(keys.shape[2], device=q.device), past[slots][:, None]
    scores = scores.masked_fill((position >= held)[:, None], -torch.inf)
    distance = distance_to_best(scores, kv_heads)
    always = ((position < rule.sinks) | (position >= held - rule.recent)) & (position < held)
    distance = distance.masked_fill(always[:, None], torch.inf)
    count = count_near(distance, rule.alpha, rule.caps[held[:, 0]], "mean" if rule.mean else "per_head")
    chosen = highest(distance, count)
    positions = chosen.new_zeros((*chosen.shape[:2], width))
    positions[..., : chosen.shape[2]] = chosen.clamp(min=0)
    return Selected(positions, (chosen >= 0).sum(2))


def remember(k: Tensor, v: Tensor, columns: Tensor, keys: Tensor, store: Tensor, past: Tensor, slots: Tensor) -> None:
    """Puts a new token behind each slot's past ones: k and v [B, G, 1, D], and of k the columns that speculate.

    columns, keys, past, slots as in `speculate`; store: [slots, G, T, 2, D], keys and values, may lie in pinned host
    memory. `past` is not changed. In a slot that is full the last row is written again.
    """
    batch, kv_heads, _, head_dim = k.shape
    if fast(k):
        _remember[(batch * kv_heads,)](
            k, v, k.stride(0), k.stride(1), columns, keys, store, past, slots,
            kv_heads, store.shape[2], head_dim, keys.shape[3],
            SIZE=up_to_power(head_dim), WIDE=up_to_power(keys.shape[3]), num_warps=4, **launching(),
        )  # fmt: skip
        return
    row = past[slots].clamp(max=store.shape[2] - 1)
    keys[slots, :, row] = (k.float() @ columns[slots])[:, :, 0].to(keys.dtype)
    store[slots, :, row] = torch.stack((k, v), 3)[:, :, 0]


def _kernels(q: Tensor, columns: Tensor, keys: Tensor, past: Tensor, slots: Tensor, rule: Rule, width: int) -> Selected:
    batch, heads, _, head_dim = q.shape
    kv_heads, room, wide = keys.shape[1:]
    group, device = heads // kv_heads, q.device
    splits = split_count(batch * kv_heads, device)
    grid = (batch * kv_heads, splits)
    # Rows of scores begin, and end, where wide reads may; behind the last token lies anything.
    apart = -(-room // 16) * 16
    scores = torch.empty((batch, heads, apart), device=device, dtype=torch.float32)
    maxima = torch.empty((batch, heads, splits), device=device, dtype=torch.float32)
    distance = torch.empty((batch, kv_heads, apart), device=device, dtype=torch.float32)
    # Per KV head: how many are near, then how many have each value of each digit, the digits before it being right.
    counts = torch.empty((batch, kv_heads, 1 + _DIGITS * 256), device=device, dtype=torch.int32)
    ends = torch.empty((batch, kv_heads, splits, 256), device=device, dtype=torch.int32)  # the last digit's, by split
    above = torch.empty((batch, kv_heads, splits), device=device, dtype=torch.int32)
    found = Selected(
        torch.empty((batch, kv_heads, width), device=device, dtype=torch.int64),
        torch.empty((batch, kv_heads), device=device, dtype=torch.int64),
    )
    sizes = {"GROUP": group, "QUERIES": up_to_power(group, 16), "SPLITS": splits, **launching()}
    counted = min(_MOST, up_to_power(-(-room // splits), _FEWEST))
    at_a_time = {"TOKENS": counted, "num_warps": 4 if counted == _FEWEST else 8}
    _score[grid](
        q, q.stride(0), q.stride(1), columns, keys, past, slots, scores, maxima, counts, above,
        1 / math.sqrt(head_dim), kv_heads, room, apart, head_dim, wide,
        SIZE=up_to_power(head_dim, 16), WIDE=up_to_power(wide, 16), COUNTS=1 + _DIGITS * 256,
        TOKENS=_TOKENS, num_warps=8, **sizes,
    )  # fmt: skip
    _measure[grid](
        scores, maxima, distance, past, slots, counts, min(rule.alpha, 3e38), rule.sinks, rule.recent, kv_heads, apart,
        COUNTS=1 + _DIGITS * 256, MOST=up_to_power(splits), **at_a_time, **sizes,
    )  # fmt: skip
    choice = {"MEAN": rule.mean, "KV_HEADS": kv_heads, "SOME": up_to_power(kv_heads), "SPLITS": splits}
    choice |= at_a_time | launching()
    for digit in range(1, _DIGITS):
        _refine[grid](
            distance, past, slots, rule.caps, counts, ends, above, apart,
            DIGIT=digit, LAST=digit == _DIGITS - 1, COUNTS=1 + _DIGITS * 256, **choice,
        )  # fmt: skip
    _write[grid](
        distance, past, slots, rule.caps, counts, ends, above, *found, apart, width,
        DIGITS=_DIGITS, COUNTS=1 + _DIGITS * 256, MOST=up_to_power(splits), **choice,
    )  # fmt: skip
    return found


@triton.jit
def _part(count, split, TOKENS: tl.constexpr, SPLITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The tokens, from and to, that a split of `count` looks at: none where it begins behind them."""
    part = tl.cdiv(tl.cdiv(count, SPLITS), TOKENS) * TOKENS
    return split * part, tl.minimum(split * part + part, count)


@triton.jit
def _score(  # type: ignore[no-untyped-def]
    q, q_row, q_head, columns, keys, past, slots, scores, maxima, counts, above, scale, kv_heads, room, apart,
    size, wide,
    SIZE: tl.constexpr, WIDE: tl.constexpr, COUNTS: tl.constexpr,
    GROUP: tl.constexpr, QUERIES: tl.constexpr, TOKENS: tl.constexpr, SPLITS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Speculated scores of a part of a slot for the heads of a KV head, and each head's highest."""
    after_previous(EARLY)
    row, kv, split = tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads, tl.program_id(1)
    slot = tl.load(slots + row).to(tl.int64)
    count = tl.load(past + slot)
    query, at, column = tl.arange(0, QUERIES), tl.arange(0, SIZE), tl.arange(0, WIDE)
    head = kv * GROUP + query
    asked = (query < GROUP)[:, None] & (at < size)[None, :]
    question = tl.load(q + row * q_row + head[:, None] * q_head + at[None, :], mask=asked, other=0.0).to(tl.float32)
    mixed = (at < size)[:, None] & (column < wide)[None, :]
    owner = slot * kv_heads + kv
    mixing = tl.load(columns + (owner * size + at[:, None]) * wide + column[None, :], mask=mixed, other=0.0)
    partial = tl.dot(question, mixing, input_precision="ieee")
    whole = partial.to(keys.dtype.element_ty)
    rest = (partial - whole.to(tl.float32)).to(keys.dtype.element_ty)  # so that rounding q does not cost a choice

    best = tl.full((QUERIES,), float("-inf"), dtype=tl.float32)
    start, end = _part(count, split, TOKENS, SPLITS)
    for first in tl.range(start, end, TOKENS):
        token = first + tl.arange(0, TOKENS)
        there = (token < end)[:, None] & (column < wide)[None, :]
        key = tl.load(keys + (owner * room + token[:, None]) * wide + column[None, :], mask=there, other=0.0)
        score = tl.dot(whole, tl.trans(key), input_precision="ieee")
        score = tl.dot(rest, tl.trans(key), score, input_precision="ieee") * scale
        seen = (query < GROUP)[:, None] & (token < end)[None, :]
        best = tl.maximum(best, tl.max(tl.where(seen, score, float("-inf")), axis=1))
        target = scores + (row * kv_heads * GROUP + head[:, None]).to(tl.int64) * apart + token[None, :]
        tl.store(target, score, mask=(query < GROUP)[:, None] & (token < apart)[None, :])
    tl.store(maxima + (row * kv_heads * GROUP + head) * SPLITS + split, best, mask=query < GROUP)
    tl.store(above + tl.program_id(0) * SPLITS + split, 0)
    if split == 0:  # what later kernels count in
        bins = tl.arange(0, 2048)
        tl.store(counts + tl.program_id(0) * COUNTS + bins, tl.zeros((2048,), dtype=tl.int32), mask=bins < COUNTS)


@triton.jit
def _measure(  # type: ignore[no-untyped-def]
    scores, maxima, distance, past, slots, counts, alpha, sinks, recent, kv_heads, apart,
    COUNTS: tl.constexpr, MOST: tl.constexpr,
    GROUP: tl.constexpr, QUERIES: tl.constexpr, TOKENS: tl.constexpr, SPLITS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """How near each token comes to a head's best; counts those within alpha, and the first digits of all."""
    after_previous(EARLY)
    row, kv, split = tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads, tl.program_id(1)
    count = tl.load(past + tl.load(slots + row))
    query, other = tl.arange(0, QUERIES), tl.arange(0, MOST)
    head = row * kv_heads * GROUP + kv * GROUP + query
    there = (query < GROUP)[:, None] & (other < SPLITS)[None, :]
    best = tl.max(tl.load(maxima + head[:, None] * SPLITS + other[None, :], mask=there, other=float("-inf")), axis=1)
    best = tl.where(query < GROUP, best, 0.0)
    near = tl.zeros((TOKENS,), dtype=tl.int32)
    digits = tl.zeros((256,), dtype=tl.int32)
    start, end = _part(count, split, TOKENS, SPLITS)
    for first in tl.range(start, end, TOKENS):
        token = first + tl.arange(0, TOKENS)
        seen = (query < GROUP)[:, None] & (token < end)[None, :]
        score = tl.load(
            scores + head[:, None].to(tl.int64) * apart + token[None, :],
            mask=(query < GROUP)[:, None] & (token < apart)[None, :],
            other=float("-inf"),
        )
        r = tl.max(tl.where(seen, score, float("-inf")) - best[:, None], axis=0)
        r = tl.where((token < sinks) | (token >= count - recent), float("inf"), r)
        tl.store(distance + tl.program_id(0).to(tl.int64) * apart + token, r, mask=token < apart)
        near += ((r > -alpha) & (token < end)).to(tl.int32)
        digits += _histogram(_ordered(r) >> 24, token < end)
    base = counts + tl.program_id(0) * COUNTS
    tl.atomic_add(base, tl.sum(near), sem="relaxed")
    tl.atomic_add(base + 1 + tl.arange(0, 256), digits, mask=digits > 0, sem="relaxed")


@triton.jit
def _ordered(r):  # type: ignore[no-untyped-def]
    """float32 as uint32 in the same order; -0.0 counts as 0.0."""
    bits = (r + 0.0).to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 == 1, ~bits, bits | 0x80000000)


@triton.jit
def _histogram(digit, there):  # type: ignore[no-untyped-def]
    """How often each of 256 digits is there."""
    return tl.histogram(digit.to(tl.int32), 256, mask=there)


@triton.jit
def _wanted(  # type: ignore[no-untyped-def]
    past, slots, caps, counts, row, kv,
    COUNTS: tl.constexpr, MEAN: tl.constexpr, KV_HEADS: tl.constexpr, SOME: tl.constexpr,
):  # fmt: skip
    """How many tokens a KV head takes, of how many."""
    count = tl.load(past + tl.load(slots + row))
    every = tl.arange(0, SOME)
    near = tl.load(counts + (row * KV_HEADS + every) * COUNTS, mask=every < KV_HEADS, other=0)
    if MEAN:
        wanted = (tl.sum(near) + KV_HEADS - 1) // KV_HEADS
    else:
        wanted = tl.sum(tl.where(every == kv, near, 0))
    return tl.minimum(wanted.to(tl.int64), tl.load(caps + count)), count


@triton.jit
def _next_digit(counts, prefix, wanted):  # type: ignore[no-untyped-def]
    """One more digit of the lowest value that is taken, and how many are still to be taken among its equals."""
    bins = tl.arange(0, 256)
    falling = tl.load(counts + 255 - bins)
    reached = tl.cumsum(falling, axis=0)
    before = tl.sum((reached < wanted).to(tl.int32))
    taken = tl.sum(tl.where(bins < before, falling, 0))
    return (prefix << 8) | (255 - before).to(tl.uint32), wanted - taken


@triton.jit
def _refine(  # type: ignore[no-untyped-def]
    distance, past, slots, caps, counts, ends, above, apart,
    DIGIT: tl.constexpr, LAST: tl.constexpr, COUNTS: tl.constexpr, MEAN: tl.constexpr, KV_HEADS: tl.constexpr,
    SOME: tl.constexpr, TOKENS: tl.constexpr, SPLITS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Counts digit number DIGIT of the tokens whose digits before it are right, and those that are surely taken."""
    after_previous(EARLY)
    row, kv, split = tl.program_id(0) // KV_HEADS, tl.program_id(0) % KV_HEADS, tl.program_id(1)
    wanted, count = _wanted(past, slots, caps, counts, row, kv, COUNTS, MEAN, KV_HEADS, SOME)
    base = counts + tl.program_id(0) * COUNTS + 1
    prefix = tl.zeros((), dtype=tl.uint32)
    for digit in tl.static_range(DIGIT):
        prefix, wanted = _next_digit(base + digit * 256, prefix, wanted)
    digits = tl.zeros((256,), dtype=tl.int32)
    higher = tl.zeros((TOKENS,), dtype=tl.int32)
    start, end = _part(count, split, TOKENS, SPLITS)
    for first in tl.range(start, end, TOKENS):
        token = first + tl.arange(0, TOKENS)
        r = tl.load(distance + tl.program_id(0).to(tl.int64) * apart + token, mask=token < apart, other=float("-inf"))
        key = _ordered(r)
        so_far = key >> (32 - 8 * DIGIT)
        right = (so_far == prefix) & (token < end)
        # Of this digit's predecessor: higher ones were counted when the digits before it were right.
        same = (so_far >> 8 == prefix >> 8) if DIGIT > 1 else (so_far >= 0)
        higher += (same & (so_far > prefix) & (token < end)).to(tl.int32)
        digits += _histogram((key >> (24 - 8 * DIGIT)) & 255, right)
    tl.atomic_add(base + DIGIT * 256 + tl.arange(0, 256), digits, mask=digits > 0, sem="relaxed")
    mark = above + tl.program_id(0) * SPLITS + split
    tl.store(mark, tl.load(mark) + tl.sum(higher))
    if LAST:
        tl.store(ends + (tl.program_id(0) * SPLITS + split) * 256 + tl.arange(0, 256), digits)


@triton.jit
def _write(  # type: ignore[no-untyped-def]
    distance, past, slots, caps, counts, ends, above, positions, taken_counts, apart, width,
    DIGITS: tl.constexpr, COUNTS: tl.constexpr, MOST: tl.constexpr, MEAN: tl.constexpr, KV_HEADS: tl.constexpr,
    SOME: tl.constexpr, TOKENS: tl.constexpr, SPLITS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Writes the taken of a part behind those of the parts before it; of equals at the cut the lowest positions."""
    after_previous(EARLY)
    row, kv, split = tl.program_id(0) // KV_HEADS, tl.program_id(0) % KV_HEADS, tl.program_id(1)
    number, count = _wanted(past, slots, caps, counts, row, kv, COUNTS, MEAN, KV_HEADS, SOME)
    wanted, prefix = number, tl.zeros((), dtype=tl.uint32)
    for digit in tl.static_range(DIGITS):
        prefix, wanted = _next_digit(counts + tl.program_id(0) * COUNTS + 1 + digit * 256, prefix, wanted)
    if split == 0:
        tl.store(taken_counts + tl.program_id(0), number)
    other, bins = tl.arange(0, MOST), tl.arange(0, 256)
    last = (prefix & 255).to(tl.int32)
    before = other < split
    surely = tl.load(above + tl.program_id(0) * SPLITS + other, mask=before, other=0)
    of_last = tl.load(
        ends + (tl.program_id(0) * SPLITS + other[:, None]) * 256 + bins[None, :], mask=before[:, None], other=0
    )
    taken = tl.sum(surely) + tl.sum(tl.where(bins[None, :] > last, of_last, 0))
    equals = tl.sum(tl.where(bins[None, :] == last, of_last, 0))
    start, end = _part(count, split, TOKENS, SPLITS)
    if number == 0:
        end = start
    for first in tl.range(start, end, TOKENS):
        token = first + tl.arange(0, TOKENS)
        r = tl.load(distance + tl.program_id(0).to(tl.int64) * apart + token, mask=token < apart, other=float("-inf"))
        key = _ordered(r)
        higher = ((key > prefix) & (token < end)).to(tl.int32)
        equal = ((key == prefix) & (token < end)).to(tl.int32)
        rank = equals + tl.cumsum(equal, axis=0)  # of an equal one, from 1 on
        also = equal * (rank <= wanted).to(tl.int32)
        # Before a token stand all higher ones so far, and as many equals as are wanted.
        place = taken + tl.cumsum(higher, axis=0) + tl.minimum(rank, wanted) - 1
        tl.store(positions + tl.program_id(0) * width + place, token.to(tl.int64), mask=(higher + also) > 0)
        taken += tl.sum(higher)
        equals += tl.sum(equal)


@triton.jit
def _remember(  # type: ignore[no-untyped-def]
    k, v, k_row, k_head, columns, keys, store, past, slots, kv_heads, room, size, wide,
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
    mixing = tl.load(columns + (owner * size + at[:, None]) * wide + column[None, :], mask=mixed, other=0.0)
    partial = tl.sum(key.to(tl.float32)[:, None] * mixing, axis=0)
    tl.store(keys + place * wide + column, partial, mask=column < wide)
    tl.store(store + place * 2 * size + at, key, mask=at < size)
    tl.store(store + (place * 2 + 1) * size + at, value, mask=at < size)
