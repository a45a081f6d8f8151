"""Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference (ICML'24, arXiv 2406.10774).

Keys form pages of `page` tokens. The lowest and highest value of every channel of a page bound q . k for any key
of the page: sum over channels of max(q * lowest, q * highest). Pages are taken in falling order of this bound until
the budget is used. Every token is kept: Quest saves attention, not memory.

GQA: the paper has one KV head per query head. Here a page's bound for a KV head is the highest of its query heads'.

Differences: the budget counts tokens, so the last page that fits in part gives its latest tokens only. The paper
takes whole pages, and its kernels always take the last page. The current token is attended to on top of the budget.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsecache.cache.base import CacheConfig
from sparsecache.cache.selection import SelectionCache, SelectionMethod
from sparsecache.kernels.pages import page_bounds
from sparsecache.kernels.threshold import Selection


@dataclass
class Quest(SelectionMethod):
    """Selects the pages whose bounds are highest."""

    page: Annotated[int, "tokens in a page, 1 or more"] = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.page < 1:
            raise ValueError(f"page={self.page} must be 1 token or more.")

    def make_sparse_cache(self, layer: int, config: CacheConfig) -> "QuestCache":
        return QuestCache(self, layer, config)

    def select(self, q: Tensor, cache: SelectionCache, slots: Tensor) -> Selection:
        assert isinstance(cache, QuestCache)
        past = cache.seq_lens[slots]
        scores = self.page_scores(q, cache, slots, cache.width(slots))
        return select_pages(
            scores, past, cache.budgets[past], self.page, min(cache.max_budget, cache.config.max_tokens)
        )

    def page_scores(self, q: Tensor, cache: "QuestCache", slots: Tensor, width: int) -> Tensor:
        """Return the scores by which a KV head takes the pages of `width` tokens: [B, G, pages] float32."""
        return cache.page_bounds(q, slots, width).amax(2)

    def bounds(self, keys: Tensor, is_held: Tensor) -> tuple[Tensor, Tensor]:
        """Return the lowest and the highest value of each channel in pages: [.., D] each.

        keys: [.., page, D]; is_held: [.., page] bool, the tokens that a page has so far, one at least.
        """
        is_free = ~is_held[..., None]
        return keys.masked_fill(is_free, torch.inf).amin(-2), keys.masked_fill(is_free, -torch.inf).amax(-2)

    def selection_nbytes(self, config: CacheConfig, seq_len: float) -> float:
        return seq_len / self.page * config.token_nbytes  # two bounds a page are as much as a key and a value


class QuestCache(SelectionCache):
    """All keys and values, and per page the bounds: lowest, highest [slots, G, pages, D]."""

    method: Quest

    def __init__(self, method: Quest, layer: int, config: CacheConfig) -> None:
        super().__init__(method, layer, config)
        pages = -(-config.max_tokens // method.page)
        self.lowest, self.highest = (config.zeros(pages, config.shape.head_dim) for _ in range(2))
        self._offset = torch.arange(method.page, device=config.device)

    def prefill(self, slot: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        super().prefill(slot, q, k, v)
        kv_heads, length, head_dim = k.shape
        page = self.method.page
        pages = -(-length // page)
        keys = pad(k, (0, 0, 0, pages * page - length)).view(kv_heads, pages, page, head_dim)
        position = torch.arange(pages * page, device=k.device).view(pages, page)
        self.lowest[slot, :, :pages], self.highest[slot, :, :pages] = self.method.bounds(keys, position < length)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> Tensor:
        out = super().attend(q, k, v, slots)
        with self.config.deferred.reading(slots):
            self._update_newest_page(slots)
        return out

    def _update_newest_page(self, slots: Tensor) -> None:
        last = self.config.max_tokens - 1
        past = self.seq_lens[slots].clamp(max=last)
        page = past // self.method.page
        position = page[:, None] * self.method.page + self._offset
        rows = position.clamp(max=last)[:, None].expand(-1, self.config.shape.kv_heads, -1)
        keys = self.full.keys_of(slots, rows)  # [B, G, page, D]
        bounds = self.method.bounds(keys, (position <= past[:, None])[:, None])
        for stored, found in zip((self.lowest, self.highest), bounds, strict=True):
            stored[slots, :, page] = found.to(stored.dtype)

    def page_bounds(self, q: Tensor, slots: Tensor, width: int) -> Tensor:
        """Return the highest score that each page can give to each query head: [B, G, H / G, pages] float32."""
        return page_bounds(q, self.lowest, self.highest, slots, -(-width // self.method.page))


def select_pages(scores: Tensor, past: Tensor, budget: Tensor, page: int, width: int) -> Selection:
    """Return the past positions of the pages of highest score, as many as the budget allows.

    scores: [B, G, pages]; past, budget: [B] int64, tokens; width: the highest budget. A page that fits in part gives
    its latest tokens. Ties go to the earlier page.
    """
    pages = scores.shape[2]
    first = page * torch.arange(pages, device=scores.device)
    held = (past[:, None] - first).clamp(0, page)  # [B, pages], tokens per page
    order = scores.masked_fill((held == 0)[:, None], -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    order = order[..., : min(pages, -(-width // page) + 1)]  # one page may hold a token only
    in_order = held[:, None].expand(*scores.shape[:2], -1).gather(2, order)
    before = in_order.cumsum(2) - in_order
    taken = torch.minimum((budget[:, None, None] - before).clamp(min=0), in_order)
    return _positions_of_runs(order * page + in_order - taken, taken, width)


def _positions_of_runs(start: Tensor, count: Tensor, width: int) -> Selection:
    """Return the positions of runs that begin at start [B, G, N] and have count [B, G, N] tokens, at most `width`."""
    ends = count.cumsum(2)
    place = torch.arange(width, device=start.device).expand(*start.shape[:2], -1).contiguous()
    run = torch.searchsorted(ends, place, right=True).clamp(max=start.shape[2] - 1)
    positions = (start - ends + count).gather(2, run) + place
    return Selection(positions, ends[..., -1])
