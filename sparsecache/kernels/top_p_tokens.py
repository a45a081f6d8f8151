"""Find the top-p tokens of heads: the fewest tokens of highest score that make a share p of the attention.

The kernels do not sort. The lowest score of a head's top-p tokens is its threshold. A token's weight is
exp(score - best score). The tokens of a head lie in chunks of a fixed length:

1. The first kernel divides a range of scores by eight limits. A program sums, over one chunk, the weights of the tokens
   up to each limit. The first range reaches from the best score down to a score below which no token can be a top-p
   token. The sums tell which eighth of the range holds the threshold. A second run of the kernel divides this eighth.
2. The second kernel sets aside the tokens in the range that remains, a few percent of all.
3. The third kernel finds the threshold among these, one program per head.

Sums of chunks are added as integers, so their order does not matter.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sparsecache.kernels._triton import next_power_of_2, pdl_options, pdl_wait, sortable, tl, triton

_CHUNK = 8192  # tokens; a constant, so that sums round alike in every batch and on every device
_MASS_BLOCK, _BLOCK = 512, 1024  # tokens per iteration; eight sums per token need many registers
_UNIT = tl.constexpr(1 << 40)  # the integer of weight 1; the sum of 2^22 tokens fits into int64


class TopPTokens(NamedTuple):
    """The top-p tokens of each head: those above its threshold, and the earliest ones at it.

    thresholds: [heads] float32, scores. tie_ends: [heads] int32; a token at the threshold is a top-p token if its
    position is below this one. log_totals: [heads] float32, the log of the sum of exp(score) over all past tokens.
    """

    thresholds: Tensor
    tie_ends: Tensor
    log_totals: Tensor


def find_top_p(scores: Tensor, extremes: Tensor, seq_lens: Tensor, slots: Tensor, p: float) -> TopPTokens:
    """Find the top-p tokens of each head among its past tokens. Needs Triton: there is no reference.

    A token is a top-p token if the tokens before it, by falling score and then by position, have less than the share p
    of the sum of exp(score). p: above 0, at most 1. scores: [B, H, T] contiguous, undefined beyond a slot's past
    tokens; extremes: as in `Scores`; seq_lens: [slots] int64, past tokens, at most T; slots: [B] int64. The result is
    undefined for a slot without past tokens.
    """
    heads, tokens, splits = scores[..., 0].numel(), scores.shape[2], extremes.shape[3]
    chunks = -(-tokens // _CHUNK)

    def empty(*size: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(size, device=scores.device, dtype=dtype)

    masses, ranges = empty(2, heads, chunks, 8, dtype=torch.int64), empty(2, heads, 16, dtype=torch.float32)
    undecided, num_undecided = empty(heads, tokens), empty(heads, chunks)
    found = TopPTokens(empty(heads, dtype=torch.float32), empty(heads), empty(heads, dtype=torch.float32))
    inputs = (scores, extremes, seq_lens, slots, masses, ranges, float(1 - p), scores.shape[1], tokens, chunks)
    sizes = {
        "SPLITS": splits, "BLOCK_S": next_power_of_2(splits), "BLOCK_C": next_power_of_2(chunks), "CHUNK": _CHUNK,
        **pdl_options(),
    }  # fmt: skip
    _mass_kernel[(heads, chunks)](*inputs, ROUND=0, BLOCK_T=_MASS_BLOCK, num_warps=4, **sizes)
    if p < 1:
        _mass_kernel[(heads, chunks)](*inputs, ROUND=1, BLOCK_T=_MASS_BLOCK, num_warps=4, **sizes)
        _set_aside_kernel[(heads, chunks)](*inputs, undecided, num_undecided, BLOCK_T=_BLOCK, num_warps=4, **sizes)
    shift = 0 if scores.dtype == torch.float32 else 13  # float32 has 13 more bits of mantissa than float16
    _search_kernel[(heads,)](
        *inputs, undecided, num_undecided, *found, BLOCK_T=_BLOCK, SHIFT=shift, num_warps=8, **sizes
    )  # fmt: skip
    return found


@triton.jit
def _key(score, SHIFT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Map scores to integers in the same order. SHIFT: how many low bits of a float32 score are always 0."""
    return sortable(score.to(tl.float32)) >> SHIFT


