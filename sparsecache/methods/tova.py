"""TOVA: Transformers are Multi-State RNNs (EMNLP'24, arXiv 2401.06104).

When the budget is full, the token that the current query attends to least is evicted. The prompt keeps the tokens that
its last query attends to most.

GQA: as in the paper, attention is averaged over all query heads, so all KV heads of a layer keep the same tokens.

Differences: the newest token always stays, as in kvpress. The paper can evict it too. The prompt's own attention is
dense.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsecache.cache.base import CacheConfig, MethodKind
from sparsecache.cache.eviction import NO_STORAGE, AttentionEvictionCache, attention_sums, pin_last
from sparsecache.cache.sparse import SparseMethod
from sparsecache.kernels.highest import highest_positions


@dataclass
class TOVA(SparseMethod):
    """Keeps the tokens that the latest query attends to most."""

    kind: ClassVar[MethodKind] = "eviction"
    absent_options = NO_STORAGE
    prompt_queries = 1

    def make_sparse_cache(self, layer: int, config: CacheConfig) -> "TOVACache":
        return TOVACache(self, layer, config)


class TOVACache(AttentionEvictionCache):
    """Evicts the token with the least attention, summed over all heads."""

    accumulate: ClassVar[bool] = False
    shared: ClassVar[bool] = True

    def prompt_scores(self, q: Tensor, k: Tensor, count: int) -> tuple[Tensor, Tensor]:
        received = attention_sums(q, k, first=k.shape[1] - 1).sum(0, keepdim=True)
        kept = highest_positions(pin_last(received, 1), count).expand(len(k), -1)
        return kept, received.expand(len(k), -1).gather(1, kept)

    def recent_tokens(self, budgets: Tensor) -> Tensor:
        return torch.ones_like(budgets)
