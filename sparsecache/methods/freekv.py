"""FreeKV: Boosting KV Cache Retrieval for Efficient LLM Inference (2025, arXiv 2505.13109).

As Quest, but pages are selected by the previous step's query, so that they could be fetched ahead. If the cosine
similarity of a query to the previous one is below `similarity`, the current query selects. The first and the most
recent pages are always selected. The defaults are those of the authors' LongBench v2 runs; the budget, theirs is 2,048
tokens, is this project's.

GQA: as in the paper, a KV head takes the mean similarity of its query heads, and the mean of their softmax over pages.

Differences:

- Every token stays on the device, so what is measured is the selection.
- First and recent pages are a share of the budget, as the authors' 128 tokens each of 2,048 are, rounded to the nearest
  page. Unless `recent` is 0, there is always a recent page, because the previous query cannot select the newest tokens.
  Small budgets have no first page.
- As in `quest`, the budget counts tokens, and the last page may be cut.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from sparsecache.cache.base import CacheConfig
from sparsecache.cache.checks import check_budget_shares
from sparsecache.kernels.page_shares import choose_queries, page_shares
from sparsecache.kernels.pages import score_bounds
from sparsecache.methods.quest import Quest, QuestCache


@dataclass
class FreeKV(Quest):
    """Selects pages by the previous step's query, unless the query has changed much."""

    prompt_queries = 1
    forces_newest: ClassVar[bool] = False  # `recent` sets how many of the last pages are selected

    page: Annotated[int, "tokens in a page, 1 to 1024"] = 32
    similarity: Annotated[float, "the previous query selects if its cosine similarity is at least this, -1 to 1"] = 0.8
    sinks: Annotated[float, "share of the budget for the first pages, 0 to 1, rounded to pages"] = 1 / 16
    recent: Annotated[float, "share of the budget for the last pages, 0 to 1, rounded to pages; 1 page at least"] = (
        1 / 16
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budget_shares(sinks=self.sinks, recent=self.recent)
        if not -1 <= self.similarity <= 1:
            raise ValueError(f"similarity={self.similarity} must be -1 to 1.")

    def make_sparse_cache(self, layer: int, config: CacheConfig) -> "FreeKVCache":
        return FreeKVCache(self, layer, config)

    def kept_pages(self, budgets: Tensor) -> tuple[Tensor, Tensor]:
        """Return how many first and last pages are always selected, by past tokens: int64, of the shape of budgets.

        budgets: [T + 1] int64, the most tokens to select of n past tokens, by n.
        """
        past, page = torch.arange(len(budgets), device=budgets.device), self.page
        budget = torch.minimum(budgets, past)
        sinks, recent = ((share * budget.double() / page + 0.5).long() for share in (self.sinks, self.recent))
        newest = (past - 1) % page + 1  # tokens of the last page
        if self.recent:
            # A last page that is at most half full comes on top, as in the authors' code: the share holds in the mean.
            recent = recent.clamp(min=1) + (newest <= page // 2)
            recent = torch.minimum(recent, 1 + (budget - newest).clamp(min=0) // page)
        rest = budget - torch.where(recent > 0, newest + (recent - 1) * page, 0)
        return torch.minimum(sinks, rest.clamp(min=0) // page), recent

    def page_scores(self, q: Tensor, cache: QuestCache, slots: Tensor, width: int) -> Tensor:
        assert isinstance(cache, FreeKVCache)
        probe = choose_queries(q, cache.last_queries, slots, cache.config.shape.kv_heads, self.similarity)
        bounds = score_bounds(probe, cache.lowest, cache.highest, slots, -(-width // self.page))
        return page_shares(bounds, cache.seq_lens, slots, cache.sinks, cache.recent, self.page)


class FreeKVCache(QuestCache):
    """As QuestCache, and last_queries [slots, H, D], the query of each slot's latest token.

    sinks, recent: [max_tokens + 1] int64, how many of the first and the last pages are always selected, by past tokens.
    """

    method: FreeKV

    def __init__(self, method: FreeKV, layer: int, config: CacheConfig) -> None:
        super().__init__(method, layer, config)
        size = (config.slots, config.shape.heads, config.shape.head_dim)
        self.last_queries = torch.zeros(size, dtype=config.dtype, device=config.device)
        self.sinks, self.recent = method.kept_pages(self.budgets)

    def prefill(self, slot: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        super().prefill(slot, q, k, v)
        self.last_queries[slot] = q[:, -1]