@triton.jit
def _score(key, SHIFT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the score of a key; the inverse of `_key`."""
    bits = (key << SHIFT) | tl.where(key < 0, (1 << SHIFT) - 1, 0)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def _best_score(extremes, head, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the best score of a head from those of its splits."""
    split = tl.arange(0, BLOCK_S)
    return tl.max(tl.load(extremes + head * SPLITS + split, mask=split < SPLITS, other=float("-inf")))


@triton.jit
def _total_and_limit(masses, head, num_chunks, chunks, excluded_share, BLOCK_C: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the mass of all tokens of a head, and the highest mass that tokens left out may have together."""
    chunk = tl.arange(0, BLOCK_C)
    total = tl.sum(tl.load(masses + (head * chunks + chunk) * 8, mask=chunk < num_chunks, other=0))
    return total, tl.minimum((total.to(tl.float64) * excluded_share).to(tl.int64), total - 1)


@triton.jit
def _narrow_range(  # type: ignore[no-untyped-def]
    masses, ranges, head, num_chunks, chunks, max_excluded, ROUND: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Return the two limits of a round that enclose the threshold, and the mass up to the higher one."""
    row, chunk, index = ROUND * tl.num_programs(0) + head, tl.arange(0, BLOCK_C)[:, None], tl.arange(0, 16)
    mask = (chunk < num_chunks) & (index < 8)[None, :]
    mass = tl.sum(tl.load(masses + (row * chunks + chunk) * 8 + index[None, :], mask=mask, other=0), axis=0)
    score = tl.load(ranges + row * 16 + index, mask=index <= 8, other=0.0)
    lower = 8 - tl.sum(((mass <= max_excluded) & (index > 0) & (index < 8)).to(tl.int32))
    low = tl.sum(tl.where(index == lower, score, 0.0))
    high = tl.sum(tl.where(index == lower - 1, score, 0.0))
    return low, high, tl.sum(tl.where(index == lower - 1, mass, 0))


@triton.jit
def _add_weights(mass, row, number, highest, limit, BLOCK_T: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add the weights of the first `number` scores of a row to the masses [8, BLOCK_T] up to each limit [8, 1]."""
    offset = tl.arange(0, BLOCK_T)[None, :]
    score = tl.load(row + offset, mask=offset < number, other=float("-inf")).to(tl.float32)
    return mass + (score <= limit).to(tl.float32) * tl.exp(score - highest)  # two instructions per limit


@triton.jit
def _mass_kernel(  # type: ignore[no-untyped-def]
    scores, extremes, seq_lens, slots, masses, ranges, excluded_share, heads, tokens, chunks,
    ROUND: tl.constexpr, BLOCK_T: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, CHUNK: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Sum the weights of a chunk's tokens up to each of eight limits. Limit 0 is the upper end of the range."""
    pdl_wait(USE_PDL)
    head, start = tl.program_id(0).to(tl.int64), tl.program_id(1) * CHUNK
    count = tl.minimum(tl.load(seq_lens + tl.load(slots + tl.program_id(0) // heads)), tokens).to(tl.int32)
    if start >= count:
        return
    highest = _best_score(extremes, head, SPLITS, BLOCK_S)
    if ROUND == 0:
        split = tl.arange(0, BLOCK_S)
        worst = extremes + (tl.num_programs(0) + head) * SPLITS + split
        lowest = tl.min(tl.load(worst, mask=split < SPLITS, other=float("inf")))
        # All weights below excluded_share / count sum to less than excluded_share, and the total is 1 or more. 0.1 is a
        # margin for rounding.
        min_log_weight = tl.log(tl.maximum(excluded_share, 1e-30)) - tl.log(count.to(tl.float32)) - 0.1
        low, high = tl.maximum(lowest, highest + min_log_weight), highest
    else:
        num_chunks = tl.cdiv(count, CHUNK)
        _, max_excluded = _total_and_limit(masses, head, num_chunks, chunks, excluded_share, BLOCK_C)
        low, high, _ = _narrow_range(masses, ranges, head, num_chunks, chunks, max_excluded, 0, BLOCK_C)
    index = tl.arange(0, 8)[:, None]
    limit = high - index * ((high - low) * 0.125)
    if start == 0:  # stored, since another kernel might round them differently
        target = ranges + (ROUND * tl.num_programs(0) + head) * 16
        tl.store(target + index, limit)
        tl.store(target + 8, low)

    row, end = scores + head * tokens, tl.minimum(start + CHUNK, count)
    last = start + (end - start) // BLOCK_T * BLOCK_T  # the first token after the full blocks, which need no mask
    mass = tl.zeros((8, BLOCK_T), dtype=tl.float32)
    for first in tl.range(start, last, BLOCK_T):
        mass = _add_weights(mass, row + first, BLOCK_T, highest, limit, BLOCK_T)
    if last < end:
        mass = _add_weights(mass, row + last, end - last, highest, limit, BLOCK_T)
    target = masses + ((ROUND * tl.num_programs(0) + head) * chunks + tl.program_id(1)) * 8
    tl.store(target + tl.arange(0, 8), (tl.sum(mass, axis=1) * _UNIT).to(tl.int64))


@triton.jit
def _set_aside_kernel(  # type: ignore[no-untyped-def]
    scores, extremes, seq_lens, slots, masses, ranges, excluded_share, heads, tokens, chunks, undecided, num_undecided,
    BLOCK_T: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, CHUNK: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """List the positions of a chunk's tokens in the range that remains, from the chunk's start on, and count them."""
    pdl_wait(USE_PDL)
    head, start = tl.program_id(0).to(tl.int64), tl.program_id(1) * CHUNK
    count = tl.minimum(tl.load(seq_lens + tl.load(slots + tl.program_id(0) // heads)), tokens).to(tl.int32)
    if start >= count:
        return
    num_chunks = tl.cdiv(count, CHUNK)
    _, max_excluded = _total_and_limit(masses, head, num_chunks, chunks, excluded_share, BLOCK_C)
    low, high, _ = _narrow_range(masses, ranges, head, num_chunks, chunks, max_excluded, 1, BLOCK_C)
    row, target = scores + head * tokens, undecided + head * tokens + start
    end = tl.minimum(start + CHUNK, count)
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
    tl.store(num_undecided + head * chunks + tl.program_id(1), number)


@triton.jit
def _search_kernel(  # type: ignore[no-untyped-def]
    scores, extremes, seq_lens, slots, masses, ranges, excluded_share, heads, tokens, chunks, undecided, num_undecided,
    thresholds, tie_ends, log_totals, BLOCK_T: tl.constexpr, SHIFT: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, CHUNK: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Find a head's threshold among the tokens set aside, and the end of its ties."""
    pdl_wait(USE_PDL)
    head = tl.program_id(0).to(tl.int64)
    count = tl.minimum(tl.load(seq_lens + tl.load(slots + tl.program_id(0) // heads)), tokens).to(tl.int32)
    if count == 0:
        return
    num_chunks = tl.cdiv(count, CHUNK)
    highest = _best_score(extremes, head, SPLITS, BLOCK_S)
    total, max_excluded = _total_and_limit(masses, head, num_chunks, chunks, excluded_share, BLOCK_C)
    tl.store(log_totals + head, highest + tl.log(total.to(tl.float32) / _UNIT))
    if excluded_share <= 0:  # all tokens are top-p tokens
        tl.store(thresholds + head, float("-inf"))
        tl.store(tie_ends + head, 0)
        return
    low_score, high_score, mass_to_high = _narrow_range(
        masses, ranges, head, num_chunks, chunks, max_excluded, 1, BLOCK_C
    )
    # The mass up to the key `low` may be left out, that up to the key `high` may not.
    low, high = _key(low_score, SHIFT).to(tl.int64) - 1, _key(high_score, SHIFT).to(tl.int64)
    row, index, mass_to_range = head * tokens, tl.arange(0, 8)[:, None], mass_to_high
    while high - low > 1:
        step = (high - low + 7) // 8
        limit = low + index * step
        limit_key = tl.minimum(limit, high).to(tl.int32)
        mass = tl.zeros((8, BLOCK_T), dtype=tl.float32)
        for chunk in tl.range(0, num_chunks):
            number = tl.load(num_undecided + head * chunks + chunk)
            for first in tl.range(0, number, BLOCK_T):
                offset = first + tl.arange(0, BLOCK_T)[None, :]
                token = tl.load(undecided + row + chunk * CHUNK + offset, mask=offset < number, other=0)
                score = tl.load(scores + row + token).to(tl.float32)
                weight = tl.where(offset < number, tl.exp(score - highest), 0.0)
                mass += (_key(score, SHIFT) > limit_key).to(tl.float32) * weight
        sums = mass_to_range - (tl.sum(mass, axis=1, keep_dims=True) * _UNIT).to(tl.int64)
        reached = tl.sum(((sums <= max_excluded) & (index > 0) & (limit < high)).to(tl.int32))
        next_limit = low + (reached + 1) * step
        if next_limit < high:
            high = next_limit
            mass_to_high = tl.sum(tl.where(index == reached + 1, sums, 0))
        low += reached * step

    # Of the tokens at the threshold, the earliest are top-p tokens, until their mass is tie_mass.
    tie_end, seen, tie_mass = count, 0, (mass_to_high - max_excluded).to(tl.float32) / _UNIT
    for chunk in tl.range(0, num_chunks):
        number = tl.load(num_undecided + head * chunks + chunk)
        for first in tl.range(0, number, BLOCK_T):
            offset = first + tl.arange(0, BLOCK_T)
            token = tl.load(undecided + row + chunk * CHUNK + offset, mask=offset < number, other=0)
            score = tl.load(scores + row + token).to(tl.float32)
            is_equal = (_key(score, SHIFT) == high.to(tl.int32)) & (offset < number)
            earlier = seen + tl.cumsum(is_equal.to(tl.int32), axis=0) - 1  # equal scores before this one
            is_beyond = is_equal & (earlier * tl.exp(score - highest) >= tie_mass)
            tie_end = tl.minimum(tie_end, tl.min(tl.where(is_beyond, token, count), axis=0))
            seen += tl.sum(is_equal.to(tl.int32), axis=0)
    tl.store(thresholds + head, _score(high.to(tl.int32), SHIFT))
    tl.store(tie_ends + head, tie_end)
