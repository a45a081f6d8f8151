"""Find the top-p tokens of heads: the fewest tokens of highest score that make a share p of the attention.

The kernels do not sort. The lowest score of a head's top-p tokens is its threshold. One program per head finds it:

1. It divides a range of scores by eight limits, and sums the weights of the tokens up to each limit. The range reaches
   from the best score down to a score below which no token can be a top-p token. The sums tell which eighth of the
   range holds the threshold.
2. It sets aside the tokens in this eighth, most often less than a third of all.
3. It finds the threshold among these.

Few heads with many tokens would leave most of the GPU idle: `top_p_split` has several programs per head. Both paths
find the same tokens, since their sums are exact.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sparsecache.kernels._triton import next_power_of_2, num_sms, pdl_options, pdl_wait, tl, triton
from sparsecache.kernels.top_p_search import (
    UNIT,
    find_threshold,
    first_range,
    max_excluded_mass,
    narrow_range,
    set_aside,
    sums_up_to,
)
from sparsecache.kernels.top_p_split import find_split

_CHUNK = 8192  # tokens; at most 16 * _MASS_BLOCK
_MASS_BLOCK, _LIST_BLOCK, _SEARCH_BLOCK = 512, 2048, 512  # tokens per iteration of steps 1 to 3
_WARPS = 8  # with these blocks, two programs share a multiprocessor by the registers they need
_LONG_ROW = 32_768  # tokens; with more, one program per head is too slow unless there is a head per multiprocessor

_forced_path: Literal["whole", "split"] | None = None  # for tests: one program per head, or several


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
    entries = torch.empty((heads, tokens), device=device, dtype=torch.int64)
    shift = 0 if scores.dtype == torch.float32 else 13  # float32 has 13 more bits of mantissa than float16
    sizes = {"SPLITS": splits, "BLOCK_S": next_power_of_2(splits), "SHIFT": shift}
    if _is_split(heads, tokens, device):
        find_split(scores, extremes, seq_lens, slots, p, entries, found, sizes)
        return found
    _find_kernel[(heads,)](
        scores, extremes, seq_lens, slots, entries, *found, float(1 - p), scores.shape[1], tokens,
        CHUNK=_CHUNK, MASS_BLOCK=_MASS_BLOCK, LIST_BLOCK=_LIST_BLOCK, SEARCH_BLOCK=_SEARCH_BLOCK,
        num_warps=_WARPS, **sizes, **pdl_options(),
    )  # fmt: skip
    return found


def _is_split(heads: int, tokens: int, device: torch.device) -> bool:
    """Return whether several programs search a head. It changes the speed alone, not the result."""
    if _forced_path is not None:
        return _forced_path == "split"
    return tokens > _LONG_ROW and heads < num_sms(device)


@triton.jit
def _find_kernel(  # type: ignore[no-untyped-def]
    scores, extremes, seq_lens, slots, entries, thresholds, tie_ends, log_totals, excluded_share, heads, tokens,
    CHUNK: tl.constexpr, MASS_BLOCK: tl.constexpr, LIST_BLOCK: tl.constexpr, SEARCH_BLOCK: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_S: tl.constexpr, SHIFT: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Find a head's threshold and the end of its ties."""
    pdl_wait(USE_PDL)
    head = tl.program_id(0).to(tl.int64)
    count = tl.minimum(tl.load(seq_lens + tl.load(slots + tl.program_id(0) // heads)), tokens).to(tl.int32)
    if count == 0:
        return
    row, index = scores + head * tokens, tl.arange(0, 8)
    low, highest = first_range(extremes, tl.num_programs(0), head, count, excluded_share, SPLITS, BLOCK_S)
    limit = highest - index * ((highest - low) * 0.125)
    mass = tl.zeros((8,), dtype=tl.int64)
    for start in tl.range(0, count, CHUNK):
        mass += sums_up_to(row, start, tl.minimum(start + CHUNK, count), highest, limit[:, None], MASS_BLOCK)
    total = tl.sum(tl.where(index == 0, mass, 0))
    tl.store(log_totals + head, highest + tl.log(total.to(tl.float32) / UNIT))
    if excluded_share <= 0:  # all tokens are top-p tokens
        tl.store(thresholds + head, float("-inf"))
        tl.store(tie_ends + head, 0)
        return
    max_excluded = max_excluded_mass(total, excluded_share)
    low, high, mass_to_high = narrow_range(mass, limit, low, max_excluded)
    target = entries + head * tokens
    number = set_aside(row, 0, count, tokens, low, high, target, LIST_BLOCK, SHIFT)
    tl.debug_barrier()  # all threads must have written
    find_threshold(
        target, target, number, tl.cdiv(number, CHUNK), count, highest, low, high, mass_to_high, max_excluded,
        thresholds + head, tie_ends + head, CHUNK, SEARCH_BLOCK, SHIFT, False,
    )  # fmt: skip
