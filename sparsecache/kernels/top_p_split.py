"""Find top-p tokens with several programs per head, for many tokens.

The tokens of a head lie in chunks of a fixed length:

1. The first kernel divides a range of scores by eight limits. A program sums, over one chunk, the weights of the tokens
   up to each limit. The sums tell which eighth of the range holds the threshold. A second run of the kernel divides
   this eighth.
2. The second kernel sets aside the tokens in the range that remains, a few percent of all.
3. The third kernel finds the threshold among these, one program per head.
"""

from typing import Any

import torch
from torch import Tensor

from sparsecache.kernels._triton import next_power_of_2, pdl_options, pdl_wait, tl, triton
from sparsecache.kernels.top_p_search import (
    UNIT,
    find_threshold,
    first_range,
    limits,
    max_excluded_mass,
    narrow_range,
    set_aside,
    sums_up_to,
)

_CHUNK = 8192  # tokens; a constant, so that sums round alike in every batch and on every device
_MASS_BLOCK, _BLOCK = 512, 1024  # tokens per iteration; eight sums per token need many registers


def find_split(
    scores: Tensor,
    extremes: Tensor,
    seq_lens: Tensor,
    slots: Tensor,
    p: float,
    undecided: Tensor,
    found: tuple[Tensor, Tensor, Tensor],
    sizes: dict[str, Any],
    shift: int,
) -> None:
    """Write to `found` what `find_top_p` returns. undecided: scratch, [heads, T] int32."""
    heads, tokens = undecided.shape
    chunks = -(-tokens // _CHUNK)
    masses = torch.empty((2, heads, chunks, 8), device=scores.device, dtype=torch.int64)
    ranges = torch.empty((2, heads, 16), device=scores.device, dtype=torch.float32)
    num_undecided = torch.empty((heads, chunks), device=scores.device, dtype=torch.int32)
    inputs = (scores, extremes, seq_lens, slots, masses, ranges, float(1 - p), scores.shape[1], tokens, chunks)
    sizes = {**sizes, "BLOCK_C": next_power_of_2(chunks), "CHUNK": _CHUNK, **pdl_options()}
    _mass_kernel[(heads, chunks)](*inputs, ROUND=0, BLOCK_T=_MASS_BLOCK, num_warps=4, **sizes)
    if p < 1:
        _mass_kernel[(heads, chunks)](*inputs, ROUND=1, BLOCK_T=_MASS_BLOCK, num_warps=4, **sizes)
        _set_aside_kernel[(heads, chunks)](*inputs, undecided, num_undecided, BLOCK_T=_BLOCK, num_warps=4, **sizes)
    _search_kernel[(heads,)](
        *inputs, undecided, num_undecided, *found, BLOCK_T=_BLOCK, SHIFT=shift, num_warps=8, **sizes
    )  # fmt: skip


@triton.jit
def _sum_chunks(masses, num_chunks, BLOCK_C: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sum the masses of the chunks of a head up to each limit: [8] int64."""
    chunk, index = tl.arange(0, BLOCK_C)[:, None], tl.arange(0, 8)[None, :]
    return tl.sum(tl.load(masses + chunk * 8 + index, mask=chunk < num_chunks, other=0), axis=0)


@triton.jit
def _range_of(  # type: ignore[no-untyped-def]
    masses, ranges, num_heads, head, num_chunks, chunks, max_excluded, ROUND: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Return the range that remains after a round, and the mass up to its upper end."""
    row = ROUND * num_heads + head
    mass = _sum_chunks(masses + row * chunks * 8, num_chunks, BLOCK_C)
    limit = tl.load(ranges + row * 16 + tl.arange(0, 8))
    return narrow_range(mass, limit, tl.load(ranges + row * 16 + 8), max_excluded)


@triton.jit
def _total(masses, head, num_chunks, chunks, BLOCK_C: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the mass of all tokens of a head."""
    chunk = tl.arange(0, BLOCK_C)
    return tl.sum(tl.load(masses + (head * chunks + chunk) * 8, mask=chunk < num_chunks, other=0))


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
    num_heads = tl.num_programs(0)
    low, highest = first_range(extremes, num_heads, head, count, excluded_share, SPLITS, BLOCK_S)
    high = highest
    if ROUND == 1:
        num_chunks = tl.cdiv(count, CHUNK)
        max_excluded = max_excluded_mass(_total(masses, head, num_chunks, chunks, BLOCK_C), excluded_share)
        low, high, _ = _range_of(masses, ranges, num_heads, head, num_chunks, chunks, max_excluded, 0, BLOCK_C)
    index, limit = tl.arange(0, 8), limits(low, high)
    if start == 0:  # stored, since another kernel might round them differently
        target = ranges + (ROUND * num_heads + head) * 16
        tl.store(target + index, limit)
        tl.store(target + 8, low)
    row, end = scores + head * tokens, tl.minimum(start + CHUNK, count)
    mass = sums_up_to(row, start, end, highest, limit, BLOCK_T, 1)
    tl.store(masses + ((ROUND * num_heads + head) * chunks + tl.program_id(1)) * 8 + index, mass)


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
    max_excluded = max_excluded_mass(_total(masses, head, num_chunks, chunks, BLOCK_C), excluded_share)
    low, high, _ = _range_of(masses, ranges, tl.num_programs(0), head, num_chunks, chunks, max_excluded, 1, BLOCK_C)
    row, target, end = scores + head * tokens, undecided + head * tokens + start, tl.minimum(start + CHUNK, count)
    number = set_aside(row, start, end, tokens, low, high, target, BLOCK_T)
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
    num_chunks, num_heads = tl.cdiv(count, CHUNK), tl.num_programs(0)
    _, highest = first_range(extremes, num_heads, head, count, excluded_share, SPLITS, BLOCK_S)
    total = _total(masses, head, num_chunks, chunks, BLOCK_C)
    tl.store(log_totals + head, highest + tl.log(total.to(tl.float32) / UNIT))
    if excluded_share <= 0:  # all tokens are top-p tokens
        tl.store(thresholds + head, float("-inf"))
        tl.store(tie_ends + head, 0)
        return
    max_excluded = max_excluded_mass(total, excluded_share)
    low, high, mass = _range_of(masses, ranges, num_heads, head, num_chunks, chunks, max_excluded, 1, BLOCK_C)
    find_threshold(
        scores + head * tokens, undecided + head * tokens, num_undecided + head * chunks, num_chunks, count, highest,
        low, high, mass, max_excluded, thresholds + head, tie_ends + head, CHUNK, BLOCK_T, SHIFT,
    )  # fmt: skip
