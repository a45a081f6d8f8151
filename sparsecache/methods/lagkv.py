"""LagKV: Lag-Relative Information of the KV Cache Tells Which Tokens Are Important (arXiv 2504.04704).

The prompt is cut into partitions of `lag` tokens. Channels of keys, and of values, are scaled by their range in the
next partition. The standard deviation over a token's channels, as a softmax over its partition, is the token's score.
Within a partition the tokens of highest score stay. The first `sinks` tokens always stay, and so do the last
partition, which has no next one, and the tokens after it. No attention is computed. GQA adds nothing: keys and values
are those of KV heads.

Differences: the paper also compresses what is decoded. Here tokens are evicted once, at the end of the prompt, as in
kvpress. The budget is of the whole prompt, so partitions give up more where the sinks and the last partition take much
of it. A smaller budget than these keeps sinks first, then the last tokens. Defaults are the authors'; the budget is
this project's.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from sparsecache.cache.eviction import EvictionMethod, pin_last

_LEAST_RANGE = 1e-6  # a constant channel would divide by 0


@dataclass
class LagKV(EvictionMethod):
    """Keeps the prompt tokens that stand out from the next partition, and every new token."""

    lag: Annotated[int, "tokens in a partition, 2 or more"] = 128
    sinks: Annotated[int, "first tokens that always stay, 0 or more"] = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lag < 2:
            raise ValueError(f"lag={self.lag} must be 2 tokens or more.")
        if self.sinks < 0:
            raise ValueError(f"sinks={self.sinks} must be 0 tokens or more.")

    def score(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kv_heads, length = k.shape[:2]
        sinks = min(self.sinks, length)
        scored = max(0, (length - sinks) // self.lag - 1) * self.lag  # tokens that have a next partition
        scores = k.new_full((kv_heads, length), torch.inf, dtype=torch.float32)
        if scored:
            spread = self._spread(torch.cat((k, v)), sinks, scored)
            order = (spread[:kv_heads] + spread[kv_heads:]).argsort(dim=-1)
            ranks = torch.arange(self.lag, device=k.device).expand_as(order) / self.lag
            scores[:, sinks : sinks + scored] = torch.empty_like(ranks).scatter_(2, order, ranks).flatten(1)
        return torch.cat((scores[:, :sinks], pin_last(scores[:, sinks:], length - sinks - scored)), 1)

    def _spread(self, x: Tensor, first: int, count: int) -> Tensor:
        """Return the spread of each token's channels from `first` on: [G, partitions, lag]; x: [G, L, D]."""
        parts = x[:, first : first + count + self.lag].float().view(len(x), -1, self.lag, x.shape[2])
        low, high = parts[:, 1:].amin(2, keepdim=True), parts[:, 1:].amax(2, keepdim=True)
        scaled: Tensor = (parts[:, :-1] - low) / (high - low).clamp(min=_LEAST_RANGE)
        return scaled.std(-1).softmax(-1)
