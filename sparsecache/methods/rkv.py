"""R-KV: Redundancy-aware KV Cache Compression for Reasoning Models (NeurIPS'25, arXiv 2505.24133).

When the budget is full, the token of lowest score is evicted: its importance times `weight`, less its redundancy times
1 - `weight`. Importance is the attention of the last `window` queries, pooled over `kernel` neighbours. Redundancy is
the mean cosine similarity of the token's key with the others, as a softmax over the tokens. For each token i, let j be
the latest other token whose key has a cosine similarity above 0.5 with the key of i: i exempts j. This pair does not
count in the redundancy of j, so the last of many similar tokens stays. The last `window` tokens always stay.

GQA: as in the authors' code, a KV head takes the highest score of its query heads before the softmax.

Differences:

- The paper evicts every 128 steps. Here one token is evicted at each step, so that no step exceeds the budget.
- Votes are pooled after prefill only: later the cache is unordered, as in the authors' code.
- When a token is evicted, the tokens that exempted it exempt none until a similar token comes.
- In the authors' code, a token that is similar to no other exempts the first token. Here it exempts none.
- The authors' default `weight` is 0.07 in the code and 0.1 in the paper; here it is the paper's.
- Window and kernel are the authors'. They decode long answers to short prompts; the budget is this project's.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

from sparsecache.cache.base import CacheConfig, MethodKind
from sparsecache.cache.eviction import NO_STORAGE, BoundedKVCache, check_voting
from sparsecache.cache.sparse import SparseMethod
from sparsecache.kernels.redundancy import Redundancy, evict_redundant
from sparsecache.kernels.scores import scaled_scores
from sparsecache.kernels.similarity import Similarities, similarity_sums

_SIMILAR = 0.5  # cosine similarity above which tokens are similar
_MAX_WINDOW = 64  # each query of it is kept, and read at every step


@dataclass
class RKV(SparseMethod):
    """Keeps tokens that get attention and whose keys are unlike the others'."""

    kind: ClassVar[MethodKind] = "eviction"
    absent_options = NO_STORAGE

    window: Annotated[int, "observation window: last tokens, which vote and always stay, 1 to 64"] = 8
    kernel: Annotated[int, "pooling kernel: neighbouring positions that votes are pooled over, an odd number"] = 7
    weight: Annotated[float, "weight of importance, 0 to 1; redundancy has 1 - weight"] = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_voting(self.window, self.kernel)
        if self.window > _MAX_WINDOW:
            raise ValueError(f"window={self.window} must be at most {_MAX_WINDOW} tokens.")
        if not 0 <= self.weight <= 1:
            raise ValueError(f"weight={self.weight} must be 0 to 1.")

    @property
    def prompt_queries(self) -> int:
        return self.window

    def make_sparse_cache(self, layer: int, config: CacheConfig) -> "RKVCache":
        return RKVCache(self, layer, config)


class RKVCache(BoundedKVCache):
    """A BoundedKVCache whose scores are, per row, the sum of its cosine similarities, exempted pairs left out."""

    def __init__(self, method: RKV, layer: int, config: CacheConfig) -> None:
        super().__init__(method, layer, config)
        self._method = method
        group = config.shape.heads // config.shape.kv_heads
        queries = config.zeros(group, method.window, config.shape.head_dim)
        exempted, similarity = torch.zeros_like(self.positions), torch.zeros_like(self.scores)
        self.redundancy = Redundancy(exempted, similarity, queries, _SIMILAR, method.weight)

    def prefill(self, slot: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        super().prefill(slot, q, k, v)
        kv_heads, length, head_dim = k.shape
        count, recent = self.prompt_count(length), min(length, self._method.window)
        state = self.scores, self.redundancy.exempted, self.redundancy.similarity
        similarity_sums(self.keys[slot, :, :count], _SIMILAR, Similarities(*(part[slot, :, :count] for part in state)))
        queries = q[:, length - recent :].roll(length % recent, 1)  # each in the row position % window
        self.redundancy.queries[slot, :, :, :recent] = queries.view(kv_heads, -1, recent, head_dim)

    def prompt_scores(self, q: Tensor, k: Tensor, count: int) -> tuple[Tensor, None]:
        kv_heads, length, _ = k.shape
        if count > self._method.window:
            best = self._prompt_priorities(q, k).topk(count, sorted=False).indices
            kept = best.sort(dim=-1).values  # in the order of the text
        else:
            kept = torch.arange(length - count, length, device=k.device).expand(kv_heads, -1)
        return kept, None  # `prefill` sets the scores

    def _prompt_priorities(self, q: Tensor, k: Tensor) -> Tensor:
        """Return the scores of a prompt's tokens, infinite in the window: [G, L]."""
        kv_heads, length, head_dim = k.shape
        method = self._method
        before = length - method.window
        logits = scaled_scores(q[:, before:], k[:, :before], head_dim)
        votes = logits.view(kv_heads, -1, *logits.shape[1:]).amax(1).softmax(-1).mean(1)
        importance = max_pool1d(votes, method.kernel, 1, method.kernel // 2)
        redundancy = (similarity_sums(k, _SIMILAR).sums / length).softmax(-1)
        priorities = redundancy.mul_(method.weight - 1)
        priorities[:, :before].add_(importance, alpha=method.weight)
        priorities[:, before:].fill_(torch.inf)
        return priorities

    def evict(self, q: Tensor, slots: Tensor) -> None:
        evict_redundant(q, self.tokens, self.redundancy, self.seq_lens, slots, self.budgets)
