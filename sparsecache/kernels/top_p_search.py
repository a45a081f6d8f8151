"""Shared parts of the kernels that find top-p tokens: exact sums of weights, and the search for a threshold.

A token's weight is exp(score - best score), rounded to a multiple of 1 / UNIT. Sums of weights are exact. They do not
depend on their order, on the number of programs or on the limits that were tried, so a row has one threshold.
"""

from sparsecache.kernels._triton import sortable, tl, triton

UNIT = tl.constexpr(1 << 41)  # the integer of weight 1; the sum of 2^21 tokens fits into int64
_COARSE = tl.constexpr(1 << 20)  # a lane adds 16 weights at most: in this unit their sum has 24 bits, as float32 has
_FINE = tl.constexpr(1 << 21)  # units of 1 / UNIT per unit of 1 / _COARSE
_ROUND_COARSE = tl.constexpr(12.0)  # the spacing of float32 from 8 to 16 is 1 / _COARSE
_ROUND_FINE = tl.constexpr(12.0 / (1 << 21))  # the spacing of float32 around it is 1 / UNIT


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
def _weight_parts(score, highest):  # type: ignore[no-untyped-def]
    """Return a weight in two parts: a multiple of 1 / _COARSE, and one of 1 / UNIT.

    float32 sums of at most 16 such parts are exact.
    """
    weight = tl.exp(score - highest)
    coarse = (weight + _ROUND_COARSE) - _ROUND_COARSE
    return coarse, ((weight - coarse) + _ROUND_FINE) - _ROUND_FINE


