"""Which past tokens come near enough to a head's best score: found by counting, on the device alone.

Nothing is sorted and the host is asked nothing. Tokens are counted by how near they come, in 256 steps. Those above the
one step in which the cut falls are written in ascending order; those in it, a few in a hundred, are put aside; the
lowest value that is still taken is found among them, eight bits at a time, and those taken are written behind.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sparsecache.kernels._triton import after_previous, launching, tl, triton, up_to_power
from sparsecache.kernels.selection import count_near, distance_to_best, highest, put_first

_FEWEST, _MOST = 512, 2048  # tokens that a program counts at a time: counting costs about as much for few as for many


class Rule(NamedTuple):
    """What is near enough: InfiniGen's options, and the most tokens to take of so many past ones, caps [T + 1]."""

    alpha: float
    caps: Tensor
    mean: bool  # one count for all KV heads, the mean over them, rounded up
    sinks: int = 0
    recent: int = 0


class Scores(NamedTuple):
    """Scores by token. values: [B, G, H / G, T], beyond a slot's past tokens anything.

    float32, from kernels float16 if the keys are in half precision. From kernels T is a multiple of 16, and they come
    with extremes [2, B, H, splits] float32: each head's highest and lowest in each part of a slot's tokens.
    """

    values: Tensor
    extremes: Tensor | None


class Selected(NamedTuple):
    """Positions [B, G, N] int64, of which the first counts [B, G] (int64) are meant.

    Ascending; from kernels in two runs, those above the step in which the cut falls, then those in it. None twice. They
    depend on the scores alone, not on the parts that these came in.
    """

    positions: Tensor
    counts: Tensor


def take_nearest(scores: Scores, past: Tensor, slots: Tensor, rule: Rule, width: int) -> Selected:
    """The tokens of each slot and KV head that a rule takes by their scores.

    past: [slots] int64, tokens held; slots: [B] int64; width: room for the positions, the highest cap there can be.
    """
    values, extremes = scores
    if extremes is not None:
        return _kernels(values, extremes, past, slots, rule, width)
    position, held = torch.arange(values.shape[3], device=values.device), past[slots]
    values = values.float().masked_fill(position >= held[:, None, None, None], -torch.inf)
    distance = distance_to_best(values.flatten(1, 2), values.shape[1])
    distance = put_first(distance, position, held, rule.sinks, rule.recent)
    count = count_near(distance, rule.alpha, rule.caps[held], "mean" if rule.mean else "per_head")
    chosen = highest(distance, count)
    positions = chosen.new_zeros((*chosen.shape[:2], width))
    positions[..., : chosen.shape[2]] = chosen.clamp(min=0)
    return Selected(positions, (chosen >= 0).sum(2))


