"""R-KV: Redundancy-aware KV Cache Compression for Reasoning Models (NeurIPS'25, arXiv 2505.24133).

When the budget is full, the token of lowest score is evicted: its importance times `weight`, less its redundancy times
1 - `weight`. Importance is the attention of the last `window` queries, pooled over `kernel` neighbours. Redundancy is
the mean cosine similarity of the token's key with the others, as a softmax over the tokens. A token is exempt from its
similarity with each token of which it is the most recent similar one, so the last of many similar tokens stays. The
last `window` tokens always stay.

GQA: as in the authors' code, a KV head takes the highest score of its query heads before the softmax.

Differences: the paper evicts every 128 steps; here one is evicted at each step, so that no step exceeds the
budget. Votes are pooled at the end of the prompt only: later the cache is unordered, as in the authors' code. When a
token is evicted, the tokens that exempted it exempt none until a similar one comes. In the authors' code, a token that
is similar to no other exempts the first one. Their default `weight` is 0.07 in the code and 0.1 in the paper. The
authors decode long answers to short prompts; the budget is this project's.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d, normalize

from sparsecache.cache.base import CacheConfig, MethodKind
from sparsecache.cache.eviction import DecodingEvictionCache, check_voting, pin_last
from sparsecache.cache.sparse import SparseMethod
from sparsecache.kernels.eviction import Eviction
from sparsecache.kernels.scores import scaled_scores
from sparsecache.kernels.similarity import latest_similar

_SIMILAR = 0.5  # cosine similarity of the keys of similar tokens
_KEPT = 2.0  # above any score


@dataclass
class RKV(SparseMethod):
    """Keeps tokens that get attention and whose keys are unlike the others'."""

    kind: ClassVar[MethodKind] = "eviction"

    window: Annotated[int, "last tokens, which vote and always stay, 1 or more"] = 8
    kernel: Annotated[int, "neighbouring positions that votes are pooled over, an odd number"] = 7
    weight: Annotated[float, "of importance against redundancy, 0 to 1"] = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_voting(self.window, self.kernel)
        if not 0 <= self.weight <= 1:
            raise ValueError(f"weight={self.weight} must be 0 to 1.")

    def make_sparse_cache(self, layer: int, config: CacheConfig) -> "RKVCache":
        return RKVCache(self, layer, config)

    def mix(self, importance: Tensor, redundancy: Tensor) -> Tensor:
        return self.weight * importance - (1 - self.weight) * redundancy


