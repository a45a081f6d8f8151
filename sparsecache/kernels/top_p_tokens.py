"""Find the top-p tokens of heads: the fewest tokens of highest score that make a share p of the attention.

The kernels do not sort. The lowest score of a head's top-p tokens is its threshold. One program per head finds it:

1. It divides a range of scores by eight limits, and sums the weights of the tokens up to each limit. The range reaches
   from the best score down to a score below which no token can be a top-p token. The sums tell which eighth of the
   range holds the threshold. A second round divides this eighth.
2. It sets aside the tokens in the range that remains, a few percent of all.
3. It finds the threshold among these.

For rows of more than 32,768 tokens `top_p_split` has several programs per head. Their length alone decides, so a
head's tokens do not depend on the batch. The paths may differ by one token, since they sum in different orders.
"""

from typing import NamedTuple

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
from sparsecache.kernels.top_p_split import find_split

_MAX_WHOLE = 32_768  # tokens; one program would take too long for more
_MASS_BLOCK, _LIST_BLOCK, _SEARCH_BLOCK = 512, 2048, 256  # tokens per iteration of steps 1 to 3, for few registers
_UNROLL = 4  # a multiprocessor has few programs, so loads of one have to overlap


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
    heads, tokens, splits, device = scores[..., 0].numel(), scores.shape[2], extremes.shape[3], scores.device
    found = TopPTokens(
        torch.empty(heads, device=device, dtype=torch.float32),
        torch.empty(heads, device=device, dtype=torch.int32),
        torch.empty(heads, device=device, dtype=torch.float32),
    )
    undecided = torch.empty((heads, tokens), device=device, dtype=torch.int32)
    shift = 0 if scores.dtype == torch.float32 else 13  # float32 has 13 more bits of mantissa than float16
    sizes = {"SPLITS": splits, "BLOCK_S": next_power_of_2(splits)}
    if tokens > _MAX_WHOLE:
        find_split(scores, extremes, seq_lens, slots, p, undecided, found, sizes, shift)
        return found
    num_undecided = torch.empty(heads, device=device, dtype=torch.int32)
    _find_kernel[(heads,)](
        scores, extremes, seq_lens, slots, undecided, num_undecided, *found, float(1 - p), scores.shape[1], tokens,
        MASS_BLOCK=_MASS_BLOCK, LIST_BLOCK=_LIST_BLOCK, SEARCH_BLOCK=_SEARCH_BLOCK, UNROLL=_UNROLL, SHIFT=shift,
        num_warps=8, **sizes, **pdl_options(),
    )  # fmt: skip
    return found


@triton.jit
def _find_kernel(  # type: ignore[no-untyped-def]
    scores, extremes, seq_lens, slots, undecided, num_undecided, thresholds, tie_ends, log_totals, excluded_share,
    heads, tokens, MASS_BLOCK: tl.constexpr, LIST_BLOCK: tl.constexpr, SEARCH_BLOCK: tl.constexpr,
    UNROLL: tl.constexpr, SHIFT: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_S: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Find a head's threshold and the end of its ties."""
    pdl_wait(USE_PDL)
    head = tl.program_id(0).to(tl.int64)
    count = tl.minimum(tl.load(seq_lens + tl.load(slots + tl.program_id(0) // heads)), tokens).to(tl.int32)
    if count == 0:
        return
    row, target = scores + head * tokens, undecided + head * tokens
    low, highest = first_range(extremes, tl.num_programs(0), head, count, excluded_share, SPLITS, BLOCK_S)
    limit = limits(low, highest)
    mass = sums_up_to(row, 0, count, highest, limit, MASS_BLOCK, UNROLL)
    total = tl.sum(tl.where(tl.arange(0, 8) == 0, mass, 0))
    tl.store(log_totals + head, highest + tl.log(total.to(tl.float32) / UNIT))
    if excluded_share <= 0:  # all tokens are top-p tokens
        tl.store(thresholds + head, float("-inf"))
        tl.store(tie_ends + head, 0)
        return
    max_excluded = max_excluded_mass(total, excluded_share)
    low, high, _ = narrow_range(mass, limit, low, max_excluded)
    limit = limits(low, high)
    mass = sums_up_to(row, 0, count, highest, limit, MASS_BLOCK, UNROLL)
    low, high, mass_to_high = narrow_range(mass, limit, low, max_excluded)
    tl.store(num_undecided + head, set_aside(row, 0, count, tokens, low, high, target, LIST_BLOCK))
    tl.debug_barrier()  # all threads must have written
    find_threshold(
        row, target, num_undecided + head, 1, count, highest, low, high, mass_to_high, max_excluded,
        thresholds + head, tie_ends + head, 0, SEARCH_BLOCK, SHIFT,
    )  # fmt: skip
