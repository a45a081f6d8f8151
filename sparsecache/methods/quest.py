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
from sparsecache.kernels.rows import index_slots
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
        past, width = cache.seq_lens[slots], cache.width(slots)
        scores = self.page_scores(q, cache, slots, width)
        order = scores.sort(dim=-1, descending=True, stable=True).indices  # [B, G, pages]
        first = self.page * torch.arange(order.shape[2], device=q.device)
        held = (past[:, None] - first).clamp(0, self.page)[:, None].expand_as(order)  # tokens per page
        in_order = held.gather(2, order)
        before = in_order.cumsum(2) - in_order
        left = (cache.budgets[past][:, None, None] - before).clamp(min=0)
        taken = torch.zeros_like(held).scatter(2, order, left)
        offset = torch.arange(self.page, device=q.device)
        is_taken = (offset < held[..., None]) & (offset >= (held - taken)[..., None])  # [B, G, pages, page]
        return cache.select_topk(is_taken.flatten(2)[..., :width].float(), slots)

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
        last = self.config.max_tokens - 1
        past = self.seq_lens[slots].clamp(max=last)
        page = past // self.method.page
        position = page[:, None] * self.method.page + self._offset  # of the newest page
        keys = self.full.keys[slots[:, None], :, position.clamp(max=last)].transpose(1, 2)  # [B, G, page, D]
        is_held = (position <= past[:, None])[:, None]
        self.lowest[slots, :, page], self.highest[slots, :, page] = self.method.bounds(keys, is_held)
        return out

    def page_bounds(self, q: Tensor, slots: Tensor, width: int) -> Tensor:
        """Return the highest score that each page can give to each query head: [B, G, H / G, pages] float32."""
        pages = -(-width // self.method.page)
        lowest, highest = (index_slots(x, slots)[:, :, :pages].float().mT for x in (self.lowest, self.highest))
        grouped = q.float().view(len(slots), lowest.shape[1], -1, q.shape[3])  # [B, G, H / G, D]
        return grouped.clamp(min=0) @ highest + grouped.clamp(max=0) @ lowest
