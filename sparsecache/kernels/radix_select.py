"""Select the highest of a list of integers by radix, without sorting."""

from sparsecache.kernels._triton import tl, triton


@triton.jit
def find_bin(histogram, wanted):  # type: ignore[no-untyped-def]
    """Return the bin of the wanted-th highest value, and how many values lie in higher bins."""
    bins = tl.arange(0, 256)
    above = tl.sum(histogram) - tl.cumsum(histogram, axis=0)  # per bin, the values in higher bins
    found = tl.min(tl.where(above < wanted, bins, 255))
    return found, tl.sum(tl.where(bins > found, histogram, 0))


@triton.jit
def radix_select(values, number, wanted, BLOCK_T: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the wanted-th highest of `number` values, and how many equal to it are selected.

    values: pointer to int32, written by other programs of this kernel; so loads go around L1.
    """
    offset = tl.arange(0, BLOCK_T)
    largest = tl.full((BLOCK_T,), 0x7FFFFFFF, dtype=tl.int32)
    low, high = largest, -largest
    for first in tl.range(0, number, BLOCK_T):
        mask = first + offset < number
        value = tl.load(values + first + offset, mask=mask, other=0, cache_modifier=".cg")
        low = tl.minimum(low, tl.where(mask, value, largest))
        high = tl.maximum(high, tl.where(mask, value, -largest))
    base = tl.min(low)
    span = (tl.max(high) - base).to(tl.uint32, bitcast=True)  # may exceed int32
    shift = 8 * ((span > 0xFF).to(tl.int32) + (span > 0xFFFF).to(tl.int32) + (span > 0xFFFFFF).to(tl.int32))
    prefix = span * 0
    while shift >= 0:
        histogram = tl.zeros((256,), dtype=tl.int32)
        for first in tl.range(0, number, BLOCK_T):
            mask = first + offset < number
            value = tl.load(values + first + offset, mask=mask, other=0, cache_modifier=".cg") - base
            leading = value.to(tl.uint32, bitcast=True) >> shift
            histogram += tl.histogram((leading & 255).to(tl.int32), 256, mask=mask & (leading >> 8 == prefix))
        digit, above = find_bin(histogram, wanted)
        prefix = (prefix << 8) | digit.to(tl.uint32)
        wanted -= above
        shift -= 8
    return base + prefix.to(tl.int32, bitcast=True), wanted


@triton.jit
def write_selected(values, tokens, number, threshold, ties, target, BLOCK_T: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write to `target` the tokens whose values are above the threshold, and the first `ties` of those equal to it.

    values, tokens: pointers to `number` int32 each, as in `radix_select`; target: pointer to int64.
    """
    written, tied = 0, 0
    for first in tl.range(0, number, BLOCK_T):
        offset = first + tl.arange(0, BLOCK_T)
        value = tl.load(values + offset, mask=offset < number, other=0, cache_modifier=".cg")
        token = tl.load(tokens + offset, mask=offset < number, other=0, cache_modifier=".cg")
        is_above, is_equal = (offset < number) & (value > threshold), (offset < number) & (value == threshold)
        packed = is_above.to(tl.int32) + (is_equal.to(tl.int32) << 16)
        scanned = tl.cumsum(packed, axis=0)
        rank = tied + (scanned >> 16)  # among the values equal to the threshold, from 1
        place = written + (scanned & 0xFFFF) + tl.minimum(rank, ties) - 1
        tl.store(target + place, token.to(tl.int64), mask=is_above | (is_equal & (rank <= ties)))
        total = tl.sum(packed)
        written += total & 0xFFFF
        tied += total >> 16