@triton.jit
def _sum_lanes(coarse, fine, BLOCK_T: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sum both parts of weights [8, BLOCK_T], at most 16 to a lane: [8] int64."""
    # Sums of 64 lanes fit into int32, which a warp sums by one instruction.
    lanes: tl.constexpr = 64 if BLOCK_T > 64 else BLOCK_T
    shape: tl.constexpr = (8, BLOCK_T // lanes, lanes)
    coarse = tl.sum(tl.reshape((coarse * _COARSE).to(tl.int32), shape), axis=2).to(tl.int64)
    fine = tl.sum(tl.reshape((fine * UNIT).to(tl.int32), shape), axis=2).to(tl.int64)
    return tl.sum(coarse * _FINE + fine, axis=1)


@triton.jit
def _add_up_to(coarse, fine, row, number, highest, limit, BLOCK_T: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add the weights of the first `number` scores of a row that are up to each limit [8, 1]."""
    offset = tl.arange(0, BLOCK_T)[None, :]
    score = tl.load(row + offset, mask=offset < number, other=float("-inf")).to(tl.float32)
    weight, rest = _weight_parts(score, highest)
    counts = (score <= limit).to(tl.float32)  # a product takes one instruction, as a sum does
    return coarse + counts * weight, fine + counts * rest


@triton.jit
def sums_up_to(row, start, end, highest, limit, BLOCK_T: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sum the weights of the tokens from start to end, at most 16 * BLOCK_T, up to each limit [8, 1]: [8] int64."""
    last = start + (end - start) // BLOCK_T * BLOCK_T  # the first token after the full blocks, which need no mask
    coarse = tl.zeros((8, BLOCK_T), dtype=tl.float32)
    fine = tl.zeros((8, BLOCK_T), dtype=tl.float32)
    for first in tl.range(start, last, BLOCK_T, loop_unroll_factor=4):  # so that loads overlap
        coarse, fine = _add_up_to(coarse, fine, row + first, BLOCK_T, highest, limit, BLOCK_T)
    if last < end:
        coarse, fine = _add_up_to(coarse, fine, row + last, end - last, highest, limit, BLOCK_T)
    return _sum_lanes(coarse, fine, BLOCK_T)


@triton.jit
def set_aside(  # type: ignore[no-untyped-def]
    row, start, end, tokens, low, high, target, BLOCK_T: tl.constexpr, SHIFT: tl.constexpr
):  # fmt: skip
    """List the tokens from start to end in a range of scores, and return their number.

    An entry has the key of a token in its high 32 bits, and the position in its low ones.
    """
    load_end, number = tl.minimum(tl.cdiv(end, 16) * 16, tokens), 0  # a mask in multiples of 16 keeps the loads wide
    # A thread loads eight neighbouring tokens and writes them in turn, so that only their number is scanned.
    first_of_eight, in_eight = tl.arange(0, BLOCK_T // 8) * 8, tl.arange(0, 8)[None, :]
    offset = first_of_eight[:, None] + in_eight
    for first in tl.range(start, end, BLOCK_T):
        score = tl.load(row + first + offset, mask=offset < load_end - first, other=0.0).to(tl.float32)
        in_range = ((score >= low) & (score <= high) & (offset < end - first)).to(tl.int32)
        key = key_of(score, SHIFT)
        size = tl.sum(in_range, axis=1)
        place = number + tl.cumsum(size, axis=0) - size
        for each in tl.static_range(8):
            is_written = tl.sum(tl.where(in_eight == each, in_range, 0), axis=1)
            of_token = tl.sum(tl.where(in_eight == each, key, 0), axis=1)
            entry = (of_token.to(tl.int64) << 32) | (first + first_of_eight + each).to(tl.int64)
            tl.store(target + place, entry, mask=is_written > 0)
            place += is_written
        number += tl.sum(size)
    return number


@triton.jit
def _listed(chunk, numbers, number, CHUNK: tl.constexpr, BY_CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return how many entries a chunk of a head's list has."""
    if BY_CHUNK:
        return tl.load(numbers + chunk)
    return tl.minimum(number - chunk * CHUNK, CHUNK)


@triton.jit
def find_threshold(  # type: ignore[no-untyped-def]
    entries, numbers, number, num_chunks, count, highest, low_score, high_score, mass_to_high, max_excluded,
    threshold, tie_end, CHUNK: tl.constexpr, BLOCK_T: tl.constexpr, SHIFT: tl.constexpr, BY_CHUNK: tl.constexpr,
):  # fmt: skip
    """Find a head's threshold among its tokens set aside, and the end of its ties; store both.

    entries: of `set_aside`, with at most CHUNK entries per chunk. BY_CHUNK: whether chunk c has numbers[c] entries;
    else all `number` entries follow each other. mass_to_high: of the head's tokens up to high_score.
    """
    # The mass up to the key `low` may be left out, that up to the key `high` may not.
    low, high = key_of(low_score, SHIFT).to(tl.int64) - 1, key_of(high_score, SHIFT).to(tl.int64)
    index, mass_to_range = tl.arange(0, 8), mass_to_high
    while high - low > 1:
        step = (high - low + 7) // 8
        limit = low + index * step
        limit_key, above = tl.minimum(limit, high).to(tl.int32)[:, None], tl.zeros((8,), dtype=tl.int64)
        for chunk in tl.range(0, num_chunks):
            coarse = tl.zeros((8, BLOCK_T), dtype=tl.float32)
            fine = tl.zeros((8, BLOCK_T), dtype=tl.float32)
            listed = _listed(chunk, numbers, number, CHUNK, BY_CHUNK)
            for first in tl.range(0, listed, BLOCK_T):
                offset = first + tl.arange(0, BLOCK_T)[None, :]
                entry = tl.load(entries + chunk * CHUNK + offset, mask=offset < listed, other=0)
                key = (entry >> 32).to(tl.int32)
                weight, rest = _weight_parts(score_of(key, SHIFT), highest)
                counts = ((key > limit_key) & (offset < listed)).to(tl.float32)
                coarse, fine = coarse + counts * weight, fine + counts * rest
            above += _sum_lanes(coarse, fine, BLOCK_T)
        sums = mass_to_range - above
        reached = tl.sum(((sums <= max_excluded) & (index > 0) & (limit < high)).to(tl.int32))
        next_limit = low + (reached + 1) * step
        if next_limit < high:
            high = next_limit
            mass_to_high = tl.sum(tl.where(index == reached + 1, sums, 0))
        low += reached * step

    # Of the tokens at the threshold, the earliest are top-p tokens, until their mass is tie_mass.
    first_beyond, seen, tie_mass = count, 0, (mass_to_high - max_excluded).to(tl.float32) / UNIT
    high_key = high.to(tl.int32)
    weight_at_high = tl.exp(score_of(high_key, SHIFT) - highest)
    for chunk in tl.range(0, num_chunks):
        listed = _listed(chunk, numbers, number, CHUNK, BY_CHUNK)
        for first in tl.range(0, listed, BLOCK_T):
            offset = first + tl.arange(0, BLOCK_T)
            entry = tl.load(entries + chunk * CHUNK + offset, mask=offset < listed, other=0)
            is_equal = ((entry >> 32).to(tl.int32) == high_key) & (offset < listed)
            earlier = seen + tl.cumsum(is_equal.to(tl.int32), axis=0) - 1  # equal scores before this one
            is_beyond = is_equal & (earlier * weight_at_high >= tie_mass)
            first_beyond = tl.minimum(first_beyond, tl.min(tl.where(is_beyond, entry.to(tl.int32), count), axis=0))
            seen += tl.sum(is_equal.to(tl.int32), axis=0)
    tl.store(threshold, score_of(high_key, SHIFT))
    tl.store(tie_end, first_beyond)
