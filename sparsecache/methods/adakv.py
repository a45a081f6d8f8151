"""Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation (NeurIPS'25, arXiv 2407.11550).

SnapKV with a budget per KV head: the KV heads of a layer compete for the sum of their budgets, and the highest scores
of all of them stay. Every KV head keeps at least the share `safeguard` of its own budget.

GQA: scores are those of `snapkv` and counts are per KV head, as in the paper's later version.

Differences: the safeguard is a minimum, as in kvpress. The authors' code instead mixes the counts that the heads won
with equal ones, in the ratio 1 - `safeguard` to `safeguard`. The minimum is the same in both. Defaults are those of the
authors' script for models with GQA: `safeguard` 0.2, a window of 32, maxima over 7 positions.

Memory: all KV heads have rows for the most that one of them may keep, which is nearly the budget times the KV heads, or
the whole prompt. So Ada-KV here saves what a step reads, like the selection methods, and only little memory.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from sparsecache.cache.base import Shape
from sparsecache.kernels.highest import highest_positions
from sparsecache.methods.snapkv import SnapKV


@dataclass
class AdaKV(SnapKV):
    """Keeps what SnapKV keeps, with more tokens in KV heads whose attention is spread."""

    budget: Annotated[float, "mean prompt tokens kept per KV head: a share up to 1, else a count"] = 0.2
    safeguard: Annotated[float, "share of the budget that every KV head keeps, 0 to 1"] = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.safeguard <= 1:
            raise ValueError(f"safeguard={self.safeguard} must be a share from 0 to 1.")

    def keep(self, scores: Tensor, count: int, width: int) -> tuple[Tensor, Tensor]:
        kv_heads, length = scores.shape
        safe = highest_positions(scores, self._safe(count))
        joined = scores.scatter(1, safe, torch.inf).view(1, -1)  # the scores of one KV head after the other
        winners = highest_positions(joined, kv_heads * count)[0]
        first = length * torch.arange(kv_heads + 1, device=scores.device)
        bounds = torch.searchsorted(winners, first)
        index = bounds[:-1, None] + torch.arange(width, device=scores.device)
        # The last token always stays, so it is each KV head's last winner.
        kept = winners[index.minimum(bounds[1:, None] - 1)] - first[:-1, None]
        return kept, bounds.diff()

    def max_head_tokens(self, count: int, shape: Shape) -> int:
        return shape.kv_heads * count - (shape.kv_heads - 1) * self._safe(count)

    def _safe(self, count: int) -> int:
        """Return how many of its tokens each KV head keeps at least."""
        return max(1, int(count * self.safeguard))
