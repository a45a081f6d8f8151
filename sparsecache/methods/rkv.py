"""R-KV: Redundancy-aware KV Cache Compression for Reasoning Models (NeurIPS'25, arXiv 2505.24133).

When the budget is full, the token of lowest score is evicted: its importance times `weight`, less its redundancy times
1 - `weight`. Importance is the attention of the last `window` queries, pooled over `kernel` neighbours. Redundancy is
the mean cosine similarity of the token's key with the others, as a softmax over the tokens. A token's similarity with
another one does not count if the token is the most recent one similar to the other: the other exempts it. So the last
of many similar tokens stays. The last `window` tokens always stay.

GQA: as in the authors' code, a KV head takes the highest score of its query heads before the softmax.

Differences: the paper evicts every 128 steps. Here one token is evicted at each step, so that no step exceeds the
budget. Votes are pooled at the end of the prompt only: later the cache is unordered, as in the authors' code. When a
token is evicted, the tokens that exempted it exempt none until a similar token comes. In the authors' code, a token
that is similar to no other exempts the first token. Their default `weight` is 0.07 in the code and 0.1 in the paper.
Window and kernel are the authors'. They decode long answers to short prompts; the budget is this project's.
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
from sparsecache.kernels.similarity import similarity_sums

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

    def mix(self, importance: Tensor, redundancy: Tensor) -> Tensor:
        """Return the scores of tokens from their importance and redundancy: [G, L] each."""
        return self.weight * importance - (1 - self.weight) * redundancy


class RKVCache(BoundedKVCache):
    """Scores are sums of similarities with the other tokens, without those that do not count."""

    def __init__(self, method: RKV, layer: int, config: CacheConfig) -> None:
        super().__init__(method, layer, config)
        self._method = method
        group = config.shape.heads // config.shape.kv_heads
        queries = config.zeros(group, method.window, config.shape.head_dim)
        exempted, similarity = torch.zeros_like(self.positions), torch.zeros_like(self.scores)
        self.redundancy = Redundancy(exempted, similarity, queries, _SIMILAR, method.weight)

    def prefill(self, slot: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        super().prefill(slot, q, k, v)
        length, window = k.shape[1], self._method.window
        count = min(self._budget.tokens(length), length)
        state = self.scores, self.redundancy.exempted, self.redundancy.similarity
        for stored, found in zip(state, similarity_sums(self.keys[slot, :, :count], _SIMILAR), strict=True):
            stored[slot, :, :count] = found
        last = torch.arange(max(0, length - window), length, device=q.device)
        self.redundancy.queries[slot][:, :, last % window] = q[:, last].view(len(k), -1, len(last), q.shape[2])

    def prompt_scores(self, q: Tensor, k: Tensor, count: int) -> tuple[Tensor, Tensor]:
        kv_heads, length, _ = k.shape
        window = min(count, self._method.window)
        kept = torch.arange(length - window, length, device=k.device).expand(kv_heads, -1)
        if count > window:
            best = self._scores_before_window(q, k).topk(count - window, sorted=False).indices
            kept = torch.cat((best.sort(dim=-1).values, kept), 1)  # in the order of the text
        return kept, torch.zeros_like(kept, dtype=torch.float32)

    def _scores_before_window(self, q: Tensor, k: Tensor) -> Tensor:
        """Return the scores of a prompt's tokens before the window: [G, L - window]."""
        kv_heads, length, head_dim = k.shape
        method = self._method
        before = length - method.window
        logits = scaled_scores(q[:, before:], k[:, :before], head_dim)
        votes = logits.view(kv_heads, -1, *logits.shape[1:]).amax(1).softmax(-1).mean(1)
        importance = max_pool1d(votes, method.kernel, 1, method.kernel // 2)
        redundancy = (similarity_sums(k, _SIMILAR)[0] / length).softmax(-1)
        return method.mix(importance, redundancy[:, :before])

    def evict(self, q: Tensor, slots: Tensor) -> None:
        evict_redundant(q, self.tokens, self.redundancy, self.seq_lens, slots, self.budgets)
