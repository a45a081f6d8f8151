"""Base classes of methods that keep every token and select at each step which ones to attend to.

They save attention, not memory. On a GPU a step has fixed sizes, so that it can be a CUDA graph.
"""

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsecache.cache.base import CacheConfig, LayerCache, MethodKind, StepBytes
from sparsecache.cache.sparse import StoredMethod
from sparsecache.cache.storage import FullStorage, stored_token_nbytes
from sparsecache.cache.topk import select_topk
from sparsecache.kernels.page_selection import PageSelection
from sparsecache.kernels.scores import scaled_scores
from sparsecache.kernels.selection import score_margin
from sparsecache.kernels.speculation import speculated_scores
from sparsecache.kernels.threshold import Scores, Selection, SelectionParams, threshold_select


class SelectionCache(LayerCache):
    """All keys and values of a layer, and the selection of a step.

    full: the FullCache. budgets: [max_tokens + 1] int64, the most tokens to select, by past tokens.
    """

    def __init__(self, method: "SelectionMethod", layer: int, config: CacheConfig) -> None:
        self.method, self.config = method, config
        self.full = method.make_full_cache(config)
        self.seq_lens, self.stats = config.seq_lens, config.stats
        self.budgets = method.budget_table(layer, config)
        self.max_budget = int(self.budgets[-1])  # budgets are non-decreasing
        self._params = SelectionParams(math.inf, self.budgets, mean=False)

    def prefill(self, slot: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.full.prefill(slot, q, k, v)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> Tensor:
        selection = self.method.select(q, self, slots)
        if not isinstance(selection, PageSelection):
            selection = Selection(*selection)  # a user's method may return any tuple
        out = self.full.attend_selected(q, k, v, slots, selection)
        with self.config.deferred.reading(selection.counts, slots):
            self.stats.record(selection.counts, slots)
        return out

    def keys_of(self, slots: Tensor) -> Tensor:
        """Return the keys of slots [B] as stored: [B, G, T, D], T as `width`, undefined beyond `seq_lens`."""
        return self.full.keys_of(slots, self.width(slots))

    def width(self, slots: Tensor) -> int:
        """Return how many positions a step scores, 1 or more.

        Those of the longest sequence on a CPU; all on a GPU.
        """
        if slots.is_cuda:  # reading a length would synchronise with the device
            return self.config.max_tokens
        return max(1, min(int(self.seq_lens[slots].max()), self.config.max_tokens))

    def select_topk(self, scores: Tensor, slots: Tensor) -> Selection:
        """Return the past positions of highest score within the budget; scores: [B, G, T] float32, T as `width`."""
        return select_topk(scores, self.seq_lens, slots, self.budgets, self.max_budget)

    def select_near_best(self, scores: Scores, slots: Tensor) -> Selection:
        """Return the past positions of largest score margin within the budget.

        A query head's margin is its score minus its best one. A KV head takes the largest margin of its query heads.
        """
        width = min(self.max_budget, self.config.max_tokens)
        return threshold_select(scores, self.seq_lens, slots, self._params, width)

    def select_by_keys(self, q: Tensor, slots: Tensor) -> Selection:
        """Return the selection of `select_near_best` by the true scores of q [B, H, 1, D] and the keys as stored."""
        kv = self.full.kv
        if isinstance(kv, FullStorage):
            return self.select_near_best(speculated_scores(q, None, kv.keys, self.seq_lens, slots), slots)
        keys = self.keys_of(slots)
        dequantised = scaled_scores(q, keys, keys.shape[3])[:, :, 0]  # [B, H, T]
        is_past = positions_below(self.seq_lens[slots], dequantised.shape[2])
        return self.select_topk(score_margin(dequantised.masked_fill(~is_past, -math.inf), keys.shape[1]), slots)

    def step_nbytes(self, seq_len: float, attended: float, cache_hit: float = 0.0) -> StepBytes:
        return StepBytes(attended * self.full.kv.token_nbytes + self.method.selection_nbytes(self.config, seq_len))


@dataclass
class SelectionMethod(StoredMethod):
    """Keeps every token and selects tokens at each step: a subclass defines `select`.

    A method with state per layer, such as page bounds, also defines a subclass of SelectionCache.

    shares_selection: whether some layers attend to what another layer selected.
    """

    shares_selection: ClassVar[bool] = False
    kind: ClassVar[MethodKind] = "selection"

    def make_sparse_cache(self, layer: int, config: CacheConfig) -> SelectionCache:
        return SelectionCache(self, layer, config)

    @abstractmethod
    def select(self, q: Tensor, cache: SelectionCache, slots: Tensor) -> Selection | PageSelection:
        """Return the past positions that each KV head attends to, within `cache.budgets`.

        q: [B, H, 1, D], rotated; slots: [B]. `cache.select_topk` turns scores into a selection. Pages may be returned
        where `cache.full.kv.attends_to_pages`. On a GPU sizes must be fixed and the host must not wait: no `.item()`,
        no `int(tensor)`, no boolean index.
        """

    def selection_nbytes(self, config: CacheConfig, seq_len: float) -> float:
        """Return the bytes that a step reads per sequence to select: by default all keys of the layer."""
        return seq_len * stored_token_nbytes(self.storage, config) / 2


def group_max(scores: Tensor, kv_heads: int) -> Tensor:
    """Return the highest of each KV head's scores: [B, H, T] to [B, G, T]."""
    return scores.view(len(scores), kv_heads, -1, scores.shape[2]).amax(2)


def positions_below(lengths: Tensor, width: int) -> Tensor:
    """Return which of `width` positions are below lengths [B]: bool [B, 1, width]."""
    return (torch.arange(width, device=lengths.device) < lengths[:, None])[:, None]
