"""Attention of one new token per sequence over a cache of slots: over all past tokens, or over chosen ones.

The tokens of all sequences are split among programs (flash decoding, https://pytorch.org/blog/flash-decoding/), as many
as fill the GPU, in parts of one length, however unlike the sequences are, as long as these are fewer than the parts.
How long that is, and where a part lies, is found on the device: the host need not know a length, so that a step can be
a CUDA graph.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsecache.kernels._triton import (
    after_previous,
    before_next,
    fast,
    launching,
    many_programs,
    tl,
    triton,
    up_to_power,
)
from sparsecache.kernels.attention import attention, attention_over_rows
from sparsecache.kernels.rows import take_rows

_TILE = 32768  # bytes of keys, and of values, that a program reads at a time
_MOST_PARTS = 64  # of a sequence
_EVEN = tl.constexpr(16)  # what the tokens of a part are a multiple of


class Ledger(NamedTuple):
    """What a sparse layer writes down of each slot: tokens held, and what was attended to of them.

    past: [slots] int64; kept: [slots, G] float64, sums of shares of the past; fetched: [slots, G] int64, sums of
    tokens; steps, capped: [slots] int64, steps, and those with more past tokens than caps [T + 1] allows.
    """

    past: Tensor
    kept: Tensor
    fetched: Tensor
    steps: Tensor
    capped: Tensor
    caps: Tensor

    def note(self, slots: Tensor, counts: Tensor, cap: Tensor | None = None) -> None:
        """One step, in which each slot's KV heads attended to counts [B, G] past tokens, and one token more.

        cap: [B], where others than `caps` are allowed.
        """
        if cap is None and fast(counts):
            kv_heads = counts.shape[1]
            sizes = {"SOME": up_to_power(kv_heads), "num_warps": 1, **launching()}
            _note[(len(slots),)](*self, slots, counts, kv_heads, len(self.caps) - 2, **sizes)
            return
        past = self.past[slots].clamp(max=len(self.caps) - 2)  # a slot not in flight may have run full
        self.kept[slots] += counts.double() / past.clamp(min=1)[:, None]
        self.fetched[slots] += counts
        self.steps[slots] += 1
        self.capped[slots] += past > (self.caps[past] if cap is None else cap)
        self.past[slots] = past + 1


def attend_and_append(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, slots: Tensor
) -> Tensor:
    """Attention over all tokens of a slot and the new one, which is appended to it.

    q: [B, H, 1, D]; k, v: [B, G, 1, D]; keys, values: [slots, G, T, D], changed; lengths: [slots] int64, tokens held,
    changed; slots: [B] int64, none twice. Returns [B, H, 1, D]. In a slot that is full the last row is written again.
    """
    if fast(q):
        return _kernel(q, k, v, keys, values, slots, lengths)
    append(k, v, keys, values, lengths, slots)
    longest = int(lengths.max())
    keys, values = keys[:, :, :longest], values[:, :, :longest]
    if len(lengths) == 1:
        return attention(q, keys, values)
    # All slots in one call, so that no cache is copied: rows of slots not asked for are dropped again.
    every = q.new_zeros((len(lengths), *q.shape[1:]))
    every[slots] = q
    seen = torch.arange(longest, device=q.device) < lengths.clamp(min=1)[:, None]  # [slots, longest]
    return attention(every, keys, values, mask=seen[:, None, None])[slots]


def append(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, slots: Tensor) -> None:
    """Appends one token to each slot, as attend_and_append does."""
    last = lengths[slots].clamp(max=keys.shape[2] - 1)
    keys[slots, :, last] = k[:, :, 0]
    values[slots, :, last] = v[:, :, 0]
    lengths[slots] = last + 1


def attend_selected(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    selected: Tensor,
    counts: Tensor,
) -> Tensor:
    """Attention over chosen rows of a slot and the new token, which is not appended.

    As attend_and_append, but for selected: [B, G, N] int64 or int32, of which the first counts [B, G] are rows to
    attend to, none twice. keys and values may be strided, but for their last dimension.
    """
    if fast(q):
        return _kernel(q, k, v, keys, values, slots, counts, selected)
    seen = torch.arange(selected.shape[2], device=q.device) < counts[..., None]
    rows = selected.long().masked_fill(~seen, 0)
    keys, values = (torch.cat((take_rows(x, slots, rows), new), 2) for x, new in ((keys, k), (values, v)))
    return attention_over_rows(q, keys, values, pad(seen, (0, 1), value=True))


class Kept(NamedTuple):
    """Where some of a step's rows are kept.

    rows: [slots, G, C, 2, D], keys and values; slots: [B]; places: [B, G, N] int32, which of a slot's rows each of the
    step's is, or -1 if none.
    """

    rows: Tensor
    slots: Tensor
    places: Tensor

    def merged(self, rows: Tensor, counts: Tensor) -> Tensor:
        """The step's rows [B, G, N, 2, D], the first counts [B, G] meant, with those that are kept in their place."""
        slot, head = self.slots[:, None, None], torch.arange(rows.shape[1], device=rows.device)[:, None]
        meant = torch.arange(rows.shape[2], device=rows.device) < counts[..., None]
        places = self.places.masked_fill(~meant, -1).long()
        return torch.where((places >= 0)[..., None, None], self.rows[slot, head, places.clamp(min=0)], rows)


