"""H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models (NeurIPS'23, arXiv 2306.14048).

The share `recent` of the budget, half as in the paper, rounded up, holds the most recent tokens. The rest holds the
heavy hitters: the other tokens with the most attention so far. Each step adds the new query's attention to every kept
token's sum. When the budget is full, the token with the lowest sum that is not recent is evicted, of equal ones the
earliest.

GQA: the paper sums and evicts per head. Here a KV head sums over all its query heads, and evicts for all of them.

Differences: the paper evicts while the prompt is read. Here, as in the authors' code that frees memory, the prompt's
attention is dense. Tokens are evicted after prefill, by the attention of all its queries. With `window` only
its last ones count, as in `snapkv`.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from sparsecache.cache.base import CacheConfig, MethodKind
from sparsecache.cache.eviction import NO_STORAGE, AttentionEvictionCache, attention_sums
from sparsecache.cache.sparse import SparseMethod


@dataclass
class H2O(SparseMethod):
    """Keeps the tokens that received the most attention, and the most recent ones."""

    kind: ClassVar[MethodKind] = "eviction"
    absent_options = NO_STORAGE

    recent: Annotated[float, "share of the budget for the most recent tokens, above 0 to 1, rounded up"] = 0.5
    window: Annotated[int | None, "last prompt queries that vote, 1 or more; none: all of them"] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.recent <= 1:
            raise ValueError(f"recent={self.recent} must be a share of the budget, above 0 to 1.")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window} must be 1 query or more (none: all of the prompt).")

    @property
    def prompt_queries(self) -> int | None:
        return self.window

    def make_sparse_cache(self, layer: int, config: CacheConfig) -> "H2OCache":
        return H2OCache(self, layer, config)


class H2OCache(AttentionEvictionCache):
    """Scores are the attention that each token received so far."""

    accumulate: ClassVar[bool] = True
    shared: ClassVar[bool] = False
    uses_logsumexp: ClassVar[bool] = True

    def __init__(self, method: H2O, layer: int, config: CacheConfig) -> None:
        self.method = method
        super().__init__(method, layer, config)

    def prefill_with_logsumexp(self, slot: int, q: Tensor, k: Tensor, v: Tensor, logsumexp: Tensor) -> None:
        self.store_prompt(slot, k, v, *self.prompt_scores(q, k, self.prompt_count(k.shape[1]), logsumexp))

    def prompt_scores(self, q: Tensor, k: Tensor, count: int, logsumexp: Tensor | None = None) -> tuple[Tensor, Tensor]:
        kv_heads, length = k.shape[:2]
        first = 0 if self.method.window is None else max(0, length - self.method.window)
        received = attention_sums(q, k, first=first, logsumexp=logsumexp)
        recent = torch.arange(length - math.ceil(self.method.recent * count), length, device=k.device)
        others = length - len(recent)
        ascending = received[:, :others].sort(dim=-1, stable=True).indices
        kept = torch.cat((ascending[:, others - count + len(recent) :], recent.expand(kv_heads, -1)), 1)
        return kept, received.gather(1, kept)

    def recent_tokens(self, budgets: Tensor) -> Tensor:
        return (self.method.recent * budgets.double()).ceil().long()
