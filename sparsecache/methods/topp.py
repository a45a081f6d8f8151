"""Top-p: as many tokens as make a share p of the attention, by true scores (Twilight, NeurIPS'25, arXiv 2502.02770).

A token is selected if the tokens of higher probability sum to less than p, so the count follows how concentrated the
attention is. The budget is an upper bound.

GQA: a KV head selects what any of its query heads needs, in the order of how little comes before a token.

Differences: the paper prunes what another method selected, with a budget of a quarter of the tokens, by 4-bit keys.
Here all keys are read, so nothing is saved to select: it shows what an adaptive count attains. p is a share of what the
past tokens get, without the current token, which is always attended to.
"""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from sparsecache.cache.selection import SelectionCache, SelectionMethod, positions_below
from sparsecache.kernels.scores import scaled_scores
from sparsecache.kernels.threshold import Selection


@dataclass
class TopP(SelectionMethod):
    """Selects as many tokens as make a share of the attention."""

    p: Annotated[float, "share of the past tokens' attention that is attended to, above 0 to 1"] = 0.85

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.p <= 1:
            raise ValueError(f"p={self.p} must be above 0 and at most 1.")

    def select(self, q: Tensor, cache: SelectionCache, slots: Tensor) -> Selection:
        keys = cache.keys_of(slots)
        scores = scaled_scores(q, keys, keys.shape[3])[:, :, 0]  # [B, H, T]
        is_past = positions_below(cache.seq_lens[slots], scores.shape[2])
        falling, order = scores.masked_fill(~is_past, -math.inf).softmax(2).sort(dim=2, descending=True, stable=True)
        before = falling.cumsum(2).sub_(falling)  # 0 for the best
        before = torch.zeros_like(before).scatter_(2, order, before)  # by position again
        before = before.view(*keys.shape[:2], -1, before.shape[2]).amin(2)
        return cache.select_topk(-before, slots, within=self.p if self.p < 1 else math.inf)  # the sum of all may round