def attend_first(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, counts: Tensor, kept: Kept | None = None) -> Tensor:
    """attend_selected over the first counts [B, G] of rows [B, G, N, 2, D], keys and values.

    kept: where some of them are read instead.
    """
    if fast(q):
        return _kernel(q, k, v, rows[..., 0, :], rows[..., 1, :], None, counts, kept=kept)
    if kept is not None:
        rows = kept.merged(rows, counts)
    slots, ranks = (torch.arange(size, device=q.device) for size in (len(q), rows.shape[2]))
    of_each = ranks.expand(*counts.shape, -1)
    return attend_selected(q, k, v, rows[..., 0, :], rows[..., 1, :], slots, of_each, counts)


def _kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor | None,
    numbers: Tensor,
    selected: Tensor | None = None,
    kept: Kept | None = None,
) -> Tensor:
    """numbers: lengths [slots], and the new token is appended; or counts [B, G], of rows or, if given, of `selected`.

    slots: None where keys and values have a slot for each row, as they must with `kept`.
    """
    batch, heads, _, head_dim = q.shape
    kv_heads, room = k.shape[1], keys.shape[2]
    parts = part_count(batch, kv_heads, q.device)
    sums = torch.empty((heads, parts, head_dim), device=q.device, dtype=torch.float32)
    marks = torch.empty((2, heads, parts), device=q.device, dtype=torch.float32)  # maxima, sums of weights
    where = torch.empty((batch, kv_heads, 2), device=q.device, dtype=torch.int32)  # a row's first part, and how many
    out = torch.empty((batch, heads, 1, head_dim), device=q.device, dtype=q.dtype)
    wide = up_to_power(head_dim, 16)
    tokens = max(16, min(128, _TILE // (wide * keys.element_size())))
    numbers, appended, group = numbers.contiguous(), numbers.dim() == 1, heads // kv_heads
    if selected is not None:
        selected = selected.contiguous()
    asked = kept.places if kept is not None else selected  # by rank
    elsewhere = (keys, numbers, 0) if kept is None else (kept.rows, kept.slots, kept.rows.shape[2])
    _attend[(kv_heads, parts)](
        q, q.stride(0), q.stride(1), k, v, k.stride(0), k.stride(1), keys, values, *keys.stride()[:3],
        numbers if slots is None else slots, numbers if asked is None else asked, numbers, *elsewhere,
        sums, marks, where, 1 / math.sqrt(head_dim),
        batch, parts, room, head_dim, heads * parts, 0 if asked is None else asked.shape[2],
        APPENDED=appended, SLOTS=slots is not None, SELECTED=selected is not None, KEPT=kept is not None, GROUP=group,
        QUERIES=up_to_power(group, 16), ROWS=up_to_power(batch), TOKENS=tokens, WIDE=wide, num_warps=4, num_stages=2,
        **launching(),
    )  # fmt: skip
    _merge[(batch, heads)](
        sums, marks, where, out, numbers if slots is None else slots, numbers, parts, room, head_dim, heads * parts,
        APPENDED=appended, GROUP=group, SEVERAL=batch > 1, MOST=up_to_power(-(-parts // batch)), WIDE=wide, num_warps=2,
        **launching(),
    )  # fmt: skip
    return out


def part_count(batch: int, kv_heads: int, device: torch.device) -> int:
    """Into how many parts `batch` sequences are split: as many as fill the GPU with all KV heads, at least one each."""
    return max(batch, min(_MOST_PARTS * batch, many_programs(device) // kv_heads))


@triton.jit
def _part_length(counts, parts):  # type: ignore[no-untyped-def]
    """How many tokens a part has, so that `parts` are enough for rows of so many: the least of the lengths tried.

    These are an even share, up to twice that in equal steps, and up to the longest row in equal ratios.
    """
    even, most, tries = tl.cdiv(tl.sum(counts), parts), tl.max(counts), tl.arange(0, 64)
    beyond = tl.exp2(tl.log2(tl.maximum(most / (2.0 * even), 1.0)) * (tries - 31) / 32) * 2 * even
    tried = tl.where(tries < 32, even + tl.cdiv(even, 32) * tries, beyond.to(tl.int32))
    tried = tl.cdiv(tried, _EVEN) * _EVEN
    needed = tl.sum(tl.cdiv(counts[:, None], tried[None, :]), axis=0)
    return tl.min(tl.where(needed <= parts, tried, tl.cdiv(most, _EVEN) * _EVEN))


@triton.jit(do_not_specialize=["batch", "parts", "room", "all_marks", "width"])
def _attend(  # type: ignore[no-untyped-def]
    q, q_row, q_head, new_key, new_value, new_row, new_head, keys, values, slot_stride, head_stride, row_stride,
    slots, asked_rows, numbers, kept, kept_slots, kept_room,
    sums, marks, where, scale, batch, parts, room, size, all_marks, width,
    APPENDED: tl.constexpr, SLOTS: tl.constexpr, SELECTED: tl.constexpr, KEPT: tl.constexpr,
    GROUP: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, WIDE: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """One program attends, for the heads of a KV head, to one part of a slot; the last part's takes the new token."""
    after_previous(EARLY)
    kv, kv_heads, part, rows = tl.program_id(0), tl.num_programs(0), tl.program_id(1), tl.arange(0, ROWS)
    meant = rows < batch
    of_slots = tl.load(slots + rows, mask=meant, other=0) if SLOTS else rows
    if APPENDED:
        counts = tl.minimum(tl.load(numbers + of_slots, mask=meant, other=0), room - 1).to(tl.int32)
    else:
        counts = tl.load(numbers + rows * kv_heads + kv, mask=meant, other=0).to(tl.int32)
    row, split, splits = 0, part, parts  # of a single row, a part may have no tokens
    if ROWS == 1:
        slot, count = tl.sum(of_slots).to(tl.int64), tl.sum(counts)
        length = tl.cdiv(tl.cdiv(count, parts), _EVEN) * _EVEN
    else:
        sizes = tl.where(meant, tl.maximum(counts, 1), 0)  # a row without tokens has one part, for the new token
        length = _part_length(sizes, parts)
        shares = tl.cdiv(sizes, length)
        ends = tl.cumsum(shares, axis=0)
        row = tl.sum((ends <= part).to(tl.int32))
        if row >= batch:
            return
        mine = rows == row
        slot, count = tl.sum(tl.where(mine, of_slots, 0)).to(tl.int64), tl.sum(tl.where(mine, counts, 0))
        splits = tl.sum(tl.where(mine, shares, 0))
        split = part - tl.sum(tl.where(mine, ends, 0)) + splits
        if split == 0:
            mark = where + (row * kv_heads + kv) * 2
            tl.store(mark, part)
            tl.store(mark + 1, splits)
    query, at = tl.arange(0, QUERIES), tl.arange(0, WIDE)
    inside = at < size
    asked = (query < GROUP)[:, None] & inside[None, :]
    head = kv * GROUP + query
    question = tl.load(q + row * q_row + head[:, None] * q_head + at[None, :], mask=asked, other=0.0)
    base = slot * slot_stride + kv.to(tl.int64) * head_stride

    best = tl.full((QUERIES,), float("-inf"), dtype=tl.float32)
    weight = tl.zeros((QUERIES,), dtype=tl.float32)
    total = tl.zeros((QUERIES, WIDE), dtype=tl.float32)
    if split == splits - 1:
        key = tl.load(new_key + row * new_row + kv * new_head + at, mask=inside, other=0.0)
        value = tl.load(new_value + row * new_row + kv * new_head + at, mask=inside, other=0.0)
        best = tl.sum(question.to(tl.float32) * key.to(tl.float32)[None, :], axis=1) * scale
        weight += 1.0
        total += value.to(tl.float32)[None, :]
        if APPENDED:
            tl.store(keys + base + count * row_stride + at, key, mask=inside)
            tl.store(values + base + count * row_stride + at, value, mask=inside)

    start, end = split * length, tl.minimum(split * length + length, count)
    if KEPT:
        keeper = tl.load(kept_slots + row).to(tl.int64) * kv_heads + kv
    for first in tl.range(start, end, TOKENS):
        token = first + tl.arange(0, TOKENS)
        there = token < end
        if SELECTED:
            token = tl.load(asked_rows + (row * kv_heads + kv) * width + token, mask=there, other=0)
        place = base + token.to(tl.int64)[:, None] * row_stride + at[None, :]
        seen = there[:, None] & inside[None, :]
        its_key, its_value = keys + place, values + place
        if KEPT:
            kept_at = tl.load(asked_rows + (row * kv_heads + kv) * width + token, mask=there, other=-1)
            of_kept = kept + (keeper * kept_room + kept_at)[:, None] * (2 * size) + at[None, :]
            its_key = tl.where((kept_at >= 0)[:, None], of_kept, its_key)
            its_value = tl.where((kept_at >= 0)[:, None], of_kept + size, its_value)
        key_part = tl.load(its_key, mask=seen, other=0.0)
        value_part = tl.load(its_value, mask=seen, other=0.0)
        scores = tl.dot(question, tl.trans(key_part), input_precision="ieee") * scale
        scores = tl.where(there[None, :], scores, float("-inf"))
        now = tl.maximum(best, tl.max(scores, axis=1))
        weights = tl.exp(scores - now[:, None])
        fade = tl.exp(best - now)
        weight = weight * fade + tl.sum(weights, axis=1)
        total = tl.dot(weights.to(value_part.dtype), value_part, total * fade[:, None], input_precision="ieee")
        best = now

    before_next(EARLY)
    mark = head * parts + part
    tl.store(marks + mark, best, mask=query < GROUP)
    tl.store(marks + all_marks + mark, weight, mask=query < GROUP)
    tl.store(sums + mark[:, None] * size + at[None, :], total, mask=asked)


@triton.jit(do_not_specialize=["parts", "room", "all_marks"])
def _merge(  # type: ignore[no-untyped-def]
    sums, marks, where, out, slots, lengths, parts, room, size, all_marks,
    APPENDED: tl.constexpr, GROUP: tl.constexpr, SEVERAL: tl.constexpr, MOST: tl.constexpr, WIDE: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """One program adds up the parts of one head, MOST at a time, and the first of a row counts the new token."""
    after_previous(EARLY)
    row, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    start, number = 0, parts
    if SEVERAL:
        place = where + (row * heads + head) // GROUP * 2
        start, number = tl.load(place), tl.load(place + 1)
    at = tl.arange(0, WIDE)
    best, weight = tl.full((), float("-inf"), dtype=tl.float32), tl.zeros((), dtype=tl.float32)
    total = tl.zeros((WIDE,), dtype=tl.float32)
    for first in tl.range(0, number, MOST):
        part = first + tl.arange(0, MOST)
        mark = head * parts + start + part
        bests = tl.load(marks + mark, mask=part < number, other=float("-inf"))
        weights = tl.load(marks + all_marks + mark, mask=part < number, other=0.0)
        there = (part < number)[:, None] & (at < size)[None, :]
        some = tl.load(sums + mark[:, None] * size + at[None, :], mask=there, other=0.0)
        now = tl.maximum(best, tl.max(bests, axis=0))
        share, fade = tl.exp(bests - now), tl.exp(best - now)
        weight = weight * fade + tl.sum(weights * share, axis=0)
        total = total * fade + tl.sum(some * share[:, None], axis=0)
        best = now
    before_next(EARLY)
    total /= weight
    tl.store(out + (row * heads + head) * size + at, total, mask=at < size)
    if APPENDED:
        if head == 0:
            slot = tl.load(slots + row)
            tl.store(lengths + slot, tl.minimum(tl.load(lengths + slot), room - 1) + 1)


@triton.jit
def _note(  # type: ignore[no-untyped-def]
    past, kept, fetched, steps, capped, caps, slots, counts, kv_heads, most, SOME: tl.constexpr, EARLY: tl.constexpr
):
    """One row's step."""
    after_previous(EARLY)
    row, head = tl.program_id(0), tl.arange(0, SOME)
    slot = tl.load(slots + row)
    held = tl.minimum(tl.load(past + slot), most)
    count = tl.load(counts + row * kv_heads + head, mask=head < kv_heads, other=0)
    share = count.to(tl.float64) / tl.maximum(held, 1).to(tl.float64)
    place = slot * kv_heads + head
    tl.store(kept + place, tl.load(kept + place, mask=head < kv_heads) + share, mask=head < kv_heads)
    tl.store(fetched + place, tl.load(fetched + place, mask=head < kv_heads) + count, mask=head < kv_heads)
    tl.store(steps + slot, tl.load(steps + slot) + 1)
    tl.store(capped + slot, tl.load(capped + slot) + (held > tl.load(caps + held)).to(tl.int64))
    tl.store(past + slot, held + 1)
