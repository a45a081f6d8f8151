"""StreamingLLM: Efficient Streaming Language Models with Attention Sinks (ICLR'24, arXiv 2309.17453).

Keeps the first tokens, which serve as attention sinks, and the most recent ones. All others are evicted. There are no
scores, so all KV heads keep the same tokens and GQA changes nothing.

Differences: the paper numbers positions inside the cache, so that a text can be endless. Here keys keep the rotation
of their positions in the text, as in every method that is compared; the prompt's attention is dense. The budget
counts sinks and recent tokens together; a budget of at most `sinks` tokens keeps only sinks. The paper has four
sinks.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from sparsecache.cache.base import CacheConfig, MethodKind
from sparsecache.cache.checks import check_token_counts
from sparsecache.cache.eviction import NO_STORAGE, BoundedKVCache
from sparsecache.cache.sparse import SparseMethod
from sparsecache.kernels.oldest import evict_oldest


@dataclass
class Streaming(SparseMethod):
    """Keeps the first and the last tokens."""

    kind: ClassVar[MethodKind] = "eviction"
    absent_options = NO_STORAGE
    prompt_queries = 0

    budget: Annotated[float, "most past tokens kept, sinks included: a share of them up to 1, else a count"] = 0.2
    sinks: Annotated[int, "first tokens that are always kept, 0 or more"] = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_token_counts(sinks=self.sinks)

    def make_sparse_cache(self, layer: int, config: CacheConfig) -> "StreamingCache":
        return StreamingCache(self.sinks, self, layer, config)


class StreamingCache(BoundedKVCache):
    """Evicts the oldest token that is not a sink."""

    def __init__(self, sinks: int, method: SparseMethod, layer: int, config: CacheConfig) -> None:
        super().__init__(method, layer, config)
        self._sinks = sinks

    def prompt_scores(self, q: Tensor, k: Tensor, count: int) -> tuple[Tensor, Tensor]:
        kv_heads, length = k.shape[:2]
        sinks = min(self._sinks, count)
        positions = torch.arange(length, device=k.device)
        kept = torch.cat((positions[:sinks], positions[length - count + sinks :])).expand(kv_heads, -1)
        return kept, torch.zeros(kept.shape, device=k.device)

    def evict(self, q: Tensor, slots: Tensor) -> None:
        evict_oldest(self.tokens, self.seq_lens, slots, self.budgets, self._sinks)