class RKVCache(DecodingEvictionCache):
    """Scores are sums of similarities with the other tokens, except those that exempt a token.

    exempted: [slots, G, rows] int64, the row of the token that a token exempts, -1 for none; similarity: [slots, G,
    rows] float32, with that token. queries: [slots, G, H / G, window, D], the last ones, by position % window.
    """

    def __init__(self, method: RKV, layer: int, config: CacheConfig) -> None:
        super().__init__(method, layer, config)
        self._method = method
        self.exempted, self.similarity = torch.zeros_like(self.positions), torch.zeros_like(self.scores)
        self.more_state = (self.exempted, self.similarity)
        group = config.shape.heads // config.shape.kv_heads
        self.queries = config.zeros(group, method.window, config.shape.head_dim)

    def prefill(self, slot: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        super().prefill(slot, q, k, v)
        length, window = k.shape[1], self._method.window
        count = min(self._budget.tokens(length), length)
        found_of_all = _redundancy(self.keys[slot, :, :count])
        for state, found in zip((self.scores, self.exempted, self.similarity), found_of_all, strict=True):
            state[slot, :, :count] = found
        last = torch.arange(max(0, length - window), length, device=q.device)
        self.queries[slot][:, :, last % window] = q[:, last].view(len(k), -1, len(last), q.shape[2])

    def prompt_scores(self, q: Tensor, k: Tensor, count: int) -> tuple[Tensor, Tensor]:
        kv_heads, length, head_dim = k.shape
        before, method = max(0, length - self._method.window), self._method
        scores = torch.zeros(kv_heads, length, device=k.device)
        if before:
            logits = scaled_scores(q[:, before:], k[:, :before], head_dim)
            votes = logits.view(kv_heads, -1, *logits.shape[1:]).amax(1).softmax(-1).mean(1)
            importance = max_pool1d(votes, method.kernel, 1, method.kernel // 2)
            redundancy = (_redundancy(k)[0] / length).softmax(-1)
            scores[:, :before] = method.mix(importance, redundancy[:, :before])
        order = pin_last(scores, length - before).sort(dim=-1, descending=True, stable=True).indices
        kept = order[:, :count].sort(dim=-1).values  # in the order of the text
        return kept, torch.zeros_like(kept, dtype=torch.float32)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> Tensor:
        at = self.seq_lens[slots] % self._method.window
        self.queries[slots, :, :, at] = q.view(len(slots), k.shape[1], -1, q.shape[3])
        return super().attend(q, k, v, slots)

    def step_scores(self, q: Tensor, slots: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        keys, positions, window = self.keys[slots], self.positions[slots], self._method.window
        new = self.num_tokens[slots].clamp(max=len(self._rows) - 1)[..., None]  # [B, G, 1]
        sums = self._add(normalize(keys.float(), dim=-1), positions, slots, new)
        is_free, is_recent = self._rows > new, positions >= (past - window)[:, None, None]
        logits = scaled_scores(self.queries[slots].flatten(2, 3), keys, keys.shape[3])
        logits = logits.view(*keys.shape[:2], -1, window, keys.shape[2]).amax(2)  # [B, G, window, rows]
        votes = logits.masked_fill((is_free | is_recent)[:, :, None], torch.finfo(torch.float32).min).softmax(-1)
        redundancy = (sums / (new + 1)).masked_fill(is_free, -torch.inf).softmax(-1)
        scores = self._method.mix(votes.mean(2), redundancy).double()
        return sums, torch.where(is_recent, _KEPT + positions, scores)

    def _add(self, unit: Tensor, positions: Tensor, slots: Tensor, new: Tensor) -> Tensor:
        """Add the new token's similarities; return the sums [B, G, rows]. unit: [B, G, rows, D]; new: [B, G, 1]."""
        exempted, similarity = self.exempted[slots], self.similarity[slots]
        found = _similarities(unit, new).masked_fill(self._rows >= new, 0)
        is_similar = found > _SIMILAR
        back = similarity.masked_fill(~is_similar | (exempted < 0), 0)  # what the new token exempts from now on
        sums = self.scores[slots].scatter_add(2, exempted.clamp(min=0), back)
        latest, row = positions.masked_fill(~is_similar, -1).max(2, keepdim=True)
        to_row = found.gather(2, row).masked_fill(latest < 0, 0)
        sums = (sums + found).scatter_add(2, row, -to_row)
        sums.scatter_(2, new, found.masked_fill(is_similar, 0).sum(2, keepdim=True))
        exempted = torch.where(is_similar, new, exempted).scatter(2, new, row.masked_fill(latest < 0, -1))
        self.exempted[slots] = exempted
        self.similarity[slots] = torch.where(is_similar, found, similarity).scatter(2, new, to_row)
        return sums

    def before_evict(self, slots: Tensor, eviction: Eviction) -> None:
        row, last, over = (part[..., None] for part in eviction)
        exempted, sums = self.exempted[slots], self.scores[slots]
        found = _similarities(normalize(self.keys[slots].float(), dim=-1), row)
        found = found.masked_fill(~over | (self._rows > last) | (self._rows == row), 0)
        of_row = exempted.gather(2, row)
        exempted_by_row = found.gather(2, of_row.clamp(min=0)).masked_fill(of_row < 0, 0)
        self.scores[slots] = (sums - found).scatter_add(2, of_row.clamp(min=0), exempted_by_row)
        exempted = exempted.masked_fill((exempted == row) & over, -1)
        self.exempted[slots] = torch.where((exempted == last) & over, row, exempted)


def _similarities(unit: Tensor, row: Tensor) -> Tensor:
    """Return the cosine similarities of a row [B, G, 1] with all rows of unit keys [B, G, rows, D]: [B, G, rows]."""
    index = row[..., None].expand(*row.shape, unit.shape[3])
    similarities: Tensor = (unit @ unit.gather(2, index).mT)[..., 0]
    return similarities


def _redundancy(keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return sums of similarities, the row that each token exempts or -1, and their similarity: [G, L] each.

    keys: [G, L, D], in the order of the text. No L x L tensor is built.
    """
    unit = normalize(keys.float(), dim=-1)
    sums = (unit * (unit.sum(1, keepdim=True) - unit)).sum(2)  # of each token with all others
    exempted, similarity = latest_similar(keys, _SIMILAR)
    return sums.scatter_add(1, exempted.clamp(min=0), -similarity), exempted, similarity
