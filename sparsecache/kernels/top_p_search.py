"""Shared parts of the kernels that find top-p tokens: sums of weights, and the search for a threshold.

A token's weight is exp(score - best score). Weights are summed in float32; sums are then integers, so that those of
chunks can be added in any order.
"""

from sparsecache.kernels._triton import sortable, tl, triton

UNIT = tl.constexpr(1 << 40)  # the integer of weight 1; the sum of 2^22 tokens fits into int64


@triton.jit
def key_of(score, SHIFT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Map scores to integers in the same order. SHIFT: how many low bits of a float32 score are always 0."""
    return sortable(score.to(tl.float32)) >> SHIFT


@triton.jit
def score_of(key, SHIFT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the score of a key; the inverse of `key_of`."""
    bits = (key << SHIFT) | tl.where(key < 0, (1 << SHIFT) - 1, 0)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def first_range(  # type: ignore[no-untyped-def]
    extremes, num_heads, head, count, excluded_share, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr
):  # fmt: skip
    """Return a score below which no token of a head is a top-p token, and its best score."""
    split = tl.arange(0, BLOCK_S)
    best = tl.load(extremes + head * SPLITS + split, mask=split < SPLITS, other=float("-inf"))
    worst = tl.load(extremes + (num_heads + head) * SPLITS + split, mask=split < SPLITS, other=float("inf"))
    highest = tl.max(best)
    # All weights below excluded_share / count sum to less than excluded_share, and the total is 1 or more. 0.1 is a
    # margin for rounding.
    min_log_weight = tl.log(tl.maximum(excluded_share, 1e-30)) - tl.log(count.to(tl.float32)) - 0.1
    return tl.maximum(tl.min(worst), highest + min_log_weight), highest


@triton.jit
def max_excluded_mass(total, excluded_share):  # type: ignore[no-untyped-def]
    """Return the highest mass that tokens left out may have together."""
    return tl.minimum((total.to(tl.float64) * excluded_share).to(tl.int64), total - 1)


@triton.jit
def limits(low, high):  # type: ignore[no-untyped-def]
    """Return eight limits that divide a range of scores, falling from its upper end: [8]."""
    return high - tl.arange(0, 8) * ((high - low) * 0.125)


@triton.jit
def narrow_range(mass, limit, low, max_excluded):  # type: ignore[no-untyped-def]
    """Return the two limits that enclose the threshold, and the mass up to the higher one.

    limit: [8], falling; mass: [8], that of the tokens up to each limit; low: the lower end of the range.
    """
    index = tl.arange(0, 8)
    lower = 8 - tl.sum(((mass <= max_excluded) & (index > 0)).to(tl.int32))
    low = tl.where(lower < 8, tl.sum(tl.where(index == lower, limit, 0.0)), low)
    high = tl.sum(tl.where(index == lower - 1, limit, 0.0))
    return low, high, tl.sum(tl.where(index == lower - 1, mass, 0))


@triton.jit
def _add_weights(mass, row, number, highest, limit, BLOCK_T: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add the weights of the first `number` scores of a row to the masses [8, BLOCK_T] up to each limit [8, 1]."""
    offset = tl.arange(0, BLOCK_T)[None, :]
    score = tl.load(row + offset, mask=offset < number, other=float("-inf")).to(tl.float32)
    return mass + (score <= limit).to(tl.float32) * tl.exp(score - highest)  # two instructions per limit


@triton.jit
def sums_up_to(row, start, end, highest, limit, BLOCK_T: tl.constexpr, UNROLL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sum the weights of the tokens from start to end up to each limit [8]: [8] int64. UNROLL: loads that overlap."""
    last = start + (end - start) // BLOCK_T * BLOCK_T  # the first token after the full blocks, which need no mask
    mass = tl.zeros((8, BLOCK_T), dtype=tl.float32)
    for first in tl.range(start, last, BLOCK_T, loop_unroll_factor=UNROLL):
        mass = _add_weights(mass, row + first, BLOCK_T, highest, limit[:, None], BLOCK_T)
    if last < end:
        mass = _add_weights(mass, row + last, end - last, highest, limit[:, None], BLOCK_T)
    return (tl.sum(mass, axis=1) * UNIT).to(tl.int64)


@triton.jit
def set_aside(row, start, end, tokens, low, high, target, BLOCK_T: tl.constexpr):  # type: ignore[no-untyped-def]
    """List the positions of the tokens from start to end in a range of scores, and return their number."""
    load_end, number = tl.minimum(tl.cdiv(end, 16) * 16, tokens), 0  # a mask in multiples of 16 keeps the loads wide
    # A thread loads eight neighbouring tokens and writes them in turn, so that only their number is scanned.
    first_of_eight, in_eight = tl.arange(0, BLOCK_T // 8) * 8, tl.arange(0, 8)[None, :]
    offset = first_of_eight[:, None] + in_eight
    for first in tl.range(start, end, BLOCK_T):
        score = tl.load(row + first + offset, mask=offset < load_end - first, other=0.0).to(tl.float32)
        in_range = ((score >= low) & (score <= high) & (offset < end - first)).to(tl.int32)
        size = tl.sum(in_range, axis=1)
        place = number + tl.cumsum(size, axis=0) - size
        for each in tl.static_range(8):
            is_written = tl.sum(tl.where(in_eight == each, in_range, 0), axis=1)
            tl.store(target + place, first + first_of_eight + each, mask=is_written > 0)
            place += is_written
        number += tl.sum(size)
    return number


@triton.jit
def find_threshold(  # type: ignore[no-untyped-def]
    row, undecided, num_undecided, num_chunks, count, highest, low_score, high_score, mass_to_high, max_excluded,
    threshold, tie_end, CHUNK: tl.constexpr, BLOCK_T: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Find a head's threshold among its tokens set aside, and the end of its ties; store both.

    undecided: of `set_aside`, those of chunk c from c * CHUNK on; num_undecided: their number per chunk.
    mass_to_high: of the head's tokens up to high_score.
    """
    # The mass up to the key `low` may be left out, that up to the key `high` may not.
    low, high = key_of(low_score, SHIFT).to(tl.int64) - 1, key_of(high_score, SHIFT).to(tl.int64)
    index, mass_to_range = tl.arange(0, 8)[:, None], mass_to_high
    while high - low > 1:
        step = (high - low + 7) // 8
        limit = low + index * step
        limit_key = tl.minimum(limit, high).to(tl.int32)
        mass = tl.zeros((8, BLOCK_T), dtype=tl.float32)
        for chunk in tl.range(0, num_chunks):
            number = tl.load(num_undecided + chunk)
            for first in tl.range(0, number, BLOCK_T):
                offset = first + tl.arange(0, BLOCK_T)[None, :]
                token = tl.load(undecided + chunk * CHUNK + offset, mask=offset < number, other=0)
                score = tl.load(row + token).to(tl.float32)
                weight = tl.where(offset < number, tl.exp(score - highest), 0.0)
                mass += (key_of(score, SHIFT) > limit_key).to(tl.float32) * weight
        sums = mass_to_range - (tl.sum(mass, axis=1, keep_dims=True) * UNIT).to(tl.int64)
        reached = tl.sum(((sums <= max_excluded) & (index > 0) & (limit < high)).to(tl.int32))
        next_limit = low + (reached + 1) * step
        if next_limit < high:
            high = next_limit
            mass_to_high = tl.sum(tl.where(index == reached + 1, sums, 0))
        low += reached * step

    # Of the tokens at the threshold, the earliest are top-p tokens, until their mass is tie_mass.
    first_beyond, seen, tie_mass = count, 0, (mass_to_high - max_excluded).to(tl.float32) / UNIT
    for chunk in tl.range(0, num_chunks):
        number = tl.load(num_undecided + chunk)
        for first in tl.range(0, number, BLOCK_T):
            offset = first + tl.arange(0, BLOCK_T)
            token = tl.load(undecided + chunk * CHUNK + offset, mask=offset < number, other=0)
            score = tl.load(row + token).to(tl.float32)
            is_equal = (key_of(score, SHIFT) == high.to(tl.int32)) & (offset < number)
            earlier = seen + tl.cumsum(is_equal.to(tl.int32), axis=0) - 1  # equal scores before this one
            is_beyond = is_equal & (earlier * tl.exp(score - highest) >= tie_mass)
            first_beyond = tl.minimum(first_beyond, tl.min(tl.where(is_beyond, token, count), axis=0))
            seen += tl.sum(is_equal.to(tl.int32), axis=0)
    tl.store(threshold, score_of(high.to(tl.int32), SHIFT))
    tl.store(tie_end, first_beyond)
