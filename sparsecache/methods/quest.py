"""Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference (ICML'24, arXiv 2406.10774).

Keys form pages of `page` tokens. The lowest and highest value of every channel of a page bound q . k for any key
of the page: sum over channels of max(q * lowest, q * highest). The newest page is always taken, as by the authors'
kernels, then pages in descending order of this bound until the budget is used. Every token is kept: Quest saves
attention, not memory.

GQA: the paper has one KV head per query head. Here a page's bound for a KV head is the highest of its query heads'.

Differences: the budget counts tokens. Of the selected page with the lowest bound, only the newest tokens that fit are
attended to. The paper takes whole pages. The current token is attended to on top of the budget. The default page has
the paper's size.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from sparsecache.cache.base import CacheConfig
from sparsecache.cache.checks import check_page_size
from sparsecache.cache.selection import SelectionCache, SelectionMethod
from sparsecache.kernels.page_bounds import channel_bounds, store_page_bounds
from sparsecache.kernels.page_selection import PageSelection, list_pages, select_pages
from sparsecache.kernels.pages import newest_page, score_bounds, update_newest_page
from sparsecache.kernels.threshold import Selection


@dataclass
class Quest(SelectionMethod):
    """Selects the pages whose bounds are highest.

    mean_bounds: whether bounds are the middle of the keys' extremes, minus and plus their mean distance from it, as in
    ArkVale.
    forces_newest: whether the newest page is always selected.
    """

    prompt_queries = 0
    mean_bounds: ClassVar[bool] = False
    forces_newest: ClassVar[bool] = True

    page: Annotated[int, "tokens in a page, 1 to 1024"] = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_page_size(self.page)

    def make_sparse_cache(self, layer: int, config: CacheConfig) -> "QuestCache":
        return QuestCache(self, layer, config)

    def select(self, q: Tensor, cache: SelectionCache, slots: Tensor) -> Selection | PageSelection:
        assert isinstance(cache, QuestCache)
        scores = self.page_scores(q, cache, slots, cache.width(slots))
        width = min(cache.max_budget, cache.config.max_tokens)
        select = list_pages if cache.full.kv.attends_to_pages(self.page) else select_pages
        return select(
            scores, cache.seq_lens, slots, self.page, width, budgets=cache.budgets, force_newest=self.forces_newest
        )

    def page_scores(self, q: Tensor, cache: "QuestCache", slots: Tensor, width: int) -> Tensor:
        """Return the scores by which a KV head takes the pages of `width` tokens: [B, G, pages] float32."""
        return score_bounds(q, cache.lowest, cache.highest, slots, -(-width // self.page), join_heads=True)

    def selection_nbytes(self, config: CacheConfig, seq_len: float) -> float:
        return seq_len / self.page * config.token_nbytes  # two bounds per page are as much as a key and a value


class QuestCache(SelectionCache):
    """All keys and values, and per page the bounds: lowest, highest [slots, G, pages, D]."""

    method: Quest

    def __init__(self, method: Quest, layer: int, config: CacheConfig) -> None:
        super().__init__(method, layer, config)
        pages = -(-config.max_tokens // method.page)
        self.lowest, self.highest = (config.zeros(pages, config.shape.head_dim) for _ in range(2))

    def prefill(self, slot: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        super().prefill(slot, q, k, v)
        store_page_bounds(k, self.lowest[slot], self.highest[slot], self.method.page, self.method.mean_bounds)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> Tensor:
        out = super().attend(q, k, v, slots)
        with self.config.deferred.reading(slots):
            self._update_newest_page(slots)
        return out

    def _update_newest_page(self, slots: Tensor) -> None:
        page, mean, capacity = self.method.page, self.method.mean_bounds, self.config.max_tokens
        recent = self.full.kv.recent_keys(page)
        if recent is not None:
            update_newest_page(recent, self.lowest, self.highest, self.seq_lens, slots, page, mean, capacity)
            return
        newest, positions, is_used = newest_page(self.seq_lens[slots], page, capacity)
        keys = self.full.keys_of(slots, positions.expand(-1, self.config.shape.kv_heads, -1))  # [B, G, page, D]
        for stored, found in zip((self.lowest, self.highest), channel_bounds(keys, is_used, mean), strict=True):
            stored[slots, :, newest] = found.to(stored.dtype)