def _kernels(scores: Tensor, extremes: Tensor, past: Tensor, slots: Tensor, rule: Rule, width: int) -> Selected:
    batch, kv_heads, group, apart = scores.shape
    splits, device = extremes.shape[3], scores.device
    grid = (batch * kv_heads, splits)

    def room(*size: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty((batch, kv_heads, *size), device=device, dtype=dtype)

    near, steps = room(splits), room(splits, 256)  # how many of a part are within alpha, and in each step
    aside, finished = room(2, apart), room()
    found = Selected(room(width, dtype=torch.int64), room(dtype=torch.int64))
    counted = min(_MOST, up_to_power(-(-apart // splits), _FEWEST))
    sizes = {
        "KV_HEADS": kv_heads, "GROUP": group, "QUERIES": up_to_power(group),
        "SPLITS": splits, "MOST": up_to_power(splits), "TOKENS": counted,
        # Eight warps count faster; beside the projections of several sequences four find room sooner.
        "num_warps": 8 if batch == 1 and counted > _FEWEST else 4, **launching(),
    }  # fmt: skip
    scored = (scores, extremes, past, slots, apart, rule.sinks, rule.recent)
    _count[grid](*scored, min(rule.alpha, 3e38), near, steps, finished, **sizes)
    _take[grid](
        *scored, rule.caps, near, steps, aside, finished, *found, width,
        MEAN=rule.mean, EVERY=up_to_power(kv_heads * splits), **sizes,
    )  # fmt: skip
    return found


@triton.jit
def part_of(count, split, TOKENS: tl.constexpr, SPLITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The tokens, from and to, that a split of `count` looks at: none where it begins behind them."""
    part = tl.cdiv(tl.cdiv(count, SPLITS), TOKENS) * TOKENS
    return split * part, tl.minimum(split * part + part, count)


@triton.jit
def _step(r, lowest):  # type: ignore[no-untyped-def]
    """In which of 256 equal steps from the lowest to 0 a distance lies; it never falls where the distance rises."""
    scale = 255.0 / tl.maximum(-lowest, 1e-30)
    step = tl.maximum(tl.minimum((r - lowest) * scale, 255.0), 0.0).to(tl.int32)
    return tl.maximum(tl.minimum(step, 255), 0)  # whatever a score that is no number gives


@triton.jit
def _ordered(r):  # type: ignore[no-untyped-def]
    """float32 as a whole number in the same order; -0.0, which a score may be rounded to, counts as 0.0."""
    bits = (r + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _from_above(counts, wanted):  # type: ignore[no-untyped-def]
    """In which of 256 bins the wanted-th highest lies, and how many are in those above it."""
    bins = tl.arange(0, 256)
    reached = tl.sum(counts) - tl.cumsum(counts, axis=0)  # in the bins above each
    found = tl.min(tl.where(reached < wanted, bins, 255))
    return found, tl.sum(tl.where(bins > found, counts, 0))


@triton.jit
def _bounds(  # type: ignore[no-untyped-def]
    extremes, owner, GROUP: tl.constexpr, QUERIES: tl.constexpr, SPLITS: tl.constexpr, MOST: tl.constexpr
):
    """Of a KV head, each head's best score [QUERIES], and a distance that no token's is below."""
    query, part = tl.arange(0, QUERIES), tl.arange(0, MOST)
    there = (query < GROUP)[:, None] & (part < SPLITS)[None, :]
    place = extremes + (owner * GROUP + query)[:, None] * SPLITS + part[None, :]
    best = tl.max(tl.load(place, mask=there, other=float("-inf")), axis=1)
    worst = tl.min(tl.load(place + tl.num_programs(0) * GROUP * SPLITS, mask=there, other=float("inf")), axis=1)
    best = tl.where(query < GROUP, best, 0.0)
    return best, tl.max(tl.where(query < GROUP, worst - best, float("-inf")))  # no token is farther from every best


@triton.jit
def _distances(  # type: ignore[no-untyped-def]
    scores, best, owner, token, end, count, sinks, recent, apart, GROUP: tl.constexpr, QUERIES: tl.constexpr
):
    """How near tokens before `end` come to their heads' best scores, by the nearest head; inf if always taken."""
    query = tl.arange(0, QUERIES)
    head = (owner * GROUP + query).to(tl.int64)
    seen = (query < GROUP)[:, None] & (token < end)[None, :]
    inside = (query < GROUP)[:, None] & (token < apart)[None, :]  # only such bounds let reads be wide
    score = tl.load(scores + head[:, None] * apart + token[None, :], mask=inside, other=0.0).to(tl.float32)
    r = tl.max(tl.where(seen, score - best[:, None], float("-inf")), axis=0)
    return tl.where((token < sinks) | (token >= count - recent), float("inf"), r)


@triton.jit
def _count(  # type: ignore[no-untyped-def]
    scores, extremes, past, slots, apart, sinks, recent, alpha, near, steps, finished,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr, SPLITS: tl.constexpr, MOST: tl.constexpr,
    TOKENS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Counts the tokens of a part that are within alpha, and all by steps."""
    after_previous(EARLY)
    owner, split = tl.program_id(0), tl.program_id(1)
    count = tl.load(past + tl.load(slots + owner // KV_HEADS)).to(tl.int32)
    best, low = _bounds(extremes, owner, GROUP, QUERIES, SPLITS, MOST)
    if split == 0:  # what the next kernel counts its programs in
        tl.store(finished + owner, 0)
    nearby = tl.zeros((TOKENS,), dtype=tl.int32)
    counts = tl.zeros((256,), dtype=tl.int32)
    start, end = part_of(count, split, TOKENS, SPLITS)
    for first in tl.range(start, end, TOKENS):
        token = first + tl.arange(0, TOKENS)
        r = _distances(scores, best, owner, token, end, count, sinks, recent, apart, GROUP, QUERIES)
        nearby += ((r > -alpha) & (token < end)).to(tl.int32)
        counts += tl.histogram(_step(r, low), 256, mask=token < end)
    tl.store(near + owner * SPLITS + split, tl.sum(nearby))
    tl.store(steps + (owner * SPLITS + split) * 256 + tl.arange(0, 256), counts)


@triton.jit
def _take(  # type: ignore[no-untyped-def]
    scores, extremes, past, slots, apart, sinks, recent, caps, near, steps, aside, finished, positions, taken_counts,
    width, MEAN: tl.constexpr, EVERY: tl.constexpr,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr, SPLITS: tl.constexpr, MOST: tl.constexpr,
    TOKENS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Writes the tokens of a part that are above the cut's step, and puts those in it aside.

    The last program of a KV head finds the cut among all that were put aside, and writes those taken behind the others.
    """
    after_previous(EARLY)
    owner, split = tl.program_id(0), tl.program_id(1)
    row, kv = owner // KV_HEADS, owner % KV_HEADS
    count = tl.load(past + tl.load(slots + row)).to(tl.int32)
    every = tl.arange(0, EVERY)
    is_meant = every < KV_HEADS * SPLITS
    nearby = tl.load(near + row * KV_HEADS * SPLITS + every, mask=is_meant, other=0)
    if MEAN:
        wanted = (tl.sum(nearby) + KV_HEADS - 1) // KV_HEADS
    else:
        wanted = tl.sum(tl.where(every // SPLITS == kv, nearby, 0))
    wanted = tl.minimum(wanted.to(tl.int64), tl.load(caps + count)).to(tl.int32)  # a cap may be any count
    if split == 0:
        tl.store(taken_counts + owner, wanted)

    other, bins = tl.arange(0, MOST), tl.arange(0, 256)
    of_parts = tl.load(
        steps + (owner * SPLITS + other[:, None]) * 256 + bins[None, :], mask=(other < SPLITS)[:, None], other=0
    )
    of_all = tl.sum(of_parts, axis=0)
    step, surely = _from_above(of_all, wanted)
    earlier = tl.where((other < split)[:, None], of_parts, 0)
    taken = tl.sum(tl.where(bins[None, :] > step, earlier, 0))
    undecided = tl.sum(tl.where(bins[None, :] == step, earlier, 0))

    best, low = _bounds(extremes, owner, GROUP, QUERIES, SPLITS, MOST)
    target, values = positions + owner.to(tl.int64) * width, aside + owner.to(tl.int64) * 2 * apart
    start, end = part_of(count, split, TOKENS, SPLITS)
    if wanted == 0:  # none is surely taken then, and what would be put aside is not looked at
        end = start
    for first in tl.range(start, end, TOKENS):
        token = first + tl.arange(0, TOKENS)
        r = _distances(scores, best, owner, token, end, count, sinks, recent, apart, GROUP, QUERIES)
        its = _step(r, low)
        is_sure, is_open = (its > step) & (token < end), (its == step) & (token < end)
        both = is_sure.to(tl.int32) + (is_open.to(tl.int32) << 16)  # two counts in one: TOKENS are fewer than 2^15
        so_far = tl.cumsum(both, axis=0)
        tl.store(target + taken + (so_far & 0xFFFF) - 1, token.to(tl.int64), mask=is_sure)
        place = values + undecided + (so_far >> 16) - 1
        tl.store(place, _ordered(r), mask=is_open)
        tl.store(place + apart, token, mask=is_open)
        all_both = tl.sum(both)
        taken += all_both & 0xFFFF
        undecided += all_both >> 16

    tl.debug_barrier()  # all of the program has written before it says so
    if tl.atomic_add(finished + owner, 1, sem="acq_rel") == SPLITS - 1:
        if wanted > 0:
            number = tl.sum(tl.where(bins == step, of_all, 0))
            lowest, ties = _lowest_taken(values, number, wanted - surely, TOKENS)
            _write_open(values, values + apart, number, lowest, ties, target + surely, TOKENS)


@triton.jit
def _lowest_taken(values, number, wanted, TOKENS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The wanted-th highest of a number of values, and how many of those that equal it are taken."""
    at = tl.arange(0, TOKENS)
    most = tl.full((TOKENS,), 0x7FFFFFFF, dtype=tl.int32)
    low, high = most, -most
    for first in tl.range(0, number, TOKENS):
        there = first + at < number
        value = tl.load(values + first + at, mask=there, other=0, cache_modifier=".cg")
        low = tl.minimum(low, tl.where(there, value, most))
        high = tl.maximum(high, tl.where(there, value, -most))
    base = tl.min(low)
    apart = (tl.max(high) - base).to(tl.uint32, bitcast=True)  # which may be more than int32 holds
    shift = 8 * ((apart > 0xFF).to(tl.int32) + (apart > 0xFFFF).to(tl.int32) + (apart > 0xFFFFFF).to(tl.int32))
    prefix = apart * 0
    while shift >= 0:
        counts = tl.zeros((256,), dtype=tl.int32)
        for first in tl.range(0, number, TOKENS):
            there = first + at < number
            value = tl.load(values + first + at, mask=there, other=0, cache_modifier=".cg") - base
            leading = value.to(tl.uint32, bitcast=True) >> shift
            counts += tl.histogram((leading & 255).to(tl.int32), 256, mask=there & (leading >> 8 == prefix))
        digit, above = _from_above(counts, wanted)
        prefix = (prefix << 8) | digit.to(tl.uint32)
        wanted -= above
        shift -= 8
    return base + prefix.to(tl.int32, bitcast=True), wanted


@triton.jit
def _write_open(values, tokens, number, lowest, ties, target, TOKENS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Writes the tokens put aside whose values are above the lowest taken one, and the first `ties` that equal it."""
    taken, tied = 0, 0
    for first in tl.range(0, number, TOKENS):
        at = first + tl.arange(0, TOKENS)
        value = tl.load(values + at, mask=at < number, other=0, cache_modifier=".cg")
        token = tl.load(tokens + at, mask=at < number, other=0, cache_modifier=".cg")
        is_higher, is_equal = (at < number) & (value > lowest), (at < number) & (value == lowest)
        both = is_higher.to(tl.int32) + (is_equal.to(tl.int32) << 16)
        so_far = tl.cumsum(both, axis=0)
        rank = tied + (so_far >> 16)  # of one that ties, from 1 on
        place = taken + (so_far & 0xFFFF) + tl.minimum(rank, ties) - 1
        tl.store(target + place, token.to(tl.int64), mask=is_higher | (is_equal & (rank <= ties)))
        all_both = tl.sum(both)
        taken += all_both & 0xFFFF
        tied += all_both >> 16
