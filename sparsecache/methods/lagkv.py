"""LagKV: Lag-Relative Information of the KV Cache Tells Which Tokens Are Important (arXiv 2504.04704).

The prompt is cut into partitions of `lag` tokens. Channels of keys, and of values, are scaled by their range in the
next partition. The standard deviation over a token's channels, as a softmax over its partition, gives a score of the
key and one of the value; the token's score is their sum. The tokens of highest score in each partition stay. The first
`sinks` tokens always stay, and so do the last partition, which has no next one, and the tokens after it. No attention
is computed. GQA changes nothing: keys and values are those of KV heads.

Differences: the paper also compresses decoded tokens. Here tokens are evicted once, after prefill, as in
kvpress. The budget counts the whole prompt, so partitions keep fewer tokens where the sinks and the last partition take
much of it. A budget smaller than these keeps sinks first, then the last tokens. Defaults are the authors'; the budget
is this project's.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from sparsecache.cache.checks import check_token_counts
from sparsecache.cache.eviction import EvictionMethod, pin_last

_MIN_RANGE = 1e-6  # so that a constant channel does not divide by 0


@dataclass
class LagKV(EvictionMethod):
    """Keeps the prompt tokens that stand out from the next partition, and every generated token."""

    prompt_queries = 0

    lag: Annotated[int, "tokens in a partition, 2 or more"] = 128
    sinks: Annotated[int, "first tokens that always stay, 0 or more"] = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lag < 2:
            raise ValueError(f"lag={self.lag} must be 2 tokens or more.")
        check_token_counts(sinks=self.sinks)

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
        """Return the scores of `count` tokens of x [N, L, D] from `first` on: [N, partitions, lag]."""
        parts = x[:, first : first + count + self.lag].view(len(x), -1, self.lag, x.shape[2])
        low, high = parts[:, 1:].amin(2, keepdim=True).float(), parts[:, 1:].amax(2, keepdim=True).float()
        scaled: Tensor = (parts[:, :-1] - low).div_((high - low).clamp_(min=_MIN_RANGE))
        return scaled.std(-1).softmax(-1)
